"""One row as it is in its source, and the opened file that it is read from."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from ..errors import InputError

MAX_ROW_BYTES = 100_000_000
"""A longer row is a sign of a broken file, such as a lost newline. It is refused without being
loaded.
"""
EMPTY = "the file is empty; give a file with at least one row"
BOM = b"\xef\xbb\xbf"


class Blank(str):
    """An empty cell of a table without types: no text, and the same as a key that is not there."""


class Record(NamedTuple):
    """One row as it is in its source."""

    where: str
    """``file:line``, or ``file:row N``."""
    value: object
    """What the row holds, or the InputError that says why it cannot be read."""
    raw: bytes | None = None
    """The bytes of the row if the source has them; only the beginning of a row that is too long."""

    def beginning(self, characters: int = 2000) -> str:
        """The first characters of the row, for a report on rows that were skipped."""
        text = (
            json.dumps(self.value, default=str)
            if self.raw is None
            else self.raw[: 4 * characters].decode(errors="replace")
        )
        return text.rstrip("\r\n")[:characters]


def nearest_file(path: Path) -> str:
    """The end of a message: the existing file whose name is most similar, or nothing."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    names = {entry.name.lower(): entry.name for entry in path.parent.iterdir() if entry.is_file()}
    close = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.5)
    return f"; the nearest is {path.parent / names[close[0]]}" if close else ""


@contextmanager
def open_bytes(path: Path, source: str) -> Iterator[BinaryIO]:
    """Opens a file for reading, unpacked if it is gzipped.

    Raises:
        InputError: the file cannot be read or unpacked, now or later in the block.
    """
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
