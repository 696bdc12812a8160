"""Each kind of source, compared with the library that defines it (json, csv, pyarrow, gzip), and
every way in which a source can be broken.
"""

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiducial.data import json_files, record, sources
from fiducial.data.row_types import (
    ChatRow,
    CompletionRow,
    LabeledRow,
    Message,
    PreferenceRow,
    PromptRow,
    SampledIds,
    StepsRow,
    TextRow,
)
from fiducial.data.rows import read_rows
from fiducial.errors import InputError

SFT = (TextRow, ChatRow, CompletionRow)
ALL = (*SFT, PreferenceRow, LabeledRow, StepsRow, PromptRow)


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def refused(source, accept=SFT, **options):
    with pytest.raises(InputError) as caught:
        read_rows(source, accept, **options)
    assert str(caught.value).startswith(f"{source}:")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(source)


# JSON arrays
# --------------------------------------------------------------------------------------------

texts = st.text(st.sampled_from('a"\\[]{},: \né'), max_size=8)
values = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


class Drip(io.BytesIO):
    """A file that returns a few bytes per read, so that every construct is cut somewhere."""

    def read(self, size=-1):
        return super().read(self.step)


@given(
    st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=4),
    st.sampled_from([3, 4, 7, 64]),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
@settings(deadline=None)
def test_an_array_is_cut_where_json_cuts_it(array, step, indent, ascii_only):
    file = Drip(
        b"\xef\xbb\xbf"
        + json.dumps(array, indent=indent, ensure_ascii=ascii_only).encode()
        + b" \n"
    )
    file.step = step
    assert [
        json.loads(item) for item in json_files._array_items(file, Path("f.json"), "f.json")
    ] == array


def test_an_array_across_real_chunks(tmp_path):
    array = [{"text": "x" * n + '"\\', "n": n} for n in (1, 65_530, 65_536, 200_000)]
    rows = read_rows(write(tmp_path / "f.json", json.dumps(array).encode()), SFT)
    assert [row.text for row in rows] == [record["text"] for record in array]


def test_rows_of_an_array_are_numbered_from_one(tmp_path):
    source = write(tmp_path / "f.json", b'[{"text": "a"},\n{"text": 5},\n{"text": "c"}]')
    assert refused(source) == ":row 2: key 'text' is a number where text belongs; write a string"
    rows = read_rows(source, SFT, on_error="skip")
    assert list(rows) == [TextRow("a", f"{source}:row 1"), TextRow("c", f"{source}:row 3")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b", "text": "c"}]', ":row 2: key 'text' occurs twice"),
        (b'[{"text": "a", "x": NaN}]', ":row 1: key 'x': NaN is not a finite number"),
        (b'[{"text": "\xff"}]', r":row 1: byte offset 10 \(0xff\) is not UTF-8"),
        (b'[{"text": "a"}, 5]', ":row 2: the row is a number where an object belongs"),
        (
            b'[{"text": "a"}, {"text"',
            ":row 2: the file is torn: it ends before its JSON array does",
        ),
        (b'[{"text": "a"}', ":row 1: the file is torn"),
        (b'[{"text": "a"},', ":row 2: the file is torn"),
        (b"[", ":row 1: the file is torn"),
        (b'[{"text": "a"},]', ":row 2: "),
        (b'[{"text": "a"},,{"text": "b"}]', ":row 2: "),
        (b'[{"text": "a"} {"text": "b"}]', ":row 1: not JSON at column"),
        (b'[{"text": "a"}}', r":row 1: not JSON \(a closing bracket"),
        (b'[{"text": ["a"}]]', ":row 1: not JSON at column 14"),
        (b'[{"text": "a"]}', r":row 1: not JSON \(a closing bracket"),
        (b'[{"text": "a"}] x', ": the JSON array is followed by more text"),
        (b'[{"text": "a"}][{"text": "b"}]', ": the JSON array is followed"),
        (b"[]", ":1: the file is empty"),
        (b" \n\t ", ":1: the file is empty"),
        (b"", ":1: the file is empty"),
        (
            b'{"text": "a"}\n{"text": "b"}\n',
            ":1: the file is not one JSON array of objects, .* rename it to f.jsonl$",
        ),
        (b'"a"', r":1: the file is not one JSON array of objects, between \[ and \]$"),
    ],
)
def test_a_broken_array(tmp_path, content, message):
    assert re.match(message, refused(write(tmp_path / "f.json", content)))


