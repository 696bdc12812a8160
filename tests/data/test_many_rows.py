"""Many rows: what is kept packed and made by several processes is what one row at a time gives, and
sources that are too large are refused in bounded memory.
"""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from fiducial.data import chunks, packed, record, workers
from fiducial.data.elements import RowFormat, read
from fiducial.data.language import LANGUAGE_ROWS, language_key, language_rows
from fiducial.data.packed import Chosen, Packed
from fiducial.data.pairs import preference_rows
from fiducial.data.prepare import Several, prompt_text, split, text_of
from fiducial.data.render import Renderer
from fiducial.data.row_types import LabeledRow, PreferenceRow, StepsRow
from fiducial.data.rows import parse_row
from fiducial.errors import InputError, RunError
from fiducial.methods.prm import solver
from fiducial.settings import RowSettings
from support import make_tokenizer

FORMATS = {
    "language": RowFormat(LANGUAGE_ROWS, language_rows, language_key, lambda r: [r.ids]),
    "pairs": RowFormat((PreferenceRow,), preference_rows, prompt_text, lambda p: [p[0].ids]),
    "steps": RowFormat(
        (StepsRow, LabeledRow),
        partial(solver, separator="\n"),
        prompt_text,
        lambda s: [s.rendered.ids],
    ),
}


def renderer(kind, **changes):
    return Renderer(make_tokenizer(kind), **({"max_length": 40} | changes))


def rows_of(name, count, chat):
    """Rows of every form, some of which spell special tokens or are cut."""
    draw = random.Random(count)

    def text():
        words = draw.choices(["the", "cat", "in", "on", "er", "<|im_end|>", "<s>", "a,b."], k=6)
        return draw.choice(["", " "]) + " ".join(words) * draw.choice([1, 1, 3])

    def said(*roles):
        return [{"role": role, "content": text()} for role in roles]

    forms = {
        "language": [
            lambda: {"text": text()},
            lambda: {"prompt": text(), "completion": text()},
            lambda: {"prompt": said("user"), "completion": said("assistant")},
            lambda: {"messages": said("system", "user", "assistant", "user", "assistant")},
        ],
        "pairs": [
            lambda: {"prompt": text(), "chosen": text() + "x", "rejected": text()},
            lambda: {"prompt": said("user"), "chosen": text() + "y", "rejected": text()},
        ],
        "steps": [
            lambda: (
                {"prompt": "the", "completions": ["a\n", "b"], "labels": [True, False]}
                | {"completions": ["a", "the cat"]}
            ),
            lambda: {"prompt": text(), "completion": text(), "label": True},
        ],
    }[name]
    wanted = [form for form in forms if chat or "role" not in json.dumps(form())]
    return [draw.choice(wanted)() for _ in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one_at_a_time(source, rows, form, made_by):
    """Items, keys and rows as they are by parsing and rendering each row alone."""
    render, found = form.render(made_by), []
    for number, raw in enumerate(rows, 1):
        row = parse_row(raw, f"{source}:{number}", form.accept)
        made = render(row)
        for item in made.items if isinstance(made, Several) else [made]:
            found.append((item, form.key(row), row))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize(("kind", "chat"), [("llama", False), ("gpt2", False), ("qwen3", True)])
@pytest.mark.parametrize("name", FORMATS)
def test_elements_are_those_of_each_row_alone(tmp_path, monkeypatch, name, kind, chat):
    monkeypatch.setattr(packed, "IN_MEMORY", 2000)  # most of it goes through the file
    monkeypatch.setattr(chunks, "ROWS", 7)
    rows = rows_of(name, 40, chat)
    source = write(tmp_path / "rows.jsonl", rows)
    form, settings = FORMATS[name], RowSettings(held_out=0.3)
    items, keys, kept = one_at_a_time(source, rows, form, renderer(kind, max_length=200))
    train, held, _ = read(source, settings, form, renderer(kind, max_length=200), 5)
    here, there = split(keys, 0.3, 5)
    assert there and len(train) == len(here)
    for part, numbers in ((train, here), (held, there)):
        assert list(part.items) == [items[i] for i in numbers]
        assert list(part.rows) == [kept[i] for i in numbers]
        assert part.items[-1] == items[numbers[-1]] and part.items[1:3] == [*part.items][1:3]


def test_cut_rows_and_notes_are_those_of_each_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 5)
    rows = rows_of("language", 60, chat=True)
    source = write(tmp_path / "rows.jsonl", rows)
    settings = RowSettings(on_error="skip", held_out=0.0)
    alone, form = renderer("qwen3"), FORMATS["language"]
    render, expected, used, bad = language_rows(alone), [], 0, []
    for number, raw in enumerate(rows, 1):
        row = parse_row(raw, f"{source}:{number}", form.accept)
        try:
            made = render(row)
        except InputError as error:
            bad.append({"where": row.where, "error": str(error), "line": json.dumps(raw)})
            continue
        used += 1
        expected += made.items if isinstance(made, Several) else [made]
    skipped = tmp_path / "skipped.jsonl"
    train, _, note = read(source, settings, form, renderer("qwen3"), 0, skipped)
    assert [*train.items] == expected and any(r.truncated for r in expected) and bad
    assert [json.loads(line) for line in skipped.read_text().splitlines()] == bad
    share = f"{len(bad)} of 60 rows ({len(bad) / 60:.1%}) skipped, see {skipped}"
    assert note == f"{share}; {alone.take_notes(used)}" and "spell a special token" in note


