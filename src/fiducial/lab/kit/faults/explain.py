"""Which mistakes a gradient shows: the fewest whose gradients in closed form add up to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ...worlds.world import Array

LEFT = 1e-6
"""A gradient is explained if no more than this share of it remains."""


@dataclass(frozen=True)
class Candidate:
    """A descent direction that these mistakes produce: a positive multiple of
    `gradient` + x * `penalty` + y * `extra` + any combination of `baselines`.

    penalty: the part of the KL penalty, with any x; a value other than 1 is named as a mistake of
    its own. extra: with any y > 0.
    """

    names: tuple[str, ...]
    gradient: Array
    penalty: Array | None = None
    extra: Array | None = None
    baselines: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The mistakes found, and the strength of the KL penalty as a multiple of the right one."""

    names: tuple[str, ...]
    strength: float = 1.0


def fit(direction: Array, candidate: Candidate, group: int = 1) -> Explanation | None:
    """The explanation if the candidate produces the direction, else None."""
    optional = [x for x in (candidate.penalty, candidate.extra) if x is not None]
    parts = (candidate.gradient, *optional, *candidate.baselines)
    columns = np.stack([x.ravel() for x in parts], 1)
    g, lengths = direction.ravel(), np.linalg.norm(columns, axis=0)
    size, nonzero = np.linalg.norm(g), lengths > 1e-12
    found = np.zeros(len(nonzero))
    found[nonzero] = np.linalg.lstsq(columns[:, nonzero], g, rcond=1e-12)[0]
    if np.linalg.norm(g - columns @ found) > LEFT * size:
        return None
    a = float(found[0])
    if abs(a) * lengths[0] < 1e-6 * size:  # only the penalty is left
        if candidate.penalty is None or found[1] <= 0:
            return None
        return Explanation((*candidate.names, "reward missing"))
    if candidate.extra is not None and found[len(optional)] / a < 1e-9:
        return None
    names = (*candidate.names, "wrong sign") if a < 0 else candidate.names
    if candidate.penalty is None or not nonzero[1]:
        return Explanation(names)
    strength = float(found[1]) / a
    return Explanation((*names, *_of_strength(strength, group)), strength)


def _of_strength(strength: float, group: int) -> tuple[str, ...]:
    known = {1.0: (), 0.0: ("KL penalty missing",), -1.0: ("KL penalty has the wrong sign",)}
    if group > 1:
        known[group / (group - 1)] = ("group mean includes the response itself",)
    near = (names for value, names in known.items() if abs(strength - value) < 1e-5)
    return next(near, ("wrong beta",))


def explain(
    direction: Array, candidates: Iterable[Candidate], group: int = 1
) -> Explanation | None:
    """The fewest mistakes that produce this descent direction, or None."""
    best: Explanation | None = None
    for candidate in candidates:
        if best is not None and (len(best.names) == 1 or len(candidate.names) >= len(best.names)):
            continue
        found = fit(direction, candidate, group)
        if found is None or not found.names:
            continue
        if best is None or len(found.names) < len(best.names):
            best = found
    return best
