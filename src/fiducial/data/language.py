"""Rows for the language-model loss: text, messages, or prompt and completion."""

from __future__ import annotations

from collections.abc import Callable

from .prepare import Several
from .render import Rendered, Renderer
from .row_types import ChatRow, CompletionRow, Content, TextRow

LANGUAGE_ROWS = (TextRow, ChatRow, CompletionRow)
Language = TextRow | ChatRow | CompletionRow


def language_rows(renderer: Renderer) -> Callable[[Language], Rendered | Several]:
    """A function that renders any of these rows."""

    def render(row: Language) -> Rendered | Several:
        if isinstance(row, TextRow):
            return renderer.text(row)
        if isinstance(row, ChatRow):
            return Several(renderer.turns(row))
        return renderer.completion(row.prompt, row.completion, row.where, row.sampled)

    return render


def language_key(row: Language) -> str:
    """What must not stand in both training and evaluation: the text, or all that is asked."""
    if isinstance(row, TextRow):
        return row.text
    return repr(row.messages[:-1] if isinstance(row, ChatRow) else row.prompt)


def language_prompt(row: Language) -> tuple[Content, str] | None:
    """A prompt for samples made from such a row, and the row's file:line.

    Plain text gives its first four words. A conversation that begins with the assistant gives None.
    """
    if isinstance(row, TextRow):
        return (" ".join(row.text.split()[:4]), row.where)
    if isinstance(row, ChatRow):
        first = next(i for i, m in enumerate(row.messages) if m.role == "assistant")
        return (row.messages[:first], row.where) if first else None
    return (row.prompt, row.where)
