"""PPO with a critic and a KL penalty to a frozen reference.

As in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155) and Ziegler et al. 2019 (arXiv 1909.08593).

Generation is a decision process: the state is the prompt with the tokens so far, the action is the
next token, the transition is deterministic, and the reward is the score of the whole response at
its last token. Each token also pays beta * log(pi / pi_ref), so that the objective is
E[score] - beta KL(pi || pi_ref).

One iteration has five steps, each a function of those before it: sample, score, forward
(log-probabilities and values), shape, improve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import losses
from ..core import advantages, kl
from ..core.reductions import whiten
from ..data.batches import Batches, pad, stream
from ..data.language import LANGUAGE_ROWS, language_rows
from ..data.prepare import joined, load
from ..data.render import Rendered
from ..models.save import save
from ..rewards.shaping import ScoreScale, shape
from ..rewards.types import Scorer
from ..rollout.forward import RolloutLogprobs, forward
from ..rollout.sampling import Sampler
from ..rollout.trajectory import Trajectory
from ..run import Run
from ..train.processes import Processes, accumulate
from ..train.progress import say
from ..train.step import Stepper
from .settings.ppo import PPO
from .setup import PreparedOnline, before_training, prepare_online


@dataclass(frozen=True)
class PPOState:
    """What PPO keeps from step to step: the KL coefficient, and the scale of the first scores."""

    beta: float
    scale: ScoreScale | None = None


def ppo(
    settings: PPO, *, sampler: Sampler | None = None, rewards: Scorer | None = None
) -> Run[PPOState]:
    """Train; returns the run: its path, metrics and model.

    Args:
        sampler: of the policy's responses; None samples in this process.
        rewards: scores them in place of --reward.
    """
    with Run("ppo", settings, state=PPOState(settings.beta)) as run:
        ready, ptx = prepare(settings, run.processes, sampler=sampler, rewards=rewards)
        _, penalty = settings.kl.resolve()
        rates = {"policy": settings.learning_rate, "critic": settings.critic.learning_rate}
        updates = settings.steps * settings.epochs * settings.minibatches
        steppers = {
            role: run.stepper(module, rates[role] or settings.learning_rate, updates)
            for role, module in ready.roles.trained().items()
        }
        run.start(settings.steps)
        if run.main:
            plan = f"{settings.steps} iterations of {settings.batch_size} responses"
            say(f"ppo: {len(ready.rows):,} prompts, {plan}" + (ready.note and f"; {ready.note}"))
        if run.step == 0:
            with before_training():  # a reward that cannot be called is found before any sampling
                run.record_samples(ready.answers(0, 0))
            run.pause()

        while run.running():
            start = run.step * settings.batch_size
            chosen = stream(len(ready.rows), start, settings.batch_size, settings.seed)
            with run.explained():
                trajectory = ready.sample(chosen, run.step)
                scored = ready.score(chosen, trajectory, run.step, start)
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
            advantage, returns = advantages.gae(
                token_rewards, old.values, trajectory.mask, gamma=settings.gamma, lam=settings.lam
            )
            weight = whiten(advantage, trajectory.mask) if settings.whiten else advantage

            moved = improve(
                trajectory, old, weight, returns, penalty, ready, ptx, steppers, settings, run
            )

            beta = settings.kl.next_beta(
                run.state.beta, metrics.get("objective/kl"), len(trajectory)
            )
            run.state = replace(run.state, beta=beta, scale=scale)
            metrics |= scored.metrics()
            metrics["explained_variance"] = explained_variance(old.values, returns, trajectory.mask)
            run.end_step(
                metrics | moved,
                rows=len(trajectory),
                tokens=int(trajectory.lengths.sum()) * moved["epochs_done"].__ceil__(),
                show=("reward", "objective/kl", "approx_kl"),
            )
            run.checkpoint_if_due()

        with run.explained():
            run.record_samples(ready.answers(run.step, run.step * settings.batch_size))
        run.model = policy = ready.roles.policy
        probe = torch.tensor([ready.prompts[0]])
        return run.finish(save=lambda path: save(policy, ready.renderer.tokenizer, path, probe))


def prepare(
    settings: PPO,
    processes: Processes,
    *,
    sampler: Sampler | None = None,
    rewards: Scorer | None = None,
) -> tuple[PreparedOnline, list[Rendered]]:
    """Prompts, rewards, roles and sampler, and the rows of PPO-ptx.

    Raises:
        InputError: a row, a reward or a model cannot be used.
    """
    ready = prepare_online(
        settings,
        processes,
        reference=settings.kl.reads_reference(settings.beta),
        critic=settings.critic.start,
        sampler=sampler,
        rewards=rewards,
    )
    if settings.ptx.data is None:
        return ready, []
    render = language_rows(ready.renderer)
    rows, kept, note = load(settings.ptx.data, settings.rows, LANGUAGE_ROWS, render)
    about = joined(note, ready.renderer.take_notes(len({r.where for r in kept})))
    note = joined(about and f"--ptx.data: {about}", ready.note)
    return replace(ready, note=note), rows


def improve(
    trajectory: Trajectory,
    old: RolloutLogprobs,
    advantage: Tensor,
    returns: Tensor,
    penalty: kl.Penalty,
    ready: PreparedOnline,
    ptx: list[Rendered],
    steppers: Mapping[str, Stepper],
    settings: PPO,
    run: Run[PPOState],
) -> dict[str, float]:
    """Epochs of minibatches over one frozen batch.

    `update` numbers the optimizer steps of the whole run.
    """
    processes = run.processes
    modules = {role: stepper.module for role, stepper in steppers.items()}
    first = update = run.step * settings.epochs * settings.minibatches
    out: dict[str, float] = {}
    order = Batches.cut(len(trajectory), settings.minibatches, settings.seed)
    for rows in order.epochs(run.step * settings.epochs, settings.epochs):
        count = int(trajectory.mask[rows].sum())
        plan = processes.plan([[int(trajectory.lengths[i])] for i in rows], settings.run.tokens)
        approx_kl = torch.zeros((), dtype=torch.float64)
        for micro in accumulate(plan, processes, *modules.values()):
            numbers = [rows[i] for i in micro.rows]
            ids, mask = trajectory.slice_rows(numbers, processes.device)
            now = ready.roles.outputs(ids, mask, trajectory.temperature, wrapped=modules)
            assert now.values is not None
            here = numbers, slice(ids.shape[1])
            logprobs, values, adv, ret = (
                x[here].to(processes.device) for x in (old.logprobs, old.values, advantage, returns)
            )
            policy_loss, policy_metrics = losses.ppo_clip_sum(
                now.logprobs, logprobs, adv, mask, clip=settings.clip
            )
            value_loss, value_metrics = losses.clipped_value_sum(
                now.values, values, ret, mask, clip=settings.critic.clip
            )
            if penalty != "k1" and old.ref_logprobs is not None:  # k1 is in the reward
                ref = old.ref_logprobs[here].to(processes.device)
                cost = kl.penalty(now.logprobs, ref, logprobs, mask, estimator=penalty)
                policy_loss = policy_loss + run.state.beta * cost.sum()
            loss = policy_loss + settings.critic.coefficient * value_loss
            steppers["policy"].backward(loss * micro.weight / count)
            if micro.weight:
                approx_kl += policy_metrics["approx_kl"].cpu()
                tokens = float(mask.sum())
                run.meter.add(policy_metrics | value_metrics, tokens)
                if update == first:
                    run.meter.add({"ratio/first": policy_metrics["ratio"]}, tokens)
        if settings.target_kl and float(processes.sum(approx_kl)) / count > settings.target_kl:
            for stepper in steppers.values():
                stepper.optimizer.zero_grad(set_to_none=True)
            return out | {"epochs_done": float(update - first) / order.per_epoch}
        if ptx:
            mix_in(ptx, update, steppers["policy"], settings, run)
        out |= steppers["policy"].step(update)
        if "critic" in steppers:
            norms = steppers["critic"].step(update)
            if "grad_norm" in norms:
                out["critic/grad_norm"] = norms["grad_norm"]
        update += 1
    return out | {"epochs_done": float(settings.epochs)}


def mix_in(
    rows: list[Rendered], update: int, stepper: Stepper, settings: PPO, run: Run[PPOState]
) -> None:
    """Add the gradient of the language-model loss of the next few rows (PPO-ptx)."""
    size = settings.ptx.batch_size
    numbers = [i for i, _ in stream(len(rows), update * size, size, settings.seed)]
    labels = sum(rows[i].num_labels for i in numbers)
    plan = run.processes.plan([[len(rows[i])] for i in numbers], settings.run.tokens)
    for micro in accumulate(plan, run.processes, stepper.module):
        batch = pad([rows[numbers[i]] for i in micro.rows]).to(run.processes.device)
        out = stepper.module(batch.ids, batch.mask)
        loss, metrics = losses.nll_sum(out.logprobs, batch.mask)
        if out.values is not None:  # several processes wait for a gradient of every weight
            loss = loss + 0.0 * out.values.sum()
        stepper.backward(settings.ptx.coefficient * loss * micro.weight / labels)
        if micro.weight:
            run.meter.add({"ptx_loss": metrics["loss"]}, float(batch.mask.sum()))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the policy's tokens.

    It is 1 for a perfect critic and 0 for a constant one.
    """
    error, target = (returns - values)[mask], returns[mask]
    variance = target.var(correction=0)
    return float(1 - error.var(correction=0) / variance) if variance > 1e-12 else 0.0
