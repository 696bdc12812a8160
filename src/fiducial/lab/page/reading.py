"""Questions that the page asks of the results: which run is shown, whether a run belongs to a
world, how many samples a method needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..runs.results import LabResults, MethodResult, RunResult, WorldFacts
from ..study.results import Overoptimization

HOLDS = 1e-6
"""Two sides of an identity that differ by more than this are not equal: float64 leaves nine digits
of room.
"""
NEAR = 0.1
"""A method is close to the optimum if the gap is at most this and stays so."""


def gaps(method: MethodResult) -> list[float]:
    """The gaps left by the runs that were measured."""
    return [r.relative_gap for r in method.runs if r.relative_gap is not None]


def middle(runs: Sequence[RunResult]) -> RunResult | None:
    """The run with the median gap (of an even number, the upper of the two in the middle); None if
    no gap was measured.
    """
    ended = sorted(
        (r for r in runs if r.relative_gap is not None), key=lambda r: r.relative_gap or 0.0
    )
    return ended[len(ended) // 2] if ended else None


def of_world(world: WorldFacts | None, run: RunResult) -> bool:
    """Whether a run may belong to the world as it is described. Each seed has a world of its own,
    and then its run begins at another reward.
    """
    first = min(run.path, key=lambda s: s.step, default=None)
    if (
        world is None
        or world.objective_reference is None
        or first is None
        or first.step != 0
        or first.reward is None
    ):
        return True  # not enough is known
    return abs(first.reward - world.objective_reference) <= HOLDS * max(
        1.0, abs(world.objective_reference)
    )


def begins_with(one: Overoptimization) -> bool:
    """Whether the path of the trained policy begins where the curve does. If not, it belongs to
    another world, or its scores have another zero.
    """
    if one.path is None or not one.path.kl or not one.curve.kl:
        return False
    c, p = one.curve, one.path
    start = min(range(len(c.kl)), key=lambda i: c.kl[i])
    room = 0.02 * (max(*c.proxy, *c.gold) - min(*c.proxy, *c.gold))
    return abs(p.proxy[0] - c.proxy[start]) <= room and abs(p.gold[0] - c.gold[start]) <= room


def first_world(lab: LabResults) -> str:
    """The world that the page begins with: the first of the list in which a method was trained."""
    order = [w.key for w in lab.worlds or []]
    ended = [m.world for m in lab.methods or [] if gaps(m)]
    return min(ended, key=lambda key: order.index(key) if key in order else len(order), default="")


def sparse_world(lab: LabResults) -> str | None:
    """The world in which rewards for steps were tried."""
    return next((m.world for m in lab.methods or [] if m.method.endswith("_steps")), None)


def in_world(lab: LabResults, world: str) -> list[MethodResult]:
    """The methods of a world in the order of the legend: tables first."""
    return sorted(
        (m for m in lab.methods or [] if m.world == world),
        key=lambda m: (m.policy != "table", m.name),
    )


def samples_needed(m: MethodResult) -> list[float] | None:
    """Responses sampled until the gap was at most NEAR and stayed so, one number per seed; None if
    a seed never came that close.
    """
    needed = []
    for run in m.runs:
        steps = sorted((s for s in run.path if s.relative_gap is not None), key=lambda s: s.step)
        above = [i for i, s in enumerate(steps) if (s.relative_gap or 0.0) > NEAR]
        after = steps[(above[-1] + 1) if above else 0 :]
        if not after:
            return None
        needed.append(after[0].samples)
    return needed or None


def one_loss(lab: LabResults) -> bool:
    """Whether several starts reached the same loss at different policies."""
    starts = lab.missing.starts if lab.missing else []
    losses = [s.loss for s in starts if s.loss is not None]
    ends = [s.probability for s in starts if s.probability is not None]
    return (
        len(losses) > 1
        and max(losses) - min(losses) < 1e-4
        and len(ends) > 1
        and max(ends) - min(ends) > 1e-3
    )


def above_frontier(lab: LabResults, world: str, run: RunResult) -> bool:
    """Whether a run's end lies above the frontier by more than a hundredth of its height, which is
    the resolution of the curve.
    """
    f = lab.frontier
    if (
        f is None
        or f.world != world
        or run.kl is None
        or run.reward is None
        or not of_world(lab.world(world), run)
    ):
        return False
    points = sorted(zip(f.kl, f.reward, strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= run.kl <= x1 and x1 > x0:
            return run.reward > y0 + (y1 - y0) * (run.kl - x0) / (x1 - x0) + 0.01 * (
                points[-1][1] - points[0][1]
            )
    return False
