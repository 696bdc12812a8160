"""The sentences at the top of a run's page, made from its numbers and no stronger than their
intervals.
"""

import math
from collections.abc import Callable
from typing import Any

from ..metrics import EVAL
from .figures import change, window
from .folder import Run
from .numbers import Estimate, count, number, percent, with_interval

ACCURACIES = ("rewards/accuracies", "accuracy")
_KINDS = (
    ("objective/kl", "policy"),
    ("clip_ratio", "policy"),
    ("kl_teacher", "distillation"),
    ("rewards/margins", "preference"),
    ("accuracy", "reward"),
    ("steps/accuracy", "process"),
    ("loss", "loss"),
)


def kind(run: Run) -> str:
    """Which of the questions a run can answer, from the metrics it wrote."""
    names = {name.removeprefix(EVAL) for name in run.series} | _named(run.summary.get("metrics"))
    for name, answer in _KINDS:
        if name in names:
            return answer
    return "unknown"


def _named(metrics: Any) -> set[str]:
    return (
        {str(name).removeprefix(EVAL) for name in metrics} if isinstance(metrics, dict) else set()
    )


def answer(run: Run) -> list[str]:
    """One to three sentences."""
    tell: dict[str, Callable[[Run], list[str]]] = {
        "policy": _policy,
        "distillation": _distillation,
        "preference": _preference,
        "reward": _reward,
        "process": _process,
        "loss": _loss,
    }
    sentences = tell[kind(run)](run) if kind(run) in tell else []
    if not sentences:
        sentences = ["This run wrote no numbers that answer a question yet."]
    status = run.summary.get("status")
    if isinstance(status, str) and status != "done":
        sentences.append(f"The run is not complete: its status is “{status}”.")
    return sentences


def _n(e: Estimate) -> str:
    return f" (n\u00a0=\u00a0{count(e.n)})" if e.n else ""


def role(name: str) -> str:
    """What an evaluation's name stands for: `length` (a judge that sees only lengths), `win` (over
    the starting model), `accuracy`, or ``.
    """
    words = name.removeprefix(EVAL).lower()
    if words.startswith("length"):
        return "length"
    return "accuracy" if "accurac" in words else "win" if "win" in words else ""


def _first(evaluation: dict[str, Estimate], wanted: str) -> Estimate | None:
    return next(
        (e for name, e in evaluation.items() if role(name) == wanted and 0 <= e.value <= 1), None
    )


def against_half(share: Estimate, wins: str, draws: str, loses: str) -> str:
    """One of three wordings by where the interval of a share lies: above one half, around it, below
    it. No interval counts as around.
    """
    return wins if share.above(0.5) else loses if share.below(0.5) else draws


def _change_words(
    run: Run, name: str, label: str, unit: str, rises: str = "rose", falls: str = "fell"
) -> str | None:
    values = run.values(name)
    if not values:
        return None
    unit = f" {unit}" if unit else ""
    if len(values) < 6:
        return f"{label} was {number(values[0])} at first and {number(values[-1])}{unit} at last, too few records to tell a trend"
    first, last, way = window(values, False), window(values, True), change(values)
    if way == 0:
        return f"{label} showed no clear change: {with_interval(first)} at the start, {with_interval(last)}{unit} at the end"
    return f"{label} {rises if way > 0 else falls} from {with_interval(first)} to {with_interval(last)}{unit}"


def _policy(run: Run) -> list[str]:
    told = _change_words(run, "reward", "Reward", "")
    kl = run.values("objective/kl")
    at = (
        f", at {with_interval(window(kl, True))} nats per response from the reference" if kl else ""
    )
    sentences = [f"{told}{at}."] if told else []
    win = _first(run.evaluation, "win")
    if win is not None:
        share = f"{percent(win)} of held-out prompts{_n(win)}"
        sentences.insert(
            0,
            against_half(
                win,
                f"It beats the model it started from on {share}.",
                f"It is not shown to beat the model it started from: {share}, and one half is not "
                "excluded.",
                f"It loses to the model it started from: it wins on only {share}.",
            ),
        )
    elif told:
        sentences.append(
            "This is the reward that was optimised: whether the responses are better by another "
            "judge was not measured here."
        )
    return sentences