def test_a_broken_array_is_not_read_on_when_rows_are_skipped(tmp_path):
    """After a syntax error, the beginning of a row is a guess: here a text would become a row."""
    source = write(
        tmp_path / "f.json", b'[{"text": "a"}, {"text": "b}, {"text": "c"}, {"text": "d"}]'
    )
    assert ":row" in refused(source, on_error="skip")
    source = write(tmp_path / "f.json", b'[{"text": "a"}, {text: "b"}, {"text": "c"}]')
    assert refused(source, on_error="skip").startswith(":row 2: not JSON at column 3")


# Long rows
# --------------------------------------------------------------------------------------------


def test_the_limit_of_a_row():
    assert record.MAX_ROW_BYTES == 16_000_000


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.json", "f.csv"])
def test_a_row_at_the_limit_passes_and_a_longer_one_does_not(tmp_path, monkeypatch, name):
    monkeypatch.setattr(record, "MAX_ROW_BYTES", 1000)

    def content(extra):
        text = b"x" * (1000 - len(b'{"text": ""}\n') + extra)
        row = b'{"text": "' + text + b'"}'
        if name == "f.csv":
            return b"text\n" + text + b"x" * 11 + b"\n"
        return (b"[" + row + b"]") if name == "f.json" else row + b"\n"

    slack = 1 if name == "f.json" else 0  # no newline
    assert len(read_rows(write(tmp_path / name, content(slack)), SFT)) == 1
    assert "the row is longer than 0.001 MB; split it" in refused(
        write(tmp_path / name, content(slack + 2))
    )


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.json"])
def test_an_overlong_row_is_never_held_and_can_be_skipped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(record, "MAX_ROW_BYTES", 10_000)
    rows = [b'{"text": "a"}', b'{"text": "' + b"x" * 20_000_000 + b'"}', b'{"text": "c"}']
    source = write(
        tmp_path / name, b"[" + b",".join(rows) + b"]" if name == "f.json" else b"\n".join(rows)
    )
    del rows
    tracemalloc.start()
    read = read_rows(source, SFT, on_error="skip", skipped=tmp_path / "skipped.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    place = ":row " if name == "f.json" else ":"
    assert [row.where for row in read] == [f"{source}{place}1", f"{source}{place}3"]
    entry = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert entry["where"] == f"{source}{place}2"
    assert entry["line"] == '{"text": "' + "x" * 1990


# CSV
# --------------------------------------------------------------------------------------------

cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).map(
    lambda text: "c" + text
)


