"""REINFORCE: a response is one arm of a bandit, and its return credits every token of it.

Williams 1992. A reward that comes once, at the end, needs no critic: the gradient of
J = E[score] - beta KL(pi || pi_ref) is E[(R - b) grad log pi(y)], exactly, for any baseline b that
does not depend on the response. (The lab shows it to the last digit.) A baseline changes the
variance:

- none; mean: a running mean of the returns so far.
- rloo: the mean of the other responses to the same prompt. Ahmadian et al. 2024, arXiv 2402.14740.
- remax: the score of the greedy response. Li et al. 2023, arXiv 2310.10505.
- reinforce++: mean and standard deviation over the batch's tokens. Hu 2025, arXiv 2501.03262. Its
  small bias is in the lab's table.

One iteration: sample, score, forward (log-probabilities), shape, one optimizer step. For several
steps on the same responses see grpo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import losses
from ..core import advantages, kl
from ..core.loss_aggregation import constant
from ..data.batches import stream
from ..models.save import save
from ..rewards.shaping import ScoreScale, importance_weights, normalize_scores, shape
from ..rewards.types import Scored, Scorer
from ..rollout.forward import RolloutLogprobs, forward
from ..rollout.sampling import Sampler
from ..rollout.trajectory import Trajectory
from ..run import Run
from ..train.processes import Processes, accumulate
from ..train.progress import say
from ..train.step import Stepper
from .settings.reinforce import Reinforce
from .setup import PreparedOnline, before_training, prepare_online


@dataclass(frozen=True)
class ReinforceState:
    """What REINFORCE keeps from step to step.

    beta: the KL coefficient. scale: of the first scores. mean: the running mean of the returns;
    None before the first step.
    """

    beta: float
    scale: ScoreScale | None = None
    mean: float | None = None


@dataclass(frozen=True)
class Batch:
    """What baselines are made of.

    mask: [N, T] tokens that are learned from. groups: [N] group ids. greedy: [N] score of the
    greedy response to each row's prompt. mean: of the returns of earlier steps.
    """

    mask: Tensor
    groups: Tensor
    greedy: Tensor
    mean: float


BASELINES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "none": lambda returns, batch: returns,
    "mean": lambda returns, batch: returns - batch.mean,
    "remax": lambda returns, batch: advantages.remax(returns, batch.greedy),
    "rloo": lambda returns, batch: advantages.leave_one_out(returns, batch.groups),
    "reinforce++": lambda returns, batch: advantages.whitened(returns, batch.mask),
}
"""From returns [N, T] to advantages [N, T]."""
MEMORY = 0.9
"""Share of the running mean that is kept from one iteration to the next."""


def reinforce(
    settings: Reinforce, *, sampler: Sampler | None = None, rewards: Scorer | None = None
) -> Run[ReinforceState]:
    """Train; returns the run: its path, metrics and model.

    Args:
        sampler: of the policy's responses; None samples in this process.
        rewards: scores them in place of --reward.
    """
    with Run("reinforce", settings, state=ReinforceState(settings.beta)) as run:
        ready = prepare(settings, run.processes, sampler=sampler, rewards=rewards)
        policy = ready.roles.policy
        stepper = run.stepper(policy, settings.learning_rate, settings.steps)
        _, penalty = settings.kl.resolve()
        run.start(settings.steps)
        if run.main:
            plan = f"{settings.steps} iterations of {settings.batch_size} responses"
            note = ready.note and f"; {ready.note}"
            say(f"reinforce ({settings.baseline}): {len(ready.rows):,} prompts, {plan}{note}")
        if run.step == 0:
            with before_training():  # a reward that cannot be called is found before any sampling
                run.record_samples(ready.answers(0, 0))
            run.pause()

        size = settings.group_size
        while run.running():
            count = settings.batch_size // size
            drawn = stream(len(ready.rows), run.step * count, count, settings.seed)
            chosen = [(i, epoch * size + k) for i, epoch in drawn for k in range(size)]
            groups = torch.arange(len(drawn)).repeat_interleave(size)
            with run.explained():
                trajectory = ready.sample(chosen, run.step)
                scored = ready.score(chosen, trajectory, run.step, run.step * count)
                greedy = torch.zeros(len(chosen))
                if settings.baseline == "remax":
                    greedy = greedy_scores([i for i, _ in drawn], scored, ready, settings, run)
            run.nonfinite.rows = partial(ready.describe, trajectory)
            old = forward(trajectory, ready.roles, run.processes, settings.run.tokens)
            token_rewards, metrics, scale = shape(
                trajectory,
                scored,
                old,
                settings.score,
                beta=run.state.beta,
                first=run.state.scale,
                kl_in_reward=penalty == "k1",
                limit=settings.max_new_tokens,
            )
            weights, mask, corrected = importance_weights(trajectory, old, settings.long)
            batch = Batch(
                mask if bool(mask.any()) else trajectory.mask,
                groups,
                greedy,
                run.state.mean or 0.0,
            )
            advantage = BASELINES[settings.baseline](
                credit(token_rewards, trajectory.mask, settings), batch
            )

            moved = improve(
                trajectory, old, advantage * weights, mask, penalty, stepper, settings, run
            )

            average = float(advantages.sequence_return(token_rewards, trajectory.mask).mean())
            mean = run.state.mean
            run.state = replace(
                run.state,
                beta=settings.kl.next_beta(
                    run.state.beta, metrics.get("objective/kl"), len(chosen)
                ),
                scale=scale,
                mean=average if mean is None else MEMORY * mean + (1 - MEMORY) * average,
            )
            if settings.baseline == "rloo":
                differ = advantages.nonzero_std(torch.tensor(scored.scores), groups)
                corrected["groups/no_spread"] = 1 - float(differ.float().mean())
            run.end_step(
                metrics | corrected | scored.metrics() | moved,
                rows=len(chosen),
                tokens=int(trajectory.lengths.sum()),
                show=("reward", "objective/kl"),
            )
            run.checkpoint_if_due()

        with run.explained():
            run.record_samples(ready.answers(run.step, run.step * settings.batch_size // size))
        run.model = policy
        probe = torch.tensor([ready.prompts[0]])
        return run.finish(save=lambda path: save(policy, ready.renderer.tokenizer, path, probe))


def prepare(
    settings: Reinforce,
    processes: Processes,
    *,
    sampler: Sampler | None = None,
    rewards: Scorer | None = None,
) -> PreparedOnline:
    """Prompts, rewards, roles and sampler.

    Raises:
        InputError: a row, a reward or a model cannot be used.
    """
    reads = settings.kl.reads_reference(settings.beta)
    return prepare_online(settings, processes, reference=reads, sampler=sampler, rewards=rewards)


def greedy_scores(
    rows: list[int],
    scored: Scored,
    ready: PreparedOnline,
    settings: Reinforce,
    run: Run[ReinforceState],
) -> Tensor:
    """[N] score of the greedy response to each row's prompt.

    It is on the scale of the sampled responses, with the same penalties.
    """
    chosen = [(i, 0) for i in rows]
    best = ready.sample(chosen, run.step, greedy=True)
    values, _, _ = normalize_scores(
        ready.score(chosen, best, run.step, run.step * len(rows)).floats(),
        best,
        settings.score,
        first=run.state.scale,
        limit=settings.max_new_tokens,
        batch=scored.floats(),
    )
    return values.float().repeat_interleave(settings.group_size)


def credit(rewards: Tensor, mask: Tensor, settings: Reinforce) -> Tensor:
    """[N, T] what each token is credited with, before a baseline is subtracted."""
    default = "reward_to_go" if settings.baseline == "reinforce++" else "sequence_return"
    if (settings.credit or default) == "reward_to_go":
        return advantages.reward_to_go(rewards, mask)
    return advantages.sequence_return(rewards, mask)[:, None].expand(mask.shape)


def improve(
    trajectory: Trajectory,
    old: RolloutLogprobs,
    advantage: Tensor,
    mask: Tensor,
    penalty: kl.Penalty,
    stepper: Stepper,
    settings: Reinforce,
    run: Run[ReinforceState],
) -> dict[str, float]:
    """One optimizer step.

    Tokens are summed and divided by a constant. Dividing by their number in the batch would give
    long responses another weight.
    """
    processes, device = run.processes, run.processes.device
    weights = constant(mask, settings.max_new_tokens).to(advantage.dtype)
    plan = processes.plan([[int(n)] for n in trajectory.lengths], settings.run.tokens)
    for micro in accumulate(plan, processes, stepper.module):
        ids, chosen = trajectory.slice_rows(micro.rows, device)
        now = stepper.module(ids, chosen, trajectory.temperature)
        here = micro.rows, slice(ids.shape[1])
        logprobs, adv, weight, learned = (
            x[here].to(device) for x in (old.logprobs, advantage, weights, mask)
        )
        loss, metrics = losses.reinforce_sum(now.logprobs, adv * weight, learned)
        if penalty != "k1" and old.ref_logprobs is not None:  # k1 is in the reward
            ref = old.ref_logprobs[here].to(device)
            cost = kl.penalty(now.logprobs, ref, logprobs, learned, estimator=penalty)
            loss = loss + run.state.beta * (weight * cost).sum()
        stepper.backward(loss * micro.weight)
        if micro.weight:
            run.meter.add(metrics, len(micro.rows) / len(trajectory))
    return stepper.step(run.step)
