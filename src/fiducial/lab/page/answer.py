"""What the lab's page says at its top, and how it writes shares of a gap: sentences no stronger
than the seeds' ranges, and alarms.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from ...report.numbers import MINUS, number
from .schema import Lab, Num, Overoptimisation, Result, Sensitivity, Trained, World

SHORT = 0.2  # a method that leaves more of the gap than this is an alarm
# an identity that is farther off than this does not hold: float64 leaves nine digits of room
HOLDS = 1e-6


def share(x: Num) -> str:
    """A share of the gap as percent, two digits: 35%, 2.1%, 0.043%."""
    if x is None:
        return "not measured"
    p = 100 * x
    if not math.isfinite(p):
        return "not finite"
    if 0 < abs(p) < 0.001:
        return "under 0.001%" if p > 0 else f"{number(p)}%"
    digits = 0 if abs(p) >= 10 or p == 0 else 1 if abs(p) >= 1 else 2 if abs(p) >= 0.1 else 3
    return f"{p:,.{digits}f}%".replace("-", MINUS)


def off(x: Num) -> str:
    """A difference between two sides: one digit is enough."""
    return (
        "not known"
        if x is None
        else "0"
        if x == 0
        else f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)
    )


def known(x: Num) -> str:
    """A number, or a dash. What is under a billionth of its unit is rounding, and one digit tells it."""
    return "\u2014" if x is None else off(x) if abs(x) < 1e-9 else number(x)


def gaps(method: Trained) -> list[float]:
    return [r.relative_gap for r in method.runs if r.relative_gap is not None]


def middle(runs: Sequence[Result]) -> Result | None:
    """The run with the median gap (the upper of the two middle ones of an even number); None where
    no gap was measured.
    """
    ended = sorted(
        (r for r in runs if r.relative_gap is not None), key=lambda r: r.relative_gap or 0.0
    )
    return ended[len(ended) // 2] if ended else None


def of_world(world: World | None, run: Result) -> bool:
    """Whether a run may belong to the world as it is described: seeds can have worlds of their own,
    and then it begins at another reference's reward.
    """
    first = min(run.path, key=lambda s: s.step, default=None)
    if (
        world is None
        or world.objective_reference is None
        or first is None
        or first.step != 0
        or first.reward is None
    ):
        return True  # it cannot be told
    return abs(first.reward - world.objective_reference) <= HOLDS * max(
        1.0, abs(world.objective_reference)
    )


def begins_with(one: Overoptimisation) -> bool:
    """Whether the trained policy's path begins where the curve does: else it is of another world,
    or its scores are counted from another zero.
    """
    if one.path is None or not one.path.kl or not one.curve.kl:
        return False
    c, p = one.curve, one.path
    start = min(range(len(c.kl)), key=lambda i: c.kl[i])
    room = 0.02 * (max(*c.proxy, *c.gold) - min(*c.proxy, *c.gold))
    return abs(p.proxy[0] - c.proxy[start]) <= room and abs(p.gold[0] - c.gold[start]) <= room


def seeds(values: Sequence[float]) -> str:
    """What is known about the spread: `3 seeds: 0.4% to 0.7%`."""
    return (
        "one seed"
        if len(values) == 1
        else f"{len(values)} seeds: {share(min(values))} to {share(max(values))}"
    )


def with_policy(one: Trained | Sensitivity) -> str:
    return f"{one.name} with a {one.policy}"


def first_world(lab: Lab) -> str:
    """The world told first: of those in which a method ended, the first of the list."""
    order = [w.key for w in lab.worlds or []]
    ended = [m.world for m in lab.methods or [] if gaps(m)]
    return min(ended, key=lambda key: order.index(key) if key in order else len(order), default="")


def lab_answer(lab: Lab) -> list[str]:
    """The sentences at the top: how far the methods end from the optimum, what the derivation and
    the labels do, where a proxy turns over.
    """
    told = [
        " ".join(_near(lab)),
        " ".join(_sparse(lab) + _elsewhere(lab) + _theory(lab) + _proxies(lab)),
    ]
    return [sentence for sentence in told if sentence] or ["Nothing was measured."]


def _near(lab: Lab) -> list[str]:
    """A sentence a policy, for the first world in which methods were trained."""
    first = first_world(lab)
    here = sorted(
        (m for m in lab.methods or [] if m.world == first and gaps(m)),
        key=lambda m: median(gaps(m)),
    )
    out: list[str] = []
    for policy in sorted({m.policy for m in here}):
        own = [m for m in here if m.policy == policy]
        if len(own) > MANY:
            out.append(
                _many(
                    own, f"With a {policy}:" if out else f"On the {first} world, with a {policy},"
                )
            )
            continue
        ends = [f"{m.name} {share(median(gaps(m)))} ({seeds(gaps(m))})" for m in own]
        if not out:  # the first number says what it is
            m = own[0]
            ends[0] = (
                f"{with_policy(m)} ends {share(median(gaps(m)))} short of the optimum "
                f"({seeds(gaps(m))})"
            )
        out.append(
            f"{f'With a {policy}:' if out else f'On the {first} world'} "
            f"{', '.join(ends)}{_verdict(own)}."
        )
    return out


MANY = 4
"""More methods than this are told by how many end close, and by those that do not."""
CLOSE = 0.1


def _many(own: list[Trained], start: str) -> str:
    close = [m for m in own if max(gaps(m)) <= CLOSE]
    far = [f"{m.name} {share(median(gaps(m)))} ({seeds(gaps(m))})" for m in own if m not in close]
    worst = max((max(gaps(m)), m.name) for m in close) if close else None
    told = (
        f"{len(close)} of {len(own)} methods leave {share(worst[0])} of the gap or less in every "
        "seed"
        if worst
        else "no method closes 90% of the gap"
    )
    named = [m for key in ("dpo", "ppo", "rloo") for m in close if m.method == key]
    ends = (
        f" ({', '.join(f'{m.name} leaves {share(median(gaps(m)))}' for m in named)})"
        if named
        else ""
    )
    return (
        f"{start} {told}{ends}{'; what is left by the others: ' + ', '.join(far) if far else ''}."
    )


def _verdict(own: list[Trained]) -> str:
    """Whether the seeds tell two methods apart: only where their ranges do not touch."""
    if len(own) != 2:
        return ""
    near, far = gaps(own[0]), gaps(own[1])
    if min(len(near), len(far)) < 2:
        return "; one seed shows no order"
    return (
        f"; every seed of {own[0].name} ends closer"
        if max(near) < min(far)
        else "; the seeds overlap, neither is shown to end closer"
    )


def sparse_world(lab: Lab) -> str | None:
    """The world in which rewards for steps were tried."""
    return next((m.world for m in lab.methods or [] if m.method.endswith("_steps")), None)


NEAR = 0.1
"""A method has come near when it leaves no more than this of the gap and keeps to it."""


def samples_needed(m: Trained) -> list[float] | None:
    """Responses sampled until the gap was at most NEAR and stayed there, a number a seed; None if a
    seed never came so far.
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