@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
@settings(deadline=None)
def test_what_the_csv_module_writes_is_read_equal(tmp_path_factory, table, ending, bom):
    path = tmp_path_factory.getbasetemp() / "round.csv"
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        csv.writer(file, lineterminator=ending).writerows([("prompt", "completion"), *table])
    expected = [
        CompletionRow(*pair, f"{path}:row {number}") for number, pair in enumerate(table, 1)
    ]
    assert list(read_rows(str(path), SFT)) == expected


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (
            'messages\n"[{""role"": ""user"", ""content"": ""hi""}, '
            '{""role"": ""assistant"", ""content"": ""yes""}]"\n',
            ChatRow((Message("user", "hi"), Message("assistant", "yes")), "W"),
        ),
        (
            "prompt,chosen,rejected,margin\n"
            'p,"[{""role"": ""assistant"", ""content"": ""a""}]",b,1.5\n',
            PreferenceRow(
                (Message("user", "p"),),
                (Message("assistant", "a"),),
                (Message("assistant", "b"),),
                1.5,
                "W",
            ),
        ),
        ("prompt,chosen,rejected,margin\np,a,b,\n", PreferenceRow("p", "a", "b", None, "W")),
        ("text,prompt,completion\n,p,c\n", CompletionRow("p", "c", "W")),
        ("prompt,completion,label\np,c,\n", CompletionRow("p", "c", "W")),
        ("prompt,text\np,\n", PromptRow("p", {"text": ""}, "W")),
        ("prompt,completion,label\np,5,0.0\n", LabeledRow("p", "5", False, "W")),
        (
            'prompt,completion,completion_ids,tokenizer\np,c,"[5, 2]",t\n',
            CompletionRow("p", "c", "W", SampledIds((5, 2), "t")),
        ),
        ("prompt,completion,label\np,5,True\n", LabeledRow("p", "5", True, "W")),
        ("prompt,completion,label\np,[1],0\n", LabeledRow("p", "[1]", False, "W")),
        (
            'prompt,completions,labels\np,"[""a"", ""b""]","[true, 0]"\n',
            StepsRow("p", ("a", "b"), (True, False), "W"),
        ),
        ("prompt,labels,n\np,x,7\n", PromptRow("p", {"labels": "x", "n": "7"}, "W")),
        ('\n\nprompt,n\n\n"a\n\nb",7\n', PromptRow("a\n\nb", {"n": "7"}, "W")),
    ],
)
def test_cells(tmp_path, content, row):
    source = write(tmp_path / "f.csv", content.encode())
    (read,) = read_rows(source, ALL)
    assert read == type(row)(
        *[
            f"{source}:row 1" if (value := getattr(row, name)) == "W" else value
            for name in row.__slots__
        ]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,completion\np,c\np\n", ":row 2: 1 cells under 2 columns; quote"),
        (b"prompt,completion\np,c\np,c,d\n", ":row 2: 3 cells under 2 columns"),
        (b'prompt,completion\np,c\np,"c\n', r":row 2: broken CSV \(unexpected end of data\)"),
        (b'prompt,completion\np,"c"d\n', ":row 1: broken CSV"),
        (b"prompt,completion,prompt\np,c,d\n", ":1: key 'prompt' names two columns"),
        (b"prompt,completion\np,c\np,\n", ":row 2: key 'completion' is empty"),
        (
            b"prompt,completion\np,caf\xe9\n",
            r":row 1: key 'completion': byte offset 3 of the cell \(0xe9\) is not UTF-8",
        ),
        (b"prompt,completion\np,a\0b\n", ":row 1: key 'completion' holds a raw NUL at character 1"),
        (b"prompt,completion\n", ":1: the file is empty"),
        (b"\n\n", ":1: the file is empty"),
        (b"question,completion\nq,c\n", ":row 1: key 'prompt' is missing"),
        (b"messages\n[{'role': 'user'}]\n", ":row 1: key 'messages': not JSON at column"),
        (b"messages\nhello\n", ":row 1: key 'messages' is text where a list of messages belongs"),
        (
            b'messages\n"[{""role"": ""user"", ""role"": ""user""}]"\n',
            ":row 1: key 'messages': key 'role' occurs twice",
        ),
        (b"prompt,completion,label\np,c,yes\n", r":row 1: key 'label' is text \('yes'\)"),
        (b"prompt,completion,label\np,c,nan\n", ":row 1: key 'label' is text"),
        (b"prompt,completion,label\n,c,1\n", ":row 1: key 'prompt' is empty"),
        (
            b"prompt,chosen,rejected,margin\np,a,b,nan\n",
            ":row 1: key 'margin' is nan where a finite number",
        ),
        (
            b"prompt,chosen,rejected,margin\np,a,b,1_0\n",
            ":row 1: key 'margin' is text where a number",
        ),
    ],
)
def test_a_broken_table(tmp_path, content, message):
    assert re.match(
        message,
        refused(
            write(tmp_path / "f.csv", content), (CompletionRow, PreferenceRow, LabeledRow, ChatRow)
        ),
    )


def test_a_bad_cell_is_skipped_and_a_broken_quote_is_not(tmp_path):
    source = write(tmp_path / "f.csv", b'prompt,completion\np,caf\xe9\np,"a\nb"\nq\np,c\n')
    rows = read_rows(source, SFT, on_error="skip")
    assert [row.where for row in rows] == [f"{source}:row 2", f"{source}:row 4"]
    assert "broken CSV" in refused(
        write(tmp_path / "g.csv", b'prompt,completion\np,c\np,"c"d\np,c\n'), on_error="skip"
    )


def test_a_cell_longer_than_the_csv_module_allows_by_default(tmp_path):
    (row,) = read_rows(write(tmp_path / "f.csv", b"text\n" + b"x" * 500_000), SFT)
    assert len(row.text) == 500_000


# Parquet
# --------------------------------------------------------------------------------------------


