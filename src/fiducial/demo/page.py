"""The demo's page: SFT, PPO, RLOO, GRPO, DPO and PPO without the KL term on the same prompts,
`index.html` with plotly's script beside it.

`write_demo_page(folder, data)` takes a plain dictionary (as read from JSON) with the fields of
`Demo` below; the classes are the schema, and an unknown or missing key is an error that names it.
Shares lie in 0..1, KL in nats, times in seconds, memory in bytes. Intervals are 95%.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import InputError
from ..report.answer import against_half
from ..report.figures import COLOURS, GREEN, Figure, figure, points_figure, thin
from ..report.numbers import Estimate, count, duration, number, percent, size, with_interval
from ..report.render import write_page

Key = Literal["sft", "ppo", "rloo", "grpo", "dpo", "ppo_no_kl"]
NAMES: dict[str, str] = {
    "sft": "SFT",
    "ppo": "PPO",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dpo": "DPO",
    "ppo_no_kl": "PPO without KL",
}
Link = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.][A-Za-z0-9_./-]*$")
]  # relative: no scheme, no leading slash
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Measured:
    """An estimate with its 95% interval and how many rows it was made from."""

    value: float
    low: float
    high: float
    n: int
    __pydantic_config__ = STRICT

    @property
    def e(self) -> Estimate:
        return Estimate(self.value, self.low, self.high, self.n)


@dataclass(frozen=True)
class Sensitivity:
    """The same method with one setting changed, such as `beta 0.02` or `learning rate x3`."""

    setting: str
    win_rate: Measured
    kl: float  # nats per response
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Method:
    """One trained model. `win_rate` is the share of held-out prompts where its true value beats
    SFT's, ties counted half; None for SFT itself.
    """

    key: Key
    gold: Measured  # mean true value on held-out prompts
    # mean score of the learned reward model on the same responses, in the units of `gold`
    proxy: Measured
    length: float  # mean tokens of a response
    models_held: list[
        str
        # the models in memory while training, such as ["policy", "reference", "critic", "reward
        # model"]
    ]
    train_seconds: float
    responses_sampled: int  # by the policy while it was trained; 0 for offline methods
    reward_model: bool
    critic: bool
    online: bool
    win_rate: Measured | None = None
    kl: Measured | None = None  # nats per response against SFT
    kl_token: float | None = None  # nats per token
    peak_memory_bytes: int | None = None
    distinct: float | None = (
        None  # distinct-2: share of word pairs that occur once among the samples
    )
    entropy: float | None = None  # nats per token on its own samples
    sensitivity: list[Sensitivity] = field(default_factory=list)
    report: Link | None = None  # relative path of the run's report.html
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class PathPoint:
    """A method on its way: KL in nats per response, proxy and gold in the same units."""

    step: int
    kl: float
    proxy: float
    gold: float
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Reliability:
    """Held-out pairs whose predicted preference lies around `predicted`, and the share of them that
    was observed.
    """

    predicted: float
    observed: float
    low: float
    high: float
    n: int
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class RewardModel:
    """The learned reward. `bayes` is the accuracy of the true value itself on these labels: the
    labels are noisy, and nothing can do better.
    """

    accuracy: Measured
    bayes: float
    length_only: (
        Measured  # accuracy of preferring the longer (or the shorter, if that is better) response
    )
    comparisons: int  # number of training pairs
    reliability: list[Reliability] = field(default_factory=list)
    report: Link | None = None
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Answer:
    """What one model said to one prompt."""

    key: Key
    text: str
    gold: float
    proxy: float
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Sample:
    """One prompt and every model's answer."""

    prompt: str
    answers: list[Answer]
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Demo:
    """All that the page shows. `paths` are keyed by method; `timings` by stage."""

    seed: int
    command: str
    machine: str
    versions: dict[str, str]
    methods: list[Method]
    reward_model: RewardModel
    paths: dict[Key, list[PathPoint]]
    samples: list[Sample]
    timings: dict[str, float]
    score_unit: str = "points"  # of gold and proxy
    task: str = ""  # one sentence: what the embedded world asks for and what the true value counts
    notes: list[str] = field(default_factory=list)
    __pydantic_config__ = STRICT


def read_demo(data: dict[str, Any]) -> Demo:
    """Checks a dictionary against the schema."""
    try:
        return TypeAdapter(Demo).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"the demo's data do not fit the page at {place!r}: {first['msg']}"
        ) from error


def hacked(demo: Demo) -> Literal["hacked", "over-optimised", "no", "not tried"]:
    """What happened without the KL term: the proxy rose beyond PPO's and the true value fell below
    SFT's, or only behind PPO's, or neither.
    """
    free, ppo = _method(demo, "ppo_no_kl"), _method(demo, "ppo") or _method(demo, "sft")
    if free is None or ppo is None or free.win_rate is None:
        return "not tried"
    if free.proxy.low <= ppo.proxy.high:
        return "no"
    if free.win_rate.high < 0.5:
        return "hacked"
    if ppo.win_rate is not None and free.win_rate.high < ppo.win_rate.low:
        return "over-optimised"
    return "no"


