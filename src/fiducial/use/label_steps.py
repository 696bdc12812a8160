"""Labels for the steps of a model's own solutions, from outcomes alone.

Wang et al. 2024 (Math-Shepherd, arXiv 2312.08935): every prefix of a solution is completed several
times, and a step is labeled right if any of its N completions ends right (their hard estimation);
`rates` is the share of completions that do (their soft one). Nothing comes after the last step, so
its label is the outcome itself. Such a label means that the policy can recover from here, not that
the step is valid: a wrong step that is corrected later is labeled right, and a valid step that
leads nowhere is labeled wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.prepare import messages_of
from ..data.steps import Steps, split
from ..errors import InputError
from ..models.trunk import context, plain
from ..rewards.judge import Judge
from ..rewards.types import Responses
from ..rollout.sampling import Keys, SamplingParams, sample_all, sampling_params
from ..rollout.trajectory import Trajectory
from ..settings import RunSettings
from ..train.processes import Processes
from ..train.progress import say
from .answering import Model
from .output import Output, read_from
from .settings import LabelSteps

WASTE = 16
"""By how many tokens a prefix may be longer than the shortest one of its group: what is sampled
beyond its own limit is cut."""


@dataclass(frozen=True)
class Prefix:
    """A solution up to the end of one of its steps.

    response: its number in the block. step: the step's number. ids: the response's tokens so far.
    """

    response: int
    step: int
    ids: list[int]


def label_steps(settings: LabelSteps) -> dict[str, Any]:
    """Write rows with prompt, completions, labels and rates, for `fiducial prm`.

    Returns:
        Counts: prompts, responses, steps, recoverable, unsplit, not_judged.

    Raises:
        InputError: a row, the judge or the model cannot be used, or no response has steps that can
            be told apart.
        RunError: the judge failed, the file cannot be written, or a signal asked to stop.
    """
    processes = Processes()
    with Output("label-steps", settings, processes) as output:
        return _label_steps(settings, processes, output)


def _label_steps(settings: LabelSteps, processes: Processes, output: Output) -> dict[str, Any]:
    judge = Judge.open(
        settings.judge,
        RunSettings(),
        processes,
        settings.worker,
        trust=settings.trust_remote_code,
    )
    if judge.scorer is None:
        raise InputError(
            f"--judge: {settings.judge} compares two responses, and steps are labeled by the score "
            "of each completion: give a judge that scores"
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
    labeler = Labeler(settings, model, judge)
    counts: dict[str, Any] = {"prompts": len(model.rows)}
    counts |= dict.fromkeys(("responses", "steps", "recoverable", "unsplit", "not_judged"), 0)
    counts |= output.counts
    output.begin(model, read_from(settings) | {"--judge": settings.judge})
    for numbers in model.blocks(
        settings.samples,
        sampled=settings.samples * settings.completions,
        max_new_tokens=settings.max_new_tokens,
        title="label-steps",
        start=output.prompts,
    ):
        rows = labeler.block(numbers, counts)
        output.add(rows, numbers[-1] + 1, counts)
    if not counts["steps"] and counts["not_judged"]:
        raise InputError(
            f"--judge: {settings.judge} judges no response, or no completion of one: it returned "
            "None for each; give a judge that applies to these prompts"
        )
    if not counts["steps"]:
        raise InputError(
            f"--separator: none of {counts['responses']:,} responses has steps that end with "
            f"{settings.separator!r}"
        )
    if processes.main:
        unsplit = counts["unsplit"]
        left = f" ({unsplit:,} responses left out: empty, or two steps share a token)"
        left = left if unsplit else ""
        if without := counts["not_judged"]:
            left += f" ({without:,} responses left out: the judge does not judge how they end)"
        say(
            f"label-steps: {counts['steps']:,} steps of {counts['responses']:,} responses to "
            f"{counts['prompts']:,} prompts in {output.path}{left}; "
            f"{counts['recoverable'] / counts['steps']:.1%} are labeled right: from there the "
            f"model ended right at least once in {settings.completions} completions, so right "
            "means recoverable, not valid"
        )
    return counts


@dataclass(frozen=True)
class Labeler:
    """Samples solutions of a model, completes their prefixes, and has a judge score all of it."""

    settings: LabelSteps
    model: Model
    judge: Judge

    @property
    def params(self) -> SamplingParams:
        """How solutions are sampled; a prefix and its completion share their limit."""
        s = self.settings
        return sampling_params(self.model.renderer, s.max_new_tokens, s.temperature, s.stop)

    def block(self, numbers: list[int], counts: dict[str, int]) -> list[dict[str, Any]]:
        """Rows of some prompts: sampled, cut into steps, every prefix completed, all judged."""
        settings, model = self.settings, self.model
        keys = Keys(settings.seed, 0, numbers, [k % settings.samples for k in range(len(numbers))])
        prompts = [model.ids[i] for i in numbers]
        sampled = sample_all(model.sampler, prompts, self.params, keys, model.processes)
        responses = Responses.of([model.rows[i] for i in numbers], sampled, model.renderer)
        tokens = sampled.responses(ending=True)
        finder = Steps(model.renderer, settings.separator)
        ends = [finder.ends(r) for r in tokens]
        texts = [split(c, settings.separator) if c.strip() else [] for c in responses.completions]
        usable = [i for i in range(len(numbers)) if len(texts[i]) == len(ends[i])]
        outcomes = [self.right(s) for s in self.judge.scores(responses) or []]
        judged = [i for i in usable if outcomes[i] is not None]
        prefixes = [
            Prefix(i, k, tokens[i][: end + 1]) for i in judged for k, end in enumerate(ends[i][:-1])
        ]
        rates = self.completed(prefixes, numbers)

        rows = []
        for i in judged:
            # nothing is left to complete after the last step: its rate is the outcome
            found = [rates[i, k] for k in range(len(ends[i]) - 1)] + [float(outcomes[i] or 0)]
            mine = [r for r in found if r is not None]
            if len(mine) < len(found):
                continue
            rows.append(
                {
                    "prompt": messages_of(responses.prompts[i]),
                    "completions": texts[i],
                    "labels": [r > 0 for r in mine],
                    "rates": mine,
                    "completion_ids": tokens[i],
                    "tokenizer": model.renderer.fingerprint,
                }
            )
            counts["steps"] += len(mine)
            counts["recoverable"] += sum(r > 0 for r in mine)
        counts["responses"] += len(numbers)
        counts["unsplit"] += len(numbers) - len(usable)
        counts["not_judged"] += len(usable) - len(rows)
        return rows

    def right(self, score: float | None) -> bool | None:
        """Whether a completion is right, by its score; None where the judge does not judge it."""
        return None if score is None else score >= self.settings.threshold

    def completed(
        self, prefixes: Sequence[Prefix], numbers: list[int]
    ) -> dict[tuple[int, int], float | None]:
        """The share of each prefix's completions that end right, of those that the judge judges;
        None where it judges none.

        A completion's random stream is keyed by its prompt, response, step and number, so blocks,
        groups and processes do not change it.
        """
        settings, model, params = self.settings, self.model, self.params
        n, longest = settings.completions, settings.max_new_tokens
        rates: dict[tuple[int, int], float | None] = {}
        lengths, limit = (
            [len(model.ids[i]) for i in numbers],
            context(plain(model.policy.lm).config),
        )
        for group in alike(prefixes, lengths, longest, limit):
            several = [(p, c) for p in group for c in range(n)]
            prompt = [numbers[p.response] for p, _ in several]
            shorter = replace(params, max_new_tokens=longest - len(group[0].ids))
            sample = [
                (p.response % settings.samples * longest + p.step) * n + c for p, c in several
            ]
            starts = [model.ids[i] + p.ids for i, (p, _) in zip(prompt, several, strict=True)]
            keys = Keys(settings.seed, 1, prompt, sample)
            sampled = sample_all(model.sampler, starts, shorter, keys, model.processes)
            more = sampled.responses(ending=True)
            answers = [(p.ids + m)[:longest] for (p, _), m in zip(several, more, strict=True)]
            trajectory = Trajectory.build(
                [model.ids[i] for i in prompt],
                answers,
                [[0.0] * len(a) for a in answers],
                [a[-1] in params.stop_ids for a in answers],
                prompt,
                list(range(len(several))),
                settings.temperature,
            )
            rows = [model.rows[i] for i in prompt]
            scores = self.judge.scores(Responses.of(rows, trajectory, model.renderer)) or []
            for k, p in enumerate(group):
                each = [self.right(s) for s in scores[k * n : (k + 1) * n]]
                right = [r for r in each if r is not None]
                rates[p.response, p.step] = sum(right) / len(right) if right else None
        return rates


def alike(
    prefixes: Sequence[Prefix], prompt_lengths: Sequence[int], longest: int, limit: int
) -> list[list[Prefix]]:
    """Groups of prefixes of similar length.

    Each prefix fits the context with what may still be sampled after the shortest one of its group.

    Args:
        longest: tokens of a response. limit: positions of the model.
    """
    groups: list[list[Prefix]] = []
    for prefix in sorted(prefixes, key=lambda p: len(p.ids)):
        first = len(groups[-1][0].ids) if groups else 0
        needed = prompt_lengths[prefix.response] + len(prefix.ids) + longest - first
        if groups and len(prefix.ids) - first <= WASTE and needed <= limit:
            groups[-1].append(prefix)
        else:
            groups.append([prefix])
    return groups
