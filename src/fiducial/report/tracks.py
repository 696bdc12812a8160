"""What alarms look at: the numbers of a run so far, in bounded memory, and the run's settings."""

from __future__ import annotations

import functools
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

FIRST = 5
"""Records that make up the start of a run."""
RECENT = 10
"""Records that the present is judged by."""
KEPT = 50
"""Newest records that are kept of each metric."""


class Track:
    """One metric so far. Values are finite.

    count: number of values. first: the first of them. start: mean of the first five. mean: of the
    newest ten. Of fewer values, it is the mean of those. best: the highest mean of ten successive
    values, -inf before there are ten.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first = self.start = self.mean = 0.0
        self.best = -math.inf
        self._kept = deque[float](maxlen=KEPT)
        self._recent = deque[float](maxlen=RECENT)

    def add(self, value: float) -> None:
        """The next value."""
        self.count += 1
        if self.count == 1:
            self.first = value
        if self.count <= FIRST:
            self.start += (value - self.start) / self.count
        self._kept.append(value)
        self._recent.append(value)
        self.mean = sum(self._recent) / len(self._recent)
        if self.count >= RECENT and self.mean > self.best:
            self.best = self.mean

    @property
    def newest(self) -> float:
        """The last value."""
        return self._recent[-1]

    @property
    def newest_five(self) -> float:
        """Mean of the newest five values."""
        return fmean(self.last(FIRST))

    def last(self, n: int = RECENT) -> list[float]:
        """The newest n values, at most the fifty that are kept."""
        return list(self._kept)[-n:]


def error(values: Sequence[float]) -> float:
    """Standard error of the mean, values taken as independent; 0 for fewer than two."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n  # statistics.stdev is exact, and too slow for every step
    return math.sqrt(sum((v - mean) * (v - mean) for v in values) / (n - 1) / n)


def clearly_below(track: Track, bar: float) -> bool:
    """Whether nine tenths of the values that are kept lie below `bar`, and their mean by five
    standard errors; false of fewer than ten values.

    A run asks this at each of thousands of steps, where two errors would be reached by chance.
    """
    values = track.last(KEPT)
    if track.mean >= bar or len(values) < RECENT:
        return False
    below = sum(v < bar for v in values) >= 0.9 * len(values)
    return below and fmean(values) + 5 * error(values) < bar


@functools.cache
def flags(text: str) -> list[str]:
    """The flags that a text names, without their dashes."""
    return re.findall(r"--([a-z]+(?:[.-][a-z]+)*)", text)


class Setup:
    """The settings of a run as its config.yaml has them, empty where they are not known."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def value(self, flag: str) -> Any:
        """The value of a flag such as `kl.target`; None where there is none."""
        at: Any = self.config
        for part in flag.replace("-", "_").split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return at

    def has(self, flag: str) -> bool:
        """Whether the method has this flag; true of all where the settings are not known."""
        *section, name = flag.replace("-", "_").split(".")
        at = self.value(".".join(section)) if section else self.config
        return not self.config or (isinstance(at, Mapping) and name in at)

    def advice(self, *remedies: str) -> str:
        """The remedies as one clause, without those that name a flag that this method lacks."""
        kept = [r for r in remedies if all(map(self.has, flags(r)))]
        if len(kept) < 2:
            return "".join(kept)
        return ", ".join(kept[:-1]) + (", or " if len(kept) > 2 else " or ") + kept[-1]

    def sentence(self, *remedies: str) -> str:
        """The same as a sentence of its own."""
        clause = self.advice(*remedies)
        return clause and f"{clause[0].upper()}{clause[1:]}."
