"""The demo's page: methods compared on the same held-out prompts. It is `index.html`, with plotly's
script beside it.

Any run can stand in the comparison: its title and its color come from the table of methods. PPO
without the KL term (`ppo_no_kl`) is told apart from the others, because it is there to be hacked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .. import verbs
from ..report.answer import against_half
from ..report.figures import GREEN, Figure, figure, method_colour, points_figure, thin
from ..report.numbers import count, duration, number, percent, size, with_interval
from ..report.render import write_page
from .results import (
    Circumstances,
    Comparison,
    Measured,
    MethodResult,
    RewardModelResult,
    Sample,
    Sensitivity,
)

Verdict = Literal["hacked", "over-optimized", "no", "not tried"]
FREE = "ppo_no_kl"
NONE = "\u2014"


def hacked(demo: Comparison) -> Verdict:
    """What happened without the KL term: the proxy rose beyond PPO's and the true value fell below
    SFT's, or only below PPO's, or neither.
    """
    free, ppo = demo.method(FREE), demo.method("ppo") or demo.method("sft")
    if free is None or ppo is None or free.win_rate is None:
        return "not tried"
    if free.proxy.low <= ppo.proxy.high:
        return "no"
    if free.win_rate.high < 0.5:
        return "hacked"
    if ppo.win_rate is not None and free.win_rate.high < ppo.win_rate.low:
        return "over-optimized"
    return "no"


def demo_answer(demo: Comparison) -> list[str]:
    """The sentences at the top, no stronger than the intervals: how the methods compare with SFT,
    and what happened without the KL term.
    """
    sentences = _against_sft(demo) + _without_kl(demo)
    return sentences or ["No method was compared with SFT."]


def _against_sft(demo: Comparison) -> list[str]:
    """The methods grouped by how they compare with SFT, and whether the intervals tell the methods
    apart.
    """
    compared = [(m, m.win_rate) for m in demo.methods if m.key != FREE and m.win_rate is not None]
    verdicts: dict[str, list[str]] = {}
    for m, won in compared:
        verdict = against_half(
            won.e,
            "beats SFT on",
            "is not shown to beat SFT (one half is not excluded):",
            "loses to SFT, winning on only",
        )
        said = verdicts.setdefault(verdict, [])
        does, of = ("", "") if said else (f" {verdict}", " of held-out prompts")
        at = f" at {number(m.kl.value)} nats" if m.kl else ""
        said.append(f"{_title(m)}{does} {percent(won.e)}{of}{at}")
    stands = [f"{', '.join(said)}." for said in verdicts.values()]
    best = max(compared, key=lambda one: one[1].value, default=None)
    others = [won.high for m, won in compared if best and m is not best[0]]
    if best and others and best[1].low <= max(others):
        which = (
            "These intervals overlap: neither method"
            if len(compared) == 2
            else "The intervals of the best methods overlap: none of them"
        )
        stands.append(f"{which} is shown to be the better one.")
    return [" ".join(stands)] if stands else []


def _without_kl(demo: Comparison) -> list[str]:
    free = demo.method(FREE)
    anchor = demo.method("ppo") or demo.method("sft")
    if free is None or free.win_rate is None or anchor is None:
        return []
    won, verdict = percent(free.win_rate.e), hacked(demo)
    rose = f"({number(anchor.proxy.value)} to {number(free.proxy.value)})"
    start = f"Without the KL term the proxy rose further {rose}"
    if verdict == "hacked":
        return [
            f"{start} and the true value fell: it beats SFT on only {won} of held-out prompts. The "
            "reward was hacked."
        ]
    if verdict == "over-optimized":
        level = against_half(
            free.win_rate.e, "it still beats SFT", "it is not shown to beat SFT", "it loses to SFT"
        )
        return [
            f"{start} while the true value fell behind PPO's: {level} ({won} of held-out prompts). "
            "The reward was over-optimized."
        ]
    if free.proxy.low > anchor.proxy.high:
        return [
            f"{start}, and it wins over SFT on {won} of held-out prompts: this run does not show "
            "that the reward was hacked."
        ]
    return [
        f"Without the KL term the proxy is not shown to rise further {rose}, with {won} wins over "
        "SFT: no hacking was seen in this run."
    ]


def demo_alarms(demo: Comparison) -> list[str]:
    """What should make a reader doubt the numbers."""
    model, found = demo.reward_model, []
    if model.accuracy.low <= model.length_only.value + 0.02:
        found.append(
            f"The reward model ({percent(model.accuracy.e)}) is not shown to know more than length "
            f"alone ({percent(model.length_only.e)}; heuristic: two points apart): collect more "
            "comparisons, or balance their lengths."
        )
    if model.accuracy.low <= 0.5:
        found.append(
            f"The reward model is not shown to beat a coin flip ({percent(model.accuracy.e)} of "
            "held-out pairs): what was trained on it means little."
        )
    sft = demo.method("sft")
    for m in demo.methods:
        if sft and m is not sft and m.length > 1.5 * sft.length:
            found.append(
                f"{_title(m)} answers in {number(m.length)} tokens where SFT takes "
                f"{number(sft.length)} (heuristic: less than half as much again): the reward may "
                "be paying for length."
            )
        if m.kl is not None and m.kl.high < 0:
            found.append(
                f"The KL of {_title(m)} is below 0 ({with_interval(m.kl.e)} nats), which is "
                "impossible: sampling and scoring do not use the same distribution."
            )
    return found


def _title(m: MethodResult) -> str:
    return verbs.title(m.method)


def _results(demo: Comparison) -> list[list[str]]:
    """The deciding table, one row per method."""

    def cell(one: Measured | None) -> str:
        return with_interval(one.e) if one else NONE

    return [
        [
            _title(m),
            f"{percent(m.win_rate.e, 1)} (n = {count(m.win_rate.n)})" if m.win_rate else NONE,
            cell(m.gold),
            cell(m.proxy),
            cell(m.kl),
            number(m.kl_token) if m.kl_token is not None else NONE,
            number(m.length),
        ]
        for m in demo.methods
    ]


def _properties(demo: Comparison) -> list[list[str]]:
    """The textbook's table of RLHF against DPO, measured: one row per property, one column per
    method.
    """

    def holds(model: str) -> Callable[[MethodResult], str]:
        return lambda m: "yes" if model in m.models_held else "no"

    def setting(s: Sensitivity) -> str:
        return f"{s.setting}: {percent(s.win_rate.e)} ({number(s.kl)})"

    rows: tuple[tuple[str, Callable[[MethodResult], str]], ...] = (
        ("Needs a reward model", holds("reward model")),
        ("Needs a critic", holds("critic")),
        (
            "Learns from",
            lambda m: "its own fresh responses (online)" if m.online else "a fixed file (offline)",
        ),
        ("Models held in memory", lambda m: f"{len(m.models_held)}: {', '.join(m.models_held)}"),
        ("Peak memory", lambda m: size(m.peak_memory_bytes)),
        ("Training time", lambda m: duration(m.train_seconds)),
        ("Responses sampled in training", lambda m: count(m.responses_sampled)),
        ("Exploration: distinct word pairs (share)", lambda m: number(m.distinct)),
        ("Exploration: entropy (nats per token)", lambda m: number(m.entropy)),
        (
            "Sensitivity: win rate over SFT (nats)",
            lambda m: "\n".join(map(setting, m.sensitivity)) or "not measured",
        ),
    )
    return [[title, *(cell(m) for m in demo.methods)] for title, cell in rows]


def _paths_figure(demo: Comparison) -> Figure:
    series: list[dict[str, Any]] = []
    for m in demo.methods:
        points = sorted(demo.paths.get(m.key, ()), key=lambda p: p.step)
        for which, dash, symbol in (("proxy", "dash", "circle-open"), ("gold", "solid", "circle")):
            kept = thin([(i, getattr(p, which)) for i, p in enumerate(points)])
            own = [points[int(i)] for i, _ in kept]
            if own:  # a KL estimate a little below zero is noise around the start
                series.append(
                    {
                        "name": _title(m) if which == "gold" else f"{_title(m)}, proxy",
                        "x": [max(p.kl, 0.0) ** 0.5 for p in own],
                        "y": [getattr(p, which) for p in own],
                        "color": method_colour(m.method),
                        "dash": dash,
                        "symbol": symbol,
                        "mode": "lines+markers" if len(own) <= 60 else "lines",
                        "faint": False,
                        "legend": which == "gold",
                        "text": [f"step {p.step:,}" for p in own],
                    }
                )
    titles: dict[Verdict, str] = {
        "hacked": "Without the KL term the proxy (dashed) climbs while the true value (solid) ends "
        "below SFT's",
        "over-optimized": "Without the KL term the true value (solid) falls behind while the proxy "
        "(dashed) climbs",
    }
    return figure(
        titles.get(hacked(demo), "Proxy (dashed) and true value (solid) as each method leaves SFT"),
        f"mean score ({demo.score_unit})",
        series,
        x="root of KL from SFT (√nats per response)",
    )


def _reliability_figure(model: RewardModelResult) -> Figure:
    points = [
        {"predicted": p.predicted, "observed": p.observed, "low": p.low, "high": p.high}
        for p in model.reliability
    ]
    return points_figure(
        "What the reward model predicts against what the labels say",
        "predicted probability that the first is better",
        "share of held-out pairs",
        points,
        ("predicted", "observed"),
        GREEN,
        diagonal=True,
    )


def _reward_words(model: RewardModelResult) -> str:
    gap = "lies below that" if model.accuracy.high < model.bayes else "reaches that"
    return (
        f"Trained on {count(model.comparisons)} comparisons, the reward model agrees with "
        f"{percent(model.accuracy.e)} of held-out labels (n = {count(model.accuracy.n)}). The "
        f"labels are noisy: the true value itself would agree with {percent(model.bayes)}. The "
        f"reward model's interval {gap}. Choosing by length alone agrees with "
        f"{percent(model.length_only.e)}."
    )


def _sample(demo: Comparison, sample: Sample) -> dict[str, Any]:
    titles = {m.key: _title(m) for m in demo.methods}
    answers = [
        {
            "name": titles[a.key],
            "text": a.text,
            "gold": number(a.gold),
            "proxy": number(a.proxy),
        }
        for a in sample.answers
    ]
    return {"prompt": sample.prompt, "answers": answers}


def _heading(demo: Comparison) -> str:
    *first, last = [_title(m) for m in demo.methods if m.key != FREE]
    with_and_without = ", with and without the KL term" if demo.method(FREE) else ""
    named = f"{', '.join(first)} and {last}" if first else last
    return f"{named} on one task{with_and_without}"


def write_demo_page(folder: Path, demo: Comparison, how: Circumstances) -> Path:
    """Writes `index.html` into `folder` and returns its path."""
    figures = {
        "paths": _paths_figure(demo),
        "reliability": _reliability_figure(demo.reward_model),
    }
    return write_page(
        Path(folder),
        "index.html",
        "demo.html.j2",
        {"figures": figures},
        title=_heading(demo),
        task=demo.task,
        sentences=demo_answer(demo),
        alarms=demo_alarms(demo),
        results=_results(demo),
        unit=demo.score_unit,
        properties=_properties(demo),
        names=[_title(m) for m in demo.methods],
        figures=figures,
        reward_words=_reward_words(demo.reward_model),
        samples=[_sample(demo, s) for s in demo.samples],
        links=[
            ("Reward model", demo.reward_model.report),
            *((_title(m), m.report) for m in demo.methods),
        ],
        notes=demo.notes,
        command=how.command,
        timings=[(stage, duration(seconds)) for stage, seconds in how.timings.items()],
        facts=[
            ("Seed", str(how.seed)),
            ("Time, all stages", duration(sum(how.timings.values()))),
            ("Machine", how.machine),
            ("Versions", ", ".join(f"{k} {v}" for k, v in how.versions.items())),
        ],
        templates=Path(__file__).parent,
    )
