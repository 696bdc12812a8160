"""GRPO and its kin: a response is judged against the other responses to its prompt.

Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300. A clipped surrogate allows several optimizer
steps on the same responses. Each later paper changes a part, and each part is a function here:

========  =========================================================================================
variant   what it is
========  =========================================================================================
grpo      mean and standard deviation of the group, PPO's clip, a mean over each response, k3 as a
          loss. Shao et al. 2024
dr_grpo   neither of the two divisions: the group's mean alone, and a constant in place of the
          length. Liu et al. 2025, arXiv 2503.20783
dapo      clip-higher, a mean over tokens, prompts without differing scores sampled again (and
          --score.length-buffer). Yu et al. 2025, arXiv 2503.14476
gspo      one ratio per response, the geometric mean of its tokens' ratios. Zheng et al. 2025,
          arXiv 2507.18071
cispo     the ratio as a detached, capped weight, so that no token loses its gradient. MiniMax 2025,
          arXiv 2506.13585
========  =========================================================================================

A variant sets the parts, and each of them may be set alone. Known to be biased, and measured in the
lab: the standard deviation, the mean over each response, forward_k3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import losses
from ..core import advantages, kl
from ..core.corrections import off_policy_mask
from ..core.loss_aggregation import constant, sequence_mean, token_mean
from ..data.batches import Batches, stream
from ..models.save import save
from ..rewards.shaping import ScoreScale, importance_weights, shape
from ..rewards.types import Scored, Scorer
from ..rollout.forward import RolloutLogprobs, forward
from ..rollout.sampling import Sampler
from ..rollout.trajectory import Trajectory
from ..run import Run
from ..train.processes import Processes, accumulate
from ..train.progress import say
from ..train.step import Stepper
from .settings.grpo import GRPO, VARIANTS, Parts
from .setup import PreparedOnline, before_training, prepare_online

ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": advantages.group_normalised,
    "dr_grpo": advantages.group_mean,
    "rloo": advantages.leave_one_out,
}
"""From returns [N] and group ids [N] to advantages [N]."""
LOSSES: dict[str, Callable[[Parts], Callable[..., tuple[Tensor, dict[str, Tensor]]]]] = {
    "ppo_clip": lambda parts: partial(
        losses.ppo_clip_sum, clip=parts.clip, clip_high=parts.clip_high
    ),
    "gspo": lambda parts: partial(losses.gspo_sum, clip=parts.clip, clip_high=parts.clip_high),
    "cispo": lambda parts: partial(losses.cispo_sum, cap=parts.cap),
}
CLIPPED = {
    "ppo_clip": "clip_ratio",
    "gspo": "clip_ratio/responses",
    "cispo": "clip_ratio/capped",
}
"""The metric of the clipped share: each loss has its own healthy range."""
AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sequence_mean": lambda mask, longest: sequence_mean(mask),
    "token_mean": lambda mask, longest: token_mean(mask),
    "constant": constant,
}
"""From a mask [N, T] and the longest that a response may be to the weight of each token [N, T]."""


@dataclass(frozen=True)
class GRPOState:
    """What GRPO keeps from step to step.

    beta: the KL coefficient. drawn: number of prompts drawn so far. scale: of the first scores.
    """

    beta: float
    drawn: int = 0
    scale: ScoreScale | None = None


def grpo(
    settings: GRPO, *, sampler: Sampler | None = None, rewards: Scorer | None = None
) -> Run[GRPOState]:
    """Train; returns the run: its path, metrics and model.

    Args:
        sampler: of the policy's responses; None samples in this process.
        rewards: scores them in place of --reward.
    """
    parts = settings.parts
    with Run("grpo", settings, state=GRPOState(parts.beta)) as run:
        ready = prepare(settings, run.processes, sampler=sampler, rewards=rewards)
        policy = ready.roles.policy
        updates = settings.steps * settings.epochs * settings.minibatches
        stepper = run.stepper(policy, settings.learning_rate, updates)
        run.start(settings.steps)
        announce(ready, settings, run)
        if run.step == 0:
            with before_training():  # a reward that cannot be called is found before any sampling
                run.record_samples(ready.answers(0, 0))
            run.pause()

        while run.running():
            with run.explained():
                trajectory, groups, scored, counts = gather(ready, settings, run)
            run.nonfinite.rows = partial(ready.describe, trajectory)
            old = forward(trajectory, ready.roles, run.processes, settings.run.tokens)
            token_rewards, metrics, scale = shape(
                trajectory,
                scored,
                old,
                settings.score,
                beta=run.state.beta,
                first=run.state.scale,
                kl_in_reward=parts.penalty == "k1",
                limit=settings.max_new_tokens,
            )
            returns = advantages.sequence_return(token_rewards, trajectory.mask)
            advantage = ADVANTAGES[parts.advantage](returns, groups)[:, None]
            weights, mask, corrected = importance_weights(trajectory, old, settings.long)

            moved = improve(
                trajectory, old, advantage * weights, mask, parts, stepper, settings, run
            )

            sampled = int(counts["groups/sampled"])
            beta = settings.kl.next_beta(
                run.state.beta, metrics.get("objective/kl"), len(trajectory)
            )
            # the cursor moves at the end: a step that fails half-way begins again as it was
            drawn = run.state.drawn + sampled
            run.state = replace(run.state, beta=beta, drawn=drawn, scale=scale)
            run.end_step(
                metrics | counts | corrected | scored.metrics() | moved,
                rows=sampled * settings.group_size,
                tokens=int(trajectory.lengths.sum()) * settings.epochs,
                show=("reward", "objective/kl", "groups/no_spread"),
            )
            run.checkpoint_if_due()

        with run.explained():
            run.record_samples(ready.answers(run.step, run.state.drawn))
        run.model = policy
        probe = torch.tensor([ready.prompts[0]])
        return run.finish(save=lambda path: save(policy, ready.renderer.tokenizer, path, probe))


def prepare(
    settings: GRPO,
    processes: Processes,
    *,
    sampler: Sampler | None = None,
    rewards: Scorer | None = None,
) -> PreparedOnline:
    """Prompts, rewards, roles and sampler.

    Raises:
        InputError: a row, a reward or a model cannot be used.
    """
    reads = settings.kl.reads_reference(settings.parts.beta)
    return prepare_online(settings, processes, reference=reads, sampler=sampler, rewards=rewards)


def announce(ready: PreparedOnline, settings: GRPO, run: Run[GRPOState]) -> None:
    """Say what is run, with the parts that are not the variant's own."""
    if not run.main:
        return
    parts, usual = settings.parts._asdict(), VARIANTS[settings.variant]._asdict()
    own = "".join(f", {k} {v}" for k, v in parts.items() if v != usual[k])
    plan = f"{settings.steps} iterations of {settings.batch_size} responses"
    note = ready.note and f"; {ready.note}"
    say(f"grpo ({settings.variant}{own}): {len(ready.rows):,} prompts, {plan}{note}")


