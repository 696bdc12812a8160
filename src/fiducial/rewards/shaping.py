"""From the score of a response to the reward of each token.

Shapes: N responses, T columns; column t is about token t. Log-probabilities are in nats, rewards in
units of the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import kl
from ..core.corrections import CORRECTIONS
from ..core.reductions import masked_mean, select
from ..rollout.completions import completion_metrics
from ..rollout.forward import RolloutLogprobs
from ..rollout.trajectory import Trajectory
from ..settings import LongSettings, ScoreSettings
from .types import Scored


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of the scores of a batch; std is 0 where they do not differ."""

    mean: float
    std: float

    @staticmethod
    def of(scores: Tensor) -> ScoreScale:
        """The scale of `scores` [N]. Scores that are equal in float32 count as equal."""
        high, low, size = scores.max(), scores.min(), scores.abs().max()
        std = float(scores.std(correction=0)) if high - low > 1e-6 * (1 + size) else 0.0
        return ScoreScale(float(scores.mean()), std)

    @property
    def factor(self) -> float:
        """What scores are multiplied by; 1 where they do not differ, because rounding errors would
        be made as large as scores.
        """
        return 1 / (self.std + 1e-8) if self.std else 1.0


def shape(
    trajectory: Trajectory,
    scored: Scored,
    logprobs: RolloutLogprobs,
    settings: ScoreSettings,
    *,
    beta: float,
    first: ScoreScale | None = None,
    kl_in_reward: bool = True,
    limit: int | None = None,
) -> tuple[Tensor, dict[str, float], ScoreScale | None]:
    """Rewards of tokens [N, T].

    Steps earn what they earn, the last token that the policy chose earns the rest of the score, and
    every token pays beta * log(pi / pi_ref).

    Args:
        first: the scale that `normalise: first` holds to; None until a batch with differing scores
            sets it.
        beta: the KL coefficient; 0 where there is no reference.
        kl_in_reward: whether the KL is paid in the reward (k1); otherwise it is a term of the loss.
        limit: the largest number of tokens that a response may have, for the length penalty.

    Returns:
        The rewards, the metrics of the batch, and the scale to hold to from now on.
    """
    each = scored.floats()
    mask, raw = trajectory.mask, torch.tensor(each, dtype=torch.float64)
    scores, scale, first = normalize_scores(each, trajectory, settings, first=first, limit=limit)
    steps = torch.zeros(mask.shape, dtype=torch.float64)
    if scored.steps is not None:
        steps = scale * select(scored.steps, mask)
    rewards = steps + trajectory.last * (scores - steps.sum(1))[:, None]
    measured = {}
    if logprobs.ref_logprobs is not None:
        kl_tokens = kl.estimate(logprobs.logprobs, logprobs.ref_logprobs, estimator="k1")
        kl_tokens = select(kl_tokens, mask)
        if kl_in_reward:
            rewards = rewards - beta * kl_tokens
        measured["objective/kl"] = float(kl_tokens.sum(1).mean())
        measured["kl"] = float(kl_tokens.sum() / mask.sum())
    gap = (select(logprobs.logprobs, mask) - trajectory.logprobs).abs().max()
    metrics = {
        "reward": float(raw.mean()),
        "reward_std": float(raw.std(correction=0)),
        "objective/score": float(scores.mean()),
        **measured,
        "beta": beta,
        "entropy": float(masked_mean(logprobs.entropy, mask)),
        **completion_metrics(trajectory),
        "sampler_gap": float(gap),
    }
    if settings.normalise != "none":
        metrics["objective/scale"] = scale
    return rewards.to(logprobs.logprobs.dtype), metrics, first


def importance_weights(
    trajectory: Trajectory, logprobs: RolloutLogprobs, settings: LongSettings
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weights [N, T] that correct for a sampler whose log-probabilities are not the trainer's.

    Returns:
        The weights, the mask [N, T] of the tokens that are learned from, and metrics.
    """
    mask = trajectory.mask
    if settings.mask_truncated:
        mask = mask & trajectory.finished[:, None]
    if settings.correction == "none":
        return mask.to(logprobs.logprobs.dtype), mask, {}
    limits = {"cap": settings.cap}
    if settings.correction == "icepop":
        limits["floor"] = settings.floor
    sampler = trajectory.logprobs.to(logprobs.logprobs.dtype)
    weights = CORRECTIONS[settings.correction](logprobs.logprobs, sampler, mask, **limits)
    each = weights[mask]
    if not len(each):
        return weights, mask, {}
    effective = float(each.sum() ** 2 / (each**2).sum() / len(each)) if (each > 0).any() else 0.0
    metrics = {
        "correction/mean": float(each.mean()),
        "correction/effective": effective,
        "correction/dropped": float((each == 0).float().mean()),
    }
    return weights, mask, metrics


def normalize_scores(
    scores: Sequence[float],
    trajectory: Trajectory,
    settings: ScoreSettings,
    *,
    first: ScoreScale | None = None,
    limit: int | None = None,
    batch: Sequence[float] | None = None,
) -> tuple[Tensor, float, ScoreScale | None]:
    """Scores [N] on the scale of the settings, minus the penalties for being cut or long.

    Args:
        first: the scale of the first batch with differing scores; None until there was one.
        limit: the largest number of tokens that a response may have, for the length penalty.
        batch: the scores that set the scale, where they are not `scores`: a greedy response is
            measured on the scale of the sampled ones.

    Returns:
        The scores, the factor by which they were multiplied, and the scale to hold to where
        `normalise` is "first": None as long as no batch had differing scores. Such a batch is
        shifted by its mean and not scaled.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    others = values if batch is None else torch.tensor(batch, dtype=torch.float64)
    scale = 1.0
    if settings.normalise != "none":
        held = first if settings.normalise == "first" else None
        found = held or ScoreScale.of(others)
        scale = found.factor
        values = (values - found.mean) * scale
        if settings.normalise == "first" and found.std:
            first = found
    if settings.clip is not None:
        values = values.clamp(-settings.clip, settings.clip)
    values = values - settings.missing_eos_penalty * (~trajectory.finished).float()
    if settings.length_buffer and limit is not None:
        penalty = overlong(trajectory.response_lengths, limit, settings.length_buffer)
        values = values - settings.length_penalty * penalty
    return values, scale, first


def overlong(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """Length penalty [N]: 0 up to limit - buffer tokens, then linear to 1 at the limit.

    DAPO (Yu et al. 2025, arXiv 2503.14476), eq. 13.
    """
    return ((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)
