"""The typed rows that files of rows become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


Content = str | tuple[Message, ...]


"""Plain text, which no template touches, or the messages of a chat, which the model's template
renders.
"""


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text, every token of which is learned."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A whole conversation with at least one assistant message."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to answer, with the row's other columns for the reward functions."""

    prompt: Content
    columns: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt and one answer to it. Here and below, prompt and answers are all text or all messages."""

    prompt: Content
    completion: Content
    where: str


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two different answers to one prompt, the better one first; margin is by how much, where the
    file says.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None
    where: str


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """An answer and whether it is good."""

    prompt: Content
    completion: Content
    label: bool
    where: str


@dataclass(frozen=True, slots=True)
class StepsRow:
    """The steps of one answer and whether each is right."""

    prompt: Content
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    where: str


Row = TextRow | ChatRow | PromptRow | CompletionRow | PreferenceRow | LabelledRow | StepsRow
