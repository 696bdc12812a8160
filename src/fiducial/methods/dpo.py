"""Direct preference optimization: fit a policy to preference pairs, held to a frozen reference.
Rafailov et al. 2023, arXiv 2305.18290.

The KL-regularised objective has the optimum pi* = pi_ref exp(r/beta) / Z; solved for the reward, r
= beta log(pi*/pi_ref) + beta log Z, and Z cancels from the comparison of two responses. So the
policy itself is the reward model, and the Bradley-Terry likelihood of the labels is its loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from .. import losses
from ..core import intervals
from ..core.reductions import select
from ..core.shared_prefix import SharedPrefix, common_length, shared_prefix
from ..data.batches import Batches, pad
from ..data.prepare import load, split, text_of
from ..data.render import Rendered, Renderer
from ..data.rows import Content, PreferenceRow
from ..models.load import load_policy, load_renderer, save
from ..models.roles import Policy
from ..rollout.answers import show
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import accumulate
from ..train.progress import say
from ..train.reference_cache import cached, fingerprint
from ..train.step import Stepper


class DPO(Settings):
    """Direct preference optimization: learn from pairs without a reward model and without sampling."""

    model: str
    """The policy to start from, a folder or a Hub name; the same weights, frozen, are the reference."""
    data: str
    """Rows with prompt, chosen, rejected: a file or a Hub name."""
    out: str | None = None
    """The run folder. Default: runs/dpo-1, -2, ..."""
    beta: float = Field(0.1, gt=0)
    """Pull to the reference: the implicit reward is beta * log(pi / pi_ref). Paper, appendix B:
    0.1, summarisation 0.5.
    """
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels (conservative DPO, Mitchell 2023). 0: the paper."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the pairs. 1: over-fitting often begins inside the first (Rafailov et al. 2024,
    arXiv 2406.02900).
    """
    steps: int | None = Field(None, gt=0)
    """Optimizer steps, instead of epochs."""
    batch_size: int = Field(64, gt=0)
    """Pairs for one optimizer step, over all processes. 64: the paper."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak, after warm-up. Paper: 1e-6 for full fine-tuning; ten to a hundred times that for LoRA
    and small models.
    """
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of the samples on the page."""
    seed: int = 0
    """Of the order of pairs and of the samples."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings(
        betas=(0.9, 0.999), schedule="constant", warmup_steps=150
    )
    run: RunSettings = RunSettings()


class Pair(NamedTuple):
    chosen: Rendered
    rejected: Rendered

    def costs(self, shared: bool) -> list[int]:
        """Lengths of the rows that the pair takes: one that holds the prompt once, or two."""
        both = [len(self.chosen), len(self.rejected)]
        return [sum(both) - common_length(self)] if shared else both


def dpo(settings: DPO) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "dpo",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        renderer = load_renderer(settings.model, settings.rows)
        train, held_out, prompts = read(settings, renderer, run)
        policy = load_policy(settings.model, settings.lora, settings.run, renderer.tokenizer).to(
            run.processes.device
        )
        reference = reference_logprobs(
            policy, train + held_out, settings.run.tokens, run
        )  # before the first step moves the policy

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
            rows = batches[run.step]
            pairs = [train[i] for i in rows]
            for micro in accumulate(
                run.processes.plan(
                    [p.costs(policy.supports_shared_prefix) for p in pairs], settings.run.tokens
                ),
                run.processes,
                stepper.module,
            ):
                chosen, rejected = pair_logprobs(
                    stepper.module, [pairs[i] for i in micro.rows], run.processes.device
                )
                ref = reference[[rows[i] for i in micro.rows]].to(chosen)
                loss, metrics = losses.dpo_sum(
                    chosen,
                    rejected,
                    ref[:, 0],
                    ref[:, 1],
                    beta=settings.beta,
                    label_smoothing=settings.label_smoothing,
                )
                stepper.backward(loss * micro.weight / len(pairs))
                if micro.weight:
                    run.meter.add(metrics, len(micro.rows))
            norms = stepper.step(run.step)
            run.end_step(
                norms,
                rows=len(pairs),
                tokens=sum(len(r) for p in pairs for r in p),
                show=("loss", "rewards/margins", "rewards/accuracies"),
            )
            if held_out and run.due(settings.run.eval_every):
                run.record(evaluate(policy, held_out, reference[len(train) :], settings, run))
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
                policy, renderer.tokenizer, path, torch.tensor([train[0].chosen.ids[:64]])
            )
        )


