"""Some rows of a source at a time, from records to tokens: parsed, rendered and packed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import InputError
from .json_files import parsed
from .prepare import Several, digest
from .record import Record
from .render import Renderer
from .row_types import Row
from .rows import parse_row
from .strict_json import leaves

ROWS, BYTES = 512, 4_000_000
"""A chunk ends with so many rows, or with so many bytes."""


class Skipped(NamedTuple):
    """A row that cannot be used, why, and how it begins."""

    where: str
    error: str
    line: str


@dataclass
class Chunk:
    """What became of some rows.

    items, rows: one pickled element each, and its row, one after the other, with their lengths.
    keys: a hash of each element's key. total: number of rows that were read. rendered: of those
    that could be used. seen: how many of them each note of the renderer is about.
    """

    items: bytes
    item_lengths: list[int]
    rows: bytes
    row_lengths: list[int]
    keys: list[bytes]
    skipped: list[Skipped]
    total: int
    rendered: int
    seen: dict[str, int]


@dataclass(frozen=True)
class Work:
    """What is done to each row, in whatever process.

    accept, render, key: as in `elements.RowFormat`. seed: of the split by keys.
    stop: whether a chunk ends with its first bad row.
    """

    accept: tuple[type, ...]
    render: Callable[[Renderer], Callable[[Any], Any]]
    key: Callable[[Any], str]
    renderer: Renderer
    seed: int
    stop: bool

    def __reduce__(self) -> Any:
        state = self.accept, self.render, self.key, self.renderer, self.seed, self.stop
        return Work, state

    @cached_property
    def _rendered(self) -> Callable[[Any], Any]:
        return self.render(self.renderer)

    def chunk(self, records: Sequence[Record]) -> Chunk:
        """Parse, render and pack some rows."""
        items, rows = bytearray(), bytearray()
        item_lengths, row_lengths, keys = list[int](), list[int](), list[bytes]()
        found = [self._row(record) for record in records]
        self.renderer.expect([row for row in found if not isinstance(row, Skipped)])
        skipped = []
        for number, (row, record) in enumerate(zip(found, records, strict=True)):
            if isinstance(row, Skipped):
                skipped.append(row)
            else:
                try:
                    made = self._rendered(row)
                except InputError as error:
                    skipped.append(Skipped(record.where, str(error), record.beginning()))
            if skipped and self.stop:
                found = found[: number + 1]
                break
            if skipped and skipped[-1].where == record.where:
                continue
            packed_row = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
            key = digest(self.key(row), self.seed)
            for item in made.items if isinstance(made, Several) else [made]:
                packed = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
                items += packed
                rows += packed_row
                item_lengths.append(len(packed))
                row_lengths.append(len(packed_row))
                keys.append(key)
        return Chunk(
            bytes(items),
            item_lengths,
            bytes(rows),
            row_lengths,
            keys,
            skipped,
            len(found),
            len(found) - len(skipped),
            self.renderer.take_counts(),
        )

    def _row(self, record: Record) -> Row | Skipped:
        value = parsed(record).value
        try:
            if isinstance(value, InputError):
                raise value
            return parse_row(value, record.where, self.accept)
        except InputError as error:
            return Skipped(record.where, str(error), record._replace(value=value).beginning())


def chunks(records: Iterator[Record]) -> Iterator[list[Record] | InputError]:
    """The records in lists; and at the end the error that kept the source from being read, if one
    did. Rows before it come first, because one of them may be bad.
    """
    held: list[Record] = []
    size = 0
    try:
        for record in records:
            held.append(record)
            size += _size(record)
            bad = isinstance(record.value, InputError)  # perhaps nothing after it is wanted
            if bad or len(held) >= ROWS or size >= BYTES:
                yield held
                held, size = [], 0
    except InputError as error:
        yield held
        yield error
        return
    if held:
        yield held


def _size(record: Record) -> int:
    """About how many bytes a record takes."""
    if record.raw is not None:
        return len(record.raw)
    return sum(len(leaf) if isinstance(leaf, str) else 8 for leaf in leaves(record.value))