def _accuracy(run: Run, what: str) -> list[str]:
    held = _first(run.evaluation, "accuracy")
    if held is not None and held.half is not None:
        share = f"{percent(held)} of held-out pairs{_n(held)}"
        return [
            against_half(
                held,
                f"{what} on {share}.",
                f"It is not shown to do better than a coin flip: {share}.",
                f"It does worse than a coin flip: {what[0].lower()}{what[1:]} on only {share}.",
            )
        ]
    for name in ACCURACIES:
        values = run.values(EVAL + name)
        if values or held is not None:
            value = held.value if held is not None else values[-1]
            return [
                f"{what} on {percent(value)} of held-out pairs; how many were asked is not "
                "recorded, so this carries no interval."
            ]
        if run.values(name):
            return [
                f"{what} on {percent(window(run.values(name), True))} of training pairs late in "
                "the run; held-out pairs were not measured."
            ]
    return []


def _preference(run: Run) -> list[str]:
    told = _change_words(
        run, "logps/chosen", "Log-probability of chosen answers", "nats per response"
    )
    return [
        *_accuracy(run, "The policy prefers the chosen answer, relative to the reference,"),
        *([f"{told}."] if told else []),
    ]


def _reward(run: Run) -> list[str]:
    sentences = _accuracy(run, "The reward model scores the chosen answer higher")
    held, length = _first(run.evaluation, "accuracy"), _first(run.evaluation, "length")
    if held is not None and length is not None:
        more = held.low is not None and held.low > (
            length.value if length.high is None else length.high
        )
        sentences.append(
            f"Choosing by length alone is right on {percent(length)}"
            + (
                ": it knows more than length."
                if more
                else ": it is not shown to know more than length."
            )
        )
    return sentences


def _process(run: Run) -> list[str]:
    held = run.evaluation.get("accuracy on held-out steps")
    usual = next(
        (e for name, e in run.evaluation.items() if name.startswith("calling all steps")), None
    )
    if held is None or usual is None:
        told = _change_words(
            run, "steps/accuracy", "Accuracy of steps", "of those it was trained on"
        )
        return [f"{told}; held-out steps were not measured."] if told else []
    more = held.low is not None and usual.high is not None and held.low > usual.high
    return [
        f"It is right about {percent(held)} of held-out steps{_n(held)}; calling all of them what "
        f"most are is right about {percent(usual)}"
        + (": it knows more than that." if more else ": it is not shown to know more than that.")
    ]


def _distillation(run: Run) -> list[str]:
    told = _change_words(run, "kl_teacher", "KL to the teacher", "nats per token")
    sentences = [f"{told}, on the student's own samples."] if told else []
    mine, theirs, kl = (
        run.evaluation.get(EVAL + name) for name in ("nll/student", "nll/teacher", "kl_teacher")
    )
    if mine is None or theirs is None or kl is None:
        return [*sentences, "Samples on held-out prompts were not measured."] if sentences else []
    share = (
        f", {percent(kl.value / theirs.value)} of it" if theirs.value > 0 and kl.value >= 0 else ""
    )
    return [
        f"On fresh samples to held-out prompts{_n(mine)} the teacher's loss is "
        f"{with_interval(theirs)} nats per token and the student's own "
        f"{with_interval(mine)}; the KL between them is {with_interval(kl)}{share}.",
        *sentences,
    ]


def _loss(run: Run) -> list[str]:
    held = run.values(EVAL + "loss")
    if len(held) >= 2:
        first, last, lowest = held[0], held[-1], min(held)
        word = (
            "hardly moved,"
            if abs(last - first) < 0.01 * abs(first)
            else "fell"
            if last < first
            else "did not fall, it went"
        )
        perplexity = f"perplexity {number(_exp(first))} to {number(_exp(last))}"
        sentences = [
            f"Held-out loss {word} from {number(first)} to {number(last)} nats per token "
            f"({perplexity})."
        ]
        if last > lowest * 1.02:
            sentences.append(f"Its lowest point, {number(lowest)}, lies before the end.")
        return sentences
    told = _change_words(run, "loss", "Training loss", "nats per token")
    only = (
        f" Held-out loss was measured once: {number(held[0])}."
        if held
        else " No held-out rows were measured, so this may be memory."
    )
    return [f"{told}.{only}"] if told else []


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