def read(
    settings: DPO, renderer: Renderer, run: Run
) -> tuple[list[Pair], list[Pair], list[tuple[Content, str]]]:
    """Rendered pairs for training and evaluation, and prompts for the samples."""

    def render(row: PreferenceRow) -> Pair:
        return Pair(
            renderer.completion(row.prompt, row.chosen, row.where),
            renderer.completion(row.prompt, row.rejected, row.where),
        )

    pairs, rows, note = load(
        settings.data,
        settings.rows,
        (PreferenceRow,),
        render,
        skipped=Path(run.path) / "skipped.jsonl",
    )
    if settings.rows.eval_data:
        held, held_rows, _ = load(settings.rows.eval_data, settings.rows, (PreferenceRow,), render)
        train = pairs
    else:
        here, there = split(
            [text_of(r.prompt) for r in rows], settings.rows.held_out, settings.seed
        )
        train, held, held_rows = (
            [pairs[i] for i in here],
            [pairs[i] for i in there],
            [rows[i] for i in there],
        )
    cut = sum(p.chosen.truncated or p.rejected.truncated for p in train)
    if run.main:
        say(
            f"dpo: {len(train):,} pairs to train on, {len(held):,} held out"
            + (f"; {cut:,} cut at {renderer.max_length} tokens" if cut else "")
        )
        if note:
            say(note)
    prompts = list(dict.fromkeys((r.prompt, "") for r in held_rows or rows))[: settings.run.samples]
    return train, held, prompts


def pair_logprobs(policy: Policy, pairs: list[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B], [B] of the chosen and the rejected responses, summed over their
    tokens, in nats. A prompt is read once for both.
    """
    if getattr(
        policy, "module", policy
    ).supports_shared_prefix:  # a data-parallel wrapper has the policy inside
        ids, mask, layout = shared_prefix(pairs)
        layout = SharedPrefix(*(x.to(device) for x in layout))
        logprobs = policy(ids.to(device), mask.to(device), shared_prefix=layout).logprobs
        return select(logprobs, layout.branch == 1).sum(1), select(
            logprobs, layout.branch == 2
        ).sum(1)
    batch = pad([p.chosen for p in pairs] + [p.rejected for p in pairs]).to(device)
    chosen, rejected = policy(batch.ids, batch.mask).logprobs.sum(1).split(len(pairs))
    return chosen, rejected


def reference_logprobs(policy: Policy, pairs: list[Pair], tokens: int, run: Run) -> Tensor:
    """[pairs, 2] of the policy as it is now, from the disk where they were computed before."""

    def compute() -> Tensor:
        def pair(rows: list[int]) -> tuple[Tensor, ...]:
            chosen, rejected = pair_logprobs(policy, [pairs[i] for i in rows], run.processes.device)
            return (torch.stack([chosen, rejected], 1),)

        return run.processes.map_rows(
            [p.costs(policy.supports_shared_prefix) for p in pairs],
            tokens,
            2,
            pair,
            title="dpo: log-probabilities of the reference",
        )[0]

    return cached(
        fingerprint(
            policy, [[p.chosen.ids, p.chosen.mask, p.rejected.ids, p.rejected.mask] for p in pairs]
        ),
        compute,
        run.processes,
    )


def evaluate(
    policy: Policy, pairs: list[Pair], reference: Tensor, settings: DPO, run: Run
) -> dict[str, float]:
    """The loss's metrics on held-out pairs; the accuracy's interval goes to the summary."""

    def compute(rows: list[int]) -> tuple[Tensor, ...]:
        return (
            torch.stack(pair_logprobs(policy, [pairs[i] for i in rows], run.processes.device), 1),
        )

    (logprobs,) = run.processes.map_rows(
        [p.costs(policy.supports_shared_prefix) for p in pairs], settings.run.tokens, 2, compute
    )
    _, metrics = losses.dpo(
        *logprobs.T, *reference.T, beta=settings.beta, label_smoothing=settings.label_smoothing
    )
    accuracy = float(metrics["rewards/accuracies"])
    run.evaluation["implicit reward accuracy on held-out pairs"] = intervals.wilson(
        accuracy * len(pairs), len(pairs)
    )
    return {f"eval/{k}": float(v) for k, v in metrics.items()}
