"""What a rule of the alarms is, and the bounds of the registry that it goes by.

A rule is a function of the numbers so far, of bounded cost, that returns what it found or None.
Each sentence says what happened, why it probably did, and which setting to change; rules of thumb
say "heuristic".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..metric import Range
from ..metrics import lookup
from .tracks import RECENT, Setup, Track

Tracks = Mapping[str, Track]


class Found(NamedTuple):
    """What a rule found: the values by their metric, the one that matters most first, and a
    sentence.
    """

    values: dict[str, float]
    text: str


Find = Callable[[Tracks, Setup], Found | None]


@dataclass(frozen=True)
class Rule:
    """An alarm. name: what alarms.jsonl calls it. metrics: it is judged when a row has one of them;
    `find` may rely on the first where it is the only one.
    """

    name: str
    metrics: tuple[str, ...]
    find: Find


@functools.cache
def bounds(name: str) -> tuple[float, float]:
    """The range of a metric outside of which an alarm is raised: its own, or the healthy one."""
    metric = lookup(name)
    return _numbers(metric.alarm or metric.healthy)


@functools.cache
def factors(name: str) -> tuple[float, float]:
    """The lowest and the highest multiple of its usual value that raises no alarm."""
    return _numbers(lookup(name).change)


def _numbers(range_: Range | None) -> tuple[float, float]:
    low, high = range_ or (None, None)
    return (-math.inf if low is None else low, math.inf if high is None else high)


def recent(tracks: Tracks, name: str) -> float | None:
    """Mean of the newest ten values; None before there are ten."""
    track = tracks.get(name)
    return track.mean if track and track.count >= RECENT else None