def test_any_number_of_processes_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 5)
    monkeypatch.setattr(workers, "FEW", 10)
    rows = rows_of("language", 90, chat=True)
    rows[70] = {"prompt": "a"}
    source = write(tmp_path / "rows.jsonl", rows)
    found = []
    for count in (1, 2):
        monkeypatch.setattr(workers, "processors", lambda count=count: count)
        settings, skipped = RowSettings(on_error="skip"), tmp_path / f"skipped-{count}.jsonl"
        made = renderer("qwen3", max_length=60)
        train, held, note = read(source, settings, FORMATS["language"], made, 1, skipped)
        elements = [[*train.items], [*train.rows], train.keys, [*held.items]]
        found.append((elements, note.replace("-1", "-2"), skipped.read_text()))
    assert found[0] == found[1] and "rows.jsonl:71" in found[0][-1]


def test_the_first_fault_of_the_file_is_named(tmp_path, monkeypatch):
    """A row that cannot be rendered before one that is no JSON, and both before a torn end."""
    monkeypatch.setattr(chunks, "ROWS", 3)
    monkeypatch.setattr(workers, "FEW", 4)
    good = '{"prompt": "a", "completion": "b"}'
    long = '{"prompt": "%s", "completion": "b"}' % ("a" * 50)
    path = tmp_path / "rows.jsonl.gz"
    for count, faults, said in (
        (2, (long, "{"), ":21: the prompt alone is 51 tokens"),
        (1, (long, "{"), ":21: the prompt alone is 51 tokens"),
        (1, (good, "{"), ":22: the text is torn"),
        (1, (good, good), ": the gzip file is torn"),
    ):
        lines = [good] * 20 + [*faults] + [good] * 20
        path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0)[:-6])
        monkeypatch.setattr(workers, "processors", lambda count=count: count)
        with pytest.raises(InputError) as caught:
            read(str(path), RowSettings(), FORMATS["language"], renderer("llama"), 0)
        assert str(caught.value).startswith(f"{path}{said}")


def test_what_cannot_be_sent_to_other_processes_is_done_here(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "FEW", 4)
    monkeypatch.setattr(chunks, "ROWS", 3)
    monkeypatch.setattr(workers, "processors", lambda: 2)
    monkeypatch.setattr(workers, "_Worker", None)
    form = RowFormat(LANGUAGE_ROWS, lambda r: language_rows(r), language_key, lambda r: [r.ids])
    source = write(tmp_path / "rows.jsonl", [{"text": "a"}] * 20)
    assert len(read(source, RowSettings(held_out=0), form, renderer("llama"), 0)[0]) == 20


def test_a_process_that_ends_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "FEW", 1)
    monkeypatch.setattr(chunks, "ROWS", 3)
    monkeypatch.setattr(workers, "processors", lambda: 2)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    source = write(tmp_path / "rows.jsonl", [{"text": "a"}] * 20)
    with pytest.raises(RunError, match=r"a process that renders rows ended \(exit code 1\)"):
        read(source, RowSettings(), FORMATS["language"], renderer("llama"), 0)


ENDLESS = """
import itertools, sys
from fiducial.data import chunks, workers
from fiducial.data.language import LANGUAGE_ROWS, language_key, language_rows
from fiducial.data.record import Record
from fiducial.data.render import Renderer
from transformers import PreTrainedTokenizerFast
work = chunks.Work(LANGUAGE_ROWS, language_rows, language_key,
                   Renderer(PreTrainedTokenizerFast.from_pretrained(sys.argv[1]), 40), 0, True)
workers.FEW = 1
for n, _ in enumerate(workers.rendered(work, itertools.repeat([Record("f:1", {"text": "a"})]), 2)):
    if n == 4:
        print("going", flush=True)
"""


