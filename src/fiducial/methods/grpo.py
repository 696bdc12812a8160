"""GRPO and its kin: a response is judged against the others to the same prompt, and a clipped
surrogate makes several steps of it. arXiv 2402.03300.

Each paper after the first changes a part of it, and each part is a function of its own here:

============ =============================================================================================================================
variant      what it is
============ =============================================================================================================================
grpo         mean and deviation of the group, PPO's clip, a mean within each response, k3 as a loss. Shao et al. 2024 (DeepSeekMath)
dr_grpo      neither of the two divisions: the group's mean alone, and a constant in place of the length. Liu et al. 2025, arXiv 2503.20783
dapo         clip-higher, a mean over tokens, prompts without spread sampled again (and --score.length-buffer). Yu et al. 2025, arXiv 2503.14476
gspo         one ratio a response, the geometric mean of its tokens'. Zheng et al. 2025, arXiv 2507.18071
cispo        the ratio as a detached, capped weight, so that no token loses its gradient. MiniMax 2025, arXiv 2506.13585
============ =============================================================================================================================

A variant sets the parts; any of them may be set alone. Known to be biased, and measured in the lab:
the deviation, the mean within a response, forward_k3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from pydantic import Field, model_validator
from torch import Tensor

from .. import losses
from ..core import advantages, kl
from ..core.corrections import off_policy_mask
from ..core.loss_aggregation import constant, sequence_mean, token_mean
from ..data.batches import Batches, stream
from ..data.prepare import load
from ..data.render import Renderer
from ..data.rows import PromptRow
from ..errors import InputError, RunError
from ..models.load import load_policy, load_reference, load_renderer, save
from ..rewards import Responses, Reward, Scored, load_rewards
from ..rollout.answers import fitting_prompt, local_sampler, show
from ..rollout.sampler import LocalSampler
from ..rollout.shaping import KLSettings, LongSettings, Looks, ScoreSettings, look, shape, trusted
from ..rollout.shared import sample_all
from ..rollout.trajectory import Trajectory
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import accumulate
from ..train.progress import say
from ..train.step import Stepper


class Parts(NamedTuple):
    """What a variant is made of."""

    advantage: str
    loss: str
    mean: str
    clip: float
    clip_high: float | None
    cap: float
    beta: float
    penalty: kl.Penalty
    resample: int


VARIANTS = {
    "grpo": Parts("grpo", "ppo_clip", "response", 0.2, None, 5.0, 0.04, "forward_k3", 0),
    "dr_grpo": Parts("dr_grpo", "ppo_clip", "constant", 0.2, None, 5.0, 0.0, "k1", 0),
    "dapo": Parts("grpo", "ppo_clip", "token", 0.2, 0.28, 5.0, 0.0, "k1", 8),
    "gspo": Parts("grpo", "gspo", "response", 3e-4, 4e-4, 5.0, 0.0, "k1", 0),
    "cispo": Parts("grpo", "cispo", "token", 0.2, None, 5.0, 0.0, "k1", 0),
}
"""With the papers' values; the KL of those whose papers have none is k1 in the reward, should it be
asked for.
"""
ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": advantages.group_normalised,
    "dr_grpo": advantages.group_mean,
    "rloo": advantages.leave_one_out,
}
"""Returns [N] and group ids [N] to advantages [N]."""
LOSSES: dict[str, Callable[[Parts], Callable[..., tuple[Tensor, dict[str, Tensor]]]]] = {
    "ppo_clip": lambda parts: partial(
        losses.ppo_clip_sum, clip=parts.clip, clip_high=parts.clip_high
    ),
    "gspo": lambda parts: partial(losses.gspo_sum, clip=parts.clip, clip_high=parts.clip_high),
    "cispo": lambda parts: partial(losses.cispo_sum, cap=parts.cap),
}
CLIPPED = {"ppo_clip": "clip_ratio", "gspo": "clip_ratio/responses", "cispo": "clip_ratio/capped"}
"""What the share that is cut is called: each has its own healthy range."""
MEANS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "response": lambda mask, longest: sequence_mean(mask),
    "token": lambda mask, longest: token_mean(mask),
    "constant": constant,
}
"""Mask [N, T] and the longest that a response may be to the weight of each token [N, T]."""


class GRPO(Settings):
    """GRPO and its variants: sample groups of responses, score them, and improve the policy towards
    the better ones of each group.
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
    """The run folder. Default: runs/grpo-1, -2, ..."""
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    """Sets those of the settings from advantage to beta that are not given, as its paper has them."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] | None = None
    """The group's mean and deviation, its mean alone, or the mean of the others. None: as the
    variant; dr_grpo: dr_grpo; all others: grpo.
    """
    loss: Literal["ppo_clip", "gspo", "cispo"] | None = None
    """What the probability ratio does; with one optimizer step an iteration it is 1, and all three
    are the same. None: ppo_clip; gspo: gspo; cispo: cispo.
    """
    mean: Literal["response", "token", "constant"] | None = None
    """Equal weight to responses (None for grpo, gspo), to tokens (dapo, cispo), or max_new_tokens
    in place of the length (dr_grpo).
    """
    clip: float | None = Field(None, gt=0)
    """How far a ratio may usefully fall. None: 0.2; gspo: 0.0003. cispo has no use for it."""
    clip_high: float | None = Field(None, gt=0)
    """How far it may rise. None: as clip; dapo: 0.28; gspo: 0.0004."""
    cap: float | None = Field(None, gt=0)
    """Largest weight of a token, for cispo alone. None: 5, as ScaleRL (arXiv 2510.13786) and TRL."""
    resample: int | None = Field(None, ge=0)
    """Rounds of fresh prompts, at most, in place of those whose responses all score the same. None:
    0; dapo: 8 (ours; the paper has no limit).
    """
    stale: float | None = Field(None, gt=0)
    """Leave out a response of negative advantage once the policy makes it this many nats a token
    less likely. DeepSeek-V3.2. None: not.
    """
    steps: int = Field(100, gt=0)
    """Iterations of sampling and improving. DeepSeekMath: 144,000 questions once."""
    batch_size: int = Field(64, gt=0)
    """Responses an iteration, over all processes. DeepSeekMath: 1,024."""
    group_size: int = Field(8, gt=1)
    """Responses to each prompt; batch_size is a multiple of it. DeepSeekMath: 64; R1 and DAPO: 16."""
    minibatches: int = Field(1, gt=0)
    """Optimizer steps an epoch makes of them; beyond the first of an iteration the ratio is no
    longer 1. DeepSeekMath: 1; DAPO: 16; GSPO: 4.
    """
    epochs: int = Field(1, gt=0)
    """Passes over an iteration's responses. 1: DeepSeekMath."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak. 1e-6: DeepSeekMath, DAPO. Ten to a thousand times that for LoRA and small models."""
    beta: float | None = Field(None, ge=0)
    """KL coefficient. None: 0, no KL penalty; grpo: 0.04."""
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of a response, at most. DeepSeekMath: 1,024."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of every log-probability. 1: DAPO."""
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

    @model_validator(mode="before")
    @classmethod
    def _as_the_variant(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given is the variant's, so that config.yaml holds what was run."""
        parts = VARIANTS.get(values.get("variant", "grpo"))
        if parts is None:
            return values
        return values | {
            k: v for k, v in parts._asdict().items() if k != "penalty" and values.get(k) is None
        }

    @model_validator(mode="after")
    def _fit(self) -> GRPO:
        if self.batch_size % self.group_size:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --group-size {self.group_size}: "
                "every prompt gets a whole group"
            )
        self.score.fits(self.max_new_tokens)
        self.kl.steers(self.parts.beta)
        return self

    @property
    def parts(self) -> Parts:
        """The parts that are used."""
        _, penalty = self.kl.resolve(VARIANTS[self.variant].penalty)
        return Parts(
            **{k: getattr(self, k) for k in Parts._fields if k != "penalty"}, penalty=penalty
        )


