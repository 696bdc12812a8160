"""Pictures of the methods on their way to the optimum, as plain data for the page's script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from ...report.figures import GREEN, INK, VERMILLION, Figure, figure, method_colour, thin
from ..runs.results import LabResults, MethodResult, PathPoint, RunResult, Sensitivity
from ..study.results import Frontier
from .curves import DASHES, FAMILIES, curve, families, keys_of
from .reading import (
    NEAR,
    first_world,
    gaps,
    in_world,
    middle,
    of_world,
    samples_needed,
    sparse_world,
)
from .text import as_typed, label, share, with_policy

Axis = Callable[[PathPoint], float]
"""The horizontal axis of a path."""
FLOOR = 1e-6
"""A share of the gap below this is drawn here, because a logarithmic axis has no 0."""


def _path(run: RunResult) -> list[PathPoint]:
    """At most a thousand points of a run's path, in order."""
    steps = sorted(run.path, key=lambda s: s.step)
    return [
        steps[int(i)]
        for i, _ in thin([(float(i), s.relative_gap or 0.0) for i, s in enumerate(steps)])
    ]


def frontier_figures(lab: LabResults) -> list[Figure]:
    """E[r] over KL: the curve that no policy can exceed, the optimum, and the path of each method's
    median seed. One picture per family, the first one large.
    """
    f = lab.frontier
    assert f is not None
    own = families(in_world(lab, f.world)) or {"One method of each kind": []}
    first, *rest = own.items()
    out = [_frontier(lab, first[1], "")]
    for name, methods in rest:
        one = _frontier(lab, methods, name)
        out.append({**one, "small": True, "keys": keys_of(methods)})
    return out


def _frontier(lab: LabResults, methods: list[MethodResult], family: str) -> Figure:
    f = lab.frontier
    assert f is not None
    named = not family  # the legend of a small picture has only the methods
    series = _bounds(f, named)
    ends: list[tuple[float, str]] = []
    for m in methods:
        run = middle([r for r in m.runs if of_world(lab.world(f.world), r)])
        if run is not None:
            ends += [] if run.relative_gap is None else [(run.relative_gap, m.name)]
            series.append(_method_path(m, run, named))
    best = f.optimum
    series.append(
        curve(
            "optimum",
            [best.kl],
            [best.reward],
            VERMILLION,
            mode="markers",
            symbol="star",
            big=True,
            text=[f"β = {as_typed(best.beta)}"],
            legend=named,
        )
    )
    out = figure(
        _frontier_title(ends, family),
        "mean reward E[r] (points)",
        series,
        x="KL(π‖ref) (nats per response)",
    )
    shown = [y for s in series for y in s["y"] if y is not None and s.get("dash") != "dot"]
    reach = max((1.05 if s["name"] == "best of n" else 1.3) * x for s in series[2:] for x in s["x"])
    out["xrange"] = [-0.02 * reach, reach]  # the curve continues where no method goes
    tops = [r for kl, r in zip(f.kl, f.reward, strict=True) if kl <= reach]
    tops += [y for s in series[2:] for y in s["y"] if y is not None]
    low, high = min(shown), max(tops)
    out["range"] = [low - 0.06 * (high - low), high + 0.08 * (high - low)]
    return out


def _bounds(f: Frontier, named: bool) -> list[dict[str, Any]]:
    """The frontier, the line on which J is that of the optimum, and best-of-n."""
    points = sorted(zip(f.kl, f.reward, f.beta, strict=True))
    best = f.optimum
    top = best.reward - best.beta * best.kl
    series = [
        curve(
            "frontier",
            [p[0] for p in points],
            [p[1] for p in points],
            INK,
            text=[f"β = {as_typed(p[2])}" for p in points],
            legend=named,
        ),
        curve(
            f"J of the optimum (slope β = {as_typed(best.beta)})",
            [0.0, points[-1][0]],
            [top, top + best.beta * points[-1][0]],
            INK,
            dash="dot",
            legend=named,
        ),
    ]
    if f.best_of_n and named:
        chosen = [c for c in f.best_of_n if c.kl is not None and c.reward is not None]
        series.append(
            curve(
                "best of n",
                [c.kl or 0.0 for c in chosen],
                [c.reward for c in chosen],
                GREEN,
                mode="markers",
                symbol="diamond",
                text=[f"n = {c.n}" for c in chosen],
            )
        )
    return series


