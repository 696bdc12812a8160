"""On-policy distillation: the student samples, and the teacher says of each token how likely it
would have been. Agarwal et al. 2023 (GKD), arXiv 2306.13649; Gu et al. 2023 (MiniLLM), arXiv
2306.08543; Thinking Machines 2025, "On-policy distillation".

What is minimised is KL(student || teacher) on the student's own responses: it seeks what the
teacher would say rather than all that it might say, and the student learns in the states it comes
to by itself. Two estimators of its gradient:

- exact: the KL of each visited state over the whole vocabulary, differentiated.
- sampled: the sampled token's log(pi / pi_T) as its negative advantage; the same in expectation,
  with more variance. One number a token from the teacher.

Both take the states as given where --discount is 0, the default and the sources' custom: early
tokens do not pay for the states they lead to. That is not the gradient of the responses' KL, but it
vanishes where the student is the teacher; --discount 1 is that gradient, exactly (see
`fiducial.losses.distill`).

One iteration: sample, look at both models, one optimizer step. Further steps on the same responses
would be off policy: take smaller batches instead.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import losses
from ..core import intervals
from ..core.reductions import select
from ..data.batches import stream
from ..data.prepare import load, split, text_of
from ..data.render import Renderer
from ..data.rows import Content, PromptRow
from ..models.load import load_policy, load_renderer, load_teacher, save
from ..models.roles import Policy
from ..rollout.answers import fitting_prompt, local_sampler, show
from ..rollout.sampler import LocalSampler
from ..rollout.shared import sample_all
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import accumulate
from ..train.progress import say
from ..train.step import Stepper


class Distill(Settings):
    """On-policy distillation: bring a student to a teacher's distribution on samples of its own."""

    model: str
    """The student to start from, a folder or a Hub name. One that knows nothing yet should be
    fine-tuned first: it learns from its own samples.
    """
    teacher: str
    """The model to learn from, a folder or a Hub name, with the student's token ids."""
    data: str
    """Rows with a prompt: a file or a Hub name. Nothing else of them is used."""
    out: str | None = None
    """The run folder. Default: runs/distill-1, -2, ..."""
    estimator: Literal["exact", "sampled"] = "exact"
    """exact: the KL of each state over the whole vocabulary, as GKD. sampled: log(pi / pi_T) of the
    sampled token, as Thinking Machines 2025.
    """
    discount: float = Field(0.0, ge=0, le=1)
    """How much of the KL in later states a token pays for, a factor a token. 0: GKD, Thinking
    Machines 2025; 1: the exact gradient, with more variance.
    """
    steps: int = Field(100, gt=0)
    """Iterations of sampling and one optimizer step. Thinking Machines 2025: 150."""
    batch_size: int = Field(64, gt=0)
    """Responses an iteration, over all processes. Ours."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak. Ours, that of SFT. Ten to a hundred times that for LoRA and small models."""
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of a response, at most. Ours, for the tasks of PPO."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of both models' distributions. 1: GKD."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response beside EOS."""
    eval_samples: int = Field(128, gt=0)
    """Responses to held-out prompts for an evaluation. Ours."""
    seed: int = 0
    """Of the order of prompts and of the samples."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()


