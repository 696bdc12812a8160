"""Files and Hub datasets, read strictly, one record at a time: nothing is coerced, and no more than
one row is held at once.

A row that cannot be read is handed on as the error that says so, and the caller stops or counts it.
Where a break also hides the beginning of the next row (a torn gzip, CSV quote or JSON array),
reading ends there whatever the caller prefers: what would follow are guesses.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import itertools
import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import InputError

MAX_ROW_BYTES = 100_000_000
"""A longer row is a broken file (a lost newline, a dump): it is refused without being loaded."""

EMPTY = "the file is empty; give a file with at least one row"
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
_OTHER_FILES = (
    ".gz",
    ".txt",
    ".tsv",
    ".zip",
    ".yaml",
    ".yml",
    ".arrow",
    ".ndjson",
    ".zst",
    ".xz",
    ".bz2",
)
_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<split>[\w.\[\]:%+-]+))?"
)

_BOM = b"\xef\xbb\xbf"
_LIST_KEYS = {"messages", "completions", "labels"}
_CONTENT_KEYS = {"prompt", "completion", "chosen", "rejected"}
_SCALARS = {"true": True, "True": True, "false": False, "False": False, "1": 1, "0": 0}


class Record(NamedTuple):
    """One row as it stands in its source."""

    where: str
    """``file:line``, or ``file:row N``."""
    value: object
    """What the row holds, or the InputError that says why it cannot be read."""
    raw: bytes | None = None
    """Its own bytes, where the source has them; of an overlong row only the beginning."""

    def beginning(self, characters: int = 2000) -> str:
        text = (
            json.dumps(self.value, default=str)
            if self.raw is None
            else self.raw[: 4 * characters].decode(errors="replace")
        )
        return text.rstrip("\r\n")[:characters]


class _Unparsable(InputError):
    """The text is not JSON at all, as against JSON that is refused."""


def records(source: str) -> Iterator[Record]:
    """The rows of a file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, each also ``.gz``) or of a
    Hub dataset (``org/name``, ``org/name:split``).

    Raises:
        InputError: there is no such file or dataset, its format is not one of those, or it is
            broken in a way that hides where the next row begins.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        inside = next((entry.name for entry in sorted(path.iterdir()) if _format(entry)), None)
        raise InputError(
            f"{source}: is a directory; name one file in it"
            + (f", such as {path / inside}" if inside else "")
        )
    if path.exists():
        readers: dict[str, Callable[[Path, str], Iterator[Record]]]
        readers = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv, ".parquet": _parquet}
        if not (kind := _format(path)):
            raise InputError(
                f"{source}: is not {', '.join(FORMATS)} or one of these with .gz; convert it, or "
                "rename it if it is one of them"
            )
        return readers[kind](path, source)
    hub = _HUB_NAME.fullmatch(source)
    if (
        hub is None
        or path.suffix.lower() in (*FORMATS, *_OTHER_FILES)
        or ("/" in source and path.parent.is_dir())
    ):
        raise InputError(f"{source}: there is no such file{_nearest(path) or '; check the path'}")
    return _hub(hub["name"], hub["split"] or "train", source)


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _nearest(path: Path) -> str:
    """The end of a sentence that names the existing file that may have been meant, or nothing."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    names = {entry.name.lower(): entry.name for entry in path.parent.iterdir() if entry.is_file()}
    close = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.5)
    return f"; the nearest is {path.parent / names[close[0]]}" if close else ""


@contextmanager
def _opened(path: Path, source: str) -> Iterator[BinaryIO]:
    try:
        with (
            cast(BinaryIO, gzip.open(path, "rb"))
            if path.suffix.lower() == ".gz"
            else path.open("rb") as file
        ):
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{source}: the gzip file is torn or not gzip ({error}); copy or compress it again"
        ) from error
    except OSError as error:
        raise InputError(
            f"{source}: cannot be read ({error.strerror or error}); check the file and its "
            "permissions"
        ) from error


# JSON
# -----------------------------------------------------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """Legal for Python's parser, and still not what a file of rows may hold."""


class _NotFinite(_Refused):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"key {shown(twice)} stands twice in one object; keep one of the two")
    return record


def _finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise _NotFinite(
            f"{shown(literal, quote=False)} is not a finite number; write one, or leave the key out"
        )
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)


def shown(text: str, *, quote: bool = True, limit: int = 40) -> str:
    """A stranger's text made fit for an error message: short, one line, printable."""
    short = ascii(text if len(text) <= limit else text[: limit - 3] + "...")
    return short if quote else short[1:-1]


