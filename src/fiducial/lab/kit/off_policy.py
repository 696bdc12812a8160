r"""The gradient that each known mistake has where the policy has moved from the one that sampled,
in closed form: ratios, clips, and weights.

As in `fiducial.lab.kit.faults`: a loss has the gradient :math:`-E_\mu\sum_t
c_t(y)\,\nabla\log\pi(y_t|s_t)`, mu being the policy that sampled, and a mistake changes c in a
known way. Shapes: [P, Y, T], see there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..worlds.world import Array
from .faults import Candidate
from .population import Population
from .terms import Terms, baselines, weights

CAPS = (1.1, 1.2, 1.25, 1.5, 1.8, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)
FLOORS = (0.2, 0.5, 0.8)


def _log_ratio(t: Terms) -> Array:
    """log pi / mu of each token, 0 behind the end."""
    return t.logp - t.of(t.population.data)


def _kept(ratio: Array, a: Array, low: float, high: float, sign: float = 1) -> Array:
    """1 where PPO's clip leaves the gradient; sign -1: where it would take it, were advantages
    turned round.
    """
    return np.where(
        ((sign * a > 0) & (ratio > 1 + high)) | ((sign * a < 0) & (ratio < 1 - low)), 0.0, 1.0
    )


def _clipped(ratio: Array, a: Array, low: float, high: float) -> dict[str, Array]:
    """[P, Y, T] A times the derivative of the clipped ratio's logarithm, by mistake."""
    kept = _kept(ratio, a, low, high)
    out = {
        "": ratio * a * kept,
        "not clipped": ratio * a,
        "clipped without the minimum": ratio * a * kept * _kept(ratio, a, low, high, -1),
        "maximum instead of minimum": ratio * a * _kept(ratio, a, low, high, -1),
        "ratio always one": a,
        "ratio inverted": -a / ratio * _kept(1 / ratio, a, low, high),
    }
    if high != low:
        out["clip range turned round"] = ratio * a * _kept(ratio, a, high, low)
        out["one bound for both sides"] = ratio * a * _kept(ratio, a, low, low)
    return out


def clip_candidates(population: Population, low: float, high: float) -> Iterator[Candidate]:
    """The clipped surrogate, of the advantages in the batch."""
    t = Terms(population)
    for kind, c in _clipped(np.exp(_log_ratio(t)), t.of(population.advantages), low, high).items():
        for weight, ws in weights(t).items():
            for w in ws:
                yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(w * c))


def gspo_candidates(population: Population, low: float, high: float) -> Iterator[Candidate]:
    """GSPO's surrogate, of the rewards as the advantages of whole responses."""
    t = Terms(population)
    for weight in ("", "EOS not a label", "last token left out", "first token left out"):
        for w in weights(t)[weight]:
            lengths = np.maximum(w.sum(-1, keepdims=True), 1.0)
            log_ratio, a, each = _log_ratio(t) * w, t.reward * w, np.exp(_log_ratio(t))
            total = log_ratio.sum(-1, keepdims=True) * w
            for kind, c in _clipped(np.exp(total / lengths), a, low, high).items():
                yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(c / lengths))
            arithmetic = (each * w).sum(-1, keepdims=True) / lengths
            others = {
                "arithmetic instead of geometric mean": [
                    each * a * _kept(arithmetic, a, low, high) / lengths
                ],
                "product instead of the geometric mean": [
                    np.exp(total) * a * _kept(np.exp(total), a, low, high) / n
                    for n in (1.0, lengths)
                ],
                "ratio of each token alone": [each * a * _kept(each, a, low, high) / lengths],
                "mean over tokens": [
                    np.exp(total / lengths) * a * _kept(np.exp(total / lengths), a, low, high)
                ],
            }
            for kind, cs in others.items():
                for c in cs:
                    yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(c))


def cispo_candidates(population: Population, cap: float) -> Iterator[Candidate]:
    """CISPO's gradient, of the advantages in the batch."""
    t = Terms(population)
    ratio, a = np.exp(_log_ratio(t)), t.of(population.advantages)
    below = ratio < cap
    kinds = {
        "": [np.minimum(ratio, cap) * a],
        "weight carries a gradient": [a * (np.minimum(ratio, cap) + below * ratio * t.logp)],
        "gradient cut where the weight should be capped": [
            a * ratio * below,
            a * ratio * (below | (a < 0)),
            a * ratio * (below | (a > 0)),
        ],
        "not capped": [a * ratio],
        "ratio always one": [a],
        "ratio inverted": [a * np.minimum(1 / ratio, cap)],
    }
    for weight, ws in weights(t).items():
        for kind, cs in kinds.items():
            for c in cs:
                for w in ws:
                    yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(w * c))


def moved_candidates(population: Population) -> Iterator[Candidate]:
    """The policy gradient at a policy that has moved: the right weight is the ratio of the whole
    response.
    """
    t = Terms(population)
    each, log_ratio = np.exp(_log_ratio(t)), _log_ratio(t)
    so_far = np.exp(np.cumsum(log_ratio, -1))
    whole = np.exp(log_ratio.sum(-1, keepdims=True)) * t.known
    mean = np.exp(log_ratio.sum(-1, keepdims=True) / t.lengths) * t.known
    kinds: list[tuple[tuple[str, ...], Array]] = [
        ((), whole),
        (("ratio of each token alone",), each),
        (("ratio up to the token",), so_far),
        (("ratio always one",), t.known),
        (("geometric mean instead of the product",), mean),
        (("ratio inverted",), 1 / each),
        (("ratio inverted",), t.known / np.where(whole > 0, whole, 1.0)),
        (("weight carries a gradient",), whole * (1 + t.logp.sum(-1, keepdims=True))),
        (("ratio of each token alone", "weight carries a gradient"), each * (1 + t.logp)),
    ]
    for name, ratio in (((), whole), (("ratio of each token alone",), each)):
        inside = ratio[t.known > 0]
        for cap in (c for c in CAPS if c < inside.max()):
            kinds.append(((*name, "weights cut"), np.minimum(ratio, cap)))
            kinds += [
                (
                    (*name, "weights dropped"),
                    np.where((ratio <= cap) & (ratio >= floor), ratio, 0.0),
                )
                for floor in (0.0, *FLOORS, 1 / cap)
            ]
        kinds += [
            ((*name, "weights dropped"), np.where(ratio >= floor, ratio, 0.0))
            for floor in FLOORS
            if floor > inside.min()
        ]
    constants = baselines(t)[: len(population.world.prompts)]
    for weight, ws in weights(t).items():
        for names, c in kinds:
            for w in ws:
                found = (*names, weight) if weight else names
                if len(found) <= 2:
                    yield Candidate(
                        found,
                        t.gradient(w * c * t.reward),
                        free=tuple(t.gradient(w * c * b) for b in constants),
                    )
