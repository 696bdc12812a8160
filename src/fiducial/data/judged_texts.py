"""Findings about what rows say: answers, labels, preferences, repetitions, prompts."""

from __future__ import annotations

from collections.abc import Callable

from ..core import intervals
from .counted import FEW, MANY, MOST, NEVER, counted
from .findings import Finding
from .survey import Survey


def _majority(s: Survey) -> Finding | None:
    right, wrong = s.right[True], s.right[False]
    if not right + wrong:
        return None
    usual = max(right, wrong) / (right + wrong)
    name = "right" if right >= wrong else "wrong"
    numbers = {"right": right, "wrong": wrong, "share": usual}
    if not min(right, wrong):
        told = f"all {right + wrong:,} labels say {name}, so there is nothing to tell apart"
        return Finding("error", "one-label", told, "add solutions of the other kind", numbers)
    told = (
        f"always saying {name} is correct for {usual:.1%} of {right + wrong:,} labels: judge the "
        "accuracy by that"
    )
    if usual <= 0.95:
        return Finding("note", "majority-baseline", told, numbers=numbers)
    change = "add solutions of the other kind"
    return Finding("warning", "majority-baseline", told, change, numbers)


def _contradictions(s: Survey) -> Finding | None:
    pairs, count = len(s.longer), s.contradictions
    found = counted(
        "contradicting-pairs" if pairs else "contradicting-labels",
        count,
        s.n["rows"],
        MANY,
        "are undone by a row that says the opposite "
        + ("(A over B, and B over A)" if pairs else "(the same answer, right and wrong)"),
        "decide such rows by majority, or remove both",
    )
    if found is not None and 2 * count == s.n["rows"]:
        told = f"{found.sentence}: all rows cancel out, and nothing is left to learn"
        return Finding("error", found.name, told, found.change, found.numbers)
    return found


def _repeated(s: Survey) -> Finding | None:
    return counted(
        "prompt-repeated",
        s.n["prompt repeated"],
        s.n["answered"],
        MANY,
        "begin with their prompt, so it stands there twice and the model learns to repeat it",
        "give the answer alone",
        unit="answers",
    )


def _revealed(s: Survey) -> Finding | None:
    if s.n["answer at the end"]:
        return counted(
            "answer-in-prompt",
            s.n["answer at the end"],
            s.n["rows"],
            MANY,
            "have a prompt that ends with the answer that the row names, so it need only be copied",
            "cut the prompts before the answer",
        )
    return counted(
        "answer-in-prompt",
        s.n["answer in prompt"],
        s.n["answered"],
        MOST,
        "stand word for word in their prompt, so they need only be copied",
        "remove the answer from the prompt, unless copying is the task",
        shown=0.02,
        unit="answers",
    )


def _same_answer(s: Survey) -> Finding | None:
    for name, answers in (("rejected", s.rejected), ("answer", s.answers)):
        count = max(answers.values(), default=0)
        whole = answers.total()
        if whole >= 20 and s.prompts >= whole / 2 and count >= MOST * whole:
            which = name if name == "rejected" or not s.rejected else "chosen"
            return counted(
                "same-answer",
                count,
                whole,
                MOST,
                f"have the very same {which}, whatever the prompt: the model learns that text and "
                "not to look at the prompt",
                "look for a column that was filled in by mistake",
            )
    return None


def _leak(s: Survey) -> Finding | None:
    return counted(
        "evaluation-in-training",
        s.leaked,
        s.held,
        FEW,
        "are also among the prompts to train on (whatever their case and white space), so the "
        "evaluation is optimistic",
        "remove them from --data or from --rows.eval-data",
        unit="evaluation prompts",
    )


def _length(s: Survey) -> Finding | None:
    if len(s.longer) < 20:
        return None
    found = intervals.mean(s.longer, s.pair_prompts)
    value, low, high = found["value"], found["low"], found["high"]
    which = "longer" if value >= 0.5 else "shorter"
    won = value if value >= 0.5 else 1 - value
    interval = (low, high) if value >= 0.5 else (1 - high, 1 - low)
    told = (
        f"the {which} answer is chosen in {won:.0%} of {len(s.longer):,} pairs (95%: "
        f"{interval[0]:.0%} to {min(1.0, interval[1]):.0%})"
    )
    numbers = {"share": won, "low": interval[0], "high": interval[1], "pairs": len(s.longer)}
    if interval[0] <= 0.75:
        return Finding("note", "length-baseline", told, numbers=numbers)
    return Finding(
        "warning",
        "length-baseline",
        f"{told}: length alone could be all that is learned",
        f"add pairs in which the {'shorter' if which == 'longer' else 'longer'} answer is better, "
        "or judge by accuracy on pairs of equal length",
        numbers,
    )


def _broken(s: Survey) -> Finding | None:
    return counted(
        "broken-characters",
        s.n["broken"],
        s.n["texts"],
        FEW,
        "hold characters of a wrong decoding (U+FFFD, or such as Ã© for é) or control characters",
        "write the file again as UTF-8 from its source",
        unit="texts",
    )


def _duplicates(s: Survey) -> Finding | None:
    return counted(
        "duplicate-rows",
        s.n["duplicates"],
        s.n["rows"],
        MANY,
        "repeat an earlier one, and count as often as they stand there",
        "remove the repetitions, unless the weight is meant",
        shown=0.001,
    )


def _near(s: Survey) -> Finding | None:
    return counted(
        "near-equal-prompts",
        s.near,
        s.prompts,
        MANY,
        "differ from another prompt in case and white space alone, and may stand in training and "
        "in evaluation",
        "write them alike, so that they count as one prompt",
        shown=0.001,
        unit="prompts",
    )


def _system(s: Survey) -> Finding | None:
    without = s.n["chat"] - s.n["system"]
    if not s.n["system"] or not without:
        return None
    return counted(
        "system-message-missing",
        min(without, s.n["system"]),
        s.n["chat"],
        NEVER,
        f"{'lack' if without <= s.n['system'] else 'have'} the system message that the others "
        f"{'have' if without <= s.n['system'] else 'lack'}",
        "give all rows the system message that users will meet",
        unit="conversations",
    )


def _no_space(s: Survey) -> Finding | None:
    if s.n["asked in plain"] < 20:
        return None
    return counted(
        "no-space-before-answer",
        s.n["no space"],
        s.n["asked in plain"],
        NEVER,
        "have no white space between prompt and answer",
        "end the prompts with a new line if the two are different words",
        shown=MOST,
    )


LOOKS: tuple[Callable[[Survey], Finding | None], ...] = (
    _majority,
    _contradictions,
    _repeated,
    _revealed,
    _same_answer,
    _leak,
    _length,
    _broken,
    _duplicates,
    _near,
    _system,
    _no_space,
)
