"""The typed rows that files of rows become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `role` is one of `ROLES`."""

    role: str
    content: str


Content = str | tuple[Message, ...]
"""Plain text, which is used as it is, or the messages of a chat, which the model's chat template
renders.
"""


@dataclass(frozen=True, slots=True)
class SampledIds:
    """The token ids of an answer as a model sampled them, its end included if it has one.

    tokenizer: the fingerprint of the tokenizer that they are of.
    """

    ids: tuple[int, ...]
    tokenizer: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text. The model is trained on every token of it."""

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
    """A prompt and one answer to it.

    In this and the following rows, prompt and answers are all text or all messages, and `sampled`
    has the tokens of an answer that a model gave, if they are known.
    """

    prompt: Content
    completion: Content
    where: str
    sampled: SampledIds | None = None


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two different answers to one prompt. `margin` says how much better `chosen` is, if known."""

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None
    where: str
    chosen_sampled: SampledIds | None = None
    rejected_sampled: SampledIds | None = None


@dataclass(frozen=True, slots=True)
class LabeledRow:
    """A prompt, an answer and whether the answer is good."""

    prompt: Content
    completion: Content
    label: bool
    where: str
    sampled: SampledIds | None = None


@dataclass(frozen=True, slots=True)
class StepsRow:
    """A prompt, the steps of one answer and whether each step is right."""

    prompt: Content
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    where: str
    sampled: SampledIds | None = None


Row = TextRow | ChatRow | PromptRow | CompletionRow | PreferenceRow | LabeledRow | StepsRow