def grpo(settings: GRPO) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "grpo",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        processes, tokens, parts = run.processes, settings.run.tokens, settings.parts
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
        updates = settings.steps * settings.epochs * settings.minibatches
        stepper = Stepper(policy, settings.learning_rate, settings.optimizer, updates, processes)
        run.start(settings.steps)
        run.state.setdefault("beta", parts.beta)
        run.state.setdefault("drawn", 0)
        if run.main:
            own = "".join(
                f", {k} {v}"
                for k, v in parts._asdict().items()
                if v != getattr(VARIANTS[settings.variant], k)
            )
            say(
                f"grpo ({settings.variant}{own}): {len(rows):,} prompts, {settings.steps} "
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

        while run.running():
            try:
                trajectory, groups, scored, counts = gather(
                    sampler, prompt_ids, rows, rewards, renderer, settings, run
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
                priced=parts.penalty == "k1",
                limit=settings.max_new_tokens,
            )
            advantage = ADVANTAGES[parts.advantage](
                advantages.sequence_return(shaped, trajectory.mask), groups
            )[:, None]
            trust, mask, known = trusted(trajectory, looks, settings.long)

            moved = improve(
                trajectory, looks, advantage * trust, mask, parts, stepper, settings, run
            )

            run.state["drawn"] += int(
                counts["groups/sampled"]
            )  # not before: a step that fails half-way is begun again as it was
            settings.kl.adapt(run.state, metrics["objective/kl"], len(trajectory))
            run.end_step(
                metrics | counts | known | scored.metrics() | moved,
                rows=int(counts["groups/sampled"]) * settings.group_size,
                tokens=int(trajectory.lengths.sum()) * settings.epochs,
                show=("reward", "objective/kl", "groups/no_spread"),
            )
            run.checkpoint_if_due()

        run.record_samples(answers(rows[: settings.run.samples]))
        run.model = policy
        return run.finish(
            save=lambda path: save(policy, renderer.tokenizer, path, torch.tensor([prompt_ids[0]]))
        )


def gather(
    sampler: LocalSampler,
    prompt_ids: list[list[int]],
    rows: list[PromptRow],
    rewards: Reward,
    renderer: Renderer,
    settings: GRPO,
    run: Run,
) -> tuple[Trajectory, Tensor, Scored, dict[str, float]]:
    """Groups of scored responses, from the prompts behind those drawn so far: trajectory, group ids
    [N], what they are worth, and counts.

    With `resample`, groups whose responses all score the same give way to fresh prompts (DAPO's
    dynamic sampling), round after round while any is wanted; those that are left at the last round
    stay, and teach nothing.
    """
    size, wanted = settings.group_size, settings.batch_size // settings.group_size
    found: list[tuple[Trajectory, Scored]] = []
    good: list[int] = []
    flat: list[int] = []
    for _ in range(1 + settings.parts.resample):
        drawn = stream(
            len(rows), run.state["drawn"] + len(good) + len(flat), wanted - len(good), settings.seed
        )
        chosen = [(i, epoch * size + k) for i, epoch in drawn for k in range(size)]
        trajectory = sample_all(
            sampler,
            [prompt_ids[i] for i, _ in chosen],
            run.processes,
            seed=settings.seed,
            step=run.step,
            prompt=[i for i, _ in chosen],
            sample=[k for _, k in chosen],
        )
        scored = rewards(Responses.of([rows[i] for i, _ in chosen], trajectory, renderer))
        before = len(good) + len(flat)
        found.append((trajectory, scored))
        groups = torch.arange(len(drawn)).repeat_interleave(size)
        has = advantages.nonzero_std(torch.tensor(scored.scores, dtype=torch.float64), groups)[
            ::size
        ].tolist()
        good += [before + g for g, yes in enumerate(has) if yes]
        flat += [before + g for g, yes in enumerate(has) if not yes]
        if len(good) == wanted:
            break
    kept = sorted([*good, *flat[: wanted - len(good)]])
    at = [g * size + k for g in kept for k in range(size)]
    counts = {
        "groups/no_spread": len(flat) / (len(good) + len(flat)),
        "groups/sampled": float(len(good) + len(flat)),
    }
    every = Trajectory.join([t for t, _ in found]).take(at)
    return (
        every,
        torch.tensor(kept).repeat_interleave(size),
        Scored.join([s for _, s in found]).take(at),
        counts,
    )


def improve(
    trajectory: Trajectory,
    looks: Looks,
    advantage: Tensor,
    mask: Tensor,
    parts: Parts,
    stepper: Stepper,
    settings: GRPO,
    run: Run,
) -> dict[str, float]:
    """Epochs of minibatches over one frozen batch; `update` numbers the optimizer steps of the
    whole run.
    """
    processes, device, loss_sum = run.processes, run.processes.device, LOSSES[parts.loss](parts)
    per_step = -(-len(trajectory) // settings.minibatches)
    first = update = run.step * settings.epochs * settings.minibatches
    out: dict[str, float] = {}
    for epoch in range(settings.epochs):
        order = Batches(len(trajectory), per_step, settings.seed)
        for rows in (
            order[(run.step * settings.epochs + epoch) * order.per_epoch + i]
            for i in range(order.per_epoch)
        ):
            weights = torch.zeros(mask.shape, dtype=advantage.dtype)
            weights[rows] = MEANS[parts.mean](mask[rows], settings.max_new_tokens).to(
                advantage.dtype
            )
            plan = processes.plan([[int(trajectory.lengths[i])] for i in rows], settings.run.tokens)
            for micro in accumulate(plan, processes, stepper.module):
                numbers = [rows[i] for i in micro.rows]
                ids, whole = trajectory.slice_rows(numbers, device)
                now = stepper.module(ids, whole, trajectory.temperature)
                old, ref, adv, weight, learned = (
                    x[numbers, : ids.shape[1]].to(device)
                    for x in (looks.logprobs, looks.ref_logprobs, advantage, weights, mask)
                )
                if settings.stale is not None:
                    learned = off_policy_mask(
                        now.logprobs, old, adv, learned, threshold=settings.stale
                    )
                loss, metrics = loss_sum(now.logprobs, old, adv * weight, learned)
                if parts.penalty != "k1":  # k1 is in the reward
                    loss = (
                        loss
                        + run.state["beta"]
                        * (
                            weight
                            * kl.penalty(now.logprobs, ref, old, learned, estimator=parts.penalty)
                        ).sum()
                    )
                stepper.backward(loss * micro.weight)
                metrics[CLIPPED[parts.loss]] = metrics.pop("clip_ratio")
                if micro.weight:
                    run.meter.add(
                        {"policy_loss": metrics.pop("policy_loss")}, len(numbers) / len(rows)
                    )
                    run.meter.add(metrics, float(learned.sum()))
                    if update == first:
                        run.meter.add({"ratio/first": metrics["ratio"]}, float(learned.sum()))
            out |= stepper.step(update)
            update += 1
    return out
