"""Rows as they are trained on, in colour in a terminal and with marks elsewhere."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from ..data.render import Rendered, Renderer
from ..data.survey import Survey
from ..methods.prm import Solution
from ..methods.setup import Prepared

MOST = 400
"""Characters of a stretch that are shown; the middle of a longer one is left out."""
_CODES = {"dim": "2", "green": "32", "red": "31", "yellow": "33", "bold": "1"}
LEGEND = {
    True: "the prompt is dim, what is trained is green",
    False: "«what is trained» stands between these marks",
}


def paint(text: str, how: str, colour: bool) -> str:
    """The text in a colour of a terminal, or as it is."""
    return f"\x1b[{_CODES[how]}m{text}\x1b[0m" if colour else text


def row_lines(survey: Survey, colour: bool) -> list[str]:
    """The rows that the survey kept, each as the sequences that are trained on."""
    lines = []
    for row, made in survey.shown:
        lines.append(row.where)
        for name, ids, mask, cut in _stretches(made):
            text = _line(survey.renderer, ids, mask, colour)
            end = paint(f" [cut at {len(ids):,} tokens]", "red", colour) if cut else ""
            lines.append(f"  {name}{text}{end}")
    return lines


def _stretches(made: Any) -> Iterable[tuple[str, list[int], list[bool], bool]]:
    if isinstance(made, list):
        yield "", made, [False] * len(made), False
    elif isinstance(made, Solution):
        ends = set(made.ends[: len(made.labels)])
        ids = made.rendered.ids
        yield "", ids, [t in ends for t in range(len(ids))], made.rendered.truncated
    elif isinstance(made, Rendered):
        yield "", made.ids, made.mask, made.truncated
    else:
        for name, one in zip(("chosen:   ", "rejected: "), made, strict=True):
            yield name, one.ids, one.mask, one.truncated


def _line(renderer: Renderer, ids: Sequence[int], mask: Sequence[bool], colour: bool) -> str:
    out = []
    at = 0
    for trained, run in itertools.groupby(mask):
        count = len(list(run))
        text = shown(renderer.encoder.decode(list(ids[at : at + count])))
        at += count
        if colour:
            out.append(paint(text, "green" if trained else "dim", True))
        else:
            out.append(f"«{text}»" if trained else text)
    return "".join(out)


def shown(text: str) -> str:
    """A text on one line, without characters that could move the cursor, and not too long."""
    if len(text) > MOST:
        half = MOST // 2
        text = f"{text[:half]} [... {len(text) - MOST:,} characters ...] {text[-half:]}"
    text = text.replace("\n", "⏎")
    return "".join(c if unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in text)


def share_lines(survey: Survey, ready: object) -> list[str]:
    """What the rows are, in a few lines, and how long they are."""
    n = survey.n
    rows = f"{survey.total:,} rows"
    if n["rows"] < survey.total and n["rows"]:
        rows += f", {n['rows']:,} of them looked at"
    lines = [f"{rows}; {survey.prompts:,} different prompts" if survey.prompts else rows]
    if n["sequences"] and isinstance(ready, Prepared):
        lines.append(
            f"{n['labels'] / n['tokens']:.1%} of {n['tokens']:,} tokens are trained, "
            f"{n['cut'] / n['sequences']:.1%} of {n['sequences']:,} sequences are cut at "
            f"{survey.renderer.max_length:,}"
        )
    return [*lines, *histogram(survey.lengths, "tokens")]


def histogram(values: Sequence[int], unit: str, bars: int = 8, width: int = 40) -> list[str]:
    """Text bars of how often values occur, in ranges of equal width."""
    if not len(values):
        return []
    low, high = min(values), max(values)
    size = max(1, -(-(high - low + 1) // bars))
    counts = [0] * (-(-(high - low + 1) // size))
    for value in values:
        counts[(value - low) // size] += 1
    most = max(counts)
    wide = len(f"{high:,}")
    return [
        f"{low + k * size:>{wide},} to {min(high, low + (k + 1) * size - 1):>{wide},} {unit} "
        f"{'█' * max(int(count > 0), round(width * count / most)):<{width}} {count:,}"
        for k, count in enumerate(counts)
    ]


def row_numbers(survey: Survey) -> dict[str, Any]:
    """The same as plain numbers."""
    n, ordered = survey.n, sorted(survey.lengths)
    quantiles = {
        name: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
        for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
        if ordered
    }
    return {
        "rows": survey.total,
        "looked_at": n["rows"],
        "prompts": survey.prompts,
        "sequences": n["sequences"],
        "tokens": n["tokens"],
        "trained_tokens": n["labels"],
        "trained_share": n["labels"] / n["tokens"] if n["tokens"] else 0.0,
        "cut_share": n["cut"] / n["sequences"] if n["sequences"] else 0.0,
        "length": {"min": ordered[0], "max": ordered[-1], **quantiles} if ordered else {},
    }