def test_the_processes_die_with_the_one_that_started_them(tmp_path):
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    make_tokenizer("llama").save_pretrained(tmp_path)
    path = os.pathsep.join(p for p in sys.path if p)
    parent = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=-1,
        text=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == "going\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(alive(int(pid)) for pid in children):
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in children)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_sequence_on_disk_is_the_sequence(monkeypatch):
    monkeypatch.setattr(packed, "IN_MEMORY", 1000)
    things = [{"a": i, "b": "x" * (i % 29)} for i in range(31)]
    kept = Packed(things)
    assert kept._in_file and kept._tail  # both places are read below
    assert list(kept) == things and kept[-1] == things[-1] and kept[3:7] == things[3:7]
    some = Chosen(kept, [4, 29, 0])
    assert [*some] == [things[4], things[29], things[0]] and some[1:] == [things[29], things[0]]
    for wrong in (31, -32):
        with pytest.raises(IndexError):
            kept[wrong]


def test_a_full_disk_is_told(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "IN_MEMORY", 50)
    monkeypatch.setattr(packed.tempfile, "TemporaryFile", full)
    with pytest.raises(InputError, match=r"has no space for the tokens of the rows.*TMPDIR"):
        Packed(["x" * 100])


# Sizes
# --------------------------------------------------------------------------------------------


def refused(source, settings=None):
    """The message, and the peak of what Python held meanwhile."""
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        read(source, settings or RowSettings(), FORMATS["language"], renderer("llama"), 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return str(caught.value).removeprefix(source), peak


def test_a_row_of_100_mb_is_refused_before_it_is_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(100_000_000)  # a hole: nothing is written
    message, peak = refused(str(path))
    assert message.startswith(":2: the row is longer than 16 MB; split it")
    assert peak < 40_000_000


def test_a_gzip_file_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "BOMB_BYTES", 1_000_000)
    line, rows = tmp_path / "line.jsonl.gz", tmp_path / "rows.jsonl.gz"
    row = b'{"text": "a' + b" a" * 2000 + b'"}\n'
    line.write_bytes(gzip.compress(row + b"x" * 20_000_000))
    rows.write_bytes(gzip.compress(row * 4000))
    assert refused(str(line))[0].startswith(": the gzip file unpacks to more than 200 times its")
    message, peak = refused(str(rows))
    assert message.startswith(": the gzip file unpacks to more than 200 times its size")
    assert message.endswith("if it is meant so, unpack it and give the unpacked file")
    assert peak < 20_000_000
    skip = RowSettings(on_error="skip")
    assert "unpacks to more than 200 times" in refused(str(line), skip)[0]
    monkeypatch.setattr(record, "BOMB_BYTES", 64_000_000)
    assert refused(str(line))[0].startswith(":2: the row is longer than 16 MB")


def test_a_packed_file_of_usual_rows_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "BOMB_BYTES", 1000)
    path, draw = tmp_path / "rows.jsonl.gz", random.Random(0)
    rows = [{"text": " ".join(draw.choices(["the", "cat", "in", "on"], k=8))} for _ in range(2000)]
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    train, _, _ = read(
        str(path), RowSettings(held_out=0), FORMATS["language"], renderer("llama"), 0
    )
    assert len(train) == 2000


def test_a_csv_row_of_many_lines_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "MAX_ROW_BYTES", 10_000)
    path = tmp_path / "rows.csv"
    path.write_text('text\na\n"b' + "\n" * 30_000_000)
    message, peak = refused(str(path))
    assert message.startswith(":row 2: broken CSV (field larger") or "longer than" in message
    assert peak < 2_000_000
    path.write_text("text\na\n" + '"b\n",' * 1_000_000)
    message, peak = refused(str(path))
    assert "the row is longer than 0.01 MB" in message and peak < 2_000_000


def test_progress_is_told_up_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "ROWS", 5)
    shares: list[float] = []
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.csv"):
        path = tmp_path / name
        rows = ["text" if name == "rows.csv" else json.dumps({"text": text_of("b")})]
        text = "\n".join([rows[0], *(["b"] * 99 if name == "rows.csv" else rows * 99)])
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        shares.clear()
        read(
            str(path), RowSettings(), FORMATS["language"], renderer("llama"), 0, told=shares.append
        )
        assert len(shares) >= 20 and shares == sorted(shares) and shares[-1] == 1.0
