"""Direct preference optimization: fit a policy to preference pairs, close to a frozen reference.

Rafailov et al. 2023, arXiv 2305.18290. The KL-regularized objective has the optimum
pi* = pi_ref exp(r / beta) / Z. Solved for the reward, r = beta log(pi* / pi_ref) + beta log Z, and
Z cancels when two responses are compared. The policy itself is therefore the reward model, and the
Bradley-Terry likelihood of the labels is its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..core import intervals
from ..core.equal_rows import distinct
from ..core.reductions import select
from ..core.shared_prefix import SharedPrefix, common_length, shared_prefix
from ..data.batches import pad
from ..data.elements import RowFormat
from ..data.pairs import Pair, preference_rows
from ..data.prepare import prompt_text
from ..data.row_types import Content, PreferenceRow
from ..models.contract import FLOAT32
from ..models.frozen import Frozen
from ..models.roles import Policy, full_precision
from ..models.save import save
from ..rollout.samples import show_samples
from ..rollout.sampling import sampling_params
from ..run import Run
from ..settings import Tokens
from ..train.machine import tokens_in_a_minute
from ..train.processes import Processes, accumulate
from ..train.progress import say
from ..train.reference_cache import cached, fingerprint, parts
from .settings.dpo import DPO
from .setup import Prepared, prepare_offline

WARMUP = 150
"""Optimizer steps of warm-up in the paper, appendix B; a tenth of a run that is shorter."""


def costs_of(pair: Pair, shared: bool) -> list[int]:
    """Lengths of the rows that a pair takes: one that holds the prompt once, or two."""
    both = [len(pair.chosen), len(pair.rejected)]
    return [sum(both) - common_length(pair)] if shared else both


def dpo(settings: DPO) -> Run[None]:
    """Train; returns the run: its path, metrics and model."""
    with Run("dpo", settings, state=None) as run:
        ready = prepare(settings, run.processes, run.path / "skipped.jsonl")
        train, held_out, policy = ready.train.items, ready.held_out.items, ready.roles.policy
        stepper = run.stepper(policy, settings.learning_rate, ready.total, WARMUP)
        announce(ready, stepper.warmup, run)
        # before the first step moves the policy, which is the reference until then
        reference = Reference(ready, settings, run)
        run.start(ready.total)
        if run.step == 0:
            run.record_samples(answers(ready, settings, run))
            run.pause()

        run.nonfinite.rows = lambda: ready.describe(run.step)
        while run.running():
            rows = ready.batches[run.step]
            pairs = [train[i] for i in rows]
            costs = [costs_of(pair, policy.supports_shared_prefix) for pair in pairs]
            plan = run.processes.plan(costs, settings.run.tokens)
            known = reference.of(rows)
            for micro in accumulate(plan, run.processes, stepper.module):
                some = [pairs[i] for i in micro.rows]
                chosen, rejected = pair_logprobs(stepper.module, some, run.processes.device)
                ref = known[micro.rows].to(chosen)
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
                run.record(evaluate(policy, held_out, reference.held_out(), settings, run))
            run.checkpoint_if_due()

        run.record_samples(answers(ready, settings, run))
        run.model = policy
        probe = torch.tensor([train[0].chosen.ids[:64]])
        return run.finish(save=lambda path: save(policy, ready.renderer.tokenizer, path, probe))


def prepare(settings: DPO, processes: Processes, skipped: Path | None = None) -> Prepared[Pair]:
    """Pairs, policy and plan.

    Raises:
        InputError: a row or the model cannot be used.
    """
    rows = RowFormat[Pair](
        (PreferenceRow,),
        preference_rows,
        prompt_text,
        lambda pair: [pair.chosen.ids, pair.rejected.ids],
        together=lambda pair: costs_of(pair, True)[0],
    )
    ready = prepare_offline(settings, processes, rows, skipped=skipped)
    policy = ready.roles.policy
    longest = max(ready.train.items, key=lambda pair: sum(map(len, pair)))
    if not policy.supports_shared_prefix or agree_when_shared(policy, longest, processes.device):
        return ready
    policy.supports_shared_prefix = False
    note = "a prompt is read for each response anew: read once for both, log-probabilities differ"
    return replace(ready, note=f"{note}; {ready.note}")


@torch.no_grad()
def agree_when_shared(policy: Policy, pair: Pair, device: torch.device) -> bool:
    """Whether both responses to a prompt that is read once have the log-probabilities that they
    have alone.
    """
    with full_precision(policy):
        shared = torch.cat(pair_logprobs(policy, [pair], device))
        batches = [pad([r]).to(device) for r in pair]
        alone = torch.cat([policy(b.ids, b.mask).logprobs.sum(1) for b in batches])
    tokens = max(r.num_labels for r in pair)
    return bool(((shared - alone).abs() <= FLOAT32 * max(1, tokens)).all())


def announce(ready: Prepared[Pair], warmup: int, run: Run[None]) -> None:
    """Say what is trained on, and how long the learning rate rises."""
    if not run.main:
        return
    cut = sum(p.chosen.truncated or p.rejected.truncated for p in ready.train.items)
    note = f"; {cut:,} cut at {ready.renderer.max_length} tokens" if cut else ""
    counts = f"{len(ready.train):,} pairs to train on, {len(ready.held_out):,} held out"
    say(f"dpo: {counts}{note}")
    if warmup:
        say(f"the learning rate rises over the first {warmup} of {ready.total} steps")
    if ready.note:
        say(ready.note)


def answers(ready: Prepared[Pair], settings: DPO, run: Run[None]) -> list[dict[str, Any]]:
    """What the policy answers to a few prompts, for the page."""
    asked: dict[tuple[Content, str], None] = {}
    for row in ready.held_out.rows or ready.train.rows:
        if len(asked) >= settings.run.samples:
            break
        asked[row.prompt, ""] = None
    return show_samples(
        ready.roles.policy,
        ready.renderer,
        list(asked),
        run.processes,
        seed=settings.seed,
        params=sampling_params(ready.renderer, settings.max_new_tokens),
    )


def pair_logprobs(policy: Any, pairs: list[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B], [B] of the chosen and the rejected responses, in nats.

    They are summed over each response's tokens. A response that stands in several pairs is read
    once; or, where that takes fewer tokens and the model allows it, a prompt is read once for both
    of its responses.

    Args:
        policy: a Policy, or a data-parallel wrapper around one.
    """
    inner: Policy = getattr(policy, "module", policy)
    rows = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    first, places = distinct((tuple(r.ids), tuple(r.mask)) for r in rows)
    once = [rows[i] for i in first]
    if inner.supports_shared_prefix and (
        len(once) == len(rows) or sum(sum(costs_of(p, True)) for p in pairs) < sum(map(len, once))
    ):
        ids, mask, layout = shared_prefix(pairs)
        layout = SharedPrefix(*(x.to(device) for x in layout))
        logprobs = policy(ids.to(device), mask.to(device), shared_prefix=layout).logprobs
        chosen, rejected = (select(logprobs, layout.branch == k).sum(1) for k in (1, 2))
        return chosen, rejected
    batch = pad(once).to(device)
    chosen, rejected = policy(batch.ids, batch.mask).logprobs.sum(1)[places].split(len(pairs))
    return chosen, rejected