def _sparse(lab: Lab) -> list[str]:
    """How many responses it takes where the reward comes once, at the end: an order only where the
    seeds' ranges do not touch.
    """
    found = sorted(
        (
            (median(n), m.name, n)
            for m in lab.methods or []
            if m.world == sparse_world(lab) and (n := samples_needed(m))
        ),
        key=lambda x: x[:2],
    )
    if len(found) < 2:
        return []
    arms = [one for one in found if not one[1].endswith("process rewards")] or found
    (_, first, few), (_, last, many) = arms[0], arms[-1]
    alone = all(max(few) < min(n) for _, name, n in found if name != first)
    order = (
        "fewest in every seed"
        if alone and len(few) > 1
        else "the seeds overlap those of others"
        if len(few) > 1
        else "one seed shows no order"
    )
    told = f"to close 90% of the gap takes {first} {_range(few)} sampled responses ({order}), {last} {_range(many)}"
    steps = [
        f"{name} {_range(n)}"
        for m in lab.methods or []
        if m.method.endswith("_steps")
        for _, name, n in found
        if name == m.name
    ]
    counted = (
        f"; with those that the process reward model learned from: {', '.join(steps)}"
        if steps
        else ""
    )
    return [f"Where the reward comes once, at the end of long responses, {told}{counted}."]


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _elsewhere(lab: Lab) -> list[str]:
    rest = sorted(
        (
            m
            for m in lab.methods or []
            if m.world not in (first_world(lab), sparse_world(lab)) and gaps(m)
        ),
        key=lambda m: median(gaps(m)),
    )
    if not rest:
        return []
    worlds = {m.world for m in rest}
    where = f"the {rest[0].world} world" if len(worlds) == 1 else f"the {len(worlds)} other worlds"
    named = [
        f"{share(median(gaps(m)))} ({with_policy(m)}{', ' + m.world if len(worlds) > 1 else ''}; "
        f"{seeds(gaps(m))})"
        for m in (rest[0], rest[-1])
    ]
    return [
        f"On {where} what is left runs from {named[0]} to {named[1]}."
        if len(rest) > 1
        else f"On {where} {named[0]} is left."
    ]


