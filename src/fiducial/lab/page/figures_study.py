"""Pictures of credit, KL, best-of-n and proxies, as plain data for the page's script."""

from __future__ import annotations

from collections.abc import Sequence

from ...report.figures import GREEN, INK, VERMILLION, Figure, figure, method_colour
from ...report.numbers import number
from ..study.results import BestOfN, Credit, KLTable, Overoptimization
from .curves import curve
from .reading import begins_with
from .text import share

CREDIT = (
    ("rloo", method_colour("rloo"), "solid", "RLOO"),
    ("ppo", method_colour("ppo"), "solid", "PPO, its critic"),
    ("perfect", method_colour("ppo"), "dot", "PPO, a perfect critic"),
    ("rloo_steps", method_colour("rloo_steps"), "solid", "RLOO, process rewards"),
)
"""The advantages that are drawn: key, color, dash and name."""


def credit_figures(c: Credit) -> list[Figure]:
    """The advantage of each token of a response: the exact one, and what methods estimate from one
    sample.
    """
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
        told = (
            f"{which}: token {most + 1} of {t.response} deserves the most "
            f"{'credit' if t.exact[most] > 0 else 'blame'}, {number(t.exact[most])}"
        )
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


def positions_figure(kl: KLTable) -> Figure:
    """The KL of each token position."""
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
    """The exact KL and its bound. The ideal case is a reward without ties over very many
    responses.
    """
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
        f"At n = {far.n} the exact KL is {number(far.kl)} nats and the bound is {number(far.bound)}"
        if far
        else "Best of n: exact KL and its bound"
    )
    out = figure(
        told, "KL from ref (nats per response)", series, x="n, responses to choose from (log scale)"
    )
    ticks = sorted({float(r.n) for r in [*rows, *ideal]})
    return {**out, "xlog": True, "xticks": [ticks, [f"{t:g}" for t in ticks]]}


def proxy_figure(one: Overoptimization, limits: tuple[list[float], list[float]] | None) -> Figure:
    """A proxy and the true reward over the root of the KL. `limits`: of both axes."""
    x = [max(k, 0.0) ** 0.5 for k in one.curve.kl]
    band = {}
    if one.error and len(one.error) == len(x):
        band = {
            name: [g + sign * 1.96 * e for g, e in zip(one.curve.gold, one.error, strict=True)]
            for name, sign in (("low", -1), ("high", 1))
        }
    series = [
        curve("proxy", x, one.curve.proxy, GREEN, dash="dash"),
        curve("true reward", x, one.curve.gold, GREEN, **band),
    ]
    if one.path and begins_with(one):
        root = [max(k, 0.0) ** 0.5 for k in one.path.kl]
        series += [
            curve("PPO, proxy", root, one.path.proxy, method_colour("ppo"), dash="dash"),
            curve("PPO, true reward", root, one.path.gold, method_colour("ppo")),
        ]
    told = one.title
    if one.peak and one.last and one.turns_over:
        peak, last = number(one.peak.gold), number(one.last.gold)
        told += f": the true reward peaks at {peak} and ends at {last}"
    elif one.last and not one.turns_over:
        told += f": the true reward does not turn over, and ends at {number(one.last.gold)}"
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


def proxy_figures(curves: Sequence[Overoptimization]) -> list[Figure]:
    """One picture per proxy. Those of sampled scores share their axes, and so do those of a
    world.
    """
    return [
        proxy_figure(
            c,
            _limits(
                [one for one in curves if one.key.startswith("world") == c.key.startswith("world")]
            ),
        )
        for c in curves
    ]


def _limits(curves: Sequence[Overoptimization]) -> tuple[list[float], list[float]] | None:
    """Both axes, wide enough for all that is drawn."""
    drawn = [line for c in curves for line in (c.curve, c.path if begins_with(c) else None) if line]
    xs = [max(k, 0.0) ** 0.5 for line in drawn for k in line.kl]
    ys = [y for line in drawn for y in [*line.proxy, *line.gold]]
    if not xs or not ys:
        return None
    room = 0.06 * (max(ys) - min(ys)) or 0.5
    return [0.0, 1.02 * max(xs) or 1.0], [min(ys) - room, max(ys) + room]
