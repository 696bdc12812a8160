"""The two answers of a preference row as tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..errors import InputError
from .render import Rendered, Renderer
from .row_types import PreferenceRow


class Pair(NamedTuple):
    """The rendered responses of a preference row."""

    chosen: Rendered
    rejected: Rendered


def preference_rows(renderer: Renderer) -> Callable[[PreferenceRow], Pair]:
    """A function that renders chosen and rejected.

    It raises an InputError for a row whose answers are the same tokens: nothing is preferred there.
    """

    def render(row: PreferenceRow) -> Pair:
        chosen = renderer.completion(row.prompt, row.chosen, row.where, row.chosen_sampled)
        rejected = renderer.completion(row.prompt, row.rejected, row.where, row.rejected_sampled)
        if chosen.ids == rejected.ids:
            cut = f" when they are cut at {renderer.max_length} tokens" if chosen.truncated else ""
            remedy = "raise --rows.max-length, or " if chosen.truncated else ""
            raise InputError(
                f"{row.where}: chosen and rejected are the same tokens{cut}, so there is nothing "
                f"to prefer: {remedy}remove the row, or leave such rows out with --rows.on-error "
                "skip"
            )
        return Pair(chosen, rejected)

    return render