def demo_answer(demo: Demo) -> list[str]:
    """The sentences at the top, no stronger than the intervals: how the methods stand to SFT, and
    what happened without the KL term.
    """
    sentences = _against_sft(demo) + _without_kl(demo)
    return sentences or ["No method was compared with SFT."]


def _against_sft(demo: Demo) -> list[str]:
    """The methods by how they stand to SFT, and whether the intervals tell them apart."""
    compared = [
        (m, m.win_rate)
        for m in demo.methods
        if m.key not in ("sft", "ppo_no_kl") and m.win_rate is not None
    ]
    verdicts: dict[str, list[str]] = {}
    for m, won in compared:
        verdict = against_half(
            won.e,
            "beats SFT on",
            "is not shown to beat SFT (one half is not excluded):",
            "loses to SFT, winning on only",
        )
        at = f" at {number(m.kl.value)} nats" if m.kl else ""
        said = verdicts.setdefault(verdict, [])
        said.append(
            f"{NAMES[m.key]} {f'{verdict} ' if not said else ''}{percent(won.e)}{' of held-out prompts' if not said else ''}{at}"
        )
    stands = [f"{', '.join(said)}." for said in verdicts.values()]
    best = max(compared, key=lambda one: one[1].value, default=None)
    others = [won.high for m, won in compared if best and m is not best[0]]
    if best and others and best[1].low <= max(others):
        which = (
            "These intervals overlap: neither"
            if len(compared) == 2
            else "The intervals of the best ones overlap: none"
        )
        stands.append(f"{which} is shown to be the better one.")
    return [" ".join(stands)] if stands else []


def _without_kl(demo: Demo) -> list[str]:
    free, ppo = _method(demo, "ppo_no_kl"), _method(demo, "ppo")
    anchor = ppo or _method(demo, "sft")
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
    if verdict == "over-optimised":
        level = against_half(
            free.win_rate.e, "it still beats SFT", "it is not shown to beat SFT", "it loses to SFT"
        )
        return [
            f"{start} while the true value fell behind PPO's: {level} ({won} of held-out prompts). "
            "The reward was over-optimised."
        ]
    if free.proxy.low > anchor.proxy.high:
        return [
            f"{start}, and it wins over SFT on {won} of held-out prompts: this run does not show "
            "that the reward was hacked."
        ]
    return [
        f"Without the KL term the proxy is not shown to rise further {rose}, at {won} over SFT: no "
        "hacking was seen in this run."
    ]


def demo_alarms(demo: Demo) -> list[str]:
    """What should make a reader doubt the numbers above."""
    model, found = demo.reward_model, []
    if model.accuracy.low <= model.length_only.value + 0.02:
        found.append(
            f"The reward model ({percent(model.accuracy.e)}) is not shown to know more than length "
            f"does ({percent(model.length_only.e)}; "
            "heuristic: two points apart): collect more comparisons, or balance their lengths."
        )
    if model.accuracy.low <= 0.5:
        found.append(
            f"The reward model is not shown to beat a coin flip ({percent(model.accuracy.e)} of "
            "held-out pairs): nothing trained on it "
            "means much."
        )
    sft = _method(demo, "sft")
    for m in demo.methods:
        if sft and m.key != "sft" and m.length > 1.5 * sft.length:
            found.append(
                f"{NAMES[m.key]} answers at {number(m.length)} tokens where SFT takes "
                f"{number(sft.length)} (heuristic: less than half as "
                "much again): the reward may be paying for length."
            )
        if m.kl is not None and m.kl.high < 0:
            found.append(
                f"The KL of {NAMES[m.key]} is below 0 ({with_interval(m.kl.e)} nats), which cannot "
                "be: sampling and scoring do not belong "
                "together."
            )
    return found


def _method(demo: Demo, key: str) -> Method | None:
    return next((m for m in demo.methods if m.key == key), None)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _results(demo: Demo) -> list[list[str]]:
    """Rows of the deciding table, a method each."""
    return [
        [
            NAMES[m.key],
            f"{percent(m.win_rate.e, 1)} (n = {count(m.win_rate.n)})" if m.win_rate else "\u2014",
            with_interval(m.gold.e),
            with_interval(m.proxy.e),
            with_interval(m.kl.e) if m.kl else "\u2014",
            number(m.kl_token) if m.kl_token is not None else "\u2014",
            number(m.length),
        ]
        for m in demo.methods
    ]


