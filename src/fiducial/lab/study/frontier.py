"""The frontier of reward against KL, and best-of-n, both exact."""

from __future__ import annotations

import numpy as np

from ..worlds import exact
from ..worlds.world import Array, World
from .results import BestOfN, BestOfNRow, Frontier, Optimum


def frontier(world: World, betas: Array | None = None) -> Frontier:
    """The optimum of each beta, best-of-n beside them, and how well finite differences along the
    curve agree with the slope that it must have.
    """
    if betas is None:
        betas = world.beta * np.geomspace(40.0, 1 / 40, 41)
    curve = exact.frontier(world, betas)
    # dE[r] / dKL = beta and dE[r] / d(1 / beta) = Var(r), by central differences in 1 / beta
    h = 1e-4
    up, down = exact.frontier(world, betas / (1 + h)), exact.frontier(world, betas / (1 - h))
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (up.reward - down.reward) / (up.kl - down.kl)
    variance = (up.reward - down.reward) * betas / (2 * h)
    # where the curve hardly moves (at its end all mass is on the best response) rounding dominates
    moves = np.abs(up.kl - down.kl) > 1e-6
    best = exact.optimum(world)[0]
    ref = exact.reference(world)
    return Frontier(
        world=world.name,
        beta=curve.beta.tolist(),
        kl=curve.kl.tolist(),
        reward=curve.reward.tolist(),
        optimum=Optimum(exact.kl(best, ref), exact.expected(best, world.reward), world.beta),
        best_of_n=[
            BestOfNRow(n=row.n, kl=row.kl, reward=row.reward)
            for row in best_of_n(world, [2, 4, 8, 16, 64, 256]).rows
        ],
        slope_error=float(np.abs(slope / betas - 1)[moves].max()),
        variance_error=float(np.abs(variance / curve.variance - 1)[moves].max()),
    )


def best_of_n(world: World, ns: list[int]) -> BestOfN:
    """The exact best of n draws of the reference by the true reward: its KL, its mean reward, and
    how often it beats one draw (a tie is half a win).

    `ideal` is the same for 4,096 equally likely responses with different rewards: the KL comes
    closer to its bound the less mass each score has.
    """
    ref = exact.reference(world)
    rows = []
    for n in ns:
        logp = exact.best_of_n(ref, world.reward, n)
        rows.append(
            BestOfNRow(
                n=n,
                kl=exact.kl(logp, ref),
                bound=float(exact.best_of_n_bound(n)),
                reward=exact.expected(logp, world.reward),
                win_rate=win_rate(logp, ref, world.reward),
                win_bound=n / (n + 1),
            )
        )
    even = np.full((1, 4096), -np.log(4096))
    ideal = [
        BestOfNRow(
            n=n,
            kl=exact.kl(exact.best_of_n(even, np.arange(4096.0)[None], n), even),
            bound=float(exact.best_of_n_bound(n)),
        )
        for n in ns
    ]
    return BestOfN(world.name, rows, ideal)


def win_rate(logp: Array, logq: Array, score: Array) -> float:
    """How often a response of the first policy [P, Y] has a higher score than one of the second; a
    tie counts half; mean over prompts.
    """
    rates = []
    for p, q, s in zip(np.exp(logp), np.exp(logq), score, strict=True):
        _, which = np.unique(s, return_inverse=True)
        mass = np.bincount(which, weights=q)
        rates.append((p * (np.cumsum(mass) - 0.5 * mass)[which]).sum())
    return float(np.mean(rates))
