r"""Where the steps of a solution end, by one rule for the text of a row and for sampled tokens.

A step ends with its separator, if it holds anything but white space: an empty line is not a step,
but a part of the next step. The last step ends with the last token, which is EOS if there is one,
and includes white space before it. So every solution has at least one step, its last step ends at
the token where a reward model is read, and the steps of a text can be joined to the same text.

    "a\n\nb\n" with separator "\n" gives "a", "\nb\n"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .render import Renderer


def split(text: str, separator: str) -> list[str]:
    """The steps of a text; joined by the separator, they are the text again.

    If the separator is empty, every character is a step.
    """
    ends = step_ends(text, separator)
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        text[a : b + 1 - (0 if k + 1 == len(ends) else len(separator))]
        for k, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]


def step_ends(pieces: Sequence[str] | Iterable[str], separator: str) -> list[int]:
    """Numbers of the pieces (characters, or the texts of tokens) with which a step ends.

    The last number is always that of the last piece. A separator may cover several pieces. A piece
    that holds the ends of two steps ends only one.

    Raises:
        ValueError: there is no piece.
    """
    pieces = list(pieces)
    if not pieces:
        raise ValueError("an empty solution has no steps; give at least one token or character")
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
    """Where the first separator after more than white space ends; -1 if there is none."""
    at = step.find(separator)
    while at >= 0 and not step[:at].strip():
        at = step.find(separator, at + len(separator))
    return at + len(separator) if at >= 0 else -1


@dataclass(frozen=True)
class Steps:
    """Finds the ends of steps among the tokens of one tokenizer.

    Every character of the separator must lie within one token: a character whose bytes are split
    over several tokens is not found.
    """

    renderer: Renderer
    separator: str
    _texts: dict[int, str] = field(default_factory=dict, repr=False)

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Indices of the tokens of a response (EOS included if it has one) with which a step ends.

        The last index is always that of the last token.
        """
        return step_ends([self._text(i) for i in ids], self.separator)

    def _text(self, token: int) -> str:
        """The text that a token adds to the text before it.

        The tokens that a response's text leaves out add none, unless they hold the separator.
        """
        if token not in self._texts:
            tokenizer = self.renderer.tokenizer
            # Decoded after another token, because decoders may strip a text's first space.
            anchor = tokenizer("a", add_special_tokens=False).input_ids[:1]
            alone, both = (
                str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
                for ids in (anchor, [*anchor, token])
            )
            text = (
                both[len(alone) :]
                if both.startswith(alone)
                else str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
            )
            silent = token in self.renderer.hidden and not (
                self.separator and self.separator in text
            )
            self._texts[token] = "" if silent else text
        return self._texts[token]
