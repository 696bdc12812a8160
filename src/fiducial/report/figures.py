"""Pictures as plain data, which the page's own script hands to plotly. Nothing here draws, so
everything here can be tested.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from .. import verbs
from ..metric import GROUPS, Range
from ..metrics import EVAL, base, lookup
from .alarms import Alarm
from .folder import Point, RunRecord
from .numbers import Estimate, mean_of, number

BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#8A8A8A",
)
INK = "ink"
"""The page's own text color: held-out curves and second curves, readable beside every method's
color on a light or a dark page.
"""
PALETTE: dict[verbs.Colour, str] = {
    "blue": BLUE,
    "orange": ORANGE,
    "green": GREEN,
    "vermillion": VERMILLION,
    "sky": SKY,
    "purple": PURPLE,
    "grey": GREY,
    "ink": INK,
}
"""The colors of the table of methods, from the palette of Okabe and Ito."""
LIMIT = 1000
"""Points of a curve that a page draws at most."""

Figure = dict[str, Any]


def method_colour(name: str) -> str:
    """The color of a method or variant on every page."""
    return PALETTE[verbs.colour(name)]


def thin(points: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """At most `limit` points: each stretch keeps its lowest and its highest, so that no spike is
    lost; both ends are kept.
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
    """Centered running mean over a twentieth of the run; empty below forty points, where the curve
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
    """Mean of the first or the last tenth of a run: five values at least, or half of all."""
    k = min(max(5, len(values) // 10), max(1, len(values) // 2))
    return mean_of(values[-k:] if late else values[:k])


def change(values: Sequence[float]) -> int:
    """1 if the last tenth lies above the first by more than both intervals explain, -1 if below, 0
    if neither is clear.
    """
    first, last = window(values, False), window(values, True)
    if first.half is None or last.half is None:
        return 0
    noise = (first.half**2 + last.half**2) ** 0.5
    gap = last.value - first.value
    return 0 if abs(gap) <= noise else (1 if gap > 0 else -1)


def spoken(unit: str) -> str:
    """The unit if it can follow a number in a sentence, else nothing."""
    words = ("nats", "token", "second", "epoch")
    return "" if unit.startswith("share") or not any(w in unit for w in words) else unit


def says(title: str, values: Sequence[float], unit: str = "") -> str:
    """A title that says what the picture shows: `KL to the reference rises from 0.1 to 2.4 nats
    per response`.
    """
    unit = spoken(unit)
    if len(values) < 2:
        return f"{title}: {number(values[0])} {unit}".rstrip()
    first, last = window(values, False).value, window(values, True).value
    steady = len(set(values)) > 1 and change(values)
    if len(values) < 6:
        return f"{title} goes from {number(values[0])} to {number(values[-1])} {unit}".rstrip()
    if not steady:
        return f"{title} shows no clear trend, about {number(fmean(values))} {unit}".rstrip()
    way = "rises" if steady > 0 else "falls"
    return f"{title} {way} from {number(first)} to {number(last)} {unit}".rstrip()


def line(
    name: str, points: Sequence[Point], colour: str, dash: str = "solid", mode: str = "lines"
) -> list[dict[str, Any]]:
    """One curve, thinned; a long one is drawn pale under its running mean."""
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
    """The y axis: everything that is drawn and, where a curve leaves the healthy range, the bound
    that it crossed. A flat curve gets some room.
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
) -> Figure:
    """A picture: title, axes with units, curves, the healthy band, and a level to compare with."""
    out: Figure = {
        "title": title,
        "x": x,
        "y": y,
        "series": series,
        "small": small,
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


def metric_figure(
    run: RunRecord,
    name: str,
    colour: str,
    *,
    small: bool = False,
    level: tuple[float, str] | None = None,
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


def mark(picture: Figure, run: RunRecord, names: Sequence[str], found: Sequence[Alarm]) -> Figure:
    """The picture of these metrics, with a mark at each step at which an alarm about one of them
    was raised: a line, and a point on the curve that tells the alarm.
    """
    marks = []
    for alarm in found:
        about = [base(name) for name in alarm.values if base(name) in names]
        if alarm.step is None or not about:
            continue
        points = run.series.get(about[0], [])
        y = next((value for step, value in points if step == alarm.step), None)
        marks.append({"x": alarm.step, "y": y, "text": f"{alarm.name}. {alarm.sentence}"})
    return {**picture, "marks": marks} if marks else picture


def both_figure(run: RunRecord, names: Sequence[str], colour: str, title: str) -> Figure:
    """Two metrics with the same unit in one picture, told apart by color and by dash."""
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
    """Estimates with their intervals over a number, such as reliability."""
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
    run: RunRecord, shown: set[str], colour: str
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every curve that the deciding pictures do not show, by group; and the metrics that never
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


def was_thinned(run: RunRecord) -> str | None:
    """A sentence that says so when curves have more points than are drawn, else None."""
    most = max((len(points) for points in run.series.values()), default=0)
    if most <= LIMIT:
        return None
    return (
        f"Curves are thinned for display: {most:,} points are drawn as at most {LIMIT:,}, each "
        "stretch by its lowest and its highest; metrics.jsonl has them all."
    )
