"""Token ids and the loss mask, made together. Nothing later infers a mask from pad ids, or decodes
and encodes again.

A sequence begins with the ids of its prompt, exactly as they are when a response is sampled. What
follows has the ids that the tokenizer gives the whole text, where those begin with the prompt's;
otherwise it is encoded apart (see `encoding`). Plain text begins with one BOS if the tokenizer adds
one, and special tokens that it spells are read as such, as in TRL. In a conversation the chat
template alone writes special tokens, BOS included, as `apply_chat_template` does; what a message
spells stays text. The token that ends a response is a label, even if it is also the pad token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import InputError
from .ahead import texts_of
from .encoding import Encoder
from .rendered import Rendered as Rendered
from .row_types import ChatRow, Content, Message, Row, SampledIds, TextRow
from .templates import CHATML as CHATML
from .templates import ChatTemplate, Turn
from .templates import set_chat_template as set_chat_template

_NOTES = {
    "apart": "{n} of {total} rows ({share:.1%}) have a token that would reach across the seam of "
    "prompt and answer, so the two are encoded apart",
    "spelled": "{n} of {total} rows ({share:.1%}) spell a special token in a message: it stays "
    "text",
    "turns": "{n} of {total} conversations ({share:.1%}) are trained turn by turn, each behind its "
    "own prompt: in one sequence their tokens would not be those that are sampled, because the "
    "chat template rewrites earlier turns or does not end them",
    "opened": "{n} of {total} rows ({share:.1%}) have an answer without the thinking that the chat "
    "template's prompt opens; they are trained with an empty one",
    "sampled": "{n} of {total} rows ({share:.1%}) are trained on the very tokens that were sampled",
    "foreign": "{n} of {total} rows ({share:.1%}) hold token ids of another tokenizer or "
    "another text; their text is encoded anew",
    "bos": "the chat template writes no BOS token although the tokenizer adds one to plain text: "
    "conversations begin without it, as they do in transformers",
}
"""What is said of rows that were rendered in another way than their text alone says."""


@dataclass(frozen=True)
class Renderer:
    """How text becomes tokens for one tokenizer.

    end_ids: what ends a response beside the tokenizer's EOS and the token with which its chat
        template ends a turn: the ids that the model's configs name.
    seen: places of the rows that a note speaks of, by its kind, and counts: how many there were
        before.
    """

    tokenizer: Any
    max_length: int
    on_long: Literal["truncate", "error"] = "truncate"
    train_on: Literal["all", "last"] = "all"
    end_ids: frozenset[int] = frozenset()
    seen: dict[str, set[str]] = field(default_factory=dict, repr=False, compare=False)
    counts: Counter[str] = field(default_factory=Counter, repr=False, compare=False)
    _ahead: dict[Any, list[Turn]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    encoder: Encoder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no EOS token, so a model could not learn to stop: choose one of "
                "its tokens with --rows.eos-token"
            )
        object.__setattr__(self, "encoder", Encoder.of(self.tokenizer))

    def __reduce__(self) -> Any:
        state = self.tokenizer, self.max_length, self.on_long, self.train_on, self.end_ids
        return Renderer, state

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate.of(self.tokenizer, self.end_ids | {self.eos})

    @property
    def ends(self) -> frozenset[int]:
        """Every id that ends a response."""
        return self.template.ends

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Ids that are no part of a response's text: its ends, BOS and padding."""
        named = (self.tokenizer.bos_token_id, self.tokenizer.pad_token_id)
        return self.ends | {i for i in named if i is not None}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary, to tell whether token ids in a file are of this tokenizer."""
        return self.encoder.fingerprint()

    def text(self, row: TextRow) -> Rendered:
        """Plain text: every token but the first is a label, and so is the EOS after it."""
        ids = self._ended(self.encoder.encode(row.text, bos=True))
        return self._fit(ids, [False] + [True] * (len(ids) - 1), row.where, prompt_length=1)

    def prompt(self, prompt: Content, where: str) -> list[int]:
        """The ids after which a response is sampled."""
        if isinstance(prompt, str):
            return self.encoder.encode(prompt, bos=True)
        text = self.template.render(self._guarded(prompt, where), where, generation=True)
        return self._begun(self.encoder.encode(text), where)

    def completion(
        self,
        prompt: Content,
        completion: Content,
        where: str,
        sampled: SampledIds | None = None,
    ) -> Rendered:
        """Prompt and completion; the labels are the completion and the token that ends it.

        Args:
            sampled: the tokens of the completion as a model chose them. They are used as they are
                if they are of this tokenizer and say the same text: one that was cut has no end.

        Raises:
            InputError: the row does not fit, has nothing to learn, or the chat template refuses it.
        """
        if sampled is not None and self._sampled(completion, sampled, where):
            before = self.prompt(prompt, where)
            return self._labeled(before + list(sampled.ids), len(before), where)
        if isinstance(completion, str) and isinstance(prompt, str):
            ids, start, apart = self.encoder.joined(prompt, completion, bos=True)
            self._see("apart", where, apart)
            return self._labeled(self._ended(ids), start, where)
        asked, answer = _messages(prompt, "user"), _messages(completion, "assistant")
        return self._one(asked + answer, len(asked), where, every=True)

    def chat(self, row: ChatRow) -> Rendered:
        """A conversation as one sequence.

        The labels are every assistant turn, or the last one alone, with the token that ends it.

        Raises:
            InputError: as for `completion`; or the turns have no common sequence (see `turns`).
        """
        return self._one(row.messages, 0, row.where, every=self.train_on == "all")

    def turns(self, row: ChatRow) -> list[Rendered]:
        """A conversation as one sequence if every turn has the same tokens in it as when it is
        sampled, and its end; otherwise as one sequence for each of the assistant's turns.
        """
        every = self.train_on == "all"
        parts, common = self._parts(row.messages, 0, row.where, every=every, ended=True)
        if common is not None:
            return [common]
        self._see("turns", row.where)
        out: list[Rendered] = []
        for ids, mask in parts:
            start = mask.index(True) if any(mask) else len(ids)
            if out and start >= self.max_length and self.on_long == "truncate":
                out[-1] = replace(out[-1], truncated=True)
                break
            out.append(self._fit(ids, mask, row.where, start))
        return out

    def expect(self, rows: Sequence[Row]) -> None:
        """Make rendering these rows next fast; their tokens stay the same."""
        self._ahead.clear()
        every = self.train_on == "all"
        self.encoder.expect(texts_of(rows, self._turns_ahead, every))

    def _turns_ahead(
        self, messages: tuple[Message, ...], first: int, where: str, every: bool
    ) -> list[Turn]:
        """What `_turns` says now, and will say once more without the work."""
        turns = self._turns(messages, first, where, every)
        self._ahead[messages, first, where, every] = turns
        return turns

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without the tokens that end it, BOS and padding.

        Other special tokens, such as <think>, are part of the text.
        """
        return self.encoder.decode([i for i in ids if i not in self.hidden])

    def take_notes(self, total: int) -> str:
        """One sentence on each peculiarity of the rows rendered since the last call, or "".

        Args:
            total: number of rows that were rendered.
        """
        self.counts.update(self.take_counts())
        said = [
            text.format(n=f"{n:,}", total=f"{total:,}", share=n / max(total, 1))
            for kind, text in _NOTES.items()
            if (n := self.counts[kind])
        ]
        self.counts.clear()
        return "; ".join(said)

    def take_counts(self) -> dict[str, int]:
        """How many rows each note is about, of those rendered since the last call."""
        counts = {kind: len(places) for kind, places in self.seen.items()}
        self.seen.clear()
        return counts

    def _see(self, kind: str, where: str, happened: bool = True) -> None:
        if happened:
            self.seen.setdefault(kind, set()).add(where)

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids with one end, whether or not the text had its own."""
        return ids if ids and ids[-1] in self.ends else [*ids, self.eos]

    def _begun(self, ids: list[int], where: str) -> list[int]:
        self._see("bos", "", bool(self.encoder.bos) and tuple(ids[:1]) != self.encoder.bos)
        return ids

    def _guarded(self, messages: Sequence[Message], where: str) -> tuple[Message, ...]:
        guarded, found = self.template.guarded(messages, where)
        self._see("spelled", where, found)
        return guarded

    def _sampled(self, completion: Content, sampled: SampledIds, where: str) -> bool:
        """Whether the ids are of this tokenizer and say the completion's text."""
        content = completion if isinstance(completion, str) else completion[-1].content
        one = isinstance(completion, str) or len(completion) == 1
        ids = list(sampled.ids)
        fits = (
            one
            and sampled.tokenizer == self.fingerprint
            and (self.decode(ids) == content or self.decode(ids[:-1]) == content)
        )
        self._see("sampled" if fits else "foreign", where)
        return fits

    def _one(
        self, messages: tuple[Message, ...], first: int, where: str, *, every: bool
    ) -> Rendered:
        parts, common = self._parts(messages, first, where, every=every)
        if common is not None:
            return common
        raise InputError(
            f"{where}: the chat template rewrites earlier turns when a turn is added, so the "
            f"{len(parts)} turns of the assistant have no common sequence of tokens: write all but "
            "the last into the prompt"
        )

    def _parts(
        self,
        messages: tuple[Message, ...],
        first: int,
        where: str,
        *,
        every: bool,
        ended: bool = False,
    ) -> tuple[list[tuple[list[int], list[bool]]], Rendered | None]:
        """Ids and mask of each of the assistant's turns from message `first` on, and the one
        sequence that holds all of them, if there is one.

        Args:
            ended: every turn must end there with a token that ends a response.
        """
        turns = self._turns(messages, first, where, every)
        self._see("opened", where, any(t.opened for t in turns))
        spans: list[tuple[int, int]] = []
        whole = self._answered(turns[-1], where)
        for turn in turns[:-1]:
            span = self._span(turn, whole[0])
            if span is None or (ended and whole[0][span[1] - 1] not in self.ends):
                parts = [self._answered(t, where) for t in turns]
                return [_masked(ids, start) for ids, start in parts], None
            spans.append(span)
        ids, start = whole
        mask = [False] * len(ids)
        for a, b in [*spans, (start, len(ids))]:
            mask[a:b] = [True] * (b - a)
        mask[0] = False  # nothing comes before the first token that it could be predicted from
        length = spans[0][0] if spans else start
        return [(ids, mask)], self._fit(ids, mask, where, prompt_length=length)

    def _turns(
        self, messages: tuple[Message, ...], first: int, where: str, every: bool
    ) -> list[Turn]:
        """Each of the assistant's turns from message `first` on, or the last one alone.

        Raises:
            InputError: the chat template refuses the messages.
        """
        known = self._ahead.pop((messages, first, where, every), None)
        if known is not None:
            return known
        numbers = [i for i, m in enumerate(messages) if m.role == "assistant" and i >= first]
        numbers = numbers if every else numbers[-1:]
        guarded = self._guarded(messages[: numbers[-1] + 1], where)
        return [self.template.turn(guarded, i, where) for i in numbers]

    def _answered(self, turn: Turn, where: str) -> tuple[list[int], int]:
        """Ids of a turn behind its prompt, with its end, and how many are the prompt's."""
        ids, start, apart = self.encoder.joined(turn.prompt, turn.answer)
        self._see("apart", where, apart)
        return self._ended(self._begun(ids, where)), start

    def _span(self, turn: Turn, whole: list[int]) -> tuple[int, int] | None:
        """Where an earlier turn stands in a conversation's ids, its end included; None if it does
        not stand there with the tokens that are sampled.
        """
        ids, start, apart = self.encoder.joined(turn.prompt, turn.answer)
        if apart or whole[: len(ids)] != ids:
            return None
        # The first token of the next turn may be what ends this one.
        after = ids[-1] not in self.ends and whole[len(ids)] in self.ends
        return start, len(ids) + after

    def _labeled(self, ids: list[int], start: int, where: str) -> Rendered:
        ids, mask = _masked(ids, start)
        return self._fit(ids, mask, where, prompt_length=start)

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


def _masked(ids: list[int], start: int) -> tuple[list[int], list[bool]]:
    """The ids, with all from `start` on as labels but the very first of a sequence."""
    return ids, [i >= max(start, 1) for i in range(len(ids))]


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
