"""Labels for the steps of a model's own solutions, from outcomes alone: complete every prefix
several times and see whether it can still end right.

Wang et al. 2024 (Math-Shepherd, arXiv 2312.08935): a step is labelled right if any of N completions
of the solution up to it ends right (their hard estimation); `rates` is the share of them that does
(their soft one). The last step has nothing behind it: its label is the outcome itself. The honest
meaning of such a label is that the policy can recover from here, not that the step is valid: a
wrong step that is mended later is labelled right, and a valid one on the way to nowhere is labelled
wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.prepare import messages_of
from ..data.steps import Steps, split
from ..errors import InputError
from ..rewards import Responses
from ..rollout.answers import local_sampler
from ..rollout.sampler import LocalSampler
from ..rollout.shared import sample_all
from ..rollout.trajectory import Trajectory
from ..train.progress import Progress, say
from .answering import BLOCK, Judge, Model

if TYPE_CHECKING:
    from .collect import Collect

WASTE = 16
"""Tokens that a prefix may be longer than the shortest it is completed with: what is sampled beyond
its own limit is cut.
"""


@dataclass(frozen=True)
class Prefix:
    """A solution up to the end of one of its steps: numbers of the response in its block and of the
    step, and the response's tokens so far.
    """

    response: int
    step: int
    ids: list[int]


def collect_steps(settings: Collect, model: Model, judge: Judge, out: Path) -> dict[str, Any]:
    """Write rows with prompt, completions, labels, rates; returns counts: prompts, responses,
    steps, recoverable, unsplit.

    Raises:
        InputError: the judge gives no scores, or no response has steps that can be told apart.
    """
    if judge.scorer is None:
        raise InputError(
            f"--steps needs a judge that scores each response, and {settings.judge} compares two"
        )
    sampler = local_sampler(
        model.policy,
        model.renderer,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop=settings.stop,
    )
    finder, main = Steps(model.renderer, settings.separator), model.processes.main
    counts = {
        "prompts": len(model.rows),
        "responses": 0,
        "steps": 0,
        "recoverable": 0,
        "unsplit": 0,
    }
    per_block = max(1, BLOCK // (settings.samples * settings.steps))
    with Progress("collect", len(model.rows) * settings.samples, show=main) as bar:
        for start in range(0, len(model.rows), per_block):
            numbers = [
                i
                for i in range(start, min(start + per_block, len(model.rows)))
                for _ in range(settings.samples)
            ]
            rows = block(numbers, sampler, finder, judge, model, settings, counts)
            if main:
                with open(out, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            bar.advance(by=len(numbers))
    if not counts["steps"]:
        raise InputError(
            f"--separator: of {counts['responses']:,} responses none has steps that "
            f"{settings.separator!r} parts"
        )
    if main:
        left = (
            f" ({counts['unsplit']:,} responses that are empty or whose steps share a token left "
            "out)"
            if counts["unsplit"]
            else ""
        )
        say(
            f"collect: {counts['steps']:,} steps of {counts['responses']:,} responses to "
            f"{counts['prompts']:,} prompts in {out}{left}; "
            f"{counts['recoverable'] / counts['steps']:.1%} are labelled right: from there the "
            f"model ended right at least once in {settings.steps} "
            "completions, so right means recoverable, not valid"
        )
    return counts


def block(
    numbers: list[int],
    sampler: LocalSampler,
    finder: Steps,
    judge: Judge,
    model: Model,
    settings: Collect,
    counts: dict[str, int],
) -> list[dict[str, Any]]:
    """Rows of some prompts: sampled, cut into steps, every prefix completed, all of it judged."""
    sampled = sample_all(
        sampler,
        [model.ids[i] for i in numbers],
        model.processes,
        seed=settings.seed,
        step=0,
        prompt=numbers,
        sample=[k % settings.samples for k in range(len(numbers))],
    )
    responses = Responses.of([model.rows[i] for i in numbers], sampled, model.renderer)
    tokens = sampled.responses(ending=True)
    ends = [finder.ends(r) for r in tokens]
    texts = [split(c, settings.separator) if c.strip() else [] for c in responses.completions]
    usable = [i for i in range(len(numbers)) if len(texts[i]) == len(ends[i])]
    prefixes = [
        Prefix(i, k, tokens[i][: end + 1]) for i in usable for k, end in enumerate(ends[i][:-1])
    ]
    whole = [score >= settings.threshold for score in judge.scores(responses) or []]
    rates = completed(prefixes, numbers, sampler, judge, model, settings)

    rows = []
    for i in usable:
        mine = [rates[i, k] for k in range(len(ends[i]) - 1)] + [
            float(whole[i])
        ]  # behind the last step nothing is left to complete
        rows.append(
            {
                "prompt": messages_of(responses.prompts[i]),
                "completions": texts[i],
                "labels": [r > 0 for r in mine],
                "rates": mine,
            }
        )
        counts["steps"] += len(mine)
        counts["recoverable"] += sum(r > 0 for r in mine)
    counts["responses"] += len(numbers)
    counts["unsplit"] += len(numbers) - len(usable)
    return rows


def completed(
    prefixes: Sequence[Prefix],
    numbers: list[int],
    sampler: LocalSampler,
    judge: Judge,
    model: Model,
    settings: Collect,
) -> dict[tuple[int, int], float]:
    """Of each prefix the share of its completions that ends right. Prefix and completion together
    have the limit of a response.

    A completion's random stream is keyed by its prompt, response, step and own number, so blocks,
    groups and processes do not change it.
    """
    rates: dict[tuple[int, int], float] = {}
    for group in alike(prefixes, [len(model.ids[n]) for n in numbers], sampler):
        several = [(p, c) for p in group for c in range(settings.steps)]
        prompt = [numbers[p.response] for p, _ in several]
        shortest = replace(sampler, max_new_tokens=sampler.max_new_tokens - len(group[0].ids))
        behind = sample_all(
            shortest,
            [model.ids[n] + p.ids for n, (p, _) in zip(prompt, several, strict=True)],
            model.processes,
            seed=settings.seed,
            step=1,
            prompt=prompt,
            sample=[
                (p.response % settings.samples * settings.max_new_tokens + p.step) * settings.steps
                + c
                for p, c in several
            ],
        ).responses(ending=True)
        answers = [
            (p.ids + more)[: settings.max_new_tokens]
            for (p, _), more in zip(several, behind, strict=True)
        ]
        trajectory = Trajectory.build(
            [model.ids[n] for n in prompt],
            answers,
            [[0.0] * len(a) for a in answers],
            [a[-1] in sampler.stop_ids for a in answers],
            prompt,
            list(range(len(several))),
            settings.temperature,
        )
        scores = (
            judge.scores(Responses.of([model.rows[n] for n in prompt], trajectory, model.renderer))
            or []
        )
        for k, p in enumerate(group):
            mine = scores[k * settings.steps : (k + 1) * settings.steps]
            rates[p.response, p.step] = sum(s >= settings.threshold for s in mine) / settings.steps
    return rates


def alike(
    prefixes: Sequence[Prefix], prompt_lengths: Sequence[int], sampler: LocalSampler
) -> list[list[Prefix]]:
    """Groups of prefixes of similar length, each of which fits the context with what may still be
    sampled behind its shortest.
    """
    groups: list[list[Prefix]] = []
    for prefix in sorted(prefixes, key=lambda p: len(p.ids)):
        first = len(groups[-1][0].ids) if groups else 0
        fits = (
            prompt_lengths[prefix.response] + len(prefix.ids) + sampler.max_new_tokens - first
            <= sampler.context
        )
        if groups and len(prefix.ids) - first <= WASTE and fits:
            groups[-1].append(prefix)
        else:
            groups.append([prefix])
    return groups
