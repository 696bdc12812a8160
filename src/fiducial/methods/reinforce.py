"""REINFORCE: a response is one arm of a bandit, and its return less a baseline is the credit of
every token of it. Williams 1992.

A reward that comes once, at the end, needs no critic: the gradient of J = E[score] - beta KL(pi ||
pi_ref) is E[(R - b) grad log pi(y)], exactly, for any baseline b that does not depend on the
response (the lab shows it to the last digit). What a baseline changes is the variance:

- none; mean: a running mean of the returns seen so far.
- rloo: the mean of the other responses to the same prompt. Ahmadian et al. 2024, arXiv 2402.14740.
- remax: the score of the greedy response. Li et al. 2023, arXiv 2310.10505.
- reinforce++: mean and deviation of the batch's tokens. Hu 2025, arXiv 2501.03262. Its small bias
  is in the lab's table.

One iteration: sample, score, look (log-probabilities), shape, one step of the optimizer. For
several steps on the same responses see grpo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import Field, model_validator
from torch import Tensor

from .. import losses
from ..core import advantages, kl
from ..core.loss_aggregation import constant
from ..data.batches import stream
from ..data.prepare import load
from ..data.render import Renderer
from ..data.rows import PromptRow
from ..errors import InputError, RunError
from ..models.load import load_policy, load_reference, load_renderer, save
from ..rewards import Responses, Reward, Scored, load_rewards
from ..rollout.answers import fitting_prompt, local_sampler, show
from ..rollout.sampler import LocalSampler
from ..rollout.shaping import (
    KLSettings,
    LongSettings,
    Looks,
    ScoreSettings,
    look,
    shape,
    trusted,
    worth,
)
from ..rollout.shared import sample_all
from ..rollout.trajectory import Trajectory
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import accumulate
from ..train.progress import say
from ..train.step import Stepper


class Reinforce(Settings):
    """REINFORCE: sample, score, and improve the policy without a critic; the baseline makes it
    RLOO, ReMax or REINFORCE++.
    """

    model: str
    """The policy to start from, a folder or a Hub name; the same weights, frozen, are the reference."""
    data: str
    """Rows with a prompt; their other columns reach the reward function. A file or a Hub name."""
    reward: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A reward model's folder, file.py:function with TRL's signature, or a verifiable reward's
    name; may be given several times.
    """
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward. Default: 1 each."""
    out: str | None = None
    """The run folder. Default: runs/reinforce-1, -2, ..."""
    baseline: Literal["none", "mean", "remax", "rloo", "reinforce++"] = "rloo"
    """What a return is compared with: nothing, a running mean, the greedy response, the group's
    others, the batch. rloo: Ahmadian et al. 2024.
    """
    credit: Literal["response", "to_go"] | None = None
    """What a token is credited with: the whole return, or what comes from it on, as process rewards
    are for. None: response; reinforce++: to_go.
    """
    steps: int = Field(100, gt=0)
    """Iterations of sampling and one optimizer step. Ahmadian et al. 2024: 600 on Anthropic HH."""
    batch_size: int = Field(64, gt=0)
    """Responses an iteration, over all processes. Ahmadian et al. 2024: 512 and 256."""
    group_size: int = Field(4, gt=0)
    """Responses to each prompt; batch_size is a multiple of it. 2 and 4: Ahmadian et al. 2024. Only
    rloo needs more than one.
    """
    learning_rate: float = Field(1e-6, gt=0)
    """Peak. 1e-6: Ahmadian et al. 2024. Ten to a thousand times that for LoRA and small models."""
    beta: float = Field(0.03, ge=0)
    """KL coefficient. 0.03: Ahmadian et al. 2024. 0: no KL penalty."""
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of a response, at most. Ahmadian et al. 2024: 53 and 128."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of every log-probability. 1: the objective as it stands."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response beside EOS."""
    seed: int = 0
    """Of the order of prompts and of the samples."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    kl: KLSettings = KLSettings()
    score: ScoreSettings = ScoreSettings()
    long: LongSettings = LongSettings()
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings(eval_every=10)

    @model_validator(mode="after")
    def _fit(self) -> Reinforce:
        if self.baseline == "rloo" and self.group_size < 2:
            raise ValueError(
                "--group-size 1 with --baseline rloo: one response alone has no others to be "
                "compared with; give at least 2"
            )
        if self.batch_size % self.group_size:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --group-size {self.group_size}: "
                "every prompt gets a whole group"
            )
        self.score.fits(self.max_new_tokens)
        self.kl.steers(self.beta)
        return self


@dataclass(frozen=True)
class Seen:
    """What baselines are made of: tokens that are learned from [N, T], group ids [N], the greedy
    score of each row's prompt [N], earlier returns' mean.
    """

    mask: Tensor
    groups: Tensor
    greedy: Tensor
    mean: float


BASELINES: dict[str, Callable[[Tensor, Seen], Tensor]] = {
    "none": lambda returns, seen: returns,
    "mean": lambda returns, seen: returns - seen.mean,
    "remax": lambda returns, seen: advantages.remax(returns, seen.greedy),
    "rloo": lambda returns, seen: advantages.leave_one_out(returns, seen.groups),
    "reinforce++": lambda returns, seen: advantages.whitened(returns, seen.mask),
}
"""Returns [N, T] to advantages [N, T]."""
MEMORY = 0.9
"""Of the running mean: what it keeps from one iteration to the next."""


def reinforce(settings: Reinforce) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "reinforce",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        processes, tokens = run.processes, settings.run.tokens
        renderer = load_renderer(settings.model, settings.rows)
        prompt_ids, rows, note = load(
            settings.data,
            settings.rows,
            (PromptRow,),
            lambda r: fitting_prompt(r, renderer, settings.max_new_tokens),
        )
        rewards = load_rewards(settings.reward, settings.reward_weights, settings.run, processes)
        rewards.check_rows(rows)
        policy = load_policy(settings.model, settings.lora, settings.run, renderer.tokenizer).to(
            processes.device
        )
        reference = load_reference(settings.model, policy, settings.lora, settings.run)
        sampler = local_sampler(
            policy,
            renderer,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=settings.stop,
        )
        stepper = Stepper(
            policy, settings.learning_rate, settings.optimizer, settings.steps, processes
        )
        _, penalty = settings.kl.resolve()
        run.start(settings.steps)
        run.state.setdefault("beta", settings.beta)
        if run.main:
            say(
                f"reinforce ({settings.baseline}): {len(rows):,} prompts, {settings.steps} "
                f"iterations of {settings.batch_size} responses" + (f"; {note}" if note else "")
            )

        def answers(seen: Sequence[PromptRow]) -> list[dict[str, Any]]:
            return show(
                policy,
                renderer,
                [(r.prompt, r.where) for r in seen],
                processes,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                stop=settings.stop,
                score=lambda t: rewards(Responses.of(seen, t, renderer)).scores,
            )

        if run.step == 0:
            try:  # a reward that cannot be called is found out before an hour of sampling
                run.record_samples(answers(rows[: settings.run.samples]))
            except RunError as error:
                raise InputError(str(error)) from error
            run.pause()

        size = settings.group_size
        while run.running():
            drawn = stream(
                len(rows),
                run.step * settings.batch_size // size,
                settings.batch_size // size,
                settings.seed,
            )
            chosen = [(i, epoch * size + k) for i, epoch in drawn for k in range(size)]
            groups = torch.arange(len(drawn)).repeat_interleave(size)
            batch = [rows[i] for i, _ in chosen]
            trajectory = sample_all(
                sampler,
                [prompt_ids[i] for i, _ in chosen],
                processes,
                seed=settings.seed,
                step=run.step,
                prompt=[i for i, _ in chosen],
                sample=[k for _, k in chosen],
            )
            try:
                scored = rewards(Responses.of(batch, trajectory, renderer))
                greedy = torch.zeros(len(batch))
                if settings.baseline == "remax":
                    greedy = most_likely(
                        [i for i, _ in drawn],
                        scored,
                        sampler,
                        prompt_ids,
                        rows,
                        rewards,
                        renderer,
                        settings,
                        run,
                    )
            except RunError as error:
                raise RunError(f"step {run.step + 1}: {error}; {run.how_to_go_on()}") from error
            looks = look(trajectory, policy, reference, processes, tokens)
            shaped, metrics = shape(
                trajectory,
                scored,
                looks,
                settings.score,
                run.state,
                priced=penalty == "k1",
                limit=settings.max_new_tokens,
            )
            trust, mask, known = trusted(trajectory, looks, settings.long)
            seen = Seen(
                mask if bool(mask.any()) else trajectory.mask,
                groups,
                greedy,
                run.state.get("mean", 0.0),
            )
            advantage = BASELINES[settings.baseline](
                returns(shaped, trajectory.mask, settings), seen
            )

            moved = improve(
                trajectory, looks, advantage * trust, mask, penalty, stepper, settings, run
            )

            average = float(advantages.sequence_return(shaped, trajectory.mask).mean())
            run.state["mean"] = (
                MEMORY * run.state["mean"] + (1 - MEMORY) * average
                if "mean" in run.state
                else average
            )
            settings.kl.adapt(run.state, metrics["objective/kl"], len(batch))
            if settings.baseline == "rloo":
                known["groups/no_spread"] = 1 - float(
                    advantages.nonzero_std(torch.tensor(scored.scores), groups).float().mean()
                )
            run.end_step(
                metrics | known | scored.metrics() | moved,
                rows=len(batch),
                tokens=int(trajectory.lengths.sum()),
                show=("reward", "objective/kl"),
            )
            run.checkpoint_if_due()

        run.record_samples(answers(rows[: settings.run.samples]))
        run.model = policy
        return run.finish(
            save=lambda path: save(policy, renderer.tokenizer, path, torch.tensor([prompt_ids[0]]))
        )


def most_likely(
    asked: list[int],
    scored: Scored,
    sampler: LocalSampler,
    prompt_ids: list[list[int]],
    rows: list[PromptRow],
    rewards: Reward,
    renderer: Renderer,
    settings: Reinforce,
    run: Run,
) -> Tensor:
    """[N] what the greedy response to each row's prompt is worth, on the scale of the sampled ones
    and with the same penalties.
    """
    best = sample_all(
        replace(sampler, temperature=0.0),
        [prompt_ids[i] for i in asked],
        run.processes,
        seed=settings.seed,
        step=run.step,
        prompt=asked,
        sample=[0] * len(asked),
    )
    scores = rewards(Responses.of([rows[i] for i in asked], best, renderer)).scores
    values, _ = worth(
        scores, best, settings.score, run.state, limit=settings.max_new_tokens, batch=scored.scores
    )
    return values.float().repeat_interleave(settings.group_size)


def returns(rewards: Tensor, mask: Tensor, settings: Reinforce) -> Tensor:
    """[N, T] what each token is credited with, before a baseline is taken from it."""
    if (
        settings.credit or ("to_go" if settings.baseline == "reinforce++" else "response")
    ) == "to_go":
        return advantages.reward_to_go(rewards, mask)
    return advantages.sequence_return(rewards, mask)[:, None].expand(mask.shape)


def improve(
    trajectory: Trajectory,
    looks: Looks,
    advantage: Tensor,
    mask: Tensor,
    penalty: kl.Penalty,
    stepper: Stepper,
    settings: Reinforce,
    run: Run,
) -> dict[str, float]:
    """One optimizer step. Tokens are summed and divided by a constant: dividing by their number in
    the batch would give long responses another weight.
    """
    processes, device = run.processes, run.processes.device
    weights = constant(mask, settings.max_new_tokens).to(advantage.dtype)
    plan = processes.plan([[int(n)] for n in trajectory.lengths], settings.run.tokens)
    for micro in accumulate(plan, processes, stepper.module):
        ids, whole = trajectory.slice_rows(micro.rows, device)
        now = stepper.module(ids, whole, trajectory.temperature)
        old, ref, adv, weight, learned = (
            x[micro.rows, : ids.shape[1]].to(device)
            for x in (looks.logprobs, looks.ref_logprobs, advantage, weights, mask)
        )
        loss, metrics = losses.reinforce_sum(now.logprobs, adv * weight, learned)
        if penalty != "k1":  # k1 is in the reward
            loss = (
                loss
                + run.state["beta"]
                * (weight * kl.penalty(now.logprobs, ref, old, learned, estimator=penalty)).sum()
            )
        stepper.backward(loss * micro.weight)
        if micro.weight:
            run.meter.add(metrics, len(micro.rows) / len(trajectory))
    return stepper.step(run.step)
