"""Records of .jsonl and .json files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import InputError
from . import record as base
from .record import BOM, EMPTY, Gauge, Record, Unparsed, open_bytes
from .strict_json import Unparsable, strict_json


def parsed(record: Record) -> Record:
    """The record with its value, or with the InputError that says why it has none."""
    if not isinstance(record.value, Unparsed) or record.raw is None:
        return record
    try:
        value: object = strict_json(record.raw, record.where, bom=record.value.bom)
    except InputError as error:
        value = error
    return record._replace(value=value)


def too_long(where: str) -> InputError:
    """The error for a row that is longer than the limit."""
    limit = f"{base.MAX_ROW_BYTES / 1e6:g} MB"
    return InputError(
        f"{where}: the row is longer than {limit}; split it, or put the lost newlines back"
    )


def _record(raw: bytes, where: str, *, bom: bool = False) -> Record:
    if len(raw) > base.MAX_ROW_BYTES:
        return Record(where, too_long(where), raw[:8000])
    return Record(where, Unparsed(bom), raw)


def json_lines_records(path: Path, source: str, gauge: Gauge) -> Iterator[Record]:
    """One record, not yet parsed, per line that is not blank; `source` is the file's name in
    messages.
    """
    with open_bytes(path, source, gauge) as file:
        for number in itertools.count(1):
            raw = file.readline(base.MAX_ROW_BYTES + 1)
            if not raw:
                return
            if raw.removeprefix(BOM if number == 1 else b"").strip():
                yield _record(raw, f"{source}:{number}", bom=number == 1)
            # the rest of a line that is too long is read and dropped
            while len(raw) > base.MAX_ROW_BYTES and not raw.endswith(b"\n"):
                raw = file.readline(base.MAX_ROW_BYTES + 1)


def json_array_records(path: Path, source: str, gauge: Gauge) -> Iterator[Record]:
    """One record per element of the array that the file holds.

    Raises:
        InputError: the file is no JSON array, or an element is not JSON, which hides where the next
            one begins.
    """
    with open_bytes(path, source, gauge) as file:
        for number, raw in enumerate(_array_items(file, path, source), 1):
            record = parsed(_record(raw, f"{source}:row {number}"))
            if isinstance(record.value, Unparsable):
                raise record.value
            yield record


_STRUCTURE = re.compile(rb'[\[\]{}",]')
_INSIDE_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def _array_items(file: BinaryIO, path: Path, source: str) -> Iterator[bytes]:
    """The text of each element, cut at the commas between them.

    `json.load` would hold the whole file in memory several times. An element longer than the limit
    is cut off just above the limit.
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
                # the chunk may end between a backslash and what it escapes
                escaped = chunk[at - 1 : at] == b"\\"
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
        del item[base.MAX_ROW_BYTES + 1 :]
        if done and item.strip():
            raise InputError(
                f"{source}: the JSON array is followed by more text; remove it, or put everything "
                "into one array"
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
        first = chunk.removeprefix(BOM).lstrip()
    if not first.startswith(b"["):
        remedy = (
            "; if each line is one object (JSON Lines), rename it to "
            f"{path.name.replace('.json', '.jsonl')}"
            if first.startswith(b"{")
            else ""
        )
        raise InputError(
            f"{source}:1: the file is not one JSON array of objects, between [ and ]{remedy}"
        )
    yield first
    yield from iter(lambda: file.read(1 << 16), b"")
