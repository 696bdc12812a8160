"""The lab page's pictures, as plain data for the page's script."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from fiducial.report.figures import COLOURS, GREEN, INK, VERMILLION, Figure, figure, thin
from fiducial.report.lab_answer import begins_with, first_world, gaps, middle, of_world, share, with_policy
from fiducial.report.lab_schema import KL, BestOfN, Lab, Num, Overoptimisation, Result, Sensitivity, Step, Trained
from fiducial.report.numbers import MINUS, number

DASHES = {"table": "solid", "transformer": "dash"}
FLOOR = 1e-6  # a share of the gap below this is drawn here: a logarithm knows no 0


def setting_of(x: float) -> str:
    """A setting as it is typed: 0.003, 1e−5."""
    return f"{x:g}".replace("e-0", "e-").replace("-", MINUS)


def curve(name: str, x: Sequence[float], y: Sequence[Num], color: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "x": list(x), "y": list(y), "color": color, "dash": "solid", "mode": "lines", "faint": False, **more}


def label(m: Trained) -> str:
    return f"{m.name}, {m.policy}"


def colour(method: str) -> str:
    return COLOURS.get(method, VERMILLION)


def here(lab: Lab, world: str) -> list[Trained]:
    """The methods of a world in the legend's order: tables first."""
    return sorted((m for m in lab.methods or [] if m.world == world), key=lambda m: (m.policy != "table", m.name))


def method_keys(lab: Lab) -> list[tuple[str, str, str]]:
    """The legend of pictures that share one: name, colour, and a class for the dash."""
    shown = sorted(lab.methods or [], key=lambda m: (m.policy != "table", m.name))
    return list(dict.fromkeys((label(m), colour(m.method), "" if DASHES.get(m.policy) == "solid" else "dash") for m in shown))


def _path(run: Result) -> list[Step]:
    """At most a thousand points of a run's way, in order."""
    steps = sorted(run.path, key=lambda s: s.step)
    return [steps[int(i)] for i, _ in thin([(float(i), s.relative_gap or 0.0) for i, s in enumerate(steps)])]


def frontier_figure(lab: Lab) -> Figure:
    """E[r] over KL: what no policy can exceed, the optimum, and the way of each method's median seed."""
    f = lab.frontier
    assert f is not None
    points = sorted(zip(f.kl, f.reward, f.beta, strict=True))
    best = f.optimum
    top = best.reward - best.beta * best.kl
    series = [
        curve("frontier", [p[0] for p in points], [p[1] for p in points], INK, text=[f"β = {setting_of(p[2])}" for p in points]),
        curve(f"J of the optimum (slope β = {setting_of(best.beta)})", [0.0, points[-1][0]], [top, top + best.beta * points[-1][0]], INK, dash="dot"),
    ]
    if f.best_of_n:
        chosen = [c for c in f.best_of_n if c.kl is not None and c.reward is not None]
        series.append(curve("best of n", [c.kl or 0.0 for c in chosen], [c.reward for c in chosen], GREEN, mode="markers", symbol="diamond",
                            text=[f"n = {c.n}" for c in chosen]))  # fmt: skip
    ends = []
    for m in here(lab, f.world):
        run = middle([r for r in m.runs if of_world(lab.world(f.world), r)])
        if run is None:
            continue
        own = [s for s in _path(run) if s.kl is not None and s.reward is not None]
        way = [(s.kl or 0.0, s.reward, f"step {s.step:,}") for s in own]
        if run.kl is not None and run.reward is not None and (not way or way[-1][:2] != (run.kl, run.reward)):
            way.append((run.kl, run.reward, "end"))
        ends += [] if run.relative_gap is None else [run.relative_gap]
        series.append(curve(label(m), [w[0] for w in way], [w[1] for w in way], colour(m.method), dash=DASHES.get(m.policy, "dot"),
                            mode="lines+markers" if len(way) <= 60 else "lines", text=[w[2] for w in way]))  # fmt: skip
    series.append(curve("optimum", [best.kl], [best.reward], VERMILLION, mode="markers", symbol="star", big=True, text=[f"β = {setting_of(best.beta)}"]))
    title = "No policy can lie above the curve: the most reward that each KL buys"
    if ends:
        title = f"Each method climbs towards the frontier and ends within {share(max(ends))} of the optimum" if max(ends) >= 0 else title
    out = figure(title, "mean reward E[r] (points)", series, x="KL(π‖ref) (nats per response)")
    shown = [y for s in series for y in s["y"] if y is not None and s.get("dash") != "dot"]
    reach = max((1.05 if s["name"] == "best of n" else 1.3) * x for s in series[2:] for x in s["x"])
    out["xrange"] = [-0.02 * reach, reach]  # the curve goes on where no method goes
    low, high = min(shown), max([p[1] for p in points if p[0] <= out["xrange"][1]] + [y for s in series[2:] for y in s["y"] if y is not None])
    out["range"] = [low - 0.06 * (high - low), high + 0.08 * (high - low)]
    return out