def _method_path(m: MethodResult, run: RunResult, named: bool) -> dict[str, Any]:
    """The path of one run, with its end."""
    own = [s for s in _path(run) if s.kl is not None and s.reward is not None]
    path = [(s.kl or 0.0, s.reward, f"step {s.step:,}") for s in own]
    measured = run.kl is not None and run.reward is not None
    if measured and (not path or path[-1][:2] != (run.kl, run.reward)):
        path.append((run.kl or 0.0, run.reward, "end"))
    return curve(
        label(m),
        [x for x, _, _ in path],
        [y for _, y, _ in path],
        method_colour(m.method),
        dash=DASHES.get(m.policy, "dot"),
        legend=named,
        mode="lines+markers" if len(path) <= 60 else "lines",
        text=[words for _, _, words in path],
    )


def _frontier_title(ends: list[tuple[float, str]], family: str) -> str:
    """What the picture shows. `ends`: gap and name of each method."""
    if not ends or max(ends)[0] < 0:
        return "No policy can be above the curve: it is the largest reward at each KL"
    worst, name = max(ends)
    near = sorted(ends)[:-1]
    if near and worst > 0.05 >= near[-1][0]:
        who = f"{family}: all" if family else "All"
        return (
            f"{who} methods except {name} (gap {share(worst)}) end within {share(near[-1][0])} of "
            "the optimum"
        )
    who = f"{family}: each method" if family else "Each method"
    return f"{who} moves toward the frontier and ends within {share(worst)} of the optimum"


def gap_figures(lab: LabResults) -> list[Figure]:
    """The gap during training, every seed, one picture per world and family. The axis is responses
    sampled if all methods of the picture sample, else steps.
    """
    out = []
    first = first_world(lab)
    limits = _gap_limits(
        [
            s.relative_gap
            for m in lab.methods or []
            for r in m.runs
            for s in r.path
            if s.relative_gap is not None
        ]
    )
    every = next(iter(families(in_world(lab, first)).values()), [])
    if sampling := [m for m in every if any(s.samples > 0 for r in m.runs for s in r.path)]:
        names = ", ".join(dict.fromkeys(m.name for m in sampling))
        title = f"{names} on the {first} world, by responses sampled"
        out.append(_gap_figure(title, sampling, *_across(sampling)))
    for world in dict.fromkeys([first, *(m.world for m in lab.methods or [])]):
        if world == sparse_world(lab):  # it has pictures of its own
            continue
        for family, methods in families(
            [m for m in in_world(lab, world) if any(r.path for r in m.runs)]
        ).items():
            left = sorted((median(gaps(m)), label(m)) for m in methods if gaps(m))
            told = f": {left[0][1]} leaves the least ({share(left[0][0])})" if len(left) > 1 else ""
            name = (
                f"The {world} world"
                if family == next(iter(FAMILIES))
                else f"{family}, {world} world"
            )
            out.append(_gap_figure(f"{name}{told}", methods, *_across(methods)))
    return [{**one, **limits} for one in out]


