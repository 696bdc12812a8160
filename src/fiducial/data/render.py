"""Token ids and the loss mask, made together. Nothing later infers a mask from pad ids, or decodes
and encodes again.

A prompt and a completion are tokenized separately and joined as ids. Joined as text, they could
have a token that belongs to both. A sequence begins with one BOS if the tokenizer adds one. EOS is
a label at the end of every response, even if EOS is also the pad token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from .row_types import ChatRow, Content, Message, TextRow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence. `mask[t]` is true if token t is a label: a token whose log-probability is
    trained or measured.
    """

    ids: list[int]
    mask: list[bool]
    where: str
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_labels(self) -> int:
        return sum(self.mask)


@dataclass(frozen=True)
class Renderer:
    """How text becomes tokens for one tokenizer."""

    tokenizer: Any
    max_length: int
    on_long: Literal["truncate", "error"] = "truncate"
    train_on: Literal["all", "last"] = "all"
    _bos: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no EOS token, so a model could not learn to stop: choose one of "
                "its tokens with --rows.eos-token"
            )
        probe = self.tokenizer("a").input_ids
        bos = self.tokenizer.bos_token_id
        object.__setattr__(self, "_bos", [bos] if bos is not None and probe[:1] == [bos] else [])

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def text(self, row: TextRow) -> Rendered:
        """Plain text: every token but the first is a label, and so is the EOS after it."""
        ids = self._ended(self._encode(row.text, first=True))
        return self._fit(ids, [False] + [True] * (len(ids) - 1), row.where, prompt_length=1)

    def prompt(self, prompt: Content, where: str) -> list[int]:
        """The ids after which a response is sampled."""
        if isinstance(prompt, str):
            return self._encode(prompt, first=True)
        return self._encode(self._template(prompt, where, generation=True), first=True)

    def completion(self, prompt: Content, completion: Content, where: str) -> Rendered:
        """Prompt and completion; the labels are the completion and its EOS."""
        prompt_ids = self.prompt(prompt, where)
        if isinstance(completion, str) and isinstance(prompt, str):
            ids = self._ended(self._encode(completion))
            mask = [True] * len(ids)
        else:
            messages = _messages(prompt, "user")
            ids, mask = self._turns(messages, _messages(completion, "assistant"), where)
        # Without BOS and with an empty prompt, the first token has nothing to be predicted from.
        if not prompt_ids:
            mask[0] = False
        return self._fit(
            prompt_ids + ids, [False] * len(prompt_ids) + mask, where, prompt_length=len(prompt_ids)
        )

    def chat(self, row: ChatRow) -> Rendered:
        """A conversation.

        The labels are every assistant turn, or the last one alone, with the token that ends it.
        """
        first = next(i for i, m in enumerate(row.messages) if m.role == "assistant")
        prompt_ids = self.prompt(row.messages[:first], row.where) if first else []
        ids, mask = self._turns(row.messages[:first], row.messages[first:], row.where)
        if self.train_on == "last":
            last_false = max((i for i, m in enumerate(mask) if not m), default=-1)
            mask = [m and i > last_false for i, m in enumerate(mask)]
        if not prompt_ids:
            mask[0] = False
        return self._fit(
            prompt_ids + ids,
            [False] * len(prompt_ids) + mask,
            row.where,
            prompt_length=len(prompt_ids),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str, *, first: bool = False) -> list[int]:
        ids = (
            list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            if text
            else []
        )
        if first and self._bos and ids[:1] != self._bos:
            return self._bos + ids
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids with one EOS at the end, whether or not the text had its own."""
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def _template(
        self, messages: Sequence[Message], where: str, *, generation: bool = False
    ) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{where}: this row is made of chat messages and the tokenizer has no chat "
                "template: give one with --rows.chat-template (chatml or a Jinja file), or write "
                "the prompt as plain text"
            )
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    plain, tokenize=False, add_generation_prompt=generation
                )
            )
        except Exception as error:
            raise InputError(
                f"{where}: the chat template refuses these messages: {error}"
            ) from error

    def _turns(
        self, before: tuple[Message, ...], turns: tuple[Message, ...], where: str
    ) -> tuple[list[int], list[bool]]:
        """Ids and mask of `turns`, which follow `before` and its generation prompt."""
        ids: list[int] = []
        mask: list[bool] = []
        done = self._template(before, where, generation=True) if before else ""
        for i, turn in enumerate(turns):
            so_far = before + turns[: i + 1]
            asks = (
                i + 1 < len(turns) and turns[i + 1].role == "assistant" and turn.role != "assistant"
            )
            text = self._template(so_far, where, generation=asks)
            if not text.startswith(done):
                raise InputError(
                    f"{where}: the chat template rewrites earlier turns when a turn is added, so "
                    "it is unknown which tokens belong to a turn: give a template that only "
                    "appends, with --rows.chat-template"
                )
            piece = self._encode(text[len(done) :], first=not before and i == 0)
            done = text
            if turn.role != "assistant":
                ids, mask = ids + piece, mask + [False] * len(piece)
                continue
            last = i + 1 == len(turns)
            end = len(piece) - piece[::-1].index(self.eos) if self.eos in piece else None
            # Text that a template puts after the end of the last turn is never sampled, so it is
            # not trained on.
            if last:
                piece = piece[:end] if end is not None else [*piece, self.eos]
                ids, mask = ids + piece, mask + [True] * len(piece)
            else:
                end = len(piece) if end is None else end
                ids, mask = ids + piece, mask + [True] * end + [False] * (len(piece) - end)
        return ids, mask

    def _fit(self, ids: list[int], mask: list[bool], where: str, prompt_length: int) -> Rendered:
        if not any(mask):
            raise InputError(
                f"{where}: the row has no token to learn from; add an answer, or remove the row"
            )
        if len(ids) <= self.max_length:
            return Rendered(ids, mask, where)
        if self.on_long == "error" or not any(mask[: self.max_length]):
            part = "the prompt alone" if prompt_length >= self.max_length else "the row"
            have = prompt_length if prompt_length >= self.max_length else len(ids)
            raise InputError(
                f"{where}: {part} is {have} tokens and the limit is {self.max_length}: shorten it, "
                "raise --rows.max-length if the model's context allows it, or leave such rows out "
                "with --rows.on-error skip"
            )
        return Rendered(ids[: self.max_length], mask[: self.max_length], where, truncated=True)


def same_tokens(one: Renderer, other: Renderer) -> bool:
    """Whether both make the same ids from the same text or messages.

    A pad token that only `one` has does not count as a difference.
    """
    without = one.tokenizer.pad_token
    same = _tokens(one.tokenizer, without) == _tokens(other.tokenizer, without)
    return same and bool(one.tokenizer.chat_template == other.tokenizer.chat_template)


def _tokens(tokenizer: Any, without: str | None) -> Any:
    """Everything that turns text into ids, without one of the added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr(tokenizer)
    found = json.loads(backend.to_str())
    found["added_tokens"] = [t for t in found["added_tokens"] if t["content"] != without]
    return found


def _messages(content: Content, role: str) -> tuple[Message, ...]:
    return (Message(role, content),) if isinstance(content, str) else content


def set_chat_template(tokenizer: Any, template: str | None) -> None:
    """Sets the template to `chatml` or to the text of a Jinja file; None keeps the tokenizer's own.

    Raises:
        InputError: the template is neither.
    """
    if template is None:
        return
    if template == "chatml":
        tokenizer.chat_template = CHATML
        return
    path = Path(template)
    if not path.is_file():
        raise InputError(f"--rows.chat-template: {template} is neither chatml nor a file")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
