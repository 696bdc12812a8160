"""What a loss does with probability ratios: where it clips or caps them, found by trying ratios,
and whether its ratio is one of log-probabilities and their own copy.

The ratios of a population are few, so two clips with no ratio between them have one gradient there.
Here one response is repeated with many ratios, and the place where its gradient stops being
proportional to the ratio is narrowed down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...core.reductions import select
from ..worlds.world import Array
from .batch import Batch, build
from .measure import Loss, loss_gradient, scalar
from .population import Population

FAR = math.log(1000.0)
"""Log-ratios are tried from -FAR to FAR; what happens beyond is not seen."""
POINTS, ROUNDS = 64, 4
EDGES = {"low": (-1, -1), "high": (1, 1), "dual": (1, -1)}
"""Direction of the log-ratio, and sign of the advantages."""


@dataclass(frozen=True)
class Edge:
    """The ratio at which the gradient stops being proportional to the ratio. stops: the gradient
    is 0 from there on; otherwise its weight is capped.
    """

    ratio: float
    stops: bool


@dataclass(frozen=True)
class ClipRange:
    """low: below 1, for negative advantages. high: above 1, for positive ones. dual: above 1, for
    negative ones. None: there is no such ratio between 1/1000 and 1000.
    """

    low: Edge | None
    high: Edge | None
    dual: Edge | None

    def sentence(self) -> str:
        """What was found."""

        def said(side: str, edge: Edge | None) -> str:
            if edge is None:
                return "continues at all ratios"
            return f"{'stops' if edge.stops else 'is capped'} {side} a ratio of {edge.ratio:.6g}"

        out = (
            "Measured: the gradient of a token with a positive advantage "
            f"{said('above', self.high)}, that of one with a negative advantage "
            f"{said('below', self.low)}."
        )
        if self.dual and not (self.high and abs(self.dual.ratio / self.high.ratio - 1) < 1e-3):
            out += f" With a negative advantage it also {said('above', self.dual)}."
        return out


def clip_range(loss: Loss, population: Population, *, one_token: bool = False) -> ClipRange | None:
    """Measure where a loss clips.

    Args:
        one_token: only the first token of the response has another ratio than 1.

    Returns:
        None if the loss has no finite gradient on such batches, or none that is proportional to the
        ratio near 1.
    """
    at = dict.fromkeys(EDGES, (0.0, FAR))
    beyond = dict.fromkeys(EDGES, 0.0)  # the weight far beyond the edge, as a share of that at 1
    for n in range(ROUNDS):
        if not at:
            break
        grids = {name: np.linspace(*at[name], POINTS + 1)[1:] for name in at}
        # a row at a ratio of 1 first, with which the others are compared
        tried = {name: np.r_[0.0, grid] * EDGES[name][0] for name, grid in grids.items()}
        found = _sizes(loss, population, tried, one_token)
        if found is None:
            return None
        for name, grid in grids.items():
            kept = np.abs(found[name] / np.exp(EDGES[name][0] * grid) - 1) < 1e-5
            if kept.all():
                if n == 0:
                    del at[name]
                continue
            first = int(np.argmin(kept))
            at[name] = (float(grid[first - 1]) if first else at[name][0], float(grid[first]))
            if n == 0:
                beyond[name] = float(found[name][-1])

    def edge(name: str) -> Edge | None:
        if name not in at:
            return None
        ratio, weight = math.exp(EDGES[name][0] * sum(at[name]) / 2), beyond[name]
        # a capped weight is the cap, to more digits than the place where it begins
        capped = abs(weight / ratio - 1) < 1e-3
        return Edge(weight if capped else ratio, weight < 1e-6)

    edges = [edge("low"), edge("high"), edge("dual")]
    if any(e is not None and not e.stops and abs(e.ratio - 1) < 1e-4 for e in edges):
        return None
    return ClipRange(*edges)


def _sizes(
    loss: Loss, population: Population, tried: dict[str, Array], one_token: bool
) -> dict[str, Array] | None:
    """The length of the gradient at each log-ratio but the first, as a share of that at the first;
    the first is 0.
    """
    batch = _at_ratios(
        population,
        np.concatenate(list(tried.values())),
        np.concatenate([np.full(len(x), float(EDGES[name][1])) for name, x in tried.items()]),
        one_token,
    )
    seen = loss_gradient(loss, batch, "raw")
    if not seen.finite:
        return None
    size = np.linalg.norm(seen.rows[0].reshape(len(batch), -1), axis=1)
    out, start = {}, 0
    for name, x in tried.items():
        here = size[start : start + len(x) * population.group : population.group]
        start += len(x) * population.group
        if here[0] == 0:
            return None
        out[name] = here[1:] / here[0]
    return out


def _at_ratios(p: Population, log_ratio: Array, sign: Array, one_token: bool) -> Batch:
    """Rows with one response, the longest without EOS: the ratio of each of its tokens and the sign
    of its advantages and reward. In a group the other rows have a ratio of 1 and the opposite sign.
    """
    longest = np.flatnonzero(~p.tree.finished & (p.tree.lengths == p.world.horizon))[0]
    partner = np.zeros(p.group - 1)
    log_ratio = np.concatenate([np.r_[x, partner] for x in log_ratio])
    sign = np.concatenate([np.r_[x, partner - x] for x in sign])
    zero = np.zeros(len(log_ratio), dtype=np.int64)
    batch = build(p, zero, zero + longest, np.arange(len(zero)) // p.group if p.group > 1 else zero)
    moved = batch.mask
    if one_token:
        column = torch.arange(moved.shape[1])[None]
        moved = moved & (column == batch.trajectory.prompt_lengths[:, None])
    away = select(torch.from_numpy(log_ratio)[:, None], moved)
    signs = torch.from_numpy(sign)
    old = torch.where(batch.mask, batch.logprobs.detach() - away, batch.old_logprobs)
    return replace(
        batch,
        old_logprobs=old,
        advantages=torch.where(batch.mask, signs[:, None], batch.advantages),
        rewards=signs,
        trajectory=replace(batch.trajectory, logprobs=select(old, batch.mask)),
    )


def ratio_of_itself(loss: Loss, batch: Batch) -> bool:
    """Whether each token is weighted by a ratio exp(x - x.detach()), which is 1 whatever policy
    sampled the response.

    Its gradient is that of log pi, so only the second derivative tells: with c the derivative by
    log pi, that of the loss is c (log pi'^2 + log pi'') along any direction, and without a ratio it
    is c log pi''.
    """
    value = scalar(loss(batch))
    moved = replace(batch, old_logprobs=batch.old_logprobs - 0.7)
    other = scalar(loss(moved))
    if not value.requires_grad or not other.requires_grad:
        return False
    (theirs,) = torch.autograd.grad(other, batch.raw, retain_graph=True, allow_unused=True)
    try:
        (g,) = torch.autograd.grad(value, batch.raw, create_graph=True, allow_unused=True)
        if g is None or theirs is None or not torch.allclose(g, theirs, rtol=1e-9, atol=1e-12):
            return False  # it knows the policy that sampled
        t, rows = batch.trajectory, torch.arange(len(batch))
        first = t.prompt_lengths
        direction = torch.zeros_like(batch.raw)
        direction[rows, first - 1] = torch.tensor([0.31, -0.53, 0.72], dtype=batch.raw.dtype)
        slope = (g * direction).sum((1, 2))
        (curve,) = torch.autograd.grad(slope.sum(), batch.raw, allow_unused=True)
    except RuntimeError:  # something in the loss has no second derivative
        return False
    if curve is None:
        return False
    z = (batch.raw.detach() / batch.temperature)[rows, first - 1]
    d, p = direction[rows, first - 1] / batch.temperature, z.softmax(-1)
    mean = (p * d).sum(1)
    log_slope = d[rows, batch.ids[rows, first]] - mean
    log_curve = mean**2 - (p * d**2).sum(1)
    c = slope.detach() / log_slope
    left = (curve * direction).sum((1, 2)) - c * (log_curve + log_slope**2)
    return bool((left.abs() < 1e-6 * (c * log_slope**2).abs().max()).all())