def _comparison(demo: Demo) -> list[list[str]]:
    """The textbook's table of RLHF against DPO, measured: a property a row, a method a column."""

    def known(x: float | None) -> str:
        return number(x) if x is not None else "not measured"

    def settings(s: Sensitivity) -> str:
        return f"{s.setting}: {percent(s.win_rate.e)} ({number(s.kl)})"

    rows: tuple[tuple[str, Callable[[Method], str]], ...] = (
        ("Needs a reward model", lambda m: _yes(m.reward_model)),
        ("Needs a critic", lambda m: _yes(m.critic)),
        (
            "Learns from",
            lambda m: "its own fresh responses (online)" if m.online else "a fixed file (offline)",
        ),
        ("Models held in memory", lambda m: f"{len(m.models_held)}: {', '.join(m.models_held)}"),
        (
            "Peak memory",
            lambda m: (
                size(m.peak_memory_bytes) if m.peak_memory_bytes is not None else "not measured"
            ),
        ),
        ("Training time", lambda m: duration(m.train_seconds)),
        ("Responses sampled in training", lambda m: count(m.responses_sampled)),
        ("Exploration: distinct word pairs (share)", lambda m: known(m.distinct)),
        ("Exploration: entropy (nats per token)", lambda m: known(m.entropy)),
        (
            "Sensitivity: win rate over SFT (nats)",
            lambda m: "\n".join(settings(s) for s in m.sensitivity) or "not measured",
        ),
    )
    return [[title, *(cell(m) for m in demo.methods)] for title, cell in rows]


def _paths_figure(demo: Demo) -> Figure:
    series: list[dict[str, Any]] = []
    for key in ("dpo", "rloo", "grpo", "ppo", "ppo_no_kl"):
        points = sorted(demo.paths.get(key, []), key=lambda p: p.step)
        for which, dash, symbol in (("proxy", "dash", "circle-open"), ("gold", "solid", "circle")):
            kept = thin([(i, getattr(p, which)) for i, p in enumerate(points)])
            own = [points[int(i)] for i, _ in kept]
            if own:  # a KL estimate a little below zero is noise around the start
                series.append(
                    {
                        "name": NAMES[key] if which == "gold" else f"{NAMES[key]}, proxy",
                        "x": [max(p.kl, 0.0) ** 0.5 for p in own],
                        "y": [getattr(p, which) for p in own],
                        "color": COLOURS[key],
                        "dash": dash,
                        "symbol": symbol,
                        "mode": "lines+markers" if len(own) <= 60 else "lines",
                        "faint": False,
                        "legend": which == "gold",
                        "text": [f"step {p.step:,}" for p in own],
                    }
                )
    plain = "Proxy (dashed) and true value (solid) as each method leaves SFT"
    titles = {
        "hacked": "Without the KL term the proxy (dashed) climbs while the true value (solid) ends below SFT's",
        "over-optimised": "Without the KL term the true value (solid) falls behind while the proxy (dashed) climbs",
    }
    return figure(
        titles.get(hacked(demo), plain),
        f"mean score ({demo.score_unit})",
        series,
        x="root of KL from SFT (√nats per response)",
    )


def _reward_words(model: RewardModel) -> str:
    worse = model.accuracy.high < model.bayes
    gap = "Its interval lies below that" if worse else "Its interval reaches that"
    return (
        f"Trained on {count(model.comparisons)} comparisons, the reward model agrees with "
        f"{percent(model.accuracy.e)} of held-out labels (n = "
        f"{count(model.accuracy.n)}). The labels are noisy: the true value itself would agree with "
        f"{percent(model.bayes)}. {gap}. Choosing by "
        f"length alone agrees with {percent(model.length_only.e)}."
    )


def _sample(sample: Sample) -> dict[str, Any]:
    answers = [
        {"name": NAMES[a.key], "text": a.text, "gold": number(a.gold), "proxy": number(a.proxy)}
        for a in sample.answers
    ]
    return {"prompt": sample.prompt, "answers": answers}


def write_demo_page(folder: Path, data: dict[str, Any]) -> Path:
    """Writes `index.html` into `folder` and returns its path."""
    demo = read_demo(data)
    figures: dict[str, Figure] = {"paths": _paths_figure(demo)}
    if demo.reward_model.reliability:
        points = [
            {"predicted": p.predicted, "observed": p.observed, "low": p.low, "high": p.high}
            for p in demo.reward_model.reliability
        ]
        figures["reliability"] = points_figure(
            "What the reward model predicts against what the labels say",
            "predicted probability that the first is better",
            "share of held-out pairs",
            points,
            ("predicted", "observed"),
            GREEN,
            diagonal=True,
        )
    pages = [
        ("Reward model", demo.reward_model.report),
        *((NAMES[m.key], m.report) for m in demo.methods),
    ]
    return write_page(
        Path(folder),
        "index.html",
        "demo.html.j2",
        {"figures": figures},
        title="SFT, PPO, RLOO, GRPO and DPO on one task, with and without the KL term",
        task=demo.task,
        sentences=demo_answer(demo),
        alarms=demo_alarms(demo),
        results=_results(demo),
        unit=demo.score_unit,
        comparison=_comparison(demo),
        names=[NAMES[m.key] for m in demo.methods],
        figures=figures,
        reward_words=_reward_words(demo.reward_model),
        samples=[_sample(s) for s in demo.samples],
        links=[page for page in pages if page[1]],
        notes=demo.notes,
        command=demo.command,
        timings=[(stage, duration(seconds)) for stage, seconds in demo.timings.items()],
        facts=[
            ("Seed", str(demo.seed)),
            ("Time, all stages", duration(sum(demo.timings.values()))),
            ("Machine", demo.machine),
            ("Versions", ", ".join(f"{k} {v}" for k, v in demo.versions.items())),
        ],
        templates=Path(__file__).parent,
    )
