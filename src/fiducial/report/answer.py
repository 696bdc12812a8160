"""The sentences at the top of a run's page, made from its numbers and no stronger than their
intervals.
"""

import math
from collections.abc import Callable

from .. import verbs
from ..metrics import EVAL, base, lookup
from .figures import change, spoken, window
from .folder import RunRecord
from .numbers import Estimate, count, number, percent, with_interval

ACCURACIES = ("rewards/accuracies", "accuracy")


def answer(run: RunRecord) -> list[str]:
    """One to three sentences: the answer to the question that this kind of run can answer."""
    tell: dict[verbs.Kind | None, Callable[[RunRecord], list[str]]] = {
        "policy": _policy,
        "distillation": _distillation,
        "preference": _preference,
        "reward": _reward,
        "process": _process,
        "loss": _loss,
        None: _general,
    }
    sentences = tell[run.kind](run) or [
        "This run has not recorded any numbers that it is judged by."
    ]
    status = run.summary.get("status")
    if isinstance(status, str) and status != "done":
        sentences.append(f"The run is not complete: its status is “{status}”.")
    return sentences


def is_share(name: str) -> bool:
    """Whether a held-out estimate of this name is a share of pairs, steps or solutions."""
    return any(word in base(name).lower() for word in ("accurac", "length alone", "calling all"))


def against_half(share: Estimate, wins: str, draws: str, loses: str) -> str:
    """One of three wordings, by whether the interval of a share lies above one half, around it, or
    below it. A share without an interval counts as around it.
    """
    return wins if share.above(0.5) else loses if share.below(0.5) else draws


def _n(e: Estimate) -> str:
    return f" (n\u00a0=\u00a0{count(e.n)})" if e.n else ""


def _first(evaluation: dict[str, Estimate], word: str) -> Estimate | None:
    return next((e for name, e in evaluation.items() if word in base(name).lower()), None)


def _change_words(
    run: RunRecord, name: str, label: str, unit: str, rises: str = "rose", falls: str = "fell"
) -> str | None:
    values = run.values(name)
    if not values:
        return None
    unit = f" {unit}" if unit else ""
    if len(values) < 6:
        return (
            f"{label} was {number(values[0])} at first and {number(values[-1])}{unit} at last (too "
            "few records to tell a trend)"
        )
    first, last, way = window(values, False), window(values, True), change(values)
    if way == 0:
        return (
            f"{label} showed no clear change: {with_interval(first)} at the start, "
            f"{with_interval(last)}{unit} at the end"
        )
    return (
        f"{label} {rises if way > 0 else falls} from {with_interval(first)} to "
        f"{with_interval(last)}{unit}"
    )


def _general(run: RunRecord) -> list[str]:
    """For a method that the table does not know: how its first two metrics changed."""
    told = [
        _change_words(run, name, lookup(name).title, spoken(lookup(name).unit))
        for name in run.decides[:2]
    ]
    return [f"{words}." for words in told if words]


def _policy(run: RunRecord) -> list[str]:
    told = _change_words(run, "reward", "Reward", "")
    if told is None:
        return []
    kl = run.values("objective/kl")
    at = (
        f", at {with_interval(window(kl, True))} nats per response from the reference" if kl else ""
    )
    return [
        f"{told}{at}.",
        "This is the reward that was optimized; whether the responses are better by another judge "
        "was not measured here.",
    ]


def _accuracy(run: RunRecord, what: str) -> list[str]:
    held = _first(run.evaluation, "accurac")
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
            return [f"{what} on {percent(value)} of held-out pairs; no interval was recorded."]
        if run.values(name):
            return [
                f"{what} on {percent(window(run.values(name), True))} of training pairs late in "
                "the run; held-out pairs were not measured."
            ]
    return []


def _preference(run: RunRecord) -> list[str]:
    told = _change_words(
        run, "logps/chosen", "Log-probability of chosen answers", "nats per response"
    )
    return [
        *_accuracy(run, "The policy prefers the chosen answer, relative to the reference,"),
        *([f"{told}."] if told else []),
    ]


def _reward(run: RunRecord) -> list[str]:
    sentences = _accuracy(run, "The reward model scores the chosen answer higher")
    held, length = _first(run.evaluation, "accurac"), _first(run.evaluation, "length alone")
    if held is not None and length is not None:
        bar = length.value if length.high is None else length.high
        known = "knows" if held.above(bar) else "is not shown to know"
        sentences.append(
            f"Choosing by length alone is right on {percent(length)}: it {known} more than length."
        )
    return sentences


def _process(run: RunRecord) -> list[str]:
    held = run.evaluation.get("accuracy on held-out steps")
    usual = _first(run.evaluation, "calling all steps")
    if held is None or usual is None:
        told = _change_words(
            run, "steps/accuracy", "Accuracy of steps", "of those it was trained on"
        )
        return [f"{told}; held-out steps were not measured."] if told else []
    more = usual.high is not None and held.above(usual.high)
    known = "knows" if more else "is not shown to know"
    return [
        f"It is right about {percent(held)} of held-out steps{_n(held)}; giving every step the "
        f"more frequent label is right about {percent(usual)}: it {known} more than that."
    ]


def _distillation(run: RunRecord) -> list[str]:
    told = _change_words(run, "kl_teacher", "KL to the teacher", "nats per token")
    sentences = [f"{told}, on the student's own samples."] if told else []
    mine, theirs, kl = (
        run.evaluation.get(EVAL + name) for name in ("nll/student", "nll/teacher", "kl_teacher")
    )
    if mine is None or theirs is None or kl is None:
        return [*sentences, "Samples on held-out prompts were not measured."] if sentences else []
    share = (
        f", {percent(kl.value / theirs.value)} of the teacher's loss"
        if theirs.value > 0 and kl.value >= 0
        else ""
    )
    return [
        f"On fresh samples to held-out prompts{_n(mine)} the teacher's loss is "
        f"{with_interval(theirs)} nats per token and the student's own {with_interval(mine)}; the "
        f"KL between them is {with_interval(kl)}{share}.",
        *sentences,
    ]


def _loss(run: RunRecord) -> list[str]:
    held = run.values(EVAL + "loss")
    if len(held) >= 2:
        first, last, lowest = held[0], held[-1], min(held)
        word = (
            "hardly moved,"
            if abs(last - first) < 0.01 * abs(first)
            else "fell"
            if last < first
            else "did not fall; it went"
        )
        perplexity = f"perplexity {number(_exp(first))} to {number(_exp(last))}"
        sentences = [
            f"Held-out loss {word} from {number(first)} to {number(last)} nats per token "
            f"({perplexity})."
        ]
        if last > lowest * 1.02:
            sentences.append(f"Its lowest value, {number(lowest)}, was reached before the end.")
        return sentences
    told = _change_words(run, "loss", "Training loss", "nats per token")
    only = (
        f" Held-out loss was measured once: {number(held[0])}."
        if held
        else " No held-out rows were measured, so this may be memorization."
    )
    return [f"{told}.{only}"] if told else []


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