def parquet(path, columns, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(
        columns if isinstance(columns, pa.Table) else pa.table(columns), buffer, **options
    )
    return write(path, buffer.getvalue())


@pytest.mark.parametrize("name", ["f.parquet", "f.parquet.gz"])
def test_parquet(tmp_path, name):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "tool_calls": None},
    ]
    source = parquet(tmp_path / name, {"messages": [turns] * 2500}, row_group_size=700)
    rows = read_rows(source, SFT)
    assert len(rows) == 2500
    assert rows.rows[-1] == ChatRow(
        (Message("user", "hi"), Message("assistant", "yes")), f"{source}:row 2500"
    )


def test_parquet_types_and_gaps(tmp_path):
    source = parquet(
        tmp_path / "f.parquet",
        {"prompt": ["p", "p", None], "completion": ["c", " ", "c"], "label": [True, False, True]},
    )
    assert (
        refused(source, (LabeledRow,))
        == ":row 2: key 'completion' is empty; fill it in or remove the row"
    )
    skipped = tmp_path / "skipped.jsonl"
    rows = read_rows(source, (LabeledRow,), on_error="skip", skipped=skipped)
    assert list(rows) == [LabeledRow("p", "c", True, f"{source}:row 1")]
    entries = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert entries[1]["error"].startswith(
        f"{source}:row 3: key 'prompt' is null where text belongs"
    )
    assert json.loads(entries[1]["line"]) == {"prompt": None, "completion": "c", "label": True}


@pytest.mark.parametrize(
    ("margin", "message"),
    [(float("nan"), "is nan where a finite number belongs"), (float("inf"), "is inf where")],
)
def test_parquet_margins(tmp_path, margin, message):
    source = parquet(
        tmp_path / "f.parquet",
        {"prompt": ["p"], "chosen": ["a"], "rejected": ["b"], "margin": [margin]},
    )
    assert f":row 1: key 'margin' {message}" in refused(source, (PreferenceRow,))


def test_parquet_text_that_is_not_utf8(tmp_path):
    import pyarrow as pa

    raw = pa.array([b"good", b"ab\xff", b"fine"]).view(pa.string())
    source = parquet(tmp_path / "f.parquet", pa.table({"text": raw}))
    assert refused(source).startswith(":row 2: byte offset 2 of a text is not UTF-8")
    assert [row.text for row in read_rows(source, SFT, on_error="skip")] == ["good", "fine"]


def test_a_parquet_row_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "MAX_ROW_BYTES", 1000)
    source = parquet(tmp_path / "f.parquet", {"text": ["a" * 600, "b" * 1100, "c" * 600]})
    assert refused(source).startswith(":row 2: the row is longer than")
    assert [row.text[0] for row in read_rows(source, SFT, on_error="skip")] == ["a", "c"]


def test_parquet_with_two_columns_of_one_name(tmp_path):
    import pyarrow as pa

    source = parquet(tmp_path / "f.parquet", pa.table([["a"], ["b"]], names=["text", "text"]))
    assert refused(source) == ": key 'text' names two columns; rename one of them"


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"hello world, no parquet", b"PAR1" + b"\xff" * 40 + b"PAR1"]
)
def test_a_broken_parquet_file(tmp_path, content):
    assert "cannot be read as Parquet" in refused(write(tmp_path / "f.parquet", content))


# Paths and archives
# --------------------------------------------------------------------------------------------

ONE = {
    ".jsonl": b'{"text": "a"}\n',
    ".json": b'[{"text": "a"}]',
    ".csv": b"text\na\n",
}


@pytest.mark.parametrize("ending", ONE)
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_every_ending_in_any_case(tmp_path, ending, zipped):
    source = write(tmp_path / f"my.data{ending}{zipped}", ONE[ending])
    assert [row.text for row in read_rows(source, SFT)] == ["a"]
    upper = tmp_path / f"UP{ending.upper()}{zipped}"
    upper.write_bytes(Path(source).read_bytes())
    assert len(read_rows(upper, SFT)) == 1


