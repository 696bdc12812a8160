"""Files and Hub datasets, read strictly, one record at a time. No value is converted to another
type, and no more than one row is held in memory.

A row that cannot be read becomes a record that holds its error, and the caller stops or counts it.
Some faults (a torn gzip file, CSV quote or JSON array) also hide where the next row begins. Reading
then always ends with an error, because everything after the fault would be a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError
from ..names import progress_file
from .json_files import json_array_records, json_lines_records, parsed
from .record import Gauge, Record, nearest_file
from .tables import csv_records, hub_records, parquet_records

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
"""Endings of files that are not read, and that no Hub dataset has."""
_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<split>[\w.\[\]:%+-]+))?"
)


def records(source: str) -> Iterator[Record]:
    """The rows of a source as `unparsed_records` finds them, each with its value.

    Raises:
        InputError: as there.
    """
    return map(parsed, unparsed_records(source, Gauge()))


def unparsed_records(source: str, gauge: Gauge) -> Iterator[Record]:
    """The rows of a file (`.jsonl`, `.json`, `.csv`, `.parquet`, each also with `.gz`) or of a Hub
    dataset (`org/name`, `org/name:split`). Lines of JSON are not yet parsed.

    Args:
        gauge: it follows how much was read.

    Raises:
        InputError: there is no such file or dataset, the file has another format, or a fault hides
            where the next row begins.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        inside = next((entry.name for entry in sorted(path.iterdir()) if _format(entry)), None)
        raise InputError(
            f"{source}: is a directory; name one file in it"
            + (f", such as {path / inside}" if inside else "")
        )
    if path.exists():
        readers: dict[str, Callable[[Path, str, Gauge], Iterator[Record]]]
        readers = {
            ".jsonl": json_lines_records,
            ".json": json_array_records,
            ".csv": csv_records,
            ".parquet": parquet_records,
        }
        if not (kind := _format(path)):
            raise InputError(
                f"{source}: is not {', '.join(FORMATS)} or one of these with .gz; convert it, or "
                "rename it if only its name is wrong"
            )
        if progress_file(path).exists():
            raise InputError(
                f"{source}: the command that writes it has not finished: go on with that command "
                f"(--resume), or remove {progress_file(path).name} to use the rows that are there"
            )
        return readers[kind](path, source, gauge)
    hub = _HUB_NAME.fullmatch(source)
    if (
        hub is None
        or path.suffix.lower() in (*FORMATS, *_OTHER_FILES)
        or ("/" in source and path.parent.is_dir())
    ):
        raise InputError(
            f"{source}: there is no such file{nearest_file(path) or '; check the path'}"
        )
    return hub_records(hub["name"], hub["split"] or "train", source, gauge)


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None
