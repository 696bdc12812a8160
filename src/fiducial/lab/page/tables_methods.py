"""The tables about methods, worlds and settings."""

from __future__ import annotations

import math
from statistics import median

from ...report.numbers import MINUS, count, duration, number
from ..runs.results import Change, LabResults, MethodResult
from ..study.results import GradientEstimator
from .alarms import SHORT
from .reading import NEAR, gaps, in_world, middle, of_world, samples_needed, sparse_world
from .table import Cell, Table, table
from .text import DASH, as_typed, known, label, seeds, share


def methods_table(lab: LabResults) -> Table | None:
    """Where each method ended, by world and kind of policy."""
    if not lab.methods:
        return None
    order = [w.key for w in lab.worlds or []]
    methods = sorted(
        lab.methods,
        key=lambda m: (
            order.index(m.world) if m.world in order else len(order),
            m.policy != "table",
            m.name,
        ),
    )
    behind = {id(m): _behind(lab, m) for m in methods}
    head: list[Cell] = [
        "Method, policy",
        "World",
        ("Gap left", f"share of J(optimum) {MINUS} J(ref); median, seeds"),
        ("Total variation", "from the optimum"),
        ("KL", "nats per response; the optimum's below"),
        ("Responses sampled", "and pairs seen"),
        "Time per run",
    ]
    named = any(behind.values())
    rows = []
    for m in methods:
        row = _method_row(lab, m)
        e = behind[id(m)]
        if named:
            row.append((f"{known(e.relative_bias)}; {known(e.variance)}", e.name) if e else DASH)
        rows.append(row)
    return table(
        [*head, *([("Its gradient", "relative bias; variance of one response")] if named else [])],
        rows,
        left=(1,),
    )


def causes(lab: LabResults) -> list[str]:
    """Why methods leave a part of the gap, for those that are no alarm."""
    return [
        f"{label(m)}, {m.world}, {share(max(gaps(m)))} left: {m.cause}"
        for m in lab.methods or []
        if m.cause and gaps(m) and max(gaps(m)) <= SHORT
    ]


def _method_row(lab: LabResults, m: MethodResult) -> list[Cell]:
    run, ends, world = (
        middle(m.runs) or (m.runs[0] if m.runs else None),
        gaps(m),
        lab.world(m.world),
    )
    if run is None:
        return [(label(m), m.setting), m.world, "no run", DASH, DASH, DASH, DASH]
    gap: Cell = share(median(ends)) if ends else "not measured"
    if len(ends) > 1:
        gap = (str(gap), ", ".join(share(x) for x in ends) if len(ends) <= 4 else seeds(ends))
    best = (
        run.kl_optimum
        if run.kl_optimum is not None
        else world.kl_optimum
        if world and of_world(world, run)
        else None
    )
    kl: Cell = (known(run.kl), f"optimum {number(best)}") if best is not None else known(run.kl)
    used: Cell = (
        (count(run.samples), f"{count(run.pairs)} pairs") if run.pairs else count(run.samples)
    )
    return [
        (label(m), m.setting),
        m.world,
        gap,
        known(run.total_variation),
        kl,
        used,
        duration(run.seconds) if run.seconds is not None else DASH,
    ]


def _behind(lab: LabResults, m: MethodResult) -> GradientEstimator | None:
    """The estimator whose expectation the method follows: the one that it names, or the only one
    with its name.
    """
    found = [
        e
        for e in lab.estimators or []
        if (e.name == m.estimator if m.estimator else m.name.lower() in e.name.lower())
    ]
    return found[0] if len(found) == 1 else None  # with several it is not known which one


AT = 0.05
"""Total variation below which a policy counts as being at an optimum."""


def _arrived(c: Change) -> Cell:
    """The optimum at which a method ended."""
    near = c.distance is not None and c.distance < AT
    return (
        c.nearest if near else "none of the known ones",
        f"{known(c.distance)} from it"
        if near
        else f"nearest: {c.nearest}, {known(c.distance)} away",
    )


def parts_table(parts: list[Change]) -> Table:
    """GRPO with parts exchanged."""
    rows: list[list[Cell]] = [
        [(c.name, c.words), share(c.relative_gap), known(c.total_variation), _arrived(c)]
        for c in parts
    ]
    return table(
        [
            "What is run",
            "Gap left",
            ("Total variation", "from the optimum"),
            ("Ended at the optimum of", "total variation"),
        ],
        rows,
        left=(3,),
    )


def lengths_table(rows: list[Change]) -> Table:
    """Settings for long responses."""
    cells: list[list[Cell]] = [
        [
            (c.name, c.words),
            share(c.relative_gap),
            known(c.total_variation),
            (known(c.cut), f"optimum {known(c.cut_optimum)}"),
            _arrived(c),
        ]
        for c in rows
    ]
    head: list[Cell] = [
        "What is run",
        "Gap left",
        ("Total variation", "from the optimum"),
        ("Truncated at the limit", "share of responses"),
        ("Ended at the optimum of", "total variation"),
    ]
    return table(head, cells, left=(4,))


def needed_table(lab: LabResults) -> Table | None:
    """The world of sparse rewards: responses sampled until the gap stayed below a tenth, and the
    gap left at the end.
    """
    methods = in_world(lab, sparse_world(lab) or "")
    if not methods:
        return None
    far = math.inf
    rows: list[list[Cell]] = []
    for m in sorted(methods, key=lambda m: median(samples_needed(m) or [far])):
        needed, ends = samples_needed(m), gaps(m)
        used: Cell = (
            (count(median(needed)), ", ".join(count(n) for n in needed))
            if needed
            else "not in every seed"
        )
        rows.append([label(m), used, (share(median(ends)), seeds(ends)) if ends else "no run"])
    head: list[Cell] = [
        "Method, policy",
        ("Responses sampled", f"until the gap stayed within {share(NEAR)}; median of the seeds"),
        ("Gap left", "at the end"),
    ]
    return table(head, rows)


def worlds_table(lab: LabResults) -> Table | None:
    """The facts of the worlds."""
    if not lab.worlds:
        return None
    rows: list[list[Cell]] = [
        [
            (w.key, w.words),
            count(w.prompts),
            count(w.responses),
            count(w.vocabulary),
            count(w.horizon),
            as_typed(w.beta),
            known(w.kl_optimum),
            known(w.objective_reference),
            known(w.objective_optimum),
        ]
        for w in lab.worlds
    ]
    head: list[Cell] = [
        "World",
        "Prompts",
        ("Responses", "per prompt"),
        ("Vocabulary", "tokens"),
        ("Longest response", "tokens"),
        ("β", "points per nat"),
        ("KL of the optimum", "nats"),
        ("J(ref)", "points"),
        ("J(optimum)", "points"),
    ]
    return table(head, rows)
