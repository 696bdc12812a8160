"""One row as it is in its source, and the opened file that it is read from."""

from __future__ import annotations

import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import InputError

MAX_ROW_BYTES = 16_000_000
"""A longer row is a sign of a broken file, such as a lost newline. It is refused without being
loaded. A context of a million tokens is about 4 MB of text.
"""
BOMB_BYTES, BOMB_RATIO = 64_000_000, 200
"""A gzip file is refused once it has unpacked to more than this, and to more than this many times
its own size. Rows of text are packed about 3 to 20 times; gzip packs a single byte 1,000 times.
"""
EMPTY = "the file is empty; give a file with at least one row"
BOM = b"\xef\xbb\xbf"


class Blank(str):
    """An empty cell of a table without types: no text, and the same as a key that is not there."""


@dataclass(frozen=True)
class Unparsed:
    """Stands for the value of a row whose bytes are JSON that nobody has parsed yet.

    bom: the bytes may begin with a byte order mark.
    """

    bom: bool


class Record(NamedTuple):
    """One row as it is in its source."""

    where: str
    """``file:line``, or ``file:row N``."""
    value: object
    """What the row holds, the InputError that says why it cannot be read, or `Unparsed`."""
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


class Gauge:
    """How much of a source has been read, for a progress bar."""

    def __init__(self) -> None:
        self._size = 0
        self._position: Callable[[], int] = lambda: 0

    def follow(self, size: int, position: Callable[[], int]) -> None:
        """What is read has this size, in bytes or rows, and `position` says how far it is."""
        self._size, self._position = size, position

    def share(self) -> float:
        """From 0 to 1; 0 where it is not known."""
        return min(1.0, self._position() / self._size) if self._size else 0.0


class _Unpacked(io.RawIOBase):
    """What a gzip file unpacks to, up to the size at which it is taken for a trap."""

    def __init__(self, packed: BinaryIO, source: str) -> None:
        self._packed, self._source, self._size = packed, source, 0
        self._file = gzip.GzipFile(fileobj=packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        self._size += len(data)
        if self._size > max(BOMB_BYTES, BOMB_RATIO * self._packed.tell()):
            raise InputError(
                f"{self._source}: the gzip file unpacks to more than {BOMB_RATIO} times its size, "
                f"which rows of text do not ({self._size / 1e6:,.0f} MB so far); if it is meant "
                "so, unpack it and give the unpacked file"
            )
        return len(data)


@contextmanager
def open_bytes(path: Path, source: str, gauge: Gauge | None = None) -> Iterator[BinaryIO]:
    """Opens a file for reading, unpacked if it is gzipped.

    Args:
        gauge: it follows how much of the file was read.

    Raises:
        InputError: the file cannot be read or unpacked, now or later in the block.
    """
    try:
        with path.open("rb") as file:
            if gauge is not None:
                size = path.stat().st_size
                gauge.follow(size, lambda: size if file.closed else file.tell())
            if path.suffix.lower() == ".gz":
                yield cast(BinaryIO, io.BufferedReader(_Unpacked(file, source), 1 << 16))
            else:
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
