r"""The gradients of mistaken losses where the policy has moved away from the policy that sampled
the
responses: ratios, clips and weights.

As in `fiducial.lab.kit.faults.policies`, a loss has the gradient :math:`-E_\mu\sum_t
c_t(y)\,\nabla\log\pi(y_t|s_t)`, where mu is the policy that sampled, and a mistake changes c in a
known way. Shapes: [P, Y, T], see there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...worlds.world import Array
from ..population import Population
from .explain import Candidate
from .terms import Terms, baselines, token_weights

CAPS = (1.1, 1.2, 1.25, 1.5, 1.8, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)
FLOORS = (0.2, 0.5, 0.8)


def _log_ratio(t: Terms) -> Array:
    """log pi / mu of each token, 0 after the end."""
    return t.logp - t.at_tokens(t.population.data)


def _kept(ratio: Array, a: Array, low: float, high: float, sign: float = 1) -> Array:
    """1 where PPO's clip keeps the gradient. sign -1: where it would with advantages of the
    opposite sign.
    """
    return np.where(
        ((sign * a > 0) & (ratio > 1 + high)) | ((sign * a < 0) & (ratio < 1 - low)), 0.0, 1.0
    )


def _clipped(ratio: Array, a: Array, low: float, high: float) -> dict[str, Array]:
    """[P, Y, T] the coefficient of grad log pi in the clipped surrogate, by mistake."""
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
        out["clip bounds swapped"] = ratio * a * _kept(ratio, a, high, low)
        out["clip_high ignored"] = ratio * a * _kept(ratio, a, low, low)
    return out


def clip_candidates(population: Population, low: float, high: float) -> Iterator[Candidate]:
    """Mistaken clipped surrogates of the advantages in the batch."""
    t = Terms(population)
    for kind, c in _clipped(
        np.exp(_log_ratio(t)), t.at_tokens(population.advantages), low, high
    ).items():
        for weight, ws in token_weights(t).items():
            for w in ws:
                yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(w * c))


def gspo_candidates(population: Population, low: float, high: float) -> Iterator[Candidate]:
    """Mistaken GSPO surrogates, with the rewards as the advantages of whole responses."""
    t = Terms(population)
    for weight in ("", "EOS masked out", "last token left out", "first token left out"):
        for w in token_weights(t)[weight]:
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
                "token ratio instead of sequence ratio": [
                    each * a * _kept(each, a, low, high) / lengths
                ],
                "mean over all tokens": [
                    np.exp(total / lengths) * a * _kept(np.exp(total / lengths), a, low, high)
                ],
            }
            for kind, cs in others.items():
                for c in cs:
                    yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(c))


def cispo_candidates(population: Population, cap: float) -> Iterator[Candidate]:
    """Mistaken CISPO gradients of the advantages in the batch."""
    t = Terms(population)
    ratio, a = np.exp(_log_ratio(t)), t.at_tokens(population.advantages)
    below = ratio < cap
    kinds = {
        "": [np.minimum(ratio, cap) * a],
        "ratio not detached": [a * (np.minimum(ratio, cap) + below * ratio * t.logp)],
        "gradient dropped beyond the cap": [
            a * ratio * below,
            a * ratio * (below | (a < 0)),
            a * ratio * (below | (a > 0)),
        ],
        "not capped": [a * ratio],
        "ratio always one": [a],
        "ratio inverted": [a * np.minimum(1 / ratio, cap)],
    }
    for weight, ws in token_weights(t).items():
        for kind, cs in kinds.items():
            for c in cs:
                for w in ws:
                    yield Candidate(tuple(n for n in (kind, weight) if n), t.gradient(w * c))


def moved_candidates(
    population: Population, caps: tuple[float, ...] = CAPS, floors: tuple[float, ...] = FLOORS
) -> Iterator[Candidate]:
    """Mistaken policy gradients. The right weight is the ratio of the whole response. caps, floors:
    the bounds of weights that are tried.
    """
    t = Terms(population)
    each, log_ratio = np.exp(_log_ratio(t)), _log_ratio(t)
    so_far = np.exp(np.cumsum(log_ratio, -1))
    whole = np.exp(log_ratio.sum(-1, keepdims=True)) * t.mask
    mean = np.exp(log_ratio.sum(-1, keepdims=True) / t.lengths) * t.mask
    kinds: list[tuple[tuple[str, ...], Array]] = [
        ((), whole),
        (("token ratio instead of sequence ratio",), each),
        (("prefix ratio instead of sequence ratio",), so_far),
        (("ratio always one",), t.mask),
        (("geometric mean instead of the product",), mean),
        (("ratio inverted",), 1 / each),
        (("ratio inverted",), t.mask / np.where(whole > 0, whole, 1.0)),
        (("ratio not detached",), whole * (1 + t.logp.sum(-1, keepdims=True))),
        (("token ratio instead of sequence ratio", "ratio not detached"), each * (1 + t.logp)),
    ]
    for name, ratio in (((), whole), (("token ratio instead of sequence ratio",), each)):
        inside = ratio[t.mask > 0]
        for cap in (c for c in caps if c < inside.max()):
            kinds.append(((*name, "weights truncated"), np.minimum(ratio, cap)))
            kinds += [
                (
                    (*name, "weights masked"),
                    np.where((ratio <= cap) & (ratio >= floor), ratio, 0.0),
                )
                for floor in (0.0, *floors, 1 / cap)
            ]
        kinds += [
            ((*name, "weights masked"), np.where(ratio >= floor, ratio, 0.0))
            for floor in floors
            if floor > inside.min()
        ]
    constants = baselines(t)[: len(population.world.prompts)]
    for weight, ws in token_weights(t).items():
        for names, c in kinds:
            for w in ws:
                found = (*names, weight) if weight else names
                if len(found) <= 2:
                    yield Candidate(
                        found,
                        t.gradient(w * c * t.reward),
                        baselines=tuple(t.gradient(w * c * b) for b in constants),
                    )