def all_logprobs(policy: Policy, pairs: Sequence[Pair], tokens: Tokens, run: Run[None]) -> Tensor:
    """[pairs, 2] log-probabilities of the policy as it is now, without gradient, in micro-batches,
    on all processes.
    """

    def both(rows: list[int]) -> tuple[Tensor, ...]:
        some = [pairs[i] for i in rows]
        return (torch.stack(pair_logprobs(policy, some, run.processes.device), 1),)

    costs = [costs_of(p, policy.supports_shared_prefix) for p in pairs]
    return run.processes.map_rows(costs, tokens, 2, both)[0]


def reference_logprobs(
    policy: Policy, pairs: Sequence[Pair], tokens: Tokens, run: Run[None]
) -> Tensor:
    """[pairs, 2] log-probabilities of the policy as it is now, from the disk if they are there."""
    costs = [costs_of(p, policy.supports_shared_prefix) for p in pairs]
    rows = ([p.chosen.ids, p.chosen.mask, p.rejected.ids, p.rejected.mask] for p in pairs)
    return cached(
        fingerprint(policy, rows),
        parts(costs, tokens_in_a_minute(policy)),
        lambda part: all_logprobs(policy, [pairs[i] for i in part], tokens, run),
        run.processes,
        "dpo: log-probabilities of the reference",
    )


class Reference:
    """Log-probabilities in nats by the reference, which is the policy before the first step.

    They are computed for all pairs of the run at once, or, by a frozen copy, when they are asked
    for.
    """

    def __init__(self, ready: Prepared[Pair], settings: DPO, run: Run[None]) -> None:
        self._ready, self._run, self._tokens = ready, run, settings.run.tokens
        policy, train = ready.roles.policy, ready.train.items
        read = ready.batches.rows(ready.total)
        self._known = torch.full((len(train), 2), torch.nan)  # of pairs that no step reads
        self._unseen: Tensor | None = None
        self._frozen: Frozen | None = None
        if settings.reads_reference_at_each_step(len(read)):
            self._frozen = Frozen(policy)
            memory = ", a copy of the model that stays in memory" if self._frozen.copied else ""
            when = "reads the pairs of each step (--reference-pass first: before)"
            if run.main:
                say(f"the reference{memory} {when}")
            return
        pairs = [*(train[i] for i in read), *ready.held_out.items]
        found = reference_logprobs(policy, pairs, self._tokens, run)
        self._known[read], self._unseen = found[: len(read)], found[len(read) :]

    def of(self, rows: Sequence[int]) -> Tensor:
        """Log-probabilities [rows, 2] of the training pairs with these numbers."""
        if self._frozen is None:
            return self._known[list(rows)]
        return self._asked(self._frozen, [self._ready.train.items[i] for i in rows])

    def held_out(self) -> Tensor:
        """Log-probabilities [pairs, 2] of all held-out pairs."""
        if self._unseen is None:
            assert self._frozen is not None
            self._unseen = self._asked(self._frozen, self._ready.held_out.items)
        return self._unseen

    def _asked(self, frozen: Frozen, pairs: Sequence[Pair]) -> Tensor:
        with frozen.policy() as policy:
            return all_logprobs(policy, pairs, self._tokens, self._run)


def evaluate(
    policy: Policy, pairs: Sequence[Pair], reference: Tensor, settings: DPO, run: Run[None]
) -> dict[str, float]:
    """The loss's metrics on held-out pairs; the accuracy's interval goes to the summary."""
    logprobs = all_logprobs(policy, pairs, settings.run.tokens, run)
    _, metrics = losses.dpo(
        *logprobs.T, *reference.T, beta=settings.beta, label_smoothing=settings.label_smoothing
    )
    right = float(metrics["rewards/accuracies"]) * len(pairs)
    name = "implicit reward accuracy on held-out pairs"
    run.evaluation[name] = intervals.wilson(right, len(pairs))
    return {f"eval/{k}": float(v) for k, v in metrics.items()}
