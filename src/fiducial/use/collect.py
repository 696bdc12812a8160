"""Preference pairs from a model's own responses: sample, let a judge compare, write rows."""

from __future__ import annotations

import itertools
from typing import Any

from ..data.prepare import messages_of
from ..errors import InputError
from ..rewards.judge import Judge
from ..rewards.types import Responses
from ..rollout.sampling import sampling_params
from ..settings import RunSettings
from ..train.processes import Processes
from ..train.progress import say
from .answering import Model
from .output import Output, read_from
from .settings import Collect


def collect(settings: Collect) -> dict[str, Any]:
    """Write the rows.

    Returns:
        Counts: prompts, responses, pairs, and the ties and duplicates that were left out.

    Raises:
        InputError: a row, the judge or the model cannot be used, or the judge prefers nothing.
        RunError: the judge failed, the file cannot be written, or a signal asked to stop.
    """
    processes = Processes()
    with Output("collect", settings, processes) as output:
        return _collect(settings, processes, output)


def _collect(settings: Collect, processes: Processes, output: Output) -> dict[str, Any]:
    judge = Judge.open(
        settings.judge,
        RunSettings(),
        processes,
        settings.worker,
        trust=settings.trust_remote_code,
    )
    if judge.compare is not None and settings.pairs == "extremes":
        raise InputError(
            "--pairs extremes needs scores, and this judge only compares two responses: use "
            "--pairs all"
        )
    model = Model.open(
        settings.model,
        settings.prompts,
        settings.rows,
        processes,
        max_new_tokens=settings.max_new_tokens,
        trust=settings.trust_remote_code,
    )
    judge.check_rows(model.rows)
    params = sampling_params(
        model.renderer, settings.max_new_tokens, settings.temperature, settings.stop
    )
    counts: dict[str, Any] = {"prompts": len(model.rows)}
    counts |= dict.fromkeys(("responses", "pairs", "ties", "duplicates", "not_judged"), 0)
    counts |= output.counts
    output.begin(model, read_from(settings) | {"--judge": settings.judge})
    for numbers, responses in model.answer(
        settings.samples, params, seed=settings.seed, title="collect", start=output.prompts
    ):
        rows = judged(responses, numbers, judge, settings, counts)
        counts["responses"] += len(numbers)
        counts["pairs"] += len(rows)
        output.add(rows, numbers[-1] + 1, counts)
    if processes.main:
        ties, duplicates = counts["ties"], counts["duplicates"]
        left = f" ({ties:,} ties and {duplicates:,} pairs of equal text left out)"
        if without := counts["not_judged"]:
            left += f" ({without:,} pairs that the judge does not judge left out)"
        say(
            f"collect: {counts['pairs']:,} pairs from {counts['responses']:,} responses to "
            f"{counts['prompts']:,} prompts in {output.path}"
            f"{left if ties + duplicates + without else ''}"
        )
    if not counts["pairs"]:
        raise InputError(
            f"the judge {settings.judge} preferred no response to another: there is nothing to "
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
    """Preference rows of one block, with the tokens that were sampled, and their counts.

    Every pair of texts that are equal or empty counts as a duplicate, every pair of equal scores as
    a tie, and every pair of which the judge does not judge one as not judged; all are left out.
    """
    texts, rows = responses.completions, []
    tokens = responses.trajectory.responses(ending=True)
    scores = judge.scores(responses)
    groups = [list(g) for _, g in itertools.groupby(range(len(numbers)), key=lambda i: numbers[i])]
    candidates: list[tuple[int, int]] = []
    for group in groups:
        if settings.pairs == "extremes":
            assert scores is not None
            place = {i: s for i in group if (s := scores[i]) is not None} or dict.fromkeys(group, 0)
            candidates.append(
                (max(place, key=place.__getitem__), min(place, key=place.__getitem__))
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
            [responses.where[a] for a, _ in usable],
        )
    for k, (a, b) in enumerate(usable):
        one, other = (scores[a], scores[b]) if scores is not None else (first[k], not first[k])
        if one is None or other is None or (scores is None and first[k] is None):
            counts["not_judged"] += 1
            continue
        if one == other:
            counts["ties"] += 1
            continue
        a_wins = one > other
        won, lost = (a, b) if a_wins else (b, a)
        prompt = messages_of(responses.prompts[a])
        row: dict[str, Any] = {
            "prompt": prompt,
            "chosen": _as(prompt, texts[won]),
            "rejected": _as(prompt, texts[lost]),
        }
        row |= {
            "chosen_ids": tokens[won],
            "rejected_ids": tokens[lost],
            "tokenizer": responses.renderer.fingerprint,
        }
        if scores is not None:
            row |= {"chosen_score": scores[won], "rejected_score": scores[lost]}
        rows.append(row)
    return rows


def _as(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