def _strict_json(raw: bytes, where: str, *, bom: bool = False) -> object:
    """Raises: InputError, its subclass _Unparsable where there is no JSON to speak of."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte offset {error.start} (0x{raw[error.start]:02x}) is not UTF-8; save the "
            "file as UTF-8"
        ) from error
    if (nul := raw.find(b"\0")) >= 0:
        raise InputError(
            f"{where}: a raw NUL byte at byte offset {nul}; remove it, or save the file as UTF-8 "
            "if it is UTF-16"
        )
    return _strict_json_text(text.removeprefix("\ufeff") if bom else text, where)


def _strict_json_text(text: str, where: str) -> object:
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        torn = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        place = (
            "the text is torn: it ends before its JSON does"
            if torn
            else f"not JSON at column {error.colno} ({error.msg})"
        )
        raise _Unparsable(
            f"{where}: {place}; write the row again as one whole JSON object"
        ) from error
    except _Refused as error:
        raise InputError(
            f"{where}: {_key_not_finite(text) if isinstance(error, _NotFinite) else ''}{error}"
        ) from error
    except RecursionError as error:
        raise InputError(
            f"{where}: lists or objects are nested too deeply to read; flatten the row"
        ) from error
    except ValueError as error:  # more digits than int() takes
        raise InputError(
            f"{where}: an integer is too long to read; write it as text or shorten it"
        ) from error


def _key_not_finite(text: str) -> str:
    """Parses once more, leniently, for the key under which NaN or an infinity stands: the strict
    parser does not tell.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # what follows is broken too
        return ""
    for key, value in record.items() if isinstance(record, dict) else ():
        if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves(value)):
            return f"key {shown(key)}: "
    return ""