def gather(
    ready: PreparedOnline, settings: GRPO, run: Run[GRPOState]
) -> tuple[Trajectory, Tensor, Scored, dict[str, float]]:
    """Groups of scored responses to the next prompts.

    With `resample`, groups whose responses all have the same score are replaced by fresh prompts
    (DAPO's dynamic sampling), round after round while any is missing. Those that are left after the
    last round stay, and have advantages of 0.

    Returns:
        The trajectory, group ids [N], the scores, and counts.
    """
    size, wanted = settings.group_size, settings.batch_size // settings.group_size
    found: list[tuple[Trajectory, Scored]] = []
    good: list[int] = []
    flat: list[int] = []
    for _ in range(1 + settings.parts.resample):
        before = len(good) + len(flat)
        start = run.state.drawn + before
        drawn = stream(len(ready.rows), start, wanted - len(good), settings.seed)
        chosen = [(i, epoch * size + k) for i, epoch in drawn for k in range(size)]
        trajectory = ready.sample(chosen, run.step)
        scored = ready.score(chosen, trajectory, run.step, start)
        found.append((trajectory, scored))
        groups = torch.arange(len(drawn)).repeat_interleave(size)
        scores = torch.tensor(scored.scores, dtype=torch.float64)
        differ = advantages.nonzero_std(scores, groups)[::size].tolist()
        good += [before + g for g, yes in enumerate(differ) if yes]
        flat += [before + g for g, yes in enumerate(differ) if not yes]
        if len(good) == wanted:
            break
    kept = sorted([*good, *flat[: wanted - len(good)]])
    rows = [g * size + k for g in kept for k in range(size)]
    sampled = len(good) + len(flat)
    counts = {"groups/no_spread": len(flat) / sampled, "groups/sampled": float(sampled)}
    every = Trajectory.join([t for t, _ in found]).take(rows)
    scores_of = Scored.join([s for _, s in found]).take(rows)
    return every, torch.tensor(kept).repeat_interleave(size), scores_of, counts


def improve(
    trajectory: Trajectory,
    old: RolloutLogprobs,
    advantage: Tensor,
    mask: Tensor,
    parts: Parts,
    stepper: Stepper,
    settings: GRPO,
    run: Run[GRPOState],
) -> dict[str, float]:
    """Epochs of minibatches over one frozen batch.

    `update` numbers the optimizer steps of the whole run.
    """
    processes, device, loss_sum = run.processes, run.processes.device, LOSSES[parts.loss](parts)
    first = update = run.step * settings.epochs * settings.minibatches
    out: dict[str, float] = {}
    order = Batches.cut(len(trajectory), settings.minibatches, settings.seed)
    for rows in order.epochs(run.step * settings.epochs, settings.epochs):
        weights = torch.zeros(mask.shape, dtype=advantage.dtype)
        aggregate = AGGREGATIONS[parts.loss_aggregation]
        weights[rows] = aggregate(mask[rows], settings.max_new_tokens).to(advantage.dtype)
        plan = processes.plan([[int(trajectory.lengths[i])] for i in rows], settings.run.tokens)
        for micro in accumulate(plan, processes, stepper.module):
            numbers = [rows[i] for i in micro.rows]
            ids, chosen = trajectory.slice_rows(numbers, device)
            now = stepper.module(ids, chosen, trajectory.temperature)
            here = numbers, slice(ids.shape[1])
            logprobs, adv, weight, learned = (
                x[here].to(device) for x in (old.logprobs, advantage, weights, mask)
            )
            if settings.off_policy_mask is not None:
                learned = off_policy_mask(
                    now.logprobs, logprobs, adv, learned, threshold=settings.off_policy_mask
                )
            loss, metrics = loss_sum(now.logprobs, logprobs, adv * weight, learned)
            if parts.penalty != "k1" and old.ref_logprobs is not None:  # k1 is in the reward
                ref = old.ref_logprobs[here].to(device)
                cost = kl.penalty(now.logprobs, ref, logprobs, learned, estimator=parts.penalty)
                loss = loss + run.state.beta * (weight * cost).sum()
            stepper.backward(loss * micro.weight)
            metrics[CLIPPED[parts.loss]] = metrics.pop("clip_ratio")
            if micro.weight:
                tokens = float(learned.sum())
                run.meter.add({"policy_loss": metrics.pop("policy_loss")}, len(numbers) / len(rows))
                run.meter.add(metrics, tokens)
                if update == first:
                    run.meter.add({"ratio/first": metrics["ratio"]}, tokens)
        out |= stepper.step(update)
        update += 1
    return out
