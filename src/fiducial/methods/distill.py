"""On-policy distillation: the student samples, and the teacher scores each of its tokens.

Agarwal et al. 2023 (GKD), arXiv 2306.13649; Gu et al. 2023 (MiniLLM), arXiv 2306.08543; Thinking
Machines 2025, "On-policy distillation". The objective is KL(student || teacher) on the student's
own responses. It seeks what the teacher would say rather than all that it might say, and the
student learns in the states that it reaches by itself. Two estimators of its gradient:

- exact: the KL at each visited state over the whole vocabulary, differentiated.
- sampled: log(pi / pi_T) of the sampled token as its negative advantage. It is the same in
  expectation, has more variance, and needs one number per token from the teacher.

Both take the states as given where --discount is 0, the default and the sources' custom: early
tokens do not pay for the states that they lead to. That is not the gradient of the responses' KL,
but it vanishes where the student equals the teacher; --discount 1 is that gradient, exactly (see
`fiducial.losses.distill`).

One iteration: sample, a forward pass of both models, one optimizer step. Further steps on the same
responses would be off policy: take smaller batches instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..core import intervals
from ..core.reductions import select
from ..data.batches import stream
from ..data.elements import Elements, RowFormat, read
from ..data.judged import judged
from ..data.prepare import prompt_text
from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..data.survey import Survey
from ..models.load import load_policy, load_teacher
from ..models.memory import Models
from ..models.roles import Roles, TokenOutputs
from ..models.save import save
from ..models.trunk import plain
from ..rollout.agreement import check_online
from ..rollout.completions import completion_metrics
from ..rollout.samples import show_samples
from ..rollout.sampling import (
    Keys,
    Sampler,
    SamplingParams,
    fitting_prompt,
    sample_all,
    sampling_params,
)
from ..rollout.trajectory import Trajectory
from ..run import Run
from ..train import machine
from ..train.processes import Processes, accumulate
from ..train.progress import say
from ..train.renderer import load_renderer, same_ends
from . import memory
from .settings.distill import Distill
from .setup import check_names, described, notes


@dataclass(frozen=True)
class Ready:
    """What the loop needs: token ids of prompts to train on and held out, roles, a sampler."""

    renderer: Renderer
    needs: memory.Needs
    train: Elements[list[int]]
    held_out: Elements[list[int]]
    roles: Roles
    sampler: Sampler
    params: SamplingParams
    note: str
    survey: Survey


def distill(settings: Distill, *, sampler: Sampler | None = None) -> Run[None]:
    """Train; returns the run: its path, metrics and model.

    Args:
        sampler: of the student's responses; None samples in this process.
    """
    with Run("distill", settings, state=None) as run:
        processes = run.processes
        ready = prepare(settings, processes, sampler=sampler)
        train, policy = ready.train.items, ready.roles.policy
        announce(ready, settings, run)
        stepper = run.stepper(policy, settings.learning_rate, settings.steps)
        run.start(settings.steps)
        if run.step == 0:
            run.record_samples(answers(ready, settings, run))
            run.pause()

        while run.running():
            start = run.step * settings.batch_size
            chosen = stream(len(train), start, settings.batch_size, settings.seed)
            keys = Keys(settings.seed, run.step, [i for i, _ in chosen], [k for _, k in chosen])
            ready.sampler.sync(policy, run.step)
            trajectory = sample_all(
                ready.sampler, [train[i] for i, _ in chosen], ready.params, keys, processes
            )
            run.nonfinite.rows = partial(
                described, trajectory, train, ready.train.rows, ready.renderer
            )
            count, gaps = int(trajectory.mask.sum()), [0.0]
            plan = processes.plan([[int(n)] for n in trajectory.lengths], settings.run.tokens)
            for micro in accumulate(plan, processes, stepper.module):
                ids, mask = trajectory.slice_rows(micro.rows, processes.device)
                loss, metrics, now = divergence(stepper.module, ready.roles, ids, mask, settings)
                stepper.backward(loss * micro.weight / count)
                if micro.weight:
                    run.meter.add(metrics, float(mask.sum()))
                    run.meter.add({"objective/kl_teacher": metrics["kl_teacher"]}, len(micro.rows))
                    sampled = trajectory.logprobs[micro.rows, : ids.shape[1]].to(processes.device)
                    gap = select(now.logprobs.detach() - sampled, mask).abs().max()
                    gaps.append(float(gap))
            norms = stepper.step(run.step)
            about = completion_metrics(trajectory)
            about["sampler_gap"] = max(processes.gather(gaps))
            run.end_step(
                norms | about,
                rows=len(chosen),
                tokens=int(trajectory.lengths.sum()),
                show=("kl_teacher", "nll/student", "nll/teacher"),
            )
            if len(ready.held_out) and run.due(settings.run.eval_every):
                run.record(evaluate(ready, settings, run))
            run.checkpoint_if_due()

        run.record_samples(answers(ready, settings, run))
        run.model = policy
        probe = torch.tensor([train[0]])
        return run.finish(save=lambda path: save(policy, ready.renderer.tokenizer, path, probe))


def divergence(
    student: Any, roles: Roles, ids: Tensor, mask: Tensor, settings: Distill
) -> tuple[Tensor, dict[str, Tensor], TokenOutputs]:
    """The loss of a micro-batch, summed over its tokens, its metrics, and the student's outputs.

    Args:
        student: the policy, or a data-parallel wrapper around it.
    """
    if settings.estimator == "exact":
        now: TokenOutputs = student(ids, mask, settings.temperature, teacher=roles.teacher)
        assert now.kl is not None and now.teacher_logprobs is not None
        theirs = now.teacher_logprobs
        loss, metrics = losses.reverse_kl_states_sum(
            now.kl, now.logprobs, mask, discount=settings.discount
        )
    else:
        now = student(ids, mask, settings.temperature, entropy=True)
        theirs = roles.teacher(ids, mask, settings.temperature).logprobs
        loss, metrics = losses.reverse_kl_sampled_sum(
            now.logprobs, theirs, mask, discount=settings.discount
        )
    assert now.entropy is not None
    metrics |= {
        "entropy": now.entropy.sum(),
        "nll/student": -now.logprobs.sum(),
        "nll/teacher": -theirs.sum(),
    }
    return loss, metrics, now


def prepare(settings: Distill, processes: Processes, *, sampler: Sampler | None = None) -> Ready:
    """Prompts, student, teacher and sampler.

    Raises:
        InputError: a row or a model cannot be used, or the vocabularies differ.
    """
    check_names(settings)
    trust = settings.trust_remote_code
    renderer = load_renderer(settings.model, settings.rows, trust=trust)
    rows = RowFormat[list[int]](
        (PromptRow,),
        partial(_prompts, max_new_tokens=settings.max_new_tokens),
        prompt_text,
        lambda ids: [ids],
    )
    survey = Survey(renderer)
    train, held_out, note = read(
        settings.data, settings.rows, rows, renderer, settings.seed, survey=survey
    )
    findings = judged(survey)
    models = Models(
        settings.model,
        teacher=settings.teacher,
        exact=settings.estimator == "exact",
        trust=trust,
    )
    held = machine.resident_memory(processes.device)
    needs = memory.online(settings, processes, models, train.items, held).settled()
    policy = load_policy(
        settings.model, settings.lora, settings.run, renderer.tokenizer, trust=trust
    ).to(processes.device)
    same_ends(plain(policy.lm), renderer)
    teacher = load_teacher(
        settings.teacher,
        policy,
        renderer.tokenizer,
        renderer.max_length,
        settings.run,
        trust=trust,
    )
    roles = Roles(policy=policy, teacher=teacher.to(processes.device))
    params = sampling_params(renderer, settings.max_new_tokens, settings.temperature, settings.stop)
    names = {"model": settings.model, "teacher": settings.teacher}
    prompts = [*train.items, *held_out.items]
    sampler, checked = check_online(roles, prompts, params, sampler, names)
    note = notes(note, checked, findings)
    return Ready(renderer, needs, train, held_out, roles, sampler, params, note, survey)


def _prompts(renderer: Renderer, max_new_tokens: int) -> Callable[[PromptRow], list[int]]:
    return lambda row: fitting_prompt(row, renderer, max_new_tokens)


def announce(ready: Ready, settings: Distill, run: Run[None]) -> None:
    """Say what is trained on."""
    if run.main:
        counts = f"{len(ready.train):,} prompts to train on, {len(ready.held_out):,} held out"
        plan = f"{settings.steps} iterations of {settings.batch_size} responses"
        say(f"distill: {counts}; {plan}" + (ready.note and f"; {ready.note}"))


def answers(ready: Ready, settings: Distill, run: Run[None]) -> list[dict[str, Any]]:
    """What the student answers to a few prompts, for the page."""
    rows = ready.held_out.rows or ready.train.rows
    return show_samples(
        ready.roles.policy,
        ready.renderer,
        [(r.prompt, r.where) for r in rows[: settings.run.samples]],
        run.processes,
        seed=settings.seed,
        params=ready.params,
        sampler=ready.sampler,
    )


def evaluate(ready: Ready, settings: Distill, run: Run[None]) -> dict[str, float]:
    """The exact KL per token and both models' loss per token, on fresh samples of the student.

    Their intervals go to the summary. The random streams are the evaluation's own and the same each
    time, so that two evaluations differ by the student alone.
    """
    prompts = ready.held_out.items
    numbers = [i % len(prompts) for i in range(settings.eval_samples)]
    sample = [i // len(prompts) for i in range(settings.eval_samples)]
    keys = Keys(settings.seed + 1, 0, numbers, sample)
    ready.sampler.sync(ready.roles.policy, run.step)
    trajectory: Trajectory = sample_all(
        ready.sampler, [prompts[i] for i in numbers], ready.params, keys, run.processes
    )

    def compute(rows: list[int]) -> tuple[Tensor, ...]:
        ids, mask = trajectory.slice_rows(rows, run.processes.device)
        found = ready.roles.policy(ids, mask, settings.temperature, teacher=ready.roles.teacher)
        return found.kl.sum(1), -found.logprobs.sum(1), -found.teacher_logprobs.sum(1)

    costs = [[int(n)] for n in trajectory.lengths]
    sums = run.processes.map_rows(costs, settings.run.tokens, None, compute)
    lengths = trajectory.response_lengths.tolist()
    names = ("eval/kl_teacher", "eval/nll/student", "eval/nll/teacher")
    found = {
        name: intervals.ratio(values.tolist(), lengths, numbers)
        for name, values in zip(names, sums, strict=True)
    }
    run.evaluation |= found
    return {name: estimate["value"] for name, estimate in found.items()}
