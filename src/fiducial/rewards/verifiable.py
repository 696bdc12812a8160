r"""Verifiable rewards: a response is compared with what its row says is right. On the command line
they have bare names, as in `--reward numeric_answer`.

Each function has TRL's signature, so that it works there too: `(prompts, completions, **columns) ->
list[float]`. Completions are text, or messages, of which the content of the last one counts. The
reward is 1 if the response is right, and else 0. No reward runs code.

==============  ====================  =========================================================
function        columns of the row    the reward is 1 if
==============  ====================  =========================================================
exact_match     answer                the text equals the answer, apart from white space
numeric_answer  answer                the final number of the text equals that of the answer
format          pattern (optional)    the whole text matches; the default pattern is
                                      `<think>...</think><answer>...</answer>`
length          min_words, max_words  the number of words is in the range; one end is optional
==============  ====================  =========================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any


class ColumnFault(ValueError):
    """A row has a column that a function cannot use.

    `row` is the row's place in the batch, and `sentence` is the fault without the place.
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
    """1 if the response equals the row's `answer`, apart from white space.

    Both are stripped, and each run of white space (line ends included) counts as one space. Case
    and punctuation count. Unicode is not normalized: an é of one character does not equal an é of
    two. An answer that is a number in the file is compared as Python writes it, such as 18 or 0.5;
    for numbers use `numeric_answer`.

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
    r"""1 if the final number of the response equals that of the row's `answer`.

    For what a number is, see `final_number`. Numbers are compared as fractions, without floats:
    0.5, 1/2 and .50 are equal, 0.333 and 1/3 are not. A response without a number gets 0.

    `answer` is a number, or text with a number, such as "1,234" or "$18". It may be a whole
    solution with a marker before the number, as in GSM8K (`... #### 18`). In text without a marker
    the first number counts: in "72 cm^2" the 72.

    Raises:
        ColumnFault: a row has no `answer`, or one without a number.
    """
    wanted = []
    for row, value in enumerate(_column("numeric_answer", "answer", answer, len(completions))):
        number = _answer_number(value)
        if number is None:
            raise ColumnFault(
                row,
                f"numeric_answer: the column 'answer' holds {_shown(value)}, which is not a "
                "number; write one, or use exact_match",
            )
        wanted.append(number)
    return [float(final_number(_text(c)) == w) for c, w in zip(completions, wanted, strict=True)]


def format(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    pattern: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float]:
    """1 if the whole response matches the row's `pattern`.

    The pattern is a regular expression of Python's `re`, in which a dot is any character, line ends
    included. Nothing protects from a pattern that takes exponential time.

    The pattern of a row without one is the form of DeepSeek-R1 (arXiv 2501.12948):
    `<think>...</think><answer>...</answer>`, each tag once, with white space around and between the
    two parts. If the chat template ends the prompt with `<think>`, give a pattern without it.

    Raises:
        ColumnFault: a pattern is not a regular expression.
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
                f"format: the column 'pattern' holds {_shown(wanted)}, which is not a regular "
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
    """1 if the response has at least `min_words` and at most `max_words` words.

    Words are separated by white space. A row must have at least one of the two columns.

    Raises:
        ColumnFault: a row has neither, or one that is not a whole number, or `min_words` is larger
            than `max_words`.
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
"""The verifiable rewards by their names on the command line."""


def final_number(text: str) -> Fraction | None:
    r"""The number with which a solution ends, exactly; None if there is none.

    Where it is found: after a marker, which is `A:`, `####`, `\boxed{`, `<answer>`, "answer is" or
    "answer:" (the last two in any case). The number must be on the marker's line, or on the next
    one if nothing follows the marker. The last marker with such a number counts, and after it the
    first number. In an equation (`9 * 2 = 18`) only the right side counts. If no marker has a
    number, the last number of the text counts.

    What a number is: `1,234.50` (commas separate groups of three digits, otherwise they separate
    numbers), `.5`, `-3`, `−3`, `1.5e-3`, `1.5 × 10^3`, `3/4`, `1 3/4` and `\frac{3}{4}`, with
    digits of any script. A sign must be directly before the digits or the currency, and not after a
    digit, letter or bracket: in 16-3 the 3 is positive. A currency sign before the number and
    everything after it (percent, units) are ignored: 50% is 50. Digits after a Latin letter (CO2)
    are not a number.

    What is not computed: sums, powers and roots (in `10^2` the 10 counts), number words and decimal
    commas. `1/0`, more than 1,000 digits and exponents beyond 1,000 have no value. A solution that
    ends with one of these has no final number.
    """
    end = len(text)
    for marker in reversed(list(_MARKER.finditer(text))):
        if found := _FORM.search(_pointed_to(marker[0], text[marker.end() : end])):
            return _value(found)
        end = marker.start()
    *_, last = [None, *_FORM.finditer(_plain(text))]
    return _value(last) if last else None


# ---- how numbers are read ----

# Neighboring character classes do not overlap, and everything that may be long is possessive (++),
# so that the time is linear in the length of any text.
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
    (?: (?: (?P<whole>\d++) \s? )? \\[dt]?frac
        \{{ \s? (?P<top>[-+]?{_NUMBER}) \s? \}} \{{ \s? (?P<bottom>[-+]?{_NUMBER}) \s? \}}
      | (?P<whole2>\d++) [ \u00a0] (?P<top2>\d++) \s? / \s? (?P<bottom2>\d++)
      | (?P<top3>{_NUMBER}) (?: [ ]?/[ ]? (?P<bottom3>{_NUMBER}) )?
    )""",
    re.VERBOSE,
)
_LONGEST = 1000