@pytest.mark.parametrize("ending", [*ONE, ".parquet"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_torn_archive(tmp_path, ending, on_error):
    content = gzip.compress(ONE.get(ending, b"") + os.urandom(5000).hex().encode())
    for torn in (content[: len(content) // 2], content[:-4], b"\x1f\x8b" + b"x" * 50, b"not gzip"):
        path = tmp_path / f"f{ending}.gz"
        path.write_bytes(torn)
        message = refused(str(path), on_error=on_error)
        if (
            torn != content[:-4] or ending != ".json"
        ):  # the text after the array is found before the tear
            assert ": the gzip file is torn or not gzip" in message


def test_a_flipped_bit_in_an_archive(tmp_path):
    content = bytearray(gzip.compress(b'{"text": "a"}\n' * 100, mtime=0))
    content[-6] ^= 1  # in the checksum
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(content)
    assert "the gzip file is torn" in refused(str(path))


def test_a_path_that_does_not_exist(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", ONE[".jsonl"])
    write(tmp_path / "other.csv", ONE[".csv"])
    assert (
        refused(str(tmp_path / "trian.jsonl"))
        == f": there is no such file; the nearest is {tmp_path / 'train.jsonl'}"
    )
    assert refused(str(tmp_path / "Train.json")).endswith(
        f"the nearest is {tmp_path / 'train.jsonl'}"
    )
    assert refused(str(tmp_path / "zzzzzzzz.parquet")) == ": there is no such file; check the path"
    assert (
        refused(str(tmp_path / "no" / "train.jsonl"))
        == f": there is no such file, nor a folder {tmp_path / 'no'}"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in (
        "train.jsonlx/",
        "../up/x",
        "trai.jsonl",
        "a/b/c",
        "data/train",
        "bad name",
        "C:\\rows.jsonl",
        "~/none.jsonl",
    ):
        message = refused(source)
        assert message.startswith(": there is no such file") and "Hub" not in message


def test_a_directory_and_an_unknown_ending(tmp_path):
    assert refused(str(tmp_path)) == ": is a directory; name one file in it"
    path = write(tmp_path / "train.jsonl", ONE[".jsonl"])
    assert refused(str(tmp_path)) == f": is a directory; name one file in it, such as {path}"
    assert refused(write(tmp_path / "f.txt", b"a")).startswith(
        ": is not .jsonl, .json, .csv, .parquet or one of these with .gz"
    )
    assert refused(write(tmp_path / "f.gz", b"a")).startswith(": is not .jsonl")


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    source = write(tmp_path / "f.jsonl", ONE[".jsonl"])

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert (
        refused(source)
        == ": cannot be read (Permission denied); check the file and its permissions"
    )


# The Hub
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [
        ("org/some-data", "org/some-data", "train"),
        ("data", "data", "train"),
        ("org/d:test", "org/d", "test"),
        ("d:train[:10%]", "d", "train[:10%]"),
    ],
)
def test_a_hub_name(monkeypatch, source, name, split):
    import datasets

    def load(path, *, split, trust_remote_code):
        assert (path, split) == expected and trust_remote_code is False
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    expected = (name, split)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows(source, SFT)) == [
        TextRow("a", f"{source}:row 1"),
        TextRow("b", f"{source}:row 2"),
    ]


def test_a_hub_that_does_not_answer(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(ONE[".jsonl"])
    code = """
from fiducial.data.row_types import TextRow
from fiducial.data.rows import read_rows
for source in "nobody/nothing:test", "train":
    try:
        read_rows(source, (TextRow,))
    except ValueError as error:
        print(error)
"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(sources.__file__).parents[2]),
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=3600,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert re.match(
        r"nobody/nothing:test: there is no such file, and the Hub dataset nobody/nothing \(split "
        r"test\) cannot be loaded \(\w+: .*\); check",
        first,
    )
    assert second.startswith("train: there is no such file") and second.endswith(
        "or give a file; the nearest is train.jsonl"
    )


def test_a_parquet_column_whose_name_is_not_text_is_an_input_error(tmp_path):
    source = parquet(tmp_path / "f.parquet", {"text": ["a"]})
    path = Path(source)
    path.write_bytes(path.read_bytes().replace(b"text", b"te\x80t"))
    assert refused(source).startswith(": cannot be read as Parquet (")


# Anything at all
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*ONE, ".parquet", ".jsonl.gz", ".parquet.gz"])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_bytes_are_rows_or_an_input_error(tmp_path_factory, ending, data):
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    kind = ending.removesuffix(".gz")
    if kind == ".parquet":
        parquet(path, {"text": ["a", "b"]})
    else:
        write(path, ONE[kind] * 2)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"\\", b"[", b"}", b",", b"\n", b"\0"])
        )
    path.write_bytes(content)
    for on_error in ("stop", "skip"):
        try:
            read_rows(str(path), ALL, on_error=on_error)
        except InputError as error:
            assert str(error).startswith(f"{path}:")
