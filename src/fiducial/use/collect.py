"""Preferences from a model's own responses: sample K a prompt, let a judge compare them, write
preference rows; with --steps, rows of labelled steps.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..data.prepare import messages_of
from ..errors import InputError
from ..rewards import Responses
from ..settings import RowSettings, RunSettings, Settings
from ..train.processes import Processes
from ..train.progress import say
from .answering import Judge, Model
from .label_steps import collect_steps


class Collect(Settings):
    """Collect preferences: sample responses, have a judge compare them, write rows with prompt,
    chosen, rejected.

    With --steps N, collect steps instead: cut each response into steps, complete it N times from
    the end of each, have the judge score every completion, and write rows with prompt, completions,
    labels and rates for `fiducial prm`. A step is labelled right if any of the N ends right: the
    model can recover from there, which does not say that the step is valid.
    """

    model: str
    """The model that answers: a folder or a Hub name."""
    prompts: str
    """Rows with a prompt: a file or a Hub name."""
    judge: str
    """A reward model's folder, file.py:function with TRL's reward signature, one that compares:
    (prompts, first, second) -> list of true or false; or
    exact_match, numeric_answer, format, length, which read the row's columns."""
    out: str
    """The file to write, .jsonl."""
    samples: int = Field(4, gt=1)
    """Responses a prompt. InstructGPT: 4 to 9."""
    pairs: Literal["all", "extremes"] = "all"
    """Of K responses all K(K-1)/2 pairs, or the best against the worst."""
    steps: int = Field(0, ge=0)
    """Completions from the end of each step, to label the steps. 0: collect preferences.
    Math-Shepherd (Wang et al. 2024): 8.
    """
    separator: str = "\n"
    """What ends a step. Lightman et al. 2023: a new line."""
    threshold: float = 0.5
    """The judge's score from which a completion counts as right. 0.5 fits scores of 0 and 1, and
    probabilities; for a reward model 0 is its usual response.
    """
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of a response, at most."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response beside EOS."""
    seed: int = 0
    """Of the samples."""
    rows: RowSettings = RowSettings()


def collect(settings: Collect) -> dict[str, Any]:
    """Write the rows; returns counts: prompts, responses, pairs, ties and duplicates that were left
    out; with --steps those of `collect_steps`.
    """
    processes = Processes()
    out = Path(settings.out)
    if out.suffix != ".jsonl":
        raise InputError(f"--out: {out} should end in .jsonl: rows are written as JSON lines")
    if out.exists():
        raise InputError(f"--out: {out} exists already: choose another file, or remove it")
    judge = Judge(settings.judge, RunSettings(), processes)
    if judge.compare is not None and settings.pairs == "extremes":
        raise InputError(
            "--pairs extremes needs scores, and this judge only compares two responses: use "
            "--pairs all"
        )
    if settings.steps and not settings.separator:
        raise InputError(
            "--separator '' with --steps: every token would be a step, and rows of text cannot say "
            "where tokens end. Give what ends a step, or train "
            "`fiducial prm --separator ''` on outcomes (rows with prompt, completion, label)"
        )
    model = Model.open(
        settings.model, settings.prompts, settings.rows, processes, reserve=settings.max_new_tokens
    )
    judge.check_rows(model.rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    if settings.steps:
        return collect_steps(settings, model, judge, out)
    counts = {"prompts": len(model.rows), "responses": 0, "pairs": 0, "ties": 0, "duplicates": 0}
    for numbers, responses in model.answer(
        settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop=settings.stop,
        seed=settings.seed,
        title="collect",
    ):
        rows = judged(responses, numbers, judge, settings, counts)
        counts["responses"] += len(numbers)
        counts["pairs"] += len(rows)
        if processes.main:
            with open(out, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if processes.main:
        left = (
            f" ({counts['ties']:,} ties and {counts['duplicates']:,} pairs of equal text left out)"
            if counts["ties"] + counts["duplicates"]
            else ""
        )
        say(
            f"collect: {counts['pairs']:,} pairs from {counts['responses']:,} responses to "
            f"{counts['prompts']:,} prompts in {out}{left}"
        )
        if not counts["pairs"]:
            raise InputError(
                f"the judge {settings.judge} told no two responses apart: there is nothing to "
                "learn from"
            )
    return counts


def judged(
    responses: Responses,
    numbers: list[int],
    judge: Judge,
    settings: Collect,
    counts: dict[str, Any],
) -> list[dict[str, Any]]:
    """Preference rows of one block."""
    texts, rows = responses.completions, []
    scores = judge.scores(responses)
    groups = [list(g) for _, g in itertools.groupby(range(len(numbers)), key=lambda i: numbers[i])]
    candidates: list[tuple[int, int]] = []
    for group in groups:
        if settings.pairs == "extremes":
            assert scores is not None
            candidates.append(
                (max(group, key=lambda i: scores[i]), min(group, key=lambda i: scores[i]))
            )
        else:
            candidates += itertools.combinations(group, 2)
    usable = []
    for a, b in candidates:
        if texts[a].strip() == texts[b].strip() or not texts[a].strip() or not texts[b].strip():
            counts["duplicates"] += 1
        else:
            usable.append((a, b))
    if scores is None:
        first = judge.prefers_first(
            [responses.prompts[a] for a, _ in usable],
            [texts[a] for a, _ in usable],
            [texts[b] for _, b in usable],
        )
    for k, (a, b) in enumerate(usable):
        if scores is not None and scores[a] == scores[b]:
            counts["ties"] += 1
            continue
        a_wins = first[k] if scores is None else scores[a] > scores[b]
        won, lost = (a, b) if a_wins else (b, a)
        prompt = messages_of(responses.prompts[a])
        row: dict[str, Any] = {
            "prompt": prompt,
            "chosen": _as(prompt, texts[won]),
            "rejected": _as(prompt, texts[lost]),
        }
        if scores is not None:
            row |= {"chosen_score": scores[won], "rejected_score": scores[lost]}
        rows.append(row)
    return rows


def _as(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
