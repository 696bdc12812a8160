"""Rows of a file, rendered and split into training and evaluation, before training starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..settings import RowSettings
from .row_types import Content
from .rows import read_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Several:
    """What was made of one row, where it is not one element."""

    items: Sequence[Any]


def load(
    source: str,
    settings: RowSettings,
    accept: tuple[type, ...],
    render: Callable[[Any], T | Several],
    *,
    skipped: Path | None = None,
) -> tuple[list[T], list[Any], str]:
    """Read and render every row, to one element or to `Several`.

    Returns:
        the elements, the row that each was made from, and one sentence on the rows that were
        skipped ("" if none was).

    Raises:
        InputError: names file:line of the first bad row, unless bad rows are to be skipped; or no
            row is left.
    """
    found = read_rows(source, accept, on_error=settings.on_error, skipped=skipped)
    rendered: list[T] = []
    kept: list[Any] = []
    bad = found.skipped
    for row in found.rows:
        try:
            made = render(row)
            items = made.items if isinstance(made, Several) else [made]
            rendered += items
            kept += [row] * len(items)
        except InputError as error:
            if settings.on_error == "stop":
                raise
            bad += 1
            if skipped is not None:
                with open(skipped, "a", encoding="utf-8") as file:
                    file.write(
                        json.dumps({"where": row.where, "error": str(error)}, ensure_ascii=False)
                        + "\n"
                    )
    if not rendered:
        reasons = f", for the reasons in {skipped}" if skipped is not None else ""
        raise InputError(
            f"{source}: all {found.total} rows were skipped{reasons}; give a file with at least "
            "one row that can be used"
        )
    note = (
        f"{bad} of {found.total} rows ({bad / found.total:.1%}) skipped, see {skipped}"
        if bad
        else ""
    )
    return rendered, kept, note


def digest(key: str, seed: int) -> bytes:
    """A hash of a row's key (prompt). The order of the hashes says which are for evaluation."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()[:16]


def split(keys: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and for evaluation, from the rows' keys (see `split_hashes`)."""
    return split_hashes([digest(key, seed) for key in keys], share)


def split_hashes(hashes: Sequence[bytes], share: float) -> tuple[list[int], list[int]]:
    """Row numbers for training and for evaluation.

    Rows with the same hash of their key (prompt) stay together; `share` is the share of the keys
    that are for evaluation: the first in the order of their hashes.
    """
    distinct = sorted(set(hashes))
    held = set(distinct[: round(share * len(distinct))]) if len(distinct) > 1 else set()
    train = [i for i, k in enumerate(hashes) if k not in held]
    return train, [i for i, k in enumerate(hashes) if k in held]


def text_of(content: Content) -> str:
    """A prompt or completion as one string, to be shown or compared."""
    return (
        content
        if isinstance(content, str)
        else "\n".join(f"{m.role}: {m.content}" for m in content)
    )


def messages_of(content: Content) -> Any:
    """A prompt or completion as reward functions get it: text, or a list of messages as dicts."""
    return (
        content
        if isinstance(content, str)
        else [{"role": m.role, "content": m.content} for m in content]
    )


def prompt_text(row: Any) -> str:
    """The prompt of a row that has one, as the key by which rows are split."""
    return text_of(row.prompt)


def joined(*notes: str) -> str:
    """Several sentences of a note as one; those that say nothing are left out."""
    return "; ".join(note for note in notes if note)
