"""Where the steps of a solution end: one rule, for the text of a row and for tokens that were sampled.

A step ends where the separator is complete, if anything but white space stands in it: an empty line
is no step, it belongs to the step behind it. The last step ends with the last token, EOS where
there is one; white space in front of that belongs to it too. So every solution has a step, its last
step ends where a reward model is read, and text that is cut into steps and joined again is the same
text.

    "a\n\nb\n"  with "\n"  ->  "a", "\nb\n"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .render import Renderer


def split(text: str, separator: str) -> list[str]:
    """The steps of a text; joined by the separator they are the text again. Without a separator a
    character is a step.
    """
    ends = step_ends(text, separator)
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        text[a : b + 1 - (0 if k + 1 == len(ends) else len(separator))]
        for k, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]


def step_ends(pieces: Sequence[str] | Iterable[str], separator: str) -> list[int]:
    """Numbers of the pieces (tokens' texts, or characters) with which a step ends; the last is that
    of the last piece.

    The separator may stand across pieces. A piece that holds the ends of two steps can end but one.

    Raises:
        ValueError: there is no piece.
    """
    pieces = list(pieces)
    if not pieces:
        raise ValueError("nothing has no steps")
    if not separator:
        return list(range(len(pieces)))
    ends: list[int] = []
    step = ""
    for i, piece in enumerate(pieces):
        step += piece
        while (at := _complete(step, separator)) >= 0:
            step = step[at:]
            if ends[-1:] != [i]:
                ends.append(i)
    last = len(pieces) - 1
    if step.strip() and ends[-1:] != [last]:
        ends.append(last)
    return [*ends[:-1], last]


def _complete(step: str, separator: str) -> int:
    """Where the separator ends that closes more than white space; -1 if none does."""
    at = step.find(separator)
    while at >= 0 and not step[:at].strip():
        at = step.find(separator, at + len(separator))
    return at + len(separator) if at >= 0 else -1


@dataclass(frozen=True)
class Steps:
    """Finds step ends among the tokens of one tokenizer.

    A separator must be made of whole tokens' texts: one character that is split into bytes over
    several tokens is not found.
    """

    renderer: Renderer
    separator: str
    _texts: dict[int, str] = field(default_factory=dict, repr=False)

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Indices into the tokens of a response (EOS included where it has one) with which a step
        ends; the last is that of the last token.
        """
        return step_ends([self._text(i) for i in ids], self.separator)

    def _text(self, token: int) -> str:
        """The text that a token adds to what stands before it. Special tokens add none, unless the
        separator is one.
        """
        if token not in self._texts:
            tokenizer = self.renderer.tokenizer
            anchor = tokenizer("a", add_special_tokens=False).input_ids[
                :1
            ]  # a decoder may strip the space with which a text begins
            alone, both = (
                str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
                for ids in (anchor, [*anchor, token])
            )
            text = (
                both[len(alone) :]
                if both.startswith(alone)
                else str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
            )
            special = token in tokenizer.all_special_ids and not (
                self.separator and self.separator in text
            )
            self._texts[token] = "" if special else text
        return self._texts[token]