def gap_figures(lab: Lab) -> list[Figure]:
    """The gap on the way, every seed: over responses sampled for the methods that sample, and over steps, a picture a world."""
    out = []
    first = first_world(lab)
    limits = _gap_limits([s.relative_gap for m in lab.methods or [] for r in m.runs for s in r.path if s.relative_gap is not None])
    sampling = [m for m in here(lab, first) if any(s.samples > 0 for r in m.runs for s in r.path)]
    if sampling:
        title = f"{', '.join(dict.fromkeys(m.name for m in sampling))} on the {first} world, by what was sampled"
        out.append({**_gap_figure(title, sampling, "responses sampled", lambda s: s.samples), "xformat": "~s"})
    for world in dict.fromkeys([first, *(m.world for m in lab.methods or [])]):
        methods = [m for m in here(lab, world) if any(r.path for r in m.runs)]
        if methods:
            left = sorted((median(gaps(m)), label(m)) for m in methods if gaps(m))
            told = f": {left[0][1]} leaves least ({share(left[0][0])})" if len(left) > 1 else ""
            out.append(_gap_figure(f"The {world} world{told}", methods, "step of the method", lambda s: s.step))
    return [{**one, **limits} for one in out]


def _gap_limits(values: Sequence[float]) -> Figure:
    """One logarithmic axis for all the pictures: decades, and between them where there are few."""
    if not values:
        return {}
    low, high = math.log10(max(min(values), FLOOR)), math.log10(max(*values, 1.0))
    between = (1, 2, 5) if high - low < 1.5 else (1,)
    ticks = [k * 10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 1) for k in between]
    return {"ylog": True, "range": [low - 0.06 * (high - low), high + 0.06 * (high - low)], "yticks": [ticks, [f"{100 * t:g}%" for t in ticks]]}


def _gap_figure(title: str, methods: list[Trained], x: str, at: Any) -> Figure:
    series = []
    for m in methods:
        own = middle(m.runs)
        for run in sorted(m.runs, key=lambda r: r is own):  # the median seed on top, the others pale
            steps = [s for s in _path(run) if s.relative_gap is not None]
            if steps:
                series.append(curve(label(m), [at(s) for s in steps], [max(s.relative_gap or 0.0, FLOOR) for s in steps], colour(m.method),
                                    dash=DASHES.get(m.policy, "dot"), faint=run is not own, legend=False))  # fmt: skip
    return figure(title, "share of the gap left", series, x=x, small=True)


def positions_figure(kl: KL) -> Figure:
    at = list(range(1, len(kl.per_position) + 1))
    most = max(range(len(at)), key=lambda i: kl.per_position[i])
    total = sum(kl.per_position)
    told = f"Token {most + 1} carries {share(kl.per_position[most] / total)} of the KL" if total > 0 else "The KL of each token"
    out = figure(told, "KL (nats)", [curve("KL", at, kl.per_position, INK, mode="lines+markers")], x="token of the response", small=True)
    return {**out, "xticks": [[float(i) for i in at], [str(i) for i in at]], "range": [0, 1.1 * max(kl.per_position) or 1.0]}


def best_of_n_figure(best: BestOfN) -> Figure:
    """Exact KL under its bound; the ideal case is a reward without ties over endlessly many responses."""
    rows = [r for r in best.rows if r.kl is not None]
    series = [curve("bound", [r.n for r in rows], [r.bound for r in rows], INK, dash="dash", mode="lines+markers", symbol="circle-open"),
              curve(f"exact, {best.world} world", [r.n for r in rows], [r.kl for r in rows], GREEN, mode="lines+markers", symbol="diamond")]  # fmt: skip
    ideal = [r for r in best.ideal if r.kl is not None]
    if ideal:
        series.append(curve("exact, rewards without ties", [r.n for r in ideal], [r.kl for r in ideal], VERMILLION, mode="markers", symbol="x"))
    far = max(rows, key=lambda r: r.n, default=None)
    told = f"At n = {far.n} the exact KL is {number(far.kl)} nats where the bound says {number(far.bound)}" if far else "Best of n: exact KL and its bound"
    out = figure(told, "KL from ref (nats per response)", series, x="n, responses to choose from (log scale)")
    ticks = sorted({float(r.n) for r in [*rows, *ideal]})
    return {**out, "xlog": True, "xticks": [ticks, [f"{t:g}" for t in ticks]]}


