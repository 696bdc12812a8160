"""Supervised fine-tuning: maximum likelihood of demonstrations. Ouyang et al. 2022 (InstructGPT,
arXiv 2203.02155), section 3.5.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from .. import losses
from ..data.batches import Batches, pad
from ..data.prepare import load, split
from ..data.render import Rendered, Renderer
from ..data.rows import ChatRow, CompletionRow, Content, TextRow
from ..models.load import load_policy, load_renderer, save
from ..models.roles import Policy
from ..rollout.answers import show
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import accumulate
from ..train.progress import say
from ..train.step import Stepper


class SFT(Settings):
    """Supervised fine-tuning: teach a model to answer as the demonstrations do."""

    model: str
    """The model to start from: a folder or a Hub name."""
    data: str
    """Rows with text, messages, or prompt and completion: a file or a Hub name."""
    out: str | None = None
    """The run folder. Default: runs/sft-1, -2, ..."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rows. 1: Huang et al. 2024 (N+); InstructGPT took 16 and chose among them by
    reward.
    """
    steps: int | None = Field(None, gt=0)
    """Optimizer steps, instead of epochs."""
    batch_size: int = Field(32, gt=0)
    """Rows for one optimizer step, over all processes. 32: InstructGPT."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak. InstructGPT: 9.65e-6. Ten to a hundred times that for LoRA and small models."""
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of the samples on the page."""
    seed: int = 0
    """Of the order of rows and of the samples."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings(schedule="cosine")
    run: RunSettings = RunSettings()


def sft(settings: SFT) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "sft",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        renderer = load_renderer(settings.model, settings.rows)
        train, held_out, prompts = read(settings, renderer, run)
        policy = load_policy(settings.model, settings.lora, settings.run, renderer.tokenizer)

        batches = Batches(len(train), settings.batch_size, settings.seed)
        total = settings.steps or max(1, round(settings.epochs * batches.per_epoch))
        stepper = Stepper(policy, settings.learning_rate, settings.optimizer, total, run.processes)
        run.start(total)
        if run.step == 0:
            run.record_samples(
                show(
                    policy,
                    renderer,
                    prompts,
                    run.processes,
                    seed=settings.seed,
                    max_new_tokens=settings.max_new_tokens,
                )
            )
            run.pause()

        while run.running():
            rows = [train[i] for i in batches[run.step]]
            labels = sum(r.num_labels for r in rows)
            for micro in accumulate(
                run.processes.plan([[len(r)] for r in rows], settings.run.tokens),
                run.processes,
                stepper.module,
            ):
                batch = pad([rows[i] for i in micro.rows]).to(run.processes.device)
                logprobs = stepper.module(batch.ids, batch.mask).logprobs
                loss, metrics = losses.nll_sum(logprobs, batch.mask)
                stepper.backward(loss * micro.weight / labels)
                if micro.weight:
                    run.meter.add(metrics, int(batch.mask.sum()))
            norms = stepper.step(run.step)
            run.end_step(
                norms, rows=len(rows), tokens=sum(map(len, rows)), show=("loss", "learning_rate")
            )
            if held_out and run.due(settings.run.eval_every):
                run.record({"eval/loss": evaluate(policy, held_out, settings.run.tokens, run)})
            run.checkpoint_if_due()

        run.record_samples(
            show(
                policy,
                renderer,
                prompts,
                run.processes,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
            )
        )
        run.model = policy
        return run.finish(
            save=lambda path: save(
                policy, renderer.tokenizer, path, torch.tensor([train[0].ids[:64]])
            )
        )


def read(
    settings: SFT, renderer: Renderer, run: Run
) -> tuple[list[Rendered], list[Rendered], list[tuple[Content, str]]]:
    """Rendered rows for training and evaluation, and prompts for the samples."""

    def render(row: TextRow | ChatRow | CompletionRow) -> Rendered:
        if isinstance(row, TextRow):
            return renderer.text(row)
        return (
            renderer.chat(row)
            if isinstance(row, ChatRow)
            else renderer.completion(row.prompt, row.completion, row.where)
        )

    accept = (TextRow, ChatRow, CompletionRow)
    skipped = Path(run.path) / "skipped.jsonl"
    rendered, rows, note = load(settings.data, settings.rows, accept, render, skipped=skipped)
    if settings.rows.eval_data:
        held, held_rows, _ = load(settings.rows.eval_data, settings.rows, accept, render)
        train = rendered
    else:
        here, there = split([_key(r) for r in rows], settings.rows.held_out, settings.seed)
        train, held, held_rows = (
            [rendered[i] for i in here],
            [rendered[i] for i in there],
            [rows[i] for i in there],
        )
    cut = sum(r.truncated for r in train)
    if run.main:
        say(
            f"sft: {len(train):,} rows to train on, {len(held):,} held out"
            + (f"; {cut:,} cut at {renderer.max_length} tokens" if cut else "")
        )
        if note:
            say(note)
    prompts = [p for r in held_rows or rows if (p := _prompt(r)) is not None][
        : settings.run.samples
    ]
    return train, held, prompts


def evaluate(policy: Policy, rows: list[Rendered], tokens: int, run: Run) -> float:
    """Mean negative log-likelihood of the held-out labels, in nats a token."""

    def compute(chosen: list[int]) -> tuple[torch.Tensor, ...]:
        batch = pad([rows[i] for i in chosen]).to(run.processes.device)
        return (policy(batch.ids, batch.mask).logprobs.sum(1),)

    (logprobs,) = run.processes.map_rows([[len(r)] for r in rows], tokens, None, compute)
    return -float(logprobs.sum()) / sum(r.num_labels for r in rows)


def _key(row: TextRow | ChatRow | CompletionRow) -> str:
    return (
        row.text
        if isinstance(row, TextRow)
        else repr(row.messages[:-1] if isinstance(row, ChatRow) else row.prompt)
    )


def _prompt(row: TextRow | ChatRow | CompletionRow) -> tuple[Content, str] | None:
    if isinstance(row, TextRow):
        return (" ".join(row.text.split()[:4]), row.where)
    if isinstance(row, ChatRow):
        first = next(i for i, m in enumerate(row.messages) if m.role == "assistant")
        return (row.messages[:first], row.where) if first else None
    return (row.prompt, row.where)
