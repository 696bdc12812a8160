"""The sentences at the top of the lab's page. None is stronger than the ranges over seeds allow."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ...report.numbers import number
from ..runs.results import LabResults, MethodResult
from .reading import HOLDS, first_world, gaps, one_loss, samples_needed, sparse_world
from .text import off, seeds, share, with_policy

MANY = 4
"""If there are more methods than this, the answer says how many are close, and names the others."""
CLOSE = 0.1


def lab_answer(lab: LabResults) -> list[str]:
    """The sentences at the top: how far from the optimum the methods end, what the derivation and
    the labels show, and where a proxy turns over.
    """
    told = [
        " ".join(_near(lab)),
        " ".join(_sparse(lab) + _elsewhere(lab) + _theory(lab) + _proxies(lab)),
    ]
    return [sentence for sentence in told if sentence] or ["Nothing was measured."]


def _near(lab: LabResults) -> list[str]:
    """One sentence per kind of policy, for the first world in which methods were trained."""
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
                f"{with_policy(m)} leaves {share(median(gaps(m)))} of the gap to the optimum "
                f"({seeds(gaps(m))})"
            )
        out.append(
            f"{f'With a {policy}:' if out else f'On the {first} world'} "
            f"{', '.join(ends)}{_verdict(own)}."
        )
    return out


def _many(own: list[MethodResult], start: str) -> str:
    """How many methods end close to the optimum, and what the others leave."""
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
    return f"{start} {told}{ends}{'; the others leave: ' + ', '.join(far) if far else ''}."


def _verdict(own: list[MethodResult]) -> str:
    """Which of two methods ends closer: told only if the ranges of their seeds do not touch."""
    if len(own) != 2:
        return ""
    near, far = gaps(own[0]), gaps(own[1])
    if min(len(near), len(far)) < 2:
        return "; one seed does not show which ends closer"
    return (
        f"; every seed of {own[0].name} ends closer"
        if max(near) < min(far)
        else "; the seeds overlap, so neither is shown to end closer"
    )


def _sparse(lab: LabResults) -> list[str]:
    """How many responses the methods need if the reward comes once, at the end. An order is told
    only if the ranges of the seeds do not touch.
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
        "the fewest in every seed"
        if alone and len(few) > 1
        else "its seeds overlap those of others"
        if len(few) > 1
        else "one seed does not show an order"
    )
    told = f"{first} needs {_range(few)} sampled responses to close 90% of the gap ({order})" + (
        f", {last} {_range(many)}" if last != first else ""
    )
    steps = [
        f"{name} {_range(n)}"
        for m in lab.methods or []
        if m.method.endswith("_steps")
        for _, name, n in found
        if name == m.name
    ]
    counted = (
        f"; counting those that the process reward model was trained on: {', '.join(steps)}"
        if steps
        else ""
    )
    return [f"If the reward comes once, at the end of long responses, {told}{counted}."]


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _elsewhere(lab: LabResults) -> list[str]:
    """The smallest and the largest gap in the other worlds."""
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
        f"On {where} the gap left ranges from {named[0]} to {named[1]}."
        if len(rest) > 1
        else f"On {where} the gap left is {named[0]}."
    ]


def _theory(lab: LabResults) -> list[str]:
    """Whether the derivation holds, and what DPO's loss recovers."""
    out = []
    found = [d.difference for d in lab.derivation or [] if d.difference is not None]
    error = lab.recovered.largest_logprob_error if lab.recovered else None
    if found:
        holds = "hold to" if max(found) <= HOLDS else "do not all hold: they differ by up to"
        out.append(f"The {len(found)} steps from the objective to DPO {holds} {off(max(found))}.")
    if error is not None:
        reached = (
            f"gives the optimum to {off(error)} nats"
            if error < 1e-3
            else f"ends up to {number(error)} nats from the optimum"
        )
        out.append(f"Minimizing DPO's loss over all pairs {reached} in every log-probability.")
    distances = (
        [s.total_variation for s in lab.missing.starts if s.total_variation is not None]
        if lab.missing
        else []
    )
    if distances and one_loss(lab):
        out.append(
            "If one response is never compared, policies with the same loss are up to "
            f"{number(max(distances))} in total variation from the optimum."
        )
    return out


def _proxies(lab: LabResults) -> list[str]:
    """In how many cases the true reward turns over."""
    curves = lab.overoptimisation or []
    turned = [c for c in curves if c.turns_over]
    if not curves:
        return []
    if not turned:
        return [f"The true reward turns over along none of the {len(curves)} proxies."]
    return [
        f"As a proxy is optimized, the true reward turns over in {len(turned)} of {len(curves)} "
        "cases."
    ]
