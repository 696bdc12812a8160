"""Records of .csv and .parquet files, and of Hub datasets."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import InputError
from . import record as base
from .json_files import too_long
from .record import EMPTY, Blank, Gauge, Record, nearest_file, open_bytes
from .strict_json import shown, strict_json_text

_LIST_KEYS = {"messages", "completions", "labels", "completion_ids", "chosen_ids", "rejected_ids"}
BATCH_BYTES = 512_000_000
"""Bytes that a batch of rows of a Parquet file may have at most."""
_CONTENT_KEYS = {"prompt", "completion", "chosen", "rejected"}


def csv_records(path: Path, source: str, gauge: Gauge) -> Iterator[Record]:
    """One record per row under the header.

    Raises:
        InputError: a fault that hides where the next row begins, or a header with a name twice.
    """
    # The limit is one for the whole process. Its default of 128 kB is less than a long prompt. It
    # is raised and never lowered, so that other readers in the process keep theirs.
    csv.field_size_limit(max(csv.field_size_limit(), base.MAX_ROW_BYTES))
    with open_bytes(path, source, gauge) as file:
        row_bytes = [0]
        reader = csv.reader(_csv_lines(file, source, row_bytes), strict=True)
        number = 0
        try:
            header = next((row for row in reader if row), None)
            if header is None:
                raise InputError(f"{source}:1: {EMPTY}")
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise InputError(
                    f"{source}:1: key {shown(twice[0])} names two columns; rename one of them"
                )
            row_bytes[0] = 0
            for row in reader:
                row_bytes[0] = 0
                if row:
                    number += 1
                    yield _csv_record(f"{source}:row {number}", header, row)
        except csv.Error as error:
            raise InputError(
                f"{source}:row {number + 1}: broken CSV ({error}); write it again, with quotes "
                "inside a cell doubled"
            ) from error


def _csv_lines(file: BinaryIO, source: str, row_bytes: list[int]) -> Iterator[str]:
    """The lines of a file; `row_bytes` counts the bytes of those that make one row."""
    for number in itertools.count(1):
        raw = file.readline(base.MAX_ROW_BYTES + 1)
        if not raw:
            return
        row_bytes[0] += len(raw)
        if row_bytes[0] > base.MAX_ROW_BYTES:
            raise too_long(f"{source}:{number}")
        # Bytes that are not UTF-8 become surrogates, so that quotes are still paired and only the
        # row with these bytes is refused.
        text = raw.decode(errors="surrogateescape")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _csv_record(where: str, header: list[str], row: list[str]) -> Record:
    try:
        if len(row) != len(header):
            raise InputError(
                f"{where}: {len(row)} cells under {len(header)} columns; quote the cells that hold "
                "commas or newlines"
            )
        if sum(map(len, row)) > base.MAX_ROW_BYTES:
            raise too_long(where)
        cells = {key: _cell(key, text, where) for key, text in zip(header, row, strict=True)}
        return Record(
            where,
            {key: Blank() if cell == "" else cell for key, cell in cells.items()},
        )
    except InputError as error:
        return Record(where, error, ",".join(row)[:8000].encode(errors="surrogateescape"))


def _cell(key: str, text: str, where: str) -> object:
    """The value of a cell. Cells have no type, so only those are read as JSON that a row format
    needs so and that look like it.
    """
    if (nul := text.find("\0")) >= 0:
        raise InputError(f"{where}: key {shown(key)} holds a raw NUL at character {nul}; remove it")
    if not text.isascii() and (byte := re.search("[\udc80-\udcff]", text)):
        offset = len(text[: byte.start()].encode(errors="surrogateescape"))
        bad = f"byte offset {offset} of the cell (0x{ord(byte[0]) - 0xDC00:02x})"
        raise InputError(f"{where}: key {shown(key)}: {bad} is not UTF-8; save the file as UTF-8")
    if key == "margin" and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[Nn]a[Nn]", text):
        return float(text)
    if (key in _LIST_KEYS and text.lstrip().startswith("[")) or (
        key in _CONTENT_KEYS and re.match(r"\s*\[\s*\{", text)
    ):
        return strict_json_text(text, f"{where}: key {shown(key)}")
    return text


def parquet_records(path: Path, source: str, gauge: Gauge) -> Iterator[Record]:
    """One record per row of the table.

    Raises:
        InputError: the file cannot be read as Parquet, or two columns have one name.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with open_bytes(path, source) as opened, tempfile.TemporaryFile() as unpacked:
        file: BinaryIO = opened
        if path.suffix.lower() == ".gz":
            shutil.copyfileobj(opened, unpacked)  # reading Parquet begins at its end
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
            gauge.follow(table.metadata.num_rows, lambda: number)
            for group in range(table.num_row_groups):
                # a cell that many rows share is stored once, and a batch holds it for each row
                size = table.metadata.row_group(group).total_byte_size
                count = min(1000, max(1, BATCH_BYTES // max(size, 1)))
                for batch in table.iter_batches(batch_size=count, row_groups=[group]):
                    large = batch.nbytes > base.MAX_ROW_BYTES
                    for row in range(batch.num_rows):
                        number += 1
                        yield _parquet_record(f"{source}:row {number}", batch.slice(row, 1), large)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{source}: cannot be read as Parquet "
                f"({shown(str(error), quote=False, limit=200)}); write it again"
            ) from error


def _parquet_record(where: str, row: Any, large: bool) -> Record:
    if large and row.nbytes > base.MAX_ROW_BYTES:
        return Record(where, too_long(where), b"")
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


def hub_records(name: str, split: str, source: str, gauge: Gauge) -> Iterator[Record]:
    """One record per row of a dataset's split.

    Raises:
        InputError: the dataset cannot be loaded.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split, trust_remote_code=False)
    # A download, a cache or a repository can raise anything, and the remedies are always the same.
    except Exception as error:
        reason = shown(str(error).strip().split("\n")[0].rstrip("."), quote=False, limit=300)
        raise InputError(
            f"{source}: there is no such file, and the Hub dataset {name} (split {split}) cannot "
            f"be loaded ({type(error).__name__}: {reason}); check the name and the network, or "
            f"give a file{'' if '/' in source else nearest_file(Path(source))}"
        ) from error
    number = 0
    gauge.follow(len(dataset), lambda: number)
    for number, record in enumerate(dataset, 1):
        yield Record(f"{source}:row {number}", record)
