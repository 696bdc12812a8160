"""The alarms of the lab's page: reasons to doubt the numbers, or not to use a method so."""

from __future__ import annotations

from collections.abc import Sequence

from ...report.numbers import number
from ..runs.results import LabResults, MethodResult
from ..study.results import Num
from .reading import HOLDS, above_frontier, begins_with, gaps
from .text import share, with_policy

SHORT = 0.2
"""A method that leaves more of the gap than this is an alarm."""


def lab_alarms(lab: LabResults, identities: Sequence[tuple[str, Num]] = ()) -> list[str]:
    """The alarms. `identities`: formulas in words, and the difference between their sides."""
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
                f"{one.title}: the trained policy does not begin where the curve does, so it is "
                "not drawn."
            )
    for r in lab.best_of_n.rows if lab.best_of_n else []:
        if r.kl is not None and r.bound is not None and r.kl > r.bound + 1e-9:
            found.append(
                f"Best of {r.n} has a KL of {number(r.kl)} nats, above its bound "
                f"{number(r.bound)}, which is impossible."
            )
    return found


def _method_alarms(lab: LabResults, m: MethodResult) -> list[str]:
    """What is wrong with the runs of one method."""
    ends, who = gaps(m), f"{with_policy(m)} on the {m.world} world"
    lost, found = len(m.runs) - len(ends), []
    far = sum(e > SHORT for e in ends)
    if far:
        those = "" if len(ends) == 1 else f" in {far} of {len(ends)} seeds"
        found.append(
            f"{who} leaves {share(max(ends))} of the gap{those}. "
            f"{m.cause or 'The cause was not measured.'}"
        )
    if ends and min(ends) < -HOLDS:
        found.append(
            f"{who} ends above the optimum ({share(min(ends))}), which is impossible: two "
            "different objectives were compared."
        )
    if any(above_frontier(lab, m.world, r) for r in m.runs):
        found.append(
            f"{who} ends above the frontier, which is impossible: its KL and its reward are not "
            "those of one policy."
        )
    if lost:
        found.append(f"{who}: {lost} of {len(m.runs)} runs have no gap.")
    return found