def _plain(text: str) -> str:
    """The text with hyphens for minus signs, and without LaTeX's marks before or between digits."""
    return re.sub(r"\\[,!;]|\\(?=[$%])", "", text.replace("\u2212", "-").replace("{,}", ","))


def _pointed_to(marker: str, rest: str) -> str:
    """The text that a marker points to, without the left side of an equation.

    It is the text in the marker's braces, or else the first line after it that is not empty.
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
    """The value of what `_FORM` matched."""
    whole = _exactly(found["whole"] or found["whole2"] or "0")
    top = _exactly(found["top"] or found["top2"] or found["top3"])
    bottom = _exactly(found["bottom"] or found["bottom2"] or found["bottom3"] or "1")
    if whole is None or top is None or not bottom:
        return None
    return (whole + top / bottom) * (-1 if found["sign"] == "-" else 1)


def _exactly(text: str) -> Fraction | None:
    """The value of what `_NUMBER` matched, or None if it would be too large to compute."""
    power = re.search(_POWER, text)
    digits, exponent = (
        (text[: power.start()], re.sub(r".*10\^\{?|[eE}]", "", power[0])) if power else (text, "0")
    )
    if len(digits) > _LONGEST or len(exponent) > 6 or abs(int(exponent)) > _LONGEST:
        return None
    return Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent)


def _answer_number(value: Any) -> Fraction | None:
    """The number in a row's `answer`, or None."""
    if isinstance(value, str):
        if _MARKER.search(value):
            return final_number(value)
        found = _FORM.search(_plain(value))
        return _value(found) if found else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    # A float is read as the file writes it, so that 0.1 is one tenth.
    return Fraction(value) if isinstance(value, int) else Fraction(repr(value))


def _column(function: str, name: str, values: Sequence[Any] | None, rows: int) -> Sequence[Any]:
    """The column's values, one per row.

    Raises:
        ColumnFault: a row has no value.
    """
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
    """A completion that is text, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    return content if isinstance(content, str) else ""


def _folded(text: str) -> str:
    """The text, stripped, with one space for each run of white space."""
    return " ".join(text.split())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