def leaves(value: object) -> Iterator[object]:
    """Everything inside that is neither a list nor an object, and the keys of objects; a stack,
    because a row can nest deeper than Python calls.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
        else:
            yield item


def _json_record(raw: bytes, where: str, *, bom: bool = False) -> Record:
    if len(raw) > MAX_ROW_BYTES:
        return Record(where, _too_long(where), raw[:8000])
    try:
        return Record(where, _strict_json(raw, where, bom=bom), raw)
    except InputError as error:
        return Record(where, error, raw)


def _too_long(where: str) -> InputError:
    return InputError(
        f"{where}: the row is longer than {MAX_ROW_BYTES / 1e6:g} MB; split it, or put the lost "
        "newlines back"
    )


def _json_lines(path: Path, source: str) -> Iterator[Record]:
    with _opened(path, source) as file:
        for number in itertools.count(1):
            raw = file.readline(MAX_ROW_BYTES + 1)
            if not raw:
                return
            if raw.removeprefix(_BOM if number == 1 else b"").strip():
                yield _json_record(raw, f"{source}:{number}", bom=number == 1)
            while len(raw) > MAX_ROW_BYTES and not raw.endswith(
                b"\n"
            ):  # the rest of an overlong line, never held
                raw = file.readline(MAX_ROW_BYTES + 1)


def _json_array(path: Path, source: str) -> Iterator[Record]:
    with _opened(path, source) as file:
        for number, raw in enumerate(_array_items(file, path, source), 1):
            record = _json_record(raw, f"{source}:row {number}")
            if isinstance(record.value, _Unparsable):
                raise record.value
            yield record


_STRUCTURE = re.compile(rb'[\[\]{}",]')
_INSIDE_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def _array_items(file: BinaryIO, path: Path, source: str) -> Iterator[bytes]:
    """The text of each element, cut at the commas between them; json.load would hold the whole file
    several times over.

    An element longer than the limit comes cut off just above the limit.
    """
    item = bytearray()
    depth, count, in_string, escaped, done = 0, 0, False, False, False

    for chunk in _from_bracket(file, path, source):
        at = start = 0
        while at < len(chunk) and not done:
            if escaped:
                at, escaped = at + 1, False
            elif in_string:
                at = cast("re.Match[bytes]", _INSIDE_STRING.match(chunk, at)).end() + 1
                escaped = (
                    chunk[at - 1 : at] == b"\\"
                )  # the chunk ends between a backslash and what it escapes
                in_string = at > len(chunk) or escaped
            elif (found := _STRUCTURE.search(chunk, at)) is None:
                break
            else:
                mark, at = found.group(), found.end()
                in_string = mark == b'"'
                depth += (mark in b"[{") - (mark in b"]}")
                if depth == 0 and mark == b"}":
                    raise InputError(
                        f"{source}:row {count}: not JSON (a closing bracket of the wrong kind); "
                        "write the file again"
                    )
                if depth == 1 and mark == b"[" and not count:
                    start, count = at, 1
                elif (depth == 1 and mark == b",") or depth == 0:
                    item += chunk[start : at - 1]
                    done = depth == 0
                    if item.strip() or count > 1 or not done:
                        yield bytes(item)
                    item.clear()
                    start, count = at, count + 1
        item += chunk[start:]
        del item[MAX_ROW_BYTES + 1 :]
        if done and item.strip():
            raise InputError(
                f"{source}: something follows the end of the JSON array; remove it, or make it one "
                "array"
            )
    if not done:
        raise InputError(
            f"{source}:row {max(count, 1)}: the file is torn: it ends before its JSON array does; "
            "write it again"
        )


def _from_bracket(file: BinaryIO, path: Path, source: str) -> Iterator[bytes]:
    first = b""
    while not first:
        if not (chunk := file.read(1 << 16)):
            raise InputError(f"{source}:1: {EMPTY}")
        first = chunk.removeprefix(_BOM).lstrip()
    if not first.startswith(b"["):
        lines = (
            "; if each line is one (JSON Lines), rename it to "
            f"{path.name.replace('.json', '.jsonl')}"
            if first.startswith(b"{")
            else ""
        )
        raise InputError(
            f"{source}:1: the file is not one JSON array of objects, between [ and ]{lines}"
        )
    yield first
    yield from iter(lambda: file.read(1 << 16), b"")


# Tables and the Hub
# ---------------------------------------------------------------------------------------------------------------------------------


def _csv(path: Path, source: str) -> Iterator[Record]:
    # The limit belongs to the process and is 128 kB by default, less than a long prompt: it is only
    # ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with _opened(path, source) as file:
        reader = csv.reader(_csv_lines(file, source), strict=True)
        number = 0
        try:
            header = next((row for row in reader if row), None)
            if header is None:
                raise InputError(f"{source}:1: {EMPTY}")
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise InputError(
                    f"{source}:1: key {shown(twice[0])} names two columns; rename one of them"
                )
            for number, row in enumerate((row for row in reader if row), 1):
                yield _csv_record(f"{source}:row {number}", header, row)
        except csv.Error as error:
            raise InputError(
                f"{source}:row {number + 1}: broken CSV ({error}); write it again, with quotes "
                "inside a cell doubled"
            ) from error


def _csv_lines(file: BinaryIO, source: str) -> Iterator[str]:
    for number in itertools.count(1):
        raw = file.readline(MAX_ROW_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_ROW_BYTES:
            raise _too_long(f"{source}:{number}")
        # Bytes that are not UTF-8 pass as surrogates, so that the quoting stays in step and only
        # their own row is refused.
        text = raw.decode(errors="surrogateescape")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _csv_record(where: str, header: list[str], row: list[str]) -> Record:
    try:
        if len(row) != len(header):
            raise InputError(
                f"{where}: {len(row)} cells under {len(header)} columns; quote the cells that hold "
                "commas or newlines"
            )
        if sum(map(len, row)) > MAX_ROW_BYTES:
            raise _too_long(where)
        cells = {key: _cell(key, text, where) for key, text in zip(header, row, strict=True)}
        return Record(
            where,
            {key: cell for key, cell in cells.items() if not (key == "margin" and cell == "")},
        )
    except InputError as error:
        return Record(where, error, ",".join(row)[:8000].encode(errors="surrogateescape"))


def _cell(key: str, text: str, where: str) -> object:
    """A cell has no type: only what a row format needs is read as JSON, and only if it looks like it."""
    if (nul := text.find("\0")) >= 0:
        raise InputError(f"{where}: key {shown(key)} holds a raw NUL at character {nul}; remove it")
    if not text.isascii() and (byte := re.search("[\udc80-\udcff]", text)):
        offset = len(text[: byte.start()].encode(errors="surrogateescape"))
        bad = f"byte offset {offset} of the cell (0x{ord(byte[0]) - 0xDC00:02x})"
        raise InputError(f"{where}: key {shown(key)}: {bad} is not UTF-8; save the file as UTF-8")
    if key == "label":
        return _SCALARS.get(text, text)
    if key == "margin" and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[Nn]a[Nn]", text):
        return float(text)
    if (key in _LIST_KEYS and text.lstrip().startswith("[")) or (
        key in _CONTENT_KEYS and re.match(r"\s*\[\s*\{", text)
    ):
        return _strict_json_text(text, f"{where}: key {shown(key)}")
    return text


def _parquet(path: Path, source: str) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with _opened(path, source) as opened, tempfile.TemporaryFile() as unpacked:
        file: BinaryIO = opened
        if path.suffix.lower() == ".gz":
            shutil.copyfileobj(opened, unpacked)  # Parquet is read from its end
            unpacked.seek(0)
            file = cast(BinaryIO, unpacked)
        try:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(
                    f"{source}: key {shown(twice[0])} names two columns; rename one of them"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1000):
                large = batch.nbytes > MAX_ROW_BYTES
                for row in range(batch.num_rows):
                    number += 1
                    yield _parquet_record(f"{source}:row {number}", batch.slice(row, 1), large)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{source}: cannot be read as Parquet "
                f"({shown(str(error), quote=False, limit=200)}); write it again"
            ) from error


def _parquet_record(where: str, row: Any, large: bool) -> Record:
    if large and row.nbytes > MAX_ROW_BYTES:
        return Record(where, _too_long(where), b"")
    try:
        return Record(where, row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Record(
            where,
            InputError(
                f"{where}: byte offset {error.start} of a text is not UTF-8; write the column as "
                "UTF-8"
            ),
            b"",
        )


def _hub(name: str, split: str, source: str) -> Iterator[Record]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    # whatever a download, a cache or a stranger's repository raises, the user can do the same about
    # it
    except Exception as error:
        reason = shown(str(error).strip().split("\n")[0].rstrip("."), quote=False, limit=300)
        raise InputError(
            f"{source}: there is no such file, and the Hub dataset {name} (split {split}) cannot "
            f"be loaded ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a "
            f"file{'' if '/' in source else _nearest(Path(source))}"
        ) from error
    for number, record in enumerate(dataset, 1):
        yield Record(f"{source}:row {number}", record)
