"""What a critic's loss fits the values to, and where it clips them.

On the population of `value_case` the old values are exact and the values close to them. There, much
has the right gradient that never learns from the rewards: the old values as the target, any
multiple of the advantage added to them, any clip. Here the old values are wrong, and the values far
from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..worlds.world import Array
from .batch import build
from .case import Closer
from .faults.terms import Terms, next_column
from .measure import Loss, loss_gradient
from .population import Population, rows

NEAR = 0.01
"""The values are this close to the wrong old values, inside any clip range."""
CLOSE = 0.1
"""The values of the population are within this of the exact ones."""
FAR, REWARD = 50.0, 1000.0
"""Distances from the old value that are tried, and the size of a reward that no value reaches."""
POINTS, ROUNDS = 64, 4
SIDES = {
    "above its old value and its target is higher": (1, 1),
    "below its old value and its target is lower": (-1, -1),
    "above its old value and its target is lower": (1, -1),
    "below its old value and its target is higher": (-1, 1),
}
"""Direction of the value from its old one, and sign of the reward."""


def closer(loss: Loss, exact: Population, wrong: Population) -> Closer:
    """The mistakes that a critic's loss shows away from the right values.

    Args:
        exact, wrong: populations whose old values are exact and wrong.
    """
    target = _target(loss, wrong)
    if target is None:
        return Closer()
    name = target.name()
    if name:
        return Closer((name,), (target.sentence(),), sure=name != UNEXPLAINED)
    clip = _clip(loss, exact)
    if clip is None:
        said = "Far from its target, the gradient is not that of a squared error."
        return Closer(remarks=(target.sentence(), said))
    at = {side: d for side, d in clip.items() if d is not None}
    toward, away = (any(SIDES[x][0] * SIDES[x][1] == sign for x in at) for sign in (1, -1))
    where = "; ".join(f"{d:.4g} {side}" for side, d in at.items())
    said = f"Measured: a value has no gradient from where it is {where}."
    remarks = (target.sentence(), said if at else "Measured: values are not clipped.")
    if away:
        return Closer((BOTH if toward else MINIMUM,), remarks, sure=True)
    # a clip inside the distances of the population is all that is left to explain there
    return Closer(remarks=remarks, sure=any(d < CLOSE for d in at.values()))


# ---- the target ----

UNEXPLAINED = "target is not a return"


@dataclass(frozen=True)
class Target:
    """shift + old * (old value) + advantage * (GAE with lam, or a mixture of n-step advantages if
    lam is None). residual: the share of the gradient that this does not explain.
    """

    shift: float
    old: float
    advantage: float
    lam: float | None
    residual: float

    def name(self) -> str:
        """The mistake in it; empty if it is a lambda-return."""

        def near(x: float, y: float) -> bool:
            return abs(x - y) < 1e-3

        if self.residual > 1e-4:
            return UNEXPLAINED
        if near(self.old, 1) and near(self.advantage, 0) and near(self.shift, 0):
            return "target is the old value"
        if near(self.old, 1) and near(self.shift, 0):
            return "" if near(self.advantage, 1) else "advantage scaled in the target"
        if near(self.old, 1):
            return "whitened advantage in the target"
        if near(self.old, self.advantage):
            return "whitened target"
        if near(self.old, 0) and near(self.shift, 0):
            return "advantage as the target"
        return UNEXPLAINED

    def sentence(self) -> str:
        """What was found."""
        if self.residual > 1e-4:
            return "Measured: the target is no sum of the old value and an advantage."
        kind = "n-step" if self.lam is None else f"lambda {self.lam:.4g}"
        if not self.name() and self.lam is None:
            return "Measured: the target is a mixture of n-step returns."
        if not self.name():
            return f"Measured: the target is the lambda-return with lambda {self.lam:.4g}."

        def times(x: float, what: str) -> list[str]:
            many = "" if abs(x - 1) < 1e-3 else f"{x:.4g} times "
            return [many + what] if abs(x) > 1e-3 else []

        parts = times(self.old, "the old value")
        parts += times(self.advantage, f"the advantage ({kind})")
        if abs(self.shift) > 1e-3:
            parts.append(f"{self.shift:.4g}")
        return f"Measured: the target is {' plus '.join(parts)}."


def _target(loss: Loss, wrong: Population) -> Target | None:
    """Fit the gradient on a population with wrong old values."""
    noise = np.random.default_rng(31).uniform(-NEAR, NEAR, size=wrong.old_values.shape)
    p = wrong.with_(values=wrong.old_values + noise)
    seen = loss_gradient(loss, build(p, *rows(p)), "values")
    if not seen.finite:
        return None
    t = Terms(p)
    later = -p.world.beta * t.log_ratio + t.reward * t.last
    later = later + next_column(t.old_values) - t.old_values
    parts = [-t.at_tokens(p.values), t.old_values, t.mask]
    for _ in range(p.world.horizon):
        parts.append(later * t.mask)
        later = next_column(later)
    columns = np.stack([t.value_gradient(c).ravel() for c in parts], 1)
    g = -seen.table[: columns.shape[0]].ravel()
    found = np.linalg.lstsq(columns, g, rcond=1e-12)[0]
    a, old, shift, first, second, third = (float(x) for x in found)
    if a <= 0:
        return None
    residual = float(np.linalg.norm(g - columns @ found) / np.linalg.norm(g))
    steps = np.array([first, second, third])
    if (steps < -1e-3 * a).any() and (steps > 1e-3 * a).any():
        return Target(shift / a, old / a, first / a, None, 1.0)
    lam: float | None = round(second / first, 6) + 0.0 if abs(first) > 1e-6 * a else 0.0
    if lam is not None and abs(third - first * lam**2) > 1e-3 * abs(first):
        lam = None
    return Target(shift / a, old / a, first / a, lam, residual)


# ---- the clip ----

MINIMUM, BOTH = "minimum in the value clip", "value clip without the maximum"


def _clip(loss: Loss, exact: Population) -> dict[str, float | None] | None:
    """The distance from the old value at which the last token's value loses its gradient, for each
    of SIDES; None if the gradient is neither that of a squared error nor 0.
    """
    at = dict.fromkeys(SIDES, (0.0, FAR))
    for n in range(ROUNDS):
        if not at:
            break
        tried = {side: np.r_[0.0, np.linspace(*at[side], POINTS + 1)[1:]] for side in at}
        found = _slopes(loss, exact, tried)
        for side, x in found.items():
            kept = np.abs(x - 1) < 1e-4
            if n == 0 and not (kept | (np.abs(x) < 1e-6)).all():
                return None
            if kept.all():
                if n == 0:
                    del at[side]
                continue
            first = int(np.argmin(kept))
            grid = tried[side][1:]
            at[side] = (float(grid[first - 1]) if first else at[side][0], float(grid[first]))
    return {side: sum(at[side]) / 2 if side in at else None for side in SIDES}


def _slopes(loss: Loss, p: Population, tried: dict[str, Array]) -> dict[str, Array]:
    """At each distance but the first: the gradient over the error, as a share of that at the
    first, which is 0.
    """
    step = np.concatenate([SIDES[side][0] * x for side, x in tried.items()])
    sign = np.concatenate([np.full(len(x), float(SIDES[side][1])) for side, x in tried.items()])
    longest = np.flatnonzero(~p.tree.finished & (p.tree.lengths == p.world.horizon))[0]
    zero = np.zeros(len(step), dtype=np.int64)
    batch = build(p, zero, zero + longest, zero)
    last = batch.trajectory.lengths - 1
    at = (torch.arange(len(step)), last)
    values = torch.where(batch.mask, batch.old_values, batch.values).detach().clone()
    values[at] = values[at] + torch.from_numpy(step)
    rewards = torch.from_numpy(REWARD * sign)
    moved = replace(batch, values=values.requires_grad_(), rewards=rewards)
    gradient = loss_gradient(loss, moved, "values").rows[0][at[0].numpy(), last.numpy()]
    penalty = p.world.beta * (batch.logprobs - batch.ref_logprobs).detach()[at]
    slope = gradient / (values.detach()[at] - (rewards - penalty)).numpy()
    out, start = {}, 0
    for side, x in tried.items():
        here = slope[start : start + len(x)]
        out[side], start = here[1:] / here[0], start + len(x)
    return out
