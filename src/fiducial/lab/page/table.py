"""A table as the page's template takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | tuple[str, str]
"""The second of two texts is set small below the first."""


@dataclass(frozen=True)
class Table:
    """Heads (with a unit below), rows, and the columns that are set left because they hold
    words.
    """

    head: list[Cell]
    rows: list[list[Cell]]
    left: list[int]


def table(
    head: Sequence[Cell], rows: Sequence[Sequence[Cell]], *, left: Sequence[int] = ()
) -> Table:
    """A table whose first column, and those of `left`, hold words."""
    return Table(list(head), [list(row) for row in rows], [0, *left])
