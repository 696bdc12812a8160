"""Pictures as plain data: the page's own script hands them to plotly. Nothing here draws, so
everything here can be tested.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..metrics import EVAL, GROUPS, Metric, Range, base, lookup
from .folder import Point, Run
from .numbers import Estimate, mean_of, number

# Okabe and Ito's palette. A method keeps its colour on every page.
BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#8A8A8A",
)
COLOURS = {
    "ppo": BLUE,
    "dpo": ORANGE,
    "reward": GREEN,
    "sft": PURPLE,
    "ppo_no_kl": VERMILLION,
    "reinforce": SKY,
    "rloo": SKY,
    "grpo": GREY,
    "reinforce_none": "ink",
    "reinforce_mean": GREEN,
    "remax": ORANGE,
    "reinforce_pp": VERMILLION,
    "rloo_steps": PURPLE,
    "ppo_steps": GREEN,
    "dr_grpo": GREEN,
    "dapo": ORANGE,
    "gspo": VERMILLION,
    "cispo": PURPLE,
}
"""In no picture do two share a colour: REINFORCE's kin, GRPO's kin, and the two ways to reward
steps have pictures of their own.
"""
# the page's own text colour: held-out curves and second curves, readable beside every method's
# colour, light or dark
INK = "ink"
LIMIT = 1000

Figure = dict[str, Any]


def thin(points: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """At most `limit` points: each stretch keeps its lowest and its highest, so that no spike is
    lost; the ends stay.
    """
    n = len(points)
    if n <= limit:
        return list(points)
    stretches = (limit - 2) // 2
    keep = {0, n - 1}
    for i in range(stretches):
        block = range(1 + i * (n - 2) // stretches, 1 + (i + 1) * (n - 2) // stretches)
        keep.add(min(block, key=lambda j: points[j][1]))
        keep.add(max(block, key=lambda j: points[j][1]))
    return [points[j] for j in sorted(keep)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Centred running mean over a twentieth of the run; empty under forty points, where the curve
    itself is readable.
    """
    n = len(points)
    if n < 40:
        return []
    reach = max(1, n // 40)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    out = []
    for i in range(n):
        start, end = max(0, i - reach), min(n, i + reach + 1)  # half a window is left at the ends
        out.append((points[i][0], (sums[end] - sums[start]) / (end - start)))
    return out


def window(values: Sequence[float], late: bool) -> Estimate:
    """Mean of the first or the last tenth of a run (five values at least, or half of what there is)."""
    k = min(max(5, len(values) // 10), max(1, len(values) // 2))
    return mean_of(values[-k:] if late else values[:k])


def change(values: Sequence[float]) -> int:
    """1 if the last tenth lies above the first by more than both intervals allow, -1 if below, 0 if
    that cannot be told.
    """
    first, last = window(values, False), window(values, True)
    if first.half is None or last.half is None:
        return 0
    noise = (first.half**2 + last.half**2) ** 0.5
    gap = last.value - first.value
    return 0 if abs(gap) <= noise else (1 if gap > 0 else -1)


def says(title: str, values: Sequence[float], unit: str = "") -> str:
    """A title that says what is to be seen: `KL to the reference rises from 0.1 to 2.4 nats per
    response`.
    """
    unit = (
        unit
        if any(word in unit for word in ("nats", "token", "second", "epoch"))
        and not unit.startswith("share")
        else ""
    )
    if len(values) < 2:
        return f"{title}: {number(values[0])} {unit}".rstrip()
    first, last = window(values, False).value, window(values, True).value
    steady = len(set(values)) > 1 and change(values)
    if len(values) < 6:
        return f"{title} goes from {number(values[0])} to {number(values[-1])} {unit}".rstrip()
    if not steady:
        return f"{title} shows no clear trend, about {number(fmean(values))} {unit}".rstrip()
    return f"{title} {'rises' if steady > 0 else 'falls'} from {number(first)} to {number(last)} {unit}".rstrip()


def line(
    name: str, points: Sequence[Point], colour: str, dash: str = "solid", mode: str = "lines"
) -> list[dict[str, Any]]:
    """One curve: thinned, and where it is long, pale under its running mean."""
    mean, shown = thin(smooth(points)), thin(points)
    few = len(points) <= 12
    main = {
        "name": name,
        "x": [x for x, _ in mean or shown],
        "y": [y for _, y in mean or shown],
        "color": colour,
        "dash": dash,
        "mode": "lines+markers" if few else mode,
        "faint": False,
    }
    if not mean:
        return [main]
    return [
        {
            **main,
            "x": [x for x, _ in shown],
            "y": [y for _, y in shown],
            "faint": True,
            "dash": "solid",
        },
        main,
    ]


def _range(series: Sequence[dict[str, Any]], healthy: Range | None) -> list[float] | None:
    """The y axis: all that is drawn and, where a curve leaves the healthy range, the bound that it
    crossed. Flat curves get room.
    """
    drawn = [y for one in series for y in one["y"] if y is not None]
    if not drawn:
        return None
    low, high = min(drawn), max(drawn)
    for bound in healthy or ():
        if bound is not None:
            low, high = (
                (min(low, bound), max(high, bound))
                if not low <= bound <= high and _outside(drawn, healthy)
                else (low, high)
            )
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return [low - pad, high + pad]


def _outside(values: Sequence[float], healthy: Range | None) -> bool:
    low, high = healthy or (None, None)
    return any((low is not None and v < low) or (high is not None and v > high) for v in values)


def figure(
    title: str,
    y: str,
    series: list[dict[str, Any]],
    *,
    x: str = "step",
    healthy: Range | None = None,
    level: tuple[float, str] | None = None,
    small: bool = False,
    note: str = "",
) -> Figure:
    """A picture: titles, axes with units, curves, the healthy band, and one level to compare with."""
    out: Figure = {
        "title": title,
        "x": x,
        "y": y,
        "series": series,
        "small": small,
        "note": note,
        "range": _range(series, healthy),
    }
    if healthy is not None and out["range"]:
        low, high = out["range"]
        out["band"] = [
            edge if bound is None else max(low, min(high, bound))
            for edge, bound in zip((low, high), healthy, strict=True)
        ]
    if level is not None:
        out["level"] = {"y": level[0], "text": level[1]}
        if out["range"]:
            out["range"] = [
                min(out["range"][0], level[0] - 0.02),
                max(out["range"][1], level[0] + 0.02),
            ]
    return out


def with_unit(metric: Metric) -> str:
    """An axis's name: `Length of responses (tokens)`."""
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def metric_figure(
    run: Run, name: str, colour: str, *, small: bool = False, level: tuple[float, str] | None = None
) -> Figure:
    """One metric over the steps, training and held out in one picture."""
    metric, series = lookup(name), []
    train, held = run.series.get(name, []), run.series.get(EVAL + name, [])
    if train:
        series += line("training" if held else metric.title, train, colour)
    if held:
        series += line("held out", held, INK, "dash", "lines+markers")
    told, title = (
        (held, f"Held-out {metric.title[0].lower()}{metric.title[1:]}")
        if held and (level or not train)
        else (train, metric.title)
    )
    seen = says(title, [v for _, v in told], metric.unit)
    return figure(
        seen, metric.unit or metric.title, series, healthy=metric.healthy, level=level, small=small
    )


def both_figure(run: Run, names: Sequence[str], colour: str, title: str) -> Figure:
    """Two metrics of one unit in one picture, told apart by colour and by dash."""
    series: list[dict[str, Any]] = []
    for name, own, dash in zip(names, (colour, INK), ("solid", "dash"), strict=False):
        if run.series.get(name):
            series += line(lookup(name).title, run.series[name], own, dash)
    return figure(title, lookup(names[0]).unit, series)


def points_figure(
    title: str,
    x: str,
    y: str,
    points: Sequence[dict[str, Any]],
    keys: tuple[str, str],
    colour: str,
    diagonal: bool = False,
) -> Figure:
    """Estimates with their intervals over a number: reliability, accuracy by difference in length."""
    xs, ys = [p[keys[0]] for p in points], [p[keys[1]] for p in points]
    one = {
        "name": "measured",
        "x": xs,
        "y": ys,
        "low": [p.get("low") for p in points],
        "high": [p.get("high") for p in points],
        "color": colour,
        "dash": "solid",
        "mode": "markers",
        "faint": False,
    }
    out = figure(title, y, [one], x=x)
    out["range"] = None
    if diagonal:
        out["diagonal"] = "perfectly calibrated"
    return out


def other_curves(
    run: Run, shown: set[str], colour: str
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every curve that the deciding picture did not show, by group; and the numbers that never
    changed, which need no picture.
    """
    names = {base(name) for name in run.series if name != "seconds"} - shown
    groups: list[dict[str, Any]] = []
    constant: list[dict[str, str]] = []
    for group, question in zip(
        GROUPS, ("Is it learning?", "Is it stable?", "Is it honest?", "Is it fast?"), strict=True
    ):
        cells = []
        for name in sorted(n for n in names if lookup(n).group == group):
            metric, values = lookup(name), run.values(name) + run.values(EVAL + name)
            if len(set(values)) == 1:
                constant.append(
                    {
                        "name": name,
                        "value": f"{values[0]:.6g}",
                        "unit": metric.unit,
                        "sentence": metric.sentence,
                    }
                )
            else:
                cells.append(
                    {
                        "name": name,
                        "sentence": metric.sentence,
                        "figure": metric_figure(run, name, colour, small=True),
                    }
                )
        if cells:
            groups.append({"question": question, "cells": cells})
    return groups, constant


def was_thinned(run: Run) -> str | None:
    """The sentence that says so, when curves hold more points than are drawn."""
    most = max((len(points) for points in run.series.values()), default=0)
    if most <= LIMIT:
        return None
    how = f"{most:,} points are drawn as at most {LIMIT:,}, each stretch by its lowest and its highest"
    return f"Curves are thinned for display: {how}; metrics.jsonl has all."