def _theory(lab: Lab) -> list[str]:
    out = []
    found = [d.difference for d in lab.derivation or [] if d.difference is not None]
    error = lab.recovered.largest_logprob_error if lab.recovered else None
    if found:
        holds = "hold to" if max(found) <= HOLDS else "do not all hold: they are off by up to"
        out.append(f"The {len(found)} steps from the objective to DPO {holds} {off(max(found))}.")
    if error is not None:
        reached = (
            f"gives the optimum to {off(error)} nats"
            if error < 1e-3
            else f"ends up to {number(error)} nats from the optimum"
        )
        out.append(f"Minimising DPO's loss over all pairs {reached} in every log-probability.")
    spread = (
        [s.total_variation for s in lab.missing.starts if s.total_variation is not None]
        if lab.missing
        else []
    )
    if spread and one_loss(lab):
        out.append(
            f"With one response never compared, equal losses end up to {number(max(spread))} in "
            "total variation from it."
        )
    return out


def one_loss(lab: Lab) -> bool:
    """Whether several starts reached one loss at policies that differ."""
    starts = lab.missing.starts if lab.missing else []
    losses = [s.loss for s in starts if s.loss is not None]
    ends = [s.probability for s in starts if s.probability is not None]
    return (
        len(losses) > 1
        and max(losses) - min(losses) < 1e-4
        and len(ends) > 1
        and max(ends) - min(ends) > 1e-3
    )


def _proxies(lab: Lab) -> list[str]:
    curves = lab.overoptimisation or []
    turned = [c for c in curves if c.turns_over]
    if not curves:
        return []
    if not turned:
        return [f"Along none of the {len(curves)} proxies does the true value turn over."]
    return [
        f"Where a proxy is climbed, the true value turns over in {len(turned)} of {len(curves)} "
        "cases."
    ]


def lab_alarms(lab: Lab, identities: Sequence[tuple[str, Num]] = ()) -> list[str]:
    """What should make a reader doubt the numbers, or not use a method as it was set. `identities`:
    formulas in words, and how far off they are.
    """
    found = [alarm for m in lab.methods or [] for alarm in _method_alarms(lab, m)]
    steps = [(f"The derivation's step {d.title!r}", d.difference) for d in lab.derivation or []]
    found += [
        f"{name} does not hold: its sides differ by {number(d)}."
        for name, d in [*steps, *identities]
        if d is not None and not d <= HOLDS
    ]
    for one in lab.overoptimisation or []:
        if one.path and not begins_with(one):
            found.append(
                f"{one.title}: the trained policy does not begin where the curve does, and is not "
                "drawn."
            )
    for r in lab.best_of_n.rows if lab.best_of_n else []:
        if r.kl is not None and r.bound is not None and r.kl > r.bound + 1e-9:
            found.append(
                f"Best of {r.n} has a KL of {number(r.kl)} nats, above its bound "
                f"{number(r.bound)}, which cannot be."
            )
    return found


def _method_alarms(lab: Lab, m: Trained) -> list[str]:
    ends, who = gaps(m), f"{with_policy(m)} on the {m.world} world"
    lost, found = len(m.runs) - len(ends), []
    far = sum(e > SHORT for e in ends)
    if far:
        those = "" if len(ends) == 1 else f" in {far} of {len(ends)} seeds"
        found.append(
            f"{who} stops {share(max(ends))} short{those}. "
            f"{m.cause or 'The cause was not measured.'}"
        )
    if ends and min(ends) < -HOLDS:
        found.append(
            f"{who} ends above the optimum ({share(min(ends))}), which cannot be: two different "
            "objectives were compared."
        )
    if any(above_frontier(lab, m.world, r) for r in m.runs):
        found.append(
            f"{who} ends above the frontier, which cannot be: its KL and its reward are not those "
            "of one policy."
        )
    if lost:
        found.append(f"{who}: {lost} of {len(m.runs)} runs have no gap.")
    return found


def above_frontier(lab: Lab, world: str, run: Result) -> bool:
    """Whether a run's end lies above the curve by more than the curve's own grain, a hundredth of
    its height.
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
