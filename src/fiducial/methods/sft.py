"""Supervised fine-tuning: maximum likelihood of demonstrations.

Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), section 3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .. import losses
from ..data.batches import pad
from ..data.elements import RowFormat
from ..data.language import LANGUAGE_ROWS, language_key, language_prompt, language_rows
from ..data.render import Rendered
from ..models.roles import Policy
from ..models.save import save
from ..rollout.samples import show_samples
from ..rollout.sampling import sampling_params
from ..run import Run
from ..settings import Tokens
from ..train.processes import Processes, accumulate
from ..train.progress import say
from .settings.sft import SFT
from .setup import Prepared, prepare_offline


def sft(settings: SFT) -> Run[None]:
    """Train; returns the run: its path, metrics and model."""
    with Run("sft", settings, state=None) as run:
        ready = prepare(settings, run.processes, run.path / "skipped.jsonl")
        train, held_out, policy = ready.train.items, ready.held_out.items, ready.roles.policy
        stepper = run.stepper(policy, settings.learning_rate, ready.total)
        announce(ready, run)
        run.start(ready.total)
        if run.step == 0:
            run.record_samples(answers(ready, settings, run))
            run.pause()

        run.nonfinite.rows = lambda: ready.describe(run.step)
        while run.running():
            rows = [train[i] for i in ready.batches[run.step]]
            labels = sum(r.num_labels for r in rows)
            plan = run.processes.plan([[len(r)] for r in rows], settings.run.tokens)
            for micro in accumulate(plan, run.processes, stepper.module):
                batch = pad([rows[i] for i in micro.rows]).to(run.processes.device)
                logprobs = stepper.module(batch.ids, batch.mask).logprobs
                loss, metrics = losses.nll_sum(logprobs, batch.mask)
                stepper.backward(loss * micro.weight / labels)
                if micro.weight:
                    run.meter.add(metrics, int(batch.mask.sum()))
            norms = stepper.step(run.step)
            tokens = sum(map(len, rows))
            run.end_step(norms, rows=len(rows), tokens=tokens, show=("loss", "learning_rate"))
            if held_out and run.due(settings.run.eval_every):
                run.record({"eval/loss": evaluate(policy, held_out, settings.run.tokens, run)})
            run.checkpoint_if_due()

        run.record_samples(answers(ready, settings, run))
        run.model = policy
        probe = torch.tensor([train[0].ids[:64]])
        return run.finish(save=lambda path: save(policy, ready.renderer.tokenizer, path, probe))


def prepare(settings: SFT, processes: Processes, skipped: Path | None = None) -> Prepared[Rendered]:
    """Rows, policy and plan.

    Raises:
        InputError: a row or the model cannot be used.
    """
    rows = RowFormat[Rendered](LANGUAGE_ROWS, language_rows, language_key, lambda row: [row.ids])
    return prepare_offline(settings, processes, rows, skipped=skipped)


def announce(ready: Prepared[Rendered], run: Run[None]) -> None:
    """Say what is trained on."""
    if not run.main:
        return
    cut = sum(r.truncated for r in ready.train.items)
    note = f"; {cut:,} cut at {ready.renderer.max_length} tokens" if cut else ""
    counts = f"{len(ready.train):,} rows to train on, {len(ready.held_out):,} held out"
    say(f"sft: {counts}{note}")
    if ready.note:
        say(ready.note)


def answers(ready: Prepared[Rendered], settings: SFT, run: Run[None]) -> list[dict[str, Any]]:
    """What the policy answers to a few prompts, for the page."""
    asked = (language_prompt(r) for r in ready.held_out.rows or ready.train.rows)
    return show_samples(
        ready.roles.policy,
        ready.renderer,
        list(islice((p for p in asked if p is not None), settings.run.samples)),
        run.processes,
        seed=settings.seed,
        params=sampling_params(ready.renderer, settings.max_new_tokens),
    )


def evaluate(policy: Policy, rows: Sequence[Rendered], tokens: Tokens, run: Run[None]) -> float:
    """Mean negative log-likelihood of the held-out labels, in nats per token."""

    def compute(chosen: list[int]) -> tuple[torch.Tensor, ...]:
        batch = pad([rows[i] for i in chosen]).to(run.processes.device)
        return (policy(batch.ids, batch.mask).logprobs.sum(1),)

    (logprobs,) = run.processes.map_rows([[len(r)] for r in rows], tokens, None, compute)
    return -float(logprobs.sum()) / sum(r.num_labels for r in rows)
