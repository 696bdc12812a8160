"""From sampled responses to the reward of each token: what the models say of them, what is done to
a score, what the KL to the reference costs.

Shapes: N responses, T columns; column t speaks of token t. Log-probabilities in nats, rewards in
units of the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core import kl
from ..core.corrections import CORRECTIONS
from ..core.reductions import masked_mean, select
from ..models.roles import Policy, Reference, Scorer
from ..rewards import Scored
from ..settings import Settings
from ..train.processes import Processes
from .trajectory import Trajectory


class KLSettings(Settings):
    """The KL penalty to the reference: where it acts, how it is estimated, and its coefficient over
    time; --beta is where that starts.
    """

    placement: kl.Placement | None = None
    """In the reward of each token, or as a term of the loss, beside advantages as they are scaled
    there. None: where the estimator is right.
    """
    estimator: kl.Penalty | None = None
    """k1 (in the reward) and k2 (of the response, in the loss) are exact; k2_tokens, weighted_k3,
    forward_k3 are losses of known bias; k3 is refused, with
    the reason. None: k1; grpo: forward_k3."""
    target: float | None = Field(None, gt=0)
    """Nats a response to hold by adapting beta. None: beta stays. Ziegler et al. 2019: 6 for style,
    none for summaries.
    """
    horizon: int = Field(10_000, gt=0)
    """Responses over which an error of 20% changes beta by a factor of about 1.2. Ziegler et al. 2019."""

    @model_validator(mode="after")
    def _right(self) -> KLSettings:
        kl.check(self.placement, self.estimator)
        return self

    def steers(self, beta: float) -> None:
        """Refuse a target that nothing can steer to: a coefficient of 0 stays 0 by whatever it is multiplied.

        Raises:
            ValueError: with what to do.
        """
        if self.target is not None and beta == 0:
            raise ValueError(
                f"--kl.target {self.target:g} with a beta of 0: the target is held by multiplying "
                "beta, so give a --beta above 0 to start from"
            )

    def resolve(self, default: kl.Penalty = "k1") -> tuple[kl.Placement, kl.Penalty]:
        """Placement and estimator; `default` is the method's own."""
        return kl.resolve(self.placement, self.estimator, default)

    def adapt(self, state: dict[str, Any], nats: float, responses: int) -> None:
        """Move state["beta"] towards the target, where there is one."""
        if self.target is not None:
            state["beta"] = kl.adapt(
                state["beta"], nats, target=self.target, episodes=responses, horizon=self.horizon
            )


class ScoreSettings(Settings):
    """What is done to a score before it becomes a reward."""

    normalise: Literal["none", "first", "batch"] = "none"
    """first: mean 0 and deviation 1 under the policy as it starts (Ziegler et al. 2019); batch:
    each batch by its deviation.
    """
    clip: float | None = Field(None, gt=0)
    """Largest absolute score, after normalisation. PPO-max (Zheng et al. 2023, arXiv 2307.04964)
    clips; None: not.
    """
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the score of a response that was cut at its limit. TRL's meaning; Huang et al.
    2024 (N+) set the score to -1 instead.
    """
    length_buffer: int = Field(0, ge=0)
    """Last tokens below the limit over which a penalty grows linearly. DAPO (arXiv 2503.14476), eq.
    13: 4,096 of 20,480. 0: none.
    """
    length_penalty: float = Field(1.0, gt=0)
    """What a response at its limit loses by the buffer. 1: DAPO."""

    def fits(self, max_new_tokens: int) -> None:
        """
        Raises:
            ValueError: the length penalty would begin before the response does.
        """
        if self.length_buffer > max_new_tokens:
            raise ValueError(
                f"--score.length-buffer {self.length_buffer} with --max-new-tokens "
                f"{max_new_tokens}: the buffer is the last tokens below the limit, "
                "so it cannot be longer than the limit itself"
            )


class LongSettings(Settings):
    """For long responses, and for a sampler that is not quite the policy that is trained. All of it
    is off at first.
    """

    mask_truncated: bool = False
    """Leave responses that were cut at the limit out of the loss. DAPO's overlong filter: their
    reward is noise, but the objective becomes another.
    """
    correction: Literal["none", "tis", "icepop", "sequence_tis", "sequence_mis"] = "none"
    """Weights for the sampler's log-probabilities not being the trainer's: of each token, cut or
    masked, or of the whole response, which is the exact one.
    """
    cap: float = Field(2.0, gt=1)
    """Largest weight: beyond it the tis are cut, the others dropped. 2: veRL; TRL: 3."""
    floor: float = Field(0.5, ge=0, lt=1)
    """Least weight, for icepop alone. 0.5: as far below 1 as the cap is above it. Ours."""


@dataclass(frozen=True)
class Looks:
    """What the models say of a Trajectory, [N, T] each, before it is learned from: nats, nats,
    nats, units of reward (0 without a critic).
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor


def look(
    trajectory: Trajectory,
    policy: Policy,
    reference: Reference,
    processes: Processes,
    tokens: int,
    *,
    critic: Scorer | None = None,
) -> Looks:
    """Log-probabilities, entropies and values of the policy as it sampled, and the reference's
    log-probabilities, without gradients.

    The policy's log-probabilities are computed again by the trainer, not taken from the sampler, so
    that the ratio of the first step is 1.

    Args:
        tokens: padded tokens of a micro-batch.
        critic: whose values are asked for; None: the policy's own head, and 0 where it has none.
    """

    def compute(rows: list[int]) -> tuple[Tensor, ...]:
        ids, mask = trajectory.slice_rows(rows, processes.device)
        mine = policy(ids, mask, trajectory.temperature, entropy=True)
        values = mine.values if critic is None else critic(ids)
        assert mine.entropy is not None
        known = torch.zeros_like(mine.logprobs) if values is None else select(values, mask)
        return mine.logprobs, reference(ids, mask, trajectory.temperature), mine.entropy, known

    return Looks(
        *processes.map_rows(
            [[int(n)] for n in trajectory.lengths], tokens, trajectory.ids.shape[1], compute
        )
    )


