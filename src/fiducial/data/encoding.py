"""Text to token ids and back, with one tokenizer.

A prompt and the text after it are encoded as one text wherever the prompt's ids begin the ids of
the whole. Where they do not, because a token would reach across the seam, both parts are encoded
apart, and the second as the continuation that it is: tokenizers that mark the beginning of words
(SentencePiece) would otherwise put a mark, and so a space, where the text has none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

GUARD = "\ufdd0"
"""Stands inside a text where its encoding must be cut. Unicode reserves it as no character."""
TOGETHER = 256
"""Texts in one call of the tokenizer, which holds far more of each than its ids."""
_ANCHORS = ("\n", "(", ":", ".", "a", "1")


@dataclass(frozen=True)
class Encoder:
    """One tokenizer, and what it does at the beginning of a text.

    bos: the id that the tokenizer itself puts before plain text, or nothing.
    marks: whether the first word of a text gets a mark that is not in the text.
    strips: whether decoding drops the first space of a text.
    """

    tokenizer: Any
    bos: tuple[int, ...]
    marks: bool
    strips: bool
    _ahead: dict[str, list[int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @staticmethod
    def of(tokenizer: Any) -> Encoder:
        """Finds out by encoding a few short texts."""
        first, bos = tokenizer("a").input_ids[:1], tokenizer.bos_token_id
        begins = (bos,) if bos is not None and first == [bos] else ()
        plain = Encoder(tokenizer, begins, marks=True, strips=True)
        try:
            marks = plain.continued("a") != plain.encode("a")
            # A decoder that writes a space before every token has no text of its own to keep.
            strips = all(plain.decode(plain.continued(text)) == text for text in (" a", "a"))
        except Exception:  # a tokenizer that knows none of these characters
            marks = strips = False
        return Encoder(tokenizer, begins, marks, strips)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The ids of a whole text; cut where it holds a `GUARD`.

        Args:
            bos: begin with the BOS token if the tokenizer does so, and the text does not.
        """
        first, *rest = text.split(GUARD)
        ids = self._ids(first)
        for piece in rest:
            ids += self.continued(piece)
        return [*self.bos, *ids] if bos and tuple(ids[:1]) != self.bos else ids

    def expect(self, texts: Iterable[str]) -> None:
        """Encode these texts in a few calls of the tokenizer and forget those expected before."""
        self._ahead.clear()
        pieces = list(
            dict.fromkeys(piece for text in texts for piece in text.split(GUARD) if piece)
        )
        for start in range(0, len(pieces), TOGETHER):
            some = pieces[start : start + TOGETHER]
            ids = self.tokenizer(some, add_special_tokens=False, verbose=False).input_ids
            self._ahead.update(zip(some, ids, strict=True))

    def continued(self, text: str) -> list[int]:
        """The ids of a text that follows another one, without a mark of its own for the seam."""
        first, *rest = text.split(GUARD)
        ids = self._after_anchor(first) if self.marks and first else self._ids(first)
        for piece in rest:
            ids += self.continued(piece)
        return ids

    def joined(self, prompt: str, text: str, *, bos: bool = False) -> tuple[list[int], int, bool]:
        """Ids of a prompt and of what follows it.

        Returns:
            the ids, the number of them that are the prompt's (always the ids of the prompt alone),
            and whether both parts were encoded apart.
        """
        before, whole = self.encode(prompt, bos=bos), self.encode(prompt + text, bos=bos)
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole, len(before), False
        return before + self.continued(text), len(before), True

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that follow other ids, special tokens included: a first space stays."""
        if self.strips and ids:
            anchor = self._ids("a")[:1]
            alone, both = self._text(anchor), self._text([*anchor, *ids])
            if both.startswith(alone):
                return both[len(alone) :]
        return self._text(ids)

    def fingerprint(self) -> str:
        """A hash of the vocabulary, without a pad token that nothing else uses."""
        t = self.tokenizer
        vocabulary = dict(t.get_vocab())
        if t.pad_token not in (None, t.eos_token, t.bos_token, t.unk_token):
            vocabulary.pop(t.pad_token, None)
        text = json.dumps(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _ids(self, text: str) -> list[int]:
        if (known := self._ahead.get(text)) is not None:
            return list(known)
        return list(self._recent(text)) if text else []

    @functools.cached_property
    def _recent(self) -> Callable[[str], tuple[int, ...]]:
        """The ids of a text. Those of the last few are kept: an anchor is asked for with every
        text, a prompt with each of its responses, and a call of a tokenizer takes long.
        """

        def ids(text: str) -> tuple[int, ...]:
            return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

        return functools.lru_cache(maxsize=64)(ids)

    def _after_anchor(self, text: str) -> list[int]:
        for anchor in _ANCHORS:
            before, both = self._ids(anchor), self._ids(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._ids(text)

    def _text(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def added_tokens(tokenizer: Any) -> tuple[dict[str, int], frozenset[str]]:
    """The tokens of a tokenizer that a text spells as a whole, with their ids, and those of them
    that are special.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    special = {str(token): int(i) for token, i in named}
    special |= {str(token): int(i) for i, token in added.items() if token.special}
    found = {str(token): int(i) for i, token in added.items()} | special
    return found, frozenset(special)


def tags(special: Collection[str]) -> frozenset[str]:
    """Those special tokens that open and close a part of an answer, such as <think> and </think>.

    An answer may hold them: they are no control tokens, which begin or end a turn.
    """
    opening = {t for t in special if re.fullmatch(r"<[A-Za-z][\w-]*>", t)}
    pairs = {t for t in opening if f"</{t[1:]}" in special}
    return frozenset(pairs | {f"</{t[1:]}" for t in pairs})


def spelled(text: str, control: frozenset[str]) -> tuple[str, bool]:
    """The text with a `GUARD` in each control token that it spells, so that it stays text, and
    whether there was one.
    """
    pattern = _any_of(control)
    if pattern is None:
        return text, False
    guarded, count = pattern.subn(lambda m: m[0][0] + GUARD + m[0][1:], text)
    return guarded, count > 0


@lru_cache(maxsize=64)
def _any_of(words: frozenset[str]) -> re.Pattern[str] | None:
    """Matches any of the words, the longest first; a single character cannot be cut."""
    long = [re.escape(t) for t in sorted(words, key=len, reverse=True) if len(t) > 1]
    return re.compile("|".join(long)) if long else None