def proxy_figure(one: Overoptimisation, limits: tuple[list[float], list[float]] | None) -> Figure:
    x = [max(k, 0.0) ** 0.5 for k in one.curve.kl]
    band = {}
    if one.error and len(one.error) == len(x):
        band = {name: [g + sign * 1.96 * e for g, e in zip(one.curve.gold, one.error, strict=True)] for name, sign in (("low", -1), ("high", 1))}
    series = [curve("proxy", x, one.curve.proxy, GREEN, dash="dash"), curve("true value", x, one.curve.gold, GREEN, **band)]
    if one.path and begins_with(one):
        way = [max(k, 0.0) ** 0.5 for k in one.path.kl]
        series += [curve("PPO, proxy", way, one.path.proxy, COLOURS["ppo"], dash="dash"), curve("PPO, true value", way, one.path.gold, COLOURS["ppo"])]
    told = one.title
    if one.peak and one.last and one.turns_over:
        told += f": the true value peaks at {number(one.peak.gold)} and ends at {number(one.last.gold)}"
    elif one.last and not one.turns_over:
        told += f": the true value does not turn over, and ends at {number(one.last.gold)}"
    if one.peak and one.turns_over:
        series.append(curve("peak", [one.peak.root_kl], [one.peak.gold], VERMILLION, mode="markers", symbol="star", legend=False))
    out = figure(told, "mean score (points)", series, x="root of KL (√nats)", small=True)
    return {**out, "xrange": limits[0], "range": limits[1]} if limits else out


def proxy_figures(curves: Sequence[Overoptimisation]) -> list[Figure]:
    """Small multiples. Drawn scores share their axes, and so do the curves of a world."""
    return [proxy_figure(c, _limits([one for one in curves if one.key.startswith("world") == c.key.startswith("world")])) for c in curves]


def _limits(curves: Sequence[Overoptimisation]) -> tuple[list[float], list[float]] | None:
    drawn = [line for c in curves for line in (c.curve, c.path if begins_with(c) else None) if line]
    xs = [max(k, 0.0) ** 0.5 for line in drawn for k in line.kl]
    ys = [y for line in drawn for y in [*line.proxy, *line.gold]]
    if not xs or not ys:
        return None
    room = 0.06 * (max(ys) - min(ys)) or 0.5
    return [0.0, 1.02 * max(xs) or 1.0], [min(ys) - room, max(ys) + room]


def heat_figure(one: Sensitivity) -> Figure:
    """The gap left over learning rate and beta. Colour by logarithm between a thousandth and the whole gap; the numbers stand in the cells."""
    cells = [x for row in one.relative_gap for x in row if x is not None]
    good = sum(x <= 0.05 for x in cells)
    title = f"{with_policy(one)} leaves 5% or less in {good} of {len(cells)} cells" if cells else f"{with_policy(one)}: nothing was measured"
    if cells:
        least, at = min((x, (one.learning_rates[j], one.betas[i])) for i, row in enumerate(one.relative_gap) for j, x in enumerate(row) if x is not None)
        title += f"; least at learning rate {setting_of(at[0])}, β {setting_of(at[1])} ({share(least)})"
    return {
        "kind": "heat", "title": title, "x": "learning rate", "y": "β (points per nat)", "series": [], "small": False, "note": one.setting,
        "columns": [setting_of(x) for x in one.learning_rates], "rows": [setting_of(b) for b in one.betas],
        "z": [[None if x is None else math.log10(min(max(x, 1e-3), 1.0)) for x in row] for row in one.relative_gap],
        "text": [["" if x is None else share(x) for x in row] for row in one.relative_gap],
        "bar": {"title": "share of the gap left", "range": [-3, 0.01], "ticks": [[-3, -2, -1, 0], ["≤ 0.1%", "1%", "10%", "≥ 100%"]]},
    }  # fmt: skip
