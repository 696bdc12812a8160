"""Whether the mean gradient of small sampled batches is the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .batch import Batch, build
from .cases import Objective, likelihood_case, policy_case
from .measure import loss_gradient
from .population import Critic, draw


@dataclass(frozen=True)
class Draws:
    """Monte-Carlo estimates compared with the exact gradient.

    z: [seeds] the largest |z| over the parameters. chi2: [seeds] the squared distance in units of
    its covariance, divided by its degrees of freedom.
    """

    z: tuple[float, ...]
    chi2: tuple[float, ...]
    dof: int
    ok: bool


def unbiased(
    loss: Callable[[Batch], object],
    objective: Objective | Literal["likelihood"] = "J",
    *,
    group: int = 1,
    critic: Critic = "exact",
    batch: int = 32,
    n: int = 20_000,
    seeds: tuple[int, ...] = (0, 1, 2),
    scale: float | None = None,
) -> Draws:
    """Test whether the mean gradient of small sampled batches is the exact one. Only this test
    shows the effect of statistics of a small batch.

    Args:
        objective, group, critic: see `check_policy_loss`.
        batch: responses per batch.
        n: responses in all.
        scale: the expected length of the gradient relative to the exact one (1: a mean over
            responses of sums over tokens). None: any length.

    Returns:
        ok if, for every seed, no parameter is off by 4.5 standard errors or more and chi2 is within
        five of its own standard deviations of 1.
    """
    case = (
        likelihood_case()
        if objective == "likelihood"
        else policy_case(objective, group=group, critic=critic)
    )
    target = case.exact(case.population).ravel()
    zs, chis, dof = [], [], 1
    for seed in seeds:
        rng = np.random.default_rng([seed, 17])
        found = []
        for _ in range(n // batch):
            sampled = build(case.population, *draw(case.population, batch, rng))
            seen = loss_gradient(loss, sampled, case.learned)
            found.append(-case.parameters(seen.table).ravel())
        gradients = np.stack(found)
        mean, covariance = gradients.mean(0), np.cov(gradients.T) / len(gradients)
        values, vectors = np.linalg.eigh(covariance)
        nonzero = values > 1e-9 * values.max()
        white = vectors[:, nonzero] / np.sqrt(values[nonzero])
        m, t = mean @ white, target @ white
        best = float(m @ t / (t @ t)) if scale is None else scale
        dof = int(nonzero.sum()) - (scale is None)
        error = np.sqrt(np.diag(covariance))
        error = np.where(error > 0, error, np.inf)
        zs.append(float((np.abs(mean - best * target) / error).max()))
        chis.append(float(((m - best * t) ** 2).sum()) / dof)
    ok = max(zs) < 4.5 and all(abs(c - 1) < 5 * math.sqrt(2 / dof) for c in chis)
    return Draws(tuple(zs), tuple(chis), dof, ok)
