"""From a source of rows to the elements that a method trains on and evaluates with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import InputError
from ..settings import RowSettings
from .prepare import joined, load, split
from .render import Renderer

T = TypeVar("T")


@dataclass(frozen=True)
class RowFormat(Generic[T]):
    """The rows that a method reads, and the elements into which it turns them.

    accept: the formats of rows. render: from a renderer to a function of one row.
    key: what must not stand in both training and evaluation, usually the prompt.
    join: from rendered rows and the rows themselves to elements with a key each, for a method whose
        elements are made of several rows; None: a row is an element.
    ids: the token ids of each sequence in an element, on which the models are checked.
    together: the length of the row that holds an element's sequences with their common beginning
        once, where the method reads them so if the model can.
    """

    accept: tuple[type, ...]
    render: Callable[[Renderer], Callable[[Any], Any]]
    key: Callable[[Any], str]
    ids: Callable[[T], Sequence[Sequence[int]]]
    join: Callable[[list[Any], list[Any]], tuple[list[str], list[T]]] | None = None
    together: Callable[[T], int] | None = None


@dataclass(frozen=True)
class Elements(Generic[T]):
    """Elements to train on or to evaluate with: what was rendered, their keys, and their rows.

    `rows` has one row per element, or is empty where elements are made of several rows.
    """

    items: list[T]
    keys: list[str]
    rows: list[Any]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, numbers: Sequence[int]) -> Elements[T]:
        """Only these elements, in this order."""
        rows = [self.rows[i] for i in numbers] if self.rows else []
        return Elements([self.items[i] for i in numbers], [self.keys[i] for i in numbers], rows)


def read(
    source: str,
    settings: RowSettings,
    rows: RowFormat[T],
    renderer: Renderer,
    seed: int,
    skipped: Path | None = None,
) -> tuple[Elements[T], Elements[T], str]:
    """Rendered elements for training and for evaluation, with no key in both; and a note.

    Raises:
        InputError: a row cannot be used, with its file:line.
    """

    def elements(name: str, file: Path | None) -> tuple[Elements[T], str]:
        rendered, kept, note = load(
            name, settings, rows.accept, rows.render(renderer), skipped=file
        )
        note = joined(note, renderer.take_notes(len({r.where for r in kept})))
        if rows.join is None:
            return Elements(rendered, [rows.key(r) for r in kept], kept), note
        keys, items = rows.join(rendered, kept)
        return Elements(items, keys, []), note

    train, note = elements(source, skipped)
    if settings.eval_data:
        return train, elements(settings.eval_data, None)[0], note
    here, there = split(train.keys, settings.held_out, seed)
    if not here:
        raise InputError(
            f"--rows.held-out {settings.held_out:g} of {len(train)} rows leaves none to train on: "
            "give less, or --rows.eval-data"
        )
    return train.take(here), train.take(there), note