def sparse_figures(lab: LabResults) -> list[Figure]:
    """The gap over responses sampled in the world of sparse rewards, by family, on one axis. The
    responses that a process reward model was trained on are counted.
    """
    methods = in_world(lab, sparse_world(lab) or "")
    limits = _gap_limits(
        [
            s.relative_gap
            for m in methods
            for r in m.runs
            for s in r.path
            if s.relative_gap is not None
        ]
    )
    groups = {
        "The response as one arm": ("ppo", *FAMILIES["REINFORCE by baseline"]),
        "Process rewards": FAMILIES["Process rewards"],
    }
    out = []
    for family, keys in groups.items():
        own = [m for m in methods if m.method in keys]
        if not own:
            continue
        needed = sorted((median(n), m.name) for m in own if (n := samples_needed(m)))
        told = (
            f"{family}: {needed[0][1]} is the first to reach a gap of {share(NEAR)}, after "
            f"{needed[0][0]:,.0f} responses"
            if needed
            else family
        )
        out.append({**_gap_figure(told, own, *_across(own)), **limits, "small": False})
    return out


def _across(methods: Sequence[MethodResult]) -> tuple[str, Axis]:
    sampling = all(any(s.samples > 0 for r in m.runs for s in r.path) for m in methods)
    return (
        ("responses sampled", lambda s: s.samples)
        if sampling
        else ("step of the method", lambda s: float(s.step))
    )


def _gap_limits(values: Sequence[float]) -> Figure:
    """One logarithmic axis for all pictures: ticks at decades, and between them if there are
    few.
    """
    if not values:
        return {}
    low, high = math.log10(max(min(values), FLOOR)), math.log10(max(*values, 1.0))
    between = (1, 2, 5) if high - low < 1.5 else (1,)
    ticks = [k * 10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 1) for k in between]
    return {
        "ylog": True,
        "range": [low - 0.06 * (high - low), high + 0.06 * (high - low)],
        "yticks": [ticks, [f"{100 * t:g}%" for t in ticks]],
    }


def _gap_figure(title: str, methods: list[MethodResult], x: str, at: Axis) -> Figure:
    series = []
    for m in methods:
        own = middle(m.runs)
        for run in sorted(m.runs, key=lambda r: r is own):  # the median seed is drawn on top
            steps = [s for s in _path(run) if s.relative_gap is not None]
            if steps:
                series.append(
                    curve(
                        label(m),
                        [at(s) for s in steps],
                        [max(s.relative_gap or 0.0, FLOOR) for s in steps],
                        method_colour(m.method),
                        dash=DASHES.get(m.policy, "dot"),
                        faint=run is not own,
                        legend=False,
                    )
                )
    more = {"xformat": "~s"} if x == "responses sampled" else {}
    return {
        **figure(title, "share of the gap left", series, x=x, small=True),
        "keys": keys_of(methods),
        **more,
    }


def heat_figure(one: Sensitivity) -> Figure:
    """The gap left, over learning rate and beta. The color is logarithmic between a thousandth of
    the gap and all of it; the cells hold the numbers.
    """
    cells = [x for row in one.relative_gap for x in row if x is not None]
    good = sum(x <= 0.05 for x in cells)
    title = (
        f"{with_policy(one)} leaves 5% or less in {good} of {len(cells)} cells"
        if cells
        else f"{with_policy(one)}: nothing was measured"
    )
    if cells:
        least, at = min(
            (x, (one.learning_rates[j], one.betas[i]))
            for i, row in enumerate(one.relative_gap)
            for j, x in enumerate(row)
            if x is not None
        )
        title += f"; least at learning rate {as_typed(at[0])}, β {as_typed(at[1])} ({share(least)})"
    return {
        "kind": "heat",
        "title": title,
        "x": "learning rate",
        "y": "β (points per nat)",
        "series": [],
        "small": False,
        "note": one.setting,
        "columns": [as_typed(x) for x in one.learning_rates],
        "rows": [as_typed(b) for b in one.betas],
        "z": [
            [None if x is None else math.log10(min(max(x, 1e-3), 1.0)) for x in row]
            for row in one.relative_gap
        ],
        "text": [["" if x is None else share(x) for x in row] for row in one.relative_gap],
        "bar": {
            "title": "share of the gap left",
            "range": [-3, 0.01],
            "ticks": [[-3, -2, -1, 0], ["≤ 0.1%", "1%", "10%", "≥ 100%"]],
        },
    }