def shape(
    trajectory: Trajectory,
    scored: Scored,
    looks: Looks,
    settings: ScoreSettings,
    state: dict[str, Any],
    *,
    priced: bool = True,
    limit: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Rewards [N, T]: steps earn what they earn, the last token the rest of the score, and every
    token pays beta * log(pi / pi_ref).

    Args:
        state: holds beta, and for `normalise: first` the mean and deviation that were seen first.
        priced: whether the KL is paid in the reward (k1); otherwise it is a term of the loss.
        limit: tokens that a response may have, for the length penalty.

    Returns:
        the rewards, and the metrics of the batch.
    """
    mask, raw = trajectory.mask, torch.tensor(scored.scores, dtype=torch.float64)
    scores, scale = worth(scored.scores, trajectory, settings, state, limit=limit)
    steps = (
        torch.zeros(mask.shape, dtype=torch.float64)
        if scored.steps is None
        else scale * select(scored.steps, mask)
    )
    rewards = steps + trajectory.last * (scores - steps.sum(1))[:, None]
    kl_tokens = select(kl.estimate(looks.logprobs, looks.ref_logprobs, estimator="k1"), mask)
    if priced:
        rewards = rewards - state["beta"] * kl_tokens
    return rewards.to(looks.logprobs.dtype), {
        "reward": float(raw.mean()),
        "reward_std": float(raw.std(correction=0)),
        "objective/kl": float(kl_tokens.sum(1).mean()),
        "objective/score": float(scores.mean()),
        "kl": float(kl_tokens.sum() / mask.sum()),
        "beta": state["beta"],
        "entropy": float(masked_mean(looks.entropy, mask)),
        "completions/mean_length": float(trajectory.response_lengths.float().mean()),
        "completions/finished": float(trajectory.finished.float().mean()),
        "sampler_gap": float((select(looks.logprobs, mask) - trajectory.logprobs).abs().max()),
    }


def trusted(
    trajectory: Trajectory, looks: Looks, settings: LongSettings
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weights [N, T] for the sampler's log-probabilities not being the trainer's, the mask [N, T]
    of the tokens that are learned from, and metrics.
    """
    mask = trajectory.mask & (
        trajectory.finished[:, None]
        if settings.mask_truncated
        else torch.ones_like(trajectory.mask)
    )
    if settings.correction == "none":
        return mask.to(looks.logprobs.dtype), mask, {}
    limits = {"cap": settings.cap} | (
        {"floor": settings.floor} if settings.correction == "icepop" else {}
    )
    weights = CORRECTIONS[settings.correction](
        looks.logprobs, trajectory.logprobs.to(looks.logprobs.dtype), mask, **limits
    )
    each = weights[mask]
    if not len(each):
        return weights, mask, {}
    size = float(each.sum() ** 2 / (each**2).sum() / len(each)) if bool((each > 0).any()) else 0.0
    return (
        weights,
        mask,
        {
            "correction/mean": float(each.mean()),
            "correction/effective": size,
            "correction/dropped": float((each == 0).float().mean()),
        },
    )


def worth(
    scores: Sequence[float],
    trajectory: Trajectory,
    settings: ScoreSettings,
    state: dict[str, Any],
    *,
    limit: int | None = None,
    batch: Sequence[float] | None = None,
) -> tuple[Tensor, float]:
    """Scores [N] on the scale that the settings ask for, less what a response pays for being cut or
    long; and the factor of the scale.

    Args:
        limit: tokens that a response may have, for the length penalty.
        batch: the scores that set the scale, where they are not these: a greedy response is
            measured as the sampled ones are.
    """
    raw, others = (
        torch.tensor(x, dtype=torch.float64) for x in (scores, scores if batch is None else batch)
    )
    values, scale = normalised(raw, settings, state, batch=others)
    values = values - settings.missing_eos_penalty * (~trajectory.finished).float()
    if settings.length_buffer and limit is not None:
        values = values - settings.length_penalty * overlong(
            trajectory.response_lengths, limit, settings.length_buffer
        )
    return values, scale


def normalised(
    scores: Tensor, settings: ScoreSettings, state: dict[str, Any], *, batch: Tensor | None = None
) -> tuple[Tensor, float]:
    """Scores [N] on the scale that the settings ask for (by the mean and deviation of `batch`, else
    their own), and the factor by which they were
    multiplied."""
    batch, scale = scores if batch is None else batch, 1.0
    if settings.normalise == "first":
        state.setdefault("score_mean", float(batch.mean()))
        state.setdefault("score_std", float(batch.std(correction=0)))
        scale = 1 / (state["score_std"] + 1e-8)
        scores = (scores - state["score_mean"]) * scale
    elif settings.normalise == "batch":
        scale = float(1 / (batch.std(correction=0) + 1e-8))
        scores = (scores - batch.mean()) * scale
    return scores if settings.clip is None else scores.clamp(-settings.clip, settings.clip), scale


def overlong(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """[N] from 0 for responses of up to limit - buffer tokens, linearly to 1 at the limit. DAPO,
    arXiv 2503.14476, eq. 13.
    """
    return ((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)
