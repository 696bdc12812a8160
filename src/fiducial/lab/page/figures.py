"""The lab page's pictures, as plain data for the page's script."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from ...report.figures import (
    BLUE,
    GREEN,
    INK,
    PURPLE,
    SKY,
    VERMILLION,
    Figure,
    figure,
    method_colour,
    thin,
)
from ...report.numbers import MINUS, number
from .answer import (
    NEAR,
    begins_with,
    first_world,
    gaps,
    middle,
    of_world,
    samples_needed,
    share,
    sparse_world,
    with_policy,
)
from .schema import (
    KL,
    BestOfN,
    Credit,
    Lab,
    Num,
    Overoptimisation,
    Result,
    Sensitivity,
    Step,
    Trained,
)

DASHES = {"table": "solid", "transformer": "dash"}
FLOOR = 1e-6  # a share of the gap below this is drawn here: a logarithm knows no 0


def setting_of(x: float) -> str:
    """A setting as it is typed: 0.003, 1e−5."""
    return f"{x:g}".replace("e-0", "e-").replace("-", MINUS)


def curve(
    name: str, x: Sequence[float], y: Sequence[Num], color: str, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "x": list(x),
        "y": list(y),
        "color": color,
        "dash": "solid",
        "mode": "lines",
        "faint": False,
        **more,
    }


FAMILIES: dict[str, tuple[str, ...]] = {
    "Every kind": ("dpo", "ppo", "rloo", "grpo"),
    "REINFORCE by its baseline": (
        "reinforce_none",
        "reinforce_mean",
        "remax",
        "rloo",
        "reinforce_pp",
    ),
    "GRPO and its kin": ("grpo", "dr_grpo", "dapo", "gspo", "cispo"),
    "Rewards for steps": ("ppo", "ppo_steps", "rloo", "rloo_steps"),
}
"""Pictures hold a family each: twelve ways in one could not be told apart."""


def families(methods: Sequence[Trained]) -> dict[str, list[Trained]]:
    """The methods in their families, the first of which takes in what belongs to none; families
    that show nothing new are left out.
    """
    known = {key for keys in FAMILIES.values() for key in keys}
    out: dict[str, list[Trained]] = {}
    shown: set[str] = set()
    for i, (name, keys) in enumerate(FAMILIES.items()):
        own = [m for m in methods if m.method in keys or (i == 0 and m.method not in known)]
        if {m.method for m in own} - shown and (i == 0 or len({m.method for m in own}) > 1):
            out[name] = own
            shown |= {m.method for m in own}
    return out


def keys_of(methods: Sequence[Trained]) -> list[tuple[str, str, str]]:
    """A legend: name, colour, and a class for the dash."""
    return list(
        dict.fromkeys(
            (label(m), colour(m.method), "" if DASHES.get(m.policy) == "solid" else "dash")
            for m in methods
        )
    )


def label(m: Trained) -> str:
    return f"{m.name}, {m.policy}"


def colour(method: str) -> str:
    return method_colour(method)


def here(lab: Lab, world: str) -> list[Trained]:
    """The methods of a world in the legend's order: tables first."""
    return sorted(
        (m for m in lab.methods or [] if m.world == world),
        key=lambda m: (m.policy != "table", m.name),
    )


def _path(run: Result) -> list[Step]:
    """At most a thousand points of a run's way, in order."""
    steps = sorted(run.path, key=lambda s: s.step)
    return [
        steps[int(i)]
        for i, _ in thin([(float(i), s.relative_gap or 0.0) for i, s in enumerate(steps)])
    ]


def frontier_figures(lab: Lab) -> list[Figure]:
    """E[r] over KL: what no policy can exceed, the optimum, and the way of each method's median
    seed; a picture a family, the first one large.
    """
    f = lab.frontier
    assert f is not None
    own = families(here(lab, f.world)) or {"Every kind": []}
    first, *rest = own.items()
    out = [_frontier(lab, first[1], "")]
    for name, methods in rest:
        one = _frontier(lab, methods, name)
        out.append({**one, "small": True, "keys": keys_of(methods)})
    return out


