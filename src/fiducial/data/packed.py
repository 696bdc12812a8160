"""Sequences of many objects that do not stand in memory as objects."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

from ..errors import InputError

T = TypeVar("T")
IN_MEMORY = 32_000_000
"""Bytes that a sequence keeps in memory. What it has beyond them lies in a temporary file."""


class Packed(Sequence[T], Generic[T]):
    """Objects kept as bytes: in memory while they are small, and then in a file without a name.

    An object is made anew each time it is asked for. The file lies in the folder for temporary
    files, which TMPDIR names, and vanishes with the process. It is read, not mapped, so it takes no
    memory.
    """

    def __init__(self, objects: Iterable[T] = ()) -> None:
        self._file: Any = None
        self._ends = array("q", [0])
        self._tail = bytearray()
        self._in_file = 0
        for item in objects:
            blob = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            self.extend(blob, [len(blob)])

    def extend(self, blob: bytes, lengths: Iterable[int]) -> None:
        """Append objects that are pickled already.

        Args:
            blob: their bytes, one after the other. lengths: the number of bytes of each.

        Raises:
            InputError: there is no space for the file.
        """
        end = self._ends[-1]
        for length in lengths:
            end += length
            self._ends.append(end)
        self._tail += blob
        if len(self._tail) <= IN_MEMORY:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            self._file.seek(self._in_file)
            self._file.write(self._tail)
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()} has no space for the tokens of the rows ({error}); free "
                "some, or let the variable TMPDIR name another folder"
            ) from error
        self._in_file += len(self._tail)
        self._tail.clear()

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, end = self._ends[number], self._ends[number + 1]
        if start >= self._in_file:
            blob = memoryview(self._tail)[start - self._in_file : end - self._in_file]
        else:
            self._file.seek(start)
            blob = self._file.read(end - start)
        item: T = pickle.loads(blob)
        return item


class Chosen(Sequence[T], Generic[T]):
    """Some elements of a sequence, in an order of their own."""

    def __init__(self, whole: Sequence[T], numbers: Sequence[int]) -> None:
        self._whole, self._numbers = whole, array("q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._whole[i] for i in self._numbers[index]]
        return self._whole[self._numbers[index]]
