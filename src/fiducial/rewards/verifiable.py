r"""Rewards that anyone can verify: the text against what the row says is right. On the command line
by their bare names, `--reward numeric_answer`.

Each has TRL's signature, so that it may be given to TRL too: `(prompts, completions, **columns) ->
list[float]`, completions as text or as messages, of which the last one's content counts; 1 where
the response is right and 0 where it is not. Rewards by running code do not come with the package.

===============  =======================  ======================================================================================
function         columns of the row       1 where
===============  =======================  ======================================================================================
exact_match      answer                   the text is the answer, white space aside, upper and lower case not
numeric_answer   answer                   the final number of the text is the answer's, exactly
format           pattern (optional)       the whole text matches; without a pattern it is `<think>...</think><answer>...</answer>`
length           min_words, max_words     the number of words is in the range, either end of which may be missing
===============  =======================  ======================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any


class ColumnFault(ValueError):
    """A row's column that a function cannot use. `row` is its place in the batch, `sentence` the
    fault without the place.
    """

    def __init__(self, row: int, sentence: str) -> None:
        self.row, self.sentence = row, sentence
        super().__init__(f"row {row} of the batch: {sentence}")


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """1 where the response is the row's `answer`: stripped, runs of white space (line ends too)
    taken for one space, then equal character by character.

    Case counts, punctuation counts, and nothing is normalised: an é written as one character is not
    an é written as two. An answer that is a number in the file is compared as Python writes it, 18
    or 0.5; for numbers take `numeric_answer`.

    Raises:
        ColumnFault: a row has no `answer`, or one that is neither text nor a number.
    """
    wanted = []
    for row, value in enumerate(_column("exact_match", "answer", answer, len(completions))):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ColumnFault(
                row,
                f"exact_match: the column 'answer' holds {_shown(value)} where text belongs; write "
                "a string",
            )
        wanted.append(_folded(str(value)))
    return [float(_folded(_text(c)) == w) for c, w in zip(completions, wanted, strict=True)]


def numeric_answer(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    r"""1 where the final number of the response (see `final_number`) is that of the row's `answer`.
    They are compared as fractions: 0.5, 1/2 and .50 are
    equal, 0.333 and 1/3 are not, and no float is ever formed. A response without a number gets 0.

    `answer` is a number, or text with one: "1,234", "$18", or a whole solution that ends in a
    marker, as GSM8K has it (`... #### 18`). Of text without a marker the first number counts, of
    "72 cm^2" the 72.

    Raises:
        ColumnFault: a row has no `answer`, or one without a number.
    """
    wanted = []
    for row, value in enumerate(_column("numeric_answer", "answer", answer, len(completions))):
        number = _answer_number(value)
        if number is None:
            raise ColumnFault(
                row,
                f"numeric_answer: the column 'answer' holds {_shown(value)}, which is no number; "
                "write one, or take exact_match",
            )
        wanted.append(number)
    return [float(final_number(_text(c)) == w) for c, w in zip(completions, wanted, strict=True)]


def format(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    pattern: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float]:
    """1 where the whole response matches the row's `pattern` (a regular expression of Python's
    `re`, in which a dot is any character, a line end too).

    A row without a pattern asks for the form of DeepSeek-R1 (arXiv 2501.12948):
    `<think>...</think><answer>...</answer>`, each tag once, white space around and between them.
    Where the chat template itself writes `<think>` at the end of the prompt, say so with a pattern.
    A pattern that takes exponential time does so here too: it is the user's own.

    Raises:
        ColumnFault: a pattern is no regular expression.
    """
    out = []
    for row, (completion, wanted) in enumerate(
        zip(completions, pattern or [None] * len(completions), strict=True)
    ):
        try:
            compiled = _THINK_ANSWER if wanted is None else re.compile(wanted, re.DOTALL)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ColumnFault(
                row,
                f"format: the column 'pattern' holds {_shown(wanted)}, which is no regular "
                f"expression: {error}",
            ) from error
        out.append(float(compiled.fullmatch(_text(completion)) is not None))
    return out


def length(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    min_words: Sequence[int | None] | None = None,
    max_words: Sequence[int | None] | None = None,
    **columns: Any,
) -> list[float]:
    """1 where the response has at least `min_words` and at most `max_words` words (what white space
    parts), 0 outside.

    A row may leave one of the two out, not both.

    Raises:
        ColumnFault: a row has neither, or one that is no whole number, or a range that nothing can
            be in.
    """
    none = [None] * len(completions)
    out = []
    for row, (completion, low, high) in enumerate(
        zip(completions, min_words or none, max_words or none, strict=True)
    ):
        if low is None and high is None:
            raise ColumnFault(
                row,
                "length needs the column 'min_words' or 'max_words', and the row has neither; add "
                "one",
            )
        for name, value in (("min_words", low), ("max_words", high)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 0
            ):
                raise ColumnFault(
                    row,
                    f"length: the column {name!r} holds {_shown(value)} where a whole number of "
                    "words belongs",
                )
        if low is not None and high is not None and low > high:
            raise ColumnFault(
                row,
                f"length: no response has at least {low} and at most {high} words; exchange "
                "'min_words' and 'max_words'",
            )
        words = len(_text(completion).split())
        out.append(float((low is None or words >= low) and (high is None or words <= high)))
    return out


VERIFIABLE: dict[str, Callable[..., list[float]]] = {
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    "format": format,
    "length": length,
}
"""By their names on the command line."""


def final_number(text: str) -> Fraction | None:
    r"""The number that a solution ends with, exactly; None where there is none.

    Where it stands: behind the last of the markers `A:`, `####`, `\boxed{`, `<answer>`, "answer is"
    and "answer:" (these two in any case) that has a number on its line, or on the next one where
    its own ends; there the first number counts, of an equation (`9 * 2 = 18`) what is behind its
    last equals sign. Without such a marker, the last number of the text.

    What a number is: `1,234.50` (commas part groups of three, otherwise they part numbers), `.5`,
    `-3` and `−3` (a sign directly before the digits or the currency, and not behind a digit, letter
    or bracket: in 16-3 the 3 is positive), `1.5e-3`, `1.5 × 10^3`, `3/4`, `1 3/4`, `\frac{3}{4}`;
    digits of any script. A currency in front and what follows, percent and units included, is
    dropped: 50% is 50. Digits glued behind a Latin letter (CO2) are none.

    What is not worked out: sums, powers and roots (of `10^2` the 10 counts), number words, decimal
    commas. `1/0`, and more than 1,000 digits or an exponent beyond 1,000, have no value: what ends
    with them has no final number.
    """
    end = len(text)
    for marker in reversed(list(_MARKER.finditer(text))):
        if found := _FORM.search(_behind(marker[0], text[marker.end() : end])):
            return _value(found)
        end = marker.start()
    *_, last = [None, *_FORM.finditer(_plain(text))]
    return _value(last) if last else None


# ---- how it is read ----

# no class of one overlaps with the next, and what may be long is possessive (++): time is linear in
# the text whatever it is
_NO_TAG = r"[^<]*+(?:<(?!/?(?:think|answer)>)[^<]*+)*+"
_THINK_ANSWER = re.compile(rf"\s*<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>\s*")

_MARKER = re.compile(r"(?<![A-Za-z])A:|####|\\boxed\b|<answer>|(?i:\banswer[*_]*\s?(?:is\b|:))")
_LEFT_SIDES = re.compile(r"(?:[^\d=]*+[\d\s.,$£€¥₹%+\-*/x\u00d7\u00f7()]*+=)*+")
_DIGITS = r"(?:\d{1,3}(?:,\d{3}(?!\d))++|\d++)(?:\.\d++)?|(?<![\d.])\.\d++"
_POWER = r"(?:[eE][-+]?\d++|\s?(?:[x\u00d7*]|\\times|\\cdot)\s?10\^(?:\{[-+]?\d++\}|[-+]?\d++))"
_NUMBER = rf"(?:{_DIGITS}){_POWER}?"
_FORM = re.compile(
    rf"""
    (?P<sign> (?<![A-Za-z\d_)\]}}\-]) [-+] )?  [$£€¥₹]?  (?<![A-Za-z\d_])
    (?: (?: (?P<whole>\d++) \s? )? \\[dt]?frac \{{ \s? (?P<top>[-+]?{_NUMBER}) \s? \}} \{{ \s? (?P<bottom>[-+]?{_NUMBER}) \s? \}}
      | (?P<whole2>\d++) [ \u00a0] (?P<top2>\d++) \s? / \s? (?P<bottom2>\d++)
      | (?P<top3>{_NUMBER}) (?: [ ]?/[ ]? (?P<bottom3>{_NUMBER}) )?
    )""",
    re.VERBOSE,
)
_LONGEST = 1000


def _plain(text: str) -> str:
    """With the minus of typography, and without what LaTeX puts between or before digits."""
    return re.sub(r"\\[,!;]|\\(?=[$%])", "", text.replace("\u2212", "-").replace("{,}", ","))


def _behind(marker: str, rest: str) -> str:
    """What a marker points to: its braces, or its line, or the next where its own is empty; of an
    equation the right side.
    """
    rest = rest.lstrip()
    if marker == "\\boxed" and rest.startswith("{"):
        depth = 0
        for brace in re.finditer(r"[{}]", rest):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                rest = rest[1 : brace.start()]
                break
    line = _plain(re.split(r"\n|</answer>", rest, maxsplit=1)[0])
    equation = _LEFT_SIDES.match(line)
    return line[equation.end() :] if equation else line


def _value(found: re.Match[str]) -> Fraction | None:
    whole = _exactly(found["whole"] or found["whole2"] or "0")
    top = _exactly(found["top"] or found["top2"] or found["top3"])
    bottom = _exactly(found["bottom"] or found["bottom2"] or found["bottom3"] or "1")
    if whole is None or top is None or not bottom:
        return None
    return (whole + top / bottom) * (-1 if found["sign"] == "-" else 1)


def _exactly(text: str) -> Fraction | None:
    """The value of what `_NUMBER` matched, without ever forming a power of ten that does not fit
    into memory.
    """
    power = re.search(_POWER, text)
    digits, exponent = (
        (text[: power.start()], re.sub(r".*10\^\{?|[eE}]", "", power[0])) if power else (text, "0")
    )
    if len(digits) > _LONGEST or len(exponent) > 6 or abs(int(exponent)) > _LONGEST:
        return None
    return Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent)


def _answer_number(value: Any) -> Fraction | None:
    if isinstance(value, str):
        if _MARKER.search(value):
            return final_number(value)
        found = _FORM.search(_plain(value))
        return _value(found) if found else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return (
        Fraction(value) if isinstance(value, int) else Fraction(repr(value))
    )  # as the file writes it: 0.1 is one tenth


def _column(function: str, name: str, values: Sequence[Any] | None, rows: int) -> Sequence[Any]:
    """One value a row; a row without one is a fault."""
    values = [None] * rows if values is None else values
    for row, value in enumerate(values):
        if value is None:
            raise ColumnFault(
                row,
                f"{function} needs the column {name!r}, which the row does not have; add it, or "
                "choose another reward",
            )
    return values


def _text(completion: Any) -> str:
    """A completion's text: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    return content if isinstance(content, str) else ""


def _folded(text: str) -> str:
    return " ".join(text.split())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
