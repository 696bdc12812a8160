"""Encoding the texts of many short rows in one call of the tokenizer, before each is rendered.

A call takes longer than the text of a short row. The ids are the same: rendering asks for each text
as before, and finds it here. A text that is not found is encoded then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ..errors import InputError
from .row_types import (
    ChatRow,
    CompletionRow,
    Content,
    LabeledRow,
    Message,
    PreferenceRow,
    Row,
    TextRow,
)

SHORT = 4000
"""Characters of a text up to which it is worth while."""


class _Turn(Protocol):
    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


Turns = Callable[[tuple[Message, ...], int, str, bool], Sequence[_Turn]]
"""The assistant's turns of messages, from a first one on; all of them, or the last."""


def texts_of(rows: Sequence[Row], turns: Turns, every: bool) -> Iterator[str]:
    """The texts that rendering these rows asks for, as far as they are known and short.

    Args:
        every: whether all turns of a conversation are rendered, and not only the last.
    """
    for row in rows:
        for text in _texts(row, turns, every):
            if len(text) <= SHORT:
                yield text


def _texts(row: Row, turns: Turns, every: bool) -> Iterator[str]:
    if isinstance(row, TextRow):
        yield row.text
    elif isinstance(row, ChatRow):
        yield from _turn_texts(row.messages, 0, row.where, turns, every)
    elif isinstance(row, CompletionRow | LabeledRow):
        yield from _answer(row.prompt, row.completion, row.where, turns)
    elif isinstance(row, PreferenceRow):
        for answer in (row.chosen, row.rejected):
            yield from _answer(row.prompt, answer, row.where, turns)


def _answer(prompt: Content, answer: Content, where: str, turns: Turns) -> Iterator[str]:
    if isinstance(prompt, str) and isinstance(answer, str):
        yield from (prompt, prompt + answer)
    elif not isinstance(prompt, str) and not isinstance(answer, str):
        yield from _turn_texts(prompt + answer, len(prompt), where, turns, True)


def _turn_texts(
    messages: tuple[Message, ...], first: int, where: str, turns: Turns, every: bool
) -> Iterator[str]:
    if sum(len(m.content) for m in messages) > SHORT:
        return
    try:
        for turn in turns(messages, first, where, every):
            yield from (turn.prompt, turn.prompt + turn.answer)
    except InputError:  # rendering the row says it again
        return