def distill(settings: Distill) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "distill",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        processes, temperature = run.processes, settings.temperature
        renderer = load_renderer(settings.model, settings.rows)
        train, held_out, prompts = read(settings, renderer, run)
        policy = load_policy(settings.model, settings.lora, settings.run, renderer.tokenizer).to(
            processes.device
        )
        teacher = load_teacher(settings.teacher, policy, renderer, settings.run).to(
            processes.device
        )
        sampler = local_sampler(
            policy,
            renderer,
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature,
            stop=settings.stop,
        )
        stepper = Stepper(
            policy, settings.learning_rate, settings.optimizer, settings.steps, processes
        )

        def answers() -> list[dict[str, Any]]:
            return show(
                policy,
                renderer,
                prompts,
                processes,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
            )

        run.start(settings.steps)
        if run.step == 0:
            run.record_samples(answers())
            run.pause()

        while run.running():
            chosen = stream(
                len(train), run.step * settings.batch_size, settings.batch_size, settings.seed
            )
            trajectory = sample_all(
                sampler,
                [train[i] for i, _ in chosen],
                processes,
                seed=settings.seed,
                step=run.step,
                prompt=[i for i, _ in chosen],
                sample=[epoch for _, epoch in chosen],
            )
            count, gaps = int(trajectory.mask.sum()), [0.0]
            plan = processes.plan([[int(n)] for n in trajectory.lengths], settings.run.tokens)
            for micro in accumulate(plan, processes, stepper.module):
                ids, mask = trajectory.slice_rows(micro.rows, processes.device)
                if settings.estimator == "exact":
                    now = stepper.module(ids, mask, temperature, teacher=teacher)
                    theirs = now.teacher_logprobs
                    loss, metrics = losses.reverse_kl_states_sum(
                        now.kl, now.logprobs, mask, discount=settings.discount
                    )
                else:
                    now = stepper.module(ids, mask, temperature, entropy=True)
                    theirs = teacher(ids, mask, temperature).logprobs
                    loss, metrics = losses.reverse_kl_sampled_sum(
                        now.logprobs, theirs, mask, discount=settings.discount
                    )
                stepper.backward(loss * micro.weight / count)
                if micro.weight:
                    metrics |= {
                        "entropy": now.entropy.sum(),
                        "nll/student": -now.logprobs.sum(),
                        "nll/teacher": -theirs.sum(),
                    }
                    run.meter.add(metrics, float(mask.sum()))
                    run.meter.add({"objective/kl_teacher": metrics["kl_teacher"]}, len(micro.rows))
                    sampled = trajectory.logprobs[micro.rows, : ids.shape[1]].to(processes.device)
                    gaps.append(float(select(now.logprobs.detach() - sampled, mask).abs().max()))
            norms = stepper.step(run.step)
            about = {
                "completions/mean_length": float(trajectory.response_lengths.float().mean()),
                "completions/finished": float(trajectory.finished.float().mean()),
                "sampler_gap": max(processes.gather(gaps)),
            }
            run.end_step(
                norms | about,
                rows=len(chosen),
                tokens=int(trajectory.lengths.sum()),
                show=("kl_teacher", "nll/student", "nll/teacher"),
            )
            if held_out and run.due(settings.run.eval_every):
                run.record(evaluate(policy, teacher, sampler, held_out, settings, run))
            run.checkpoint_if_due()

        run.record_samples(answers())
        run.model = policy
        return run.finish(
            save=lambda path: save(policy, renderer.tokenizer, path, torch.tensor([train[0]]))
        )


def read(
    settings: Distill, renderer: Renderer, run: Run
) -> tuple[list[list[int]], list[list[int]], list[tuple[Content, str]]]:
    """Token ids of the prompts for training and for evaluation, and prompts for the samples."""

    def render(row: PromptRow) -> list[int]:
        return fitting_prompt(row, renderer, settings.max_new_tokens)

    ids, rows, note = load(settings.data, settings.rows, (PromptRow,), render)
    if settings.rows.eval_data:
        train = ids
        held, held_rows, _ = load(settings.rows.eval_data, settings.rows, (PromptRow,), render)
    else:
        here, there = split(
            [text_of(r.prompt) for r in rows], settings.rows.held_out, settings.seed
        )
        train, held, held_rows = (
            [ids[i] for i in here],
            [ids[i] for i in there],
            [rows[i] for i in there],
        )
    if run.main:
        many = f"{len(train):,} prompts to train on, {len(held):,} held out; {settings.steps} iterations of {settings.batch_size} responses"
        say(f"distill: {many}" + (f"; {note}" if note else ""))
    return train, held, [(r.prompt, r.where) for r in held_rows or rows][: settings.run.samples]


def evaluate(
    policy: Policy,
    teacher: Policy,
    sampler: LocalSampler,
    prompts: list[list[int]],
    settings: Distill,
    run: Run,
) -> dict[str, float]:
    """The exact KL per token and both models' loss per token, on fresh samples of the student;
    their intervals go to the summary.
    """
    numbers = [i % len(prompts) for i in range(settings.eval_samples)]
    # streams of their own, and the same at every evaluation, so that two differ by the student
    # alone
    trajectory = sample_all(
        sampler,
        [prompts[i] for i in numbers],
        run.processes,
        seed=settings.seed + 1,
        step=0,
        prompt=numbers,
        sample=[i // len(prompts) for i in range(settings.eval_samples)],
    )

    def compute(rows: list[int]) -> tuple[Tensor, ...]:
        ids, mask = trajectory.slice_rows(rows, run.processes.device)
        found = policy(ids, mask, settings.temperature, teacher=teacher)
        assert found.kl is not None and found.teacher_logprobs is not None
        return found.kl.sum(1), -found.logprobs.sum(1), -found.teacher_logprobs.sum(1)

    sums = run.processes.map_rows(
        [[int(n)] for n in trajectory.lengths], settings.run.tokens, None, compute
    )
    lengths, names = (
        trajectory.response_lengths.tolist(),
        ("eval/kl_teacher", "eval/nll/student", "eval/nll/teacher"),
    )
    found = {
        name: intervals.ratio(values.tolist(), lengths, numbers)
        for name, values in zip(names, sums, strict=True)
    }
    run.evaluation |= found
    return {name: estimate["value"] for name, estimate in found.items()}
