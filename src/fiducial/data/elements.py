"""From a source of rows to the elements that a method trains on and evaluates with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import InputError
from ..settings import RowSettings
from .chunks import Skipped, Work, chunks
from .packed import Chosen, Packed
from .prepare import digest, joined, split_hashes
from .record import EMPTY, Gauge
from .render import Renderer
from .sources import unparsed_records
from .survey import Survey
from .workers import rendered

T = TypeVar("T")
Told = Callable[[float], None]
"""Is told again and again which share of a source has been read, from 0 to 1."""


@dataclass(frozen=True)
class RowFormat(Generic[T]):
    """The rows that a method reads, and the elements into which it turns them.

    accept: the formats of rows. render: from a renderer to a function of one row.
    key: what must not stand in both training and evaluation, usually the prompt. Both are functions
        of a module, so that other processes can be told of them.
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
    join: Callable[[Sequence[Any], Sequence[Any]], tuple[list[str], Iterable[T]]] | None = None
    together: Callable[[T], int] | None = None


@dataclass(frozen=True)
class Elements(Generic[T]):
    """Elements to train on or to evaluate with: what was rendered, hashes of their keys, and their
    rows.

    `rows` has one row per element, or is empty where elements are made of several rows. Items and
    rows are made anew each time they are asked for, so that a million of them fit into memory.
    """

    items: Sequence[T]
    keys: Sequence[bytes]
    rows: Sequence[Any]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, numbers: Sequence[int]) -> Elements[T]:
        """Only these elements, in this order."""
        rows = Chosen(self.rows, numbers) if self.rows else []
        keys = [self.keys[i] for i in numbers]
        return Elements(Chosen(self.items, numbers), keys, rows)


def read(
    source: str,
    settings: RowSettings,
    rows: RowFormat[T],
    renderer: Renderer,
    seed: int,
    skipped: Path | None = None,
    told: Told | None = None,
    survey: Survey | None = None,
) -> tuple[Elements[T], Elements[T], str]:
    """Rendered elements for training and for evaluation, with no key in both; and a note.

    Args:
        skipped: the file for rows that are left out. told: is told of the progress. survey:
            counts what the rows to train on hold, and the prompts of --rows.eval-data among them.

    Raises:
        InputError: a row cannot be used, with its file:line.
    """
    look, compare = (None, None) if survey is None else (survey.look, survey.compare)
    train, note = _elements(source, settings, rows, renderer, seed, skipped, told, look)
    if settings.eval_data:
        held, _ = _elements(settings.eval_data, settings, rows, renderer, seed, None, told, compare)
        return train, held, note
    here, there = split_hashes(train.keys, settings.held_out)
    if not here:
        raise InputError(
            f"--rows.held-out {settings.held_out:g} of {len(train)} rows leaves none to train on: "
            "give less, or --rows.eval-data"
        )
    return train.take(here), train.take(there), note


def _elements(
    source: str,
    settings: RowSettings,
    form: RowFormat[T],
    renderer: Renderer,
    seed: int,
    skipped: Path | None,
    told: Told | None,
    look: Callable[[Sequence[Any], Sequence[Any]], None] | None,
) -> tuple[Elements[T], str]:
    """All elements of a source, and one sentence on rows that were skipped and on how rows were
    rendered.

    Args:
        look: is given the rows and what was made of each.
    """
    gauge = Gauge()
    stop = settings.on_error == "stop"
    work = Work(form.accept, form.render, form.key, renderer, seed, stop)
    items, rows = Packed[Any](), Packed[Any]()
    keys: list[bytes] = []
    first_error = ""
    total = used = 0
    with closing(rendered(work, chunks(unparsed_records(source, gauge)))) as found:
        for chunk in found:
            if chunk.skipped:
                if stop:
                    raise InputError(chunk.skipped[0].error)
                _write_skipped(chunk.skipped, skipped, new=not first_error)
                first_error = first_error or chunk.skipped[0].error
            items.extend(chunk.items, chunk.item_lengths)
            rows.extend(chunk.rows, chunk.row_lengths)
            keys += chunk.keys
            total += chunk.total
            used += chunk.rendered
            renderer.counts.update(chunk.seen)
            if told is not None:
                told(gauge.share())
    if not total:
        raise InputError(f"{source}:1: {EMPTY}")
    if not items:
        raise InputError(
            f"{source}: all {total} rows were skipped, the first because: {first_error}"
        )
    bad = total - used
    note = f"{bad} of {total} rows ({bad / total:.1%}) skipped, see {skipped}" if bad else ""
    note = joined(note, renderer.take_notes(used))
    if look is not None:
        look(rows, items)
    if form.join is None:
        return Elements(items, keys, rows), note
    names, made = form.join(items, rows)
    return Elements(Packed(made), [digest(name, seed) for name in names], []), note


def _write_skipped(rows: Iterable[Skipped], path: Path | None, *, new: bool) -> None:
    """Write rows that were left out, with where, error and the first 2,000 characters."""
    if path is not None:
        with path.open("w" if new else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row._asdict()) + "\n" for row in rows)