def _frontier(lab: Lab, methods: list[Trained], family: str) -> Figure:
    f = lab.frontier
    assert f is not None
    points = sorted(zip(f.kl, f.reward, f.beta, strict=True))
    best = f.optimum
    top = best.reward - best.beta * best.kl
    named = not family  # the small pictures have the legend of their ways alone
    series = [
        curve(
            "frontier",
            [p[0] for p in points],
            [p[1] for p in points],
            INK,
            text=[f"β = {setting_of(p[2])}" for p in points],
            legend=named,
        ),
        curve(
            f"J of the optimum (slope β = {setting_of(best.beta)})",
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
    ends: list[tuple[float, str]] = []
    for m in methods:
        run = middle([r for r in m.runs if of_world(lab.world(f.world), r)])
        if run is None:
            continue
        own = [s for s in _path(run) if s.kl is not None and s.reward is not None]
        way = [(s.kl or 0.0, s.reward, f"step {s.step:,}") for s in own]
        if (
            run.kl is not None
            and run.reward is not None
            and (not way or way[-1][:2] != (run.kl, run.reward))
        ):
            way.append((run.kl, run.reward, "end"))
        ends += [] if run.relative_gap is None else [(run.relative_gap, m.name)]
        series.append(
            curve(
                label(m),
                [w[0] for w in way],
                [w[1] for w in way],
                colour(m.method),
                dash=DASHES.get(m.policy, "dot"),
                legend=named,
                mode="lines+markers" if len(way) <= 60 else "lines",
                text=[w[2] for w in way],
            )
        )
    series.append(
        curve(
            "optimum",
            [best.kl],
            [best.reward],
            VERMILLION,
            mode="markers",
            symbol="star",
            big=True,
            text=[f"β = {setting_of(best.beta)}"],
            legend=named,
        )
    )
    title = "No policy can lie above the curve: the most reward that each KL buys"
    if ends and max(ends)[0] >= 0:
        title = f"{f'{family}: each' if family else 'Each method'} climbs towards the frontier and ends within {share(max(ends)[0])} of the optimum"
        near = sorted(ends)[:-1]
        if near and max(ends)[0] > 0.05 >= near[-1][0]:
            who = f"{family}: all" if family else "All"
            title = f"{who} but {max(ends)[1]} ({share(max(ends)[0])} short) end within {share(near[-1][0])} of the optimum"
    out = figure(title, "mean reward E[r] (points)", series, x="KL(π‖ref) (nats per response)")
    shown = [y for s in series for y in s["y"] if y is not None and s.get("dash") != "dot"]
    reach = max((1.05 if s["name"] == "best of n" else 1.3) * x for s in series[2:] for x in s["x"])
    out["xrange"] = [-0.02 * reach, reach]  # the curve goes on where no method goes
    low, high = (
        min(shown),
        max(
            [p[1] for p in points if p[0] <= out["xrange"][1]]
            + [y for s in series[2:] for y in s["y"] if y is not None]
        ),
    )
    out["range"] = [low - 0.06 * (high - low), high + 0.08 * (high - low)]
    return out


def gap_figures(lab: Lab) -> list[Figure]:
    """The gap on the way, every seed, a picture a world and family: over responses sampled where
    all of it sample, else over steps.
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
    every = next(iter(families(here(lab, first)).values()), [])
    if sampling := [m for m in every if any(s.samples > 0 for r in m.runs for s in r.path)]:
        title = f"{', '.join(dict.fromkeys(m.name for m in sampling))} on the {first} world, by what was sampled"
        out.append(_gap_figure(title, sampling, *_across(sampling)))
    for world in dict.fromkeys([first, *(m.world for m in lab.methods or [])]):
        if world == sparse_world(lab):  # has pictures of its own
            continue
        for family, methods in families(
            [m for m in here(lab, world) if any(r.path for r in m.runs)]
        ).items():
            left = sorted((median(gaps(m)), label(m)) for m in methods if gaps(m))
            told = f": {left[0][1]} leaves least ({share(left[0][0])})" if len(left) > 1 else ""
            name = (
                f"The {world} world"
                if family == next(iter(FAMILIES))
                else f"{family}, {world} world"
            )
            out.append(_gap_figure(f"{name}{told}", methods, *_across(methods)))
    return [{**one, **limits} for one in out]


def sparse_figures(lab: Lab) -> list[Figure]:
    """The gap against responses sampled in the world of sparse rewards, by family, on one axis;
    what a process reward model had learned from is counted.
    """
    methods = here(lab, sparse_world(lab) or "")
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
        "One arm": ("ppo", *FAMILIES["REINFORCE by its baseline"]),
        "Rewards for steps": FAMILIES["Rewards for steps"],
    }
    out = []
    for family, keys in groups.items():
        own = [m for m in methods if m.method in keys]
        if not own:
            continue
        needed = sorted((median(n), m.name) for m in own if (n := samples_needed(m)))
        told = (
            f"{family}: {needed[0][1]} is the first to be within {share(NEAR)}, after "
            f"{needed[0][0]:,.0f} responses"
            if needed
            else family
        )
        out.append({**_gap_figure(told, own, *_across(own)), **limits, "small": False})
    return out


def _across(methods: Sequence[Trained]) -> tuple[str, Any]:
    sampling = all(any(s.samples > 0 for r in m.runs for s in r.path) for m in methods)
    return (
        ("responses sampled", lambda s: s.samples)
        if sampling
        else ("step of the method", lambda s: s.step)
    )


CREDIT = (
    ("rloo", SKY, "solid", "RLOO"),
    ("ppo", BLUE, "solid", "PPO, its critic"),
    ("perfect", BLUE, "dot", "PPO, a perfect critic"),
    ("rloo_steps", PURPLE, "solid", "RLOO, process rewards"),
)


def credit_figures(c: Credit) -> list[Figure]:
    """The advantage of each token of a response: the exact one, and what methods make of one sample."""
    out = []
    values = [
        x
        for t in c.responses
        for row in (t.exact, *(t.methods[k] for k, *_ in CREDIT if k in t.methods))
        for x in row
    ]
    room = 0.08 * (max([*values, 0.0]) - min([*values, 0.0])) or 0.1
    for t in c.responses:
        at = [i + 1 for i in range(len(t.exact))]
        series = [
            curve(name, at, t.methods[key], shade, dash=dash, mode="lines+markers", legend=False)
            for key, shade, dash, name in CREDIT
            if key in t.methods
        ]
        series.append(
            curve(
                "exact, Q \u2212 V",
                at,
                t.exact,
                INK,
                mode="lines+markers",
                symbol="diamond",
                legend=False,
            )
        )
        most = max(range(len(at)), key=lambda i: abs(t.exact[i]))
        which = "Right" if t.right else "Wrong"
        told = f"{which}: token {most + 1} of {t.response} deserves {'most' if t.exact[most] > 0 else 'the blame'}, {number(t.exact[most])}"
        named = [
            (name, shade, "" if dash == "solid" else "dash")
            for key, shade, dash, name in CREDIT
            if key in t.methods
        ]
        ticks = [f"{letter}*" if i in t.decisive else letter for i, letter in enumerate(t.response)]
        out.append(
            {
                **figure(told, "advantage (points)", series, x="token of the response"),
                "keys": [("exact, Q \u2212 V", INK, ""), *named],
                "xticks": [[float(i) for i in at], ticks],
                "range": [min([*values, 0.0]) - room, max([*values, 0.0]) + room],
            }
        )
    return out


def _gap_limits(values: Sequence[float]) -> Figure:
    """One logarithmic axis for all the pictures: decades, and between them where there are few."""
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


def _gap_figure(title: str, methods: list[Trained], x: str, at: Any) -> Figure:
    series = []
    for m in methods:
        own = middle(m.runs)
        for run in sorted(
            m.runs, key=lambda r: r is own
        ):  # the median seed on top, the others pale
            steps = [s for s in _path(run) if s.relative_gap is not None]
            if steps:
                series.append(
                    curve(
                        label(m),
                        [at(s) for s in steps],
                        [max(s.relative_gap or 0.0, FLOOR) for s in steps],
                        colour(m.method),
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


def positions_figure(kl: KL) -> Figure:
    at = list(range(1, len(kl.per_position) + 1))
    most = max(range(len(at)), key=lambda i: kl.per_position[i])
    total = sum(kl.per_position)
    told = (
        f"Token {most + 1} carries {share(kl.per_position[most] / total)} of the KL"
        if total > 0
        else "The KL of each token"
    )
    out = figure(
        told,
        "KL (nats)",
        [curve("KL", at, kl.per_position, INK, mode="lines+markers")],
        x="token of the response",
        small=True,
    )
    return {
        **out,
        "xticks": [[float(i) for i in at], [str(i) for i in at]],
        "range": [0, 1.1 * max(kl.per_position) or 1.0],
    }


def best_of_n_figure(best: BestOfN) -> Figure:
    """Exact KL under its bound; the ideal case is a reward without ties over endlessly many responses."""
    rows = [r for r in best.rows if r.kl is not None]
    series = [
        curve(
            "bound",
            [r.n for r in rows],
            [r.bound for r in rows],
            INK,
            dash="dash",
            mode="lines+markers",
            symbol="circle-open",
        ),
        curve(
            f"exact, {best.world} world",
            [r.n for r in rows],
            [r.kl for r in rows],
            GREEN,
            mode="lines+markers",
            symbol="diamond",
        ),
    ]
    ideal = [r for r in best.ideal if r.kl is not None]
    if ideal:
        series.append(
            curve(
                "exact, rewards without ties",
                [r.n for r in ideal],
                [r.kl for r in ideal],
                VERMILLION,
                mode="markers",
                symbol="x",
            )
        )
    far = max(rows, key=lambda r: r.n, default=None)
    told = (
        f"At n = {far.n} the exact KL is {number(far.kl)} nats where the bound says "
        f"{number(far.bound)}"
        if far
        else "Best of n: exact KL and its bound"
    )
    out = figure(
        told, "KL from ref (nats per response)", series, x="n, responses to choose from (log scale)"
    )
    ticks = sorted({float(r.n) for r in [*rows, *ideal]})
    return {**out, "xlog": True, "xticks": [ticks, [f"{t:g}" for t in ticks]]}


def proxy_figure(one: Overoptimisation, limits: tuple[list[float], list[float]] | None) -> Figure:
    x = [max(k, 0.0) ** 0.5 for k in one.curve.kl]
    band = {}
    if one.error and len(one.error) == len(x):
        band = {
            name: [g + sign * 1.96 * e for g, e in zip(one.curve.gold, one.error, strict=True)]
            for name, sign in (("low", -1), ("high", 1))
        }
    series = [
        curve("proxy", x, one.curve.proxy, GREEN, dash="dash"),
        curve("true value", x, one.curve.gold, GREEN, **band),
    ]
    if one.path and begins_with(one):
        way = [max(k, 0.0) ** 0.5 for k in one.path.kl]
        series += [
            curve("PPO, proxy", way, one.path.proxy, method_colour("ppo"), dash="dash"),
            curve("PPO, true value", way, one.path.gold, method_colour("ppo")),
        ]
    told = one.title
    if one.peak and one.last and one.turns_over:
        told += (
            f": the true value peaks at {number(one.peak.gold)} and ends at {number(one.last.gold)}"
        )
    elif one.last and not one.turns_over:
        told += f": the true value does not turn over, and ends at {number(one.last.gold)}"
    if one.peak and one.turns_over:
        series.append(
            curve(
                "peak",
                [one.peak.root_kl],
                [one.peak.gold],
                VERMILLION,
                mode="markers",
                symbol="star",
                legend=False,
            )
        )
    out = figure(told, "mean score (points)", series, x="root of KL (√nats)", small=True)
    return {**out, "xrange": limits[0], "range": limits[1]} if limits else out


def proxy_figures(curves: Sequence[Overoptimisation]) -> list[Figure]:
    """Small multiples. Drawn scores share their axes, and so do the curves of a world."""
    return [
        proxy_figure(
            c,
            _limits(
                [one for one in curves if one.key.startswith("world") == c.key.startswith("world")]
            ),
        )
        for c in curves
    ]


def _limits(curves: Sequence[Overoptimisation]) -> tuple[list[float], list[float]] | None:
    drawn = [line for c in curves for line in (c.curve, c.path if begins_with(c) else None) if line]
    xs = [max(k, 0.0) ** 0.5 for line in drawn for k in line.kl]
    ys = [y for line in drawn for y in [*line.proxy, *line.gold]]
    if not xs or not ys:
        return None
    room = 0.06 * (max(ys) - min(ys)) or 0.5
    return [0.0, 1.02 * max(xs) or 1.0], [min(ys) - room, max(ys) + room]


def heat_figure(one: Sensitivity) -> Figure:
    """The gap left over learning rate and beta. Colour by logarithm between a thousandth and the
    whole gap; the numbers stand in the cells.
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
        title += (
            f"; least at learning rate {setting_of(at[0])}, β {setting_of(at[1])} ({share(least)})"
        )
    return {
        "kind": "heat",
        "title": title,
        "x": "learning rate",
        "y": "β (points per nat)",
        "series": [],
        "small": False,
        "note": one.setting,
        "columns": [setting_of(x) for x in one.learning_rates],
        "rows": [setting_of(b) for b in one.betas],
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
