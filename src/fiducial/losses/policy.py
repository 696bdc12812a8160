"""Policy-gradient losses on sampled tokens.

Shapes: [B, T]; column t is about token t. Log-probabilities in nats, at the sampling temperature.

Every loss here is proportional to its advantages. A token's weight (a mean over responses, a
correction for another sampler) may therefore be multiplied into its advantage beforehand, as long
as it is not negative. That is how the training loops use the sum forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.reductions import same_shape, select

Metrics = dict[str, Tensor]


def reinforce(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    r"""The policy gradient as a loss. Williams 1992.

    It is right for one step on fresh samples alone. For further steps see :func:`ppo_clip`, whose
    gradient is the same at ratio 1.

    .. math:: L_t = -A_t \log\pi(y_t)

    Args:
        logprobs: [B, T] of the policy that sampled, with gradient.
        advantages: [B, T], no gradient.
        mask: [B, T] true at the policy's tokens.

    Returns:
        The mean over the policy's tokens. Its value means nothing; its gradient does.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = _count(mask)
    loss, metrics = reinforce_sum(logprobs, advantages, mask)
    return loss / count, {k: v / count for k, v in metrics.items()}


def reinforce_sum(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    """:func:`reinforce` summed over real tokens."""
    same_shape(logprobs=logprobs, advantages=advantages, mask=mask)
    loss = -(select(advantages, mask) * select(logprobs, mask)).sum()
    return loss, {"policy_loss": loss.detach()}


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    r"""The clipped surrogate: eq. 7 of Schulman et al. 2017, arXiv 1707.06347, as a loss.

    .. math:: L_t = -\min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon_{high}) A_t),
              \qquad \rho_t = \pi(y_t)/\pi_{old}(y_t)

    Args:
        logprobs: [B, T] of the policy, with gradient.
        old_logprobs: [B, T] of the policy that sampled, recomputed by the trainer, so that the
            ratio is 1 in the first step.
        advantages: [B, T], no gradient.
        mask: [B, T] true at the policy's tokens.
        clip: epsilon; 0.2 in the paper and in Ziegler et al. 2019.
        clip_high: epsilon above 1, where it differs from `clip`. DAPO's clip-higher (arXiv
            2503.14476, eq. 10) takes 0.28, which leaves unlikely tokens more room to grow.

    Returns:
        The mean over the policy's tokens, and the metrics ``clip_ratio`` (share of tokens whose
        gradient the clip removes), ``approx_kl`` (k3 of old against new, in nats per token),
        ``ratio`` (the mean) and ``ratio/max``.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = _count(mask)
    loss, metrics = ppo_clip_sum(
        logprobs, old_logprobs, advantages, mask, clip=clip, clip_high=clip_high
    )
    return loss / count, _over(metrics, count)


def ppo_clip_sum(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """:func:`ppo_clip` summed over real tokens, metrics too (``/max`` stays a maximum)."""
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    mask = mask.bool()
    advantages, high = select(advantages, mask), clip if clip_high is None else clip_high
    log_ratio = select(logprobs, mask) - select(old_logprobs, mask)
    ratio = log_ratio.exp()
    loss = select(
        -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + high) * advantages), mask
    ).sum()
    return loss, {"policy_loss": loss.detach()} | _ratio_metrics(
        log_ratio, _cut(ratio, advantages, clip, high), mask
    )


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 3e-4,
    clip_high: float | None = 4e-4,
) -> tuple[Tensor, Metrics]:
    r"""GSPO: one ratio for the whole response, the geometric mean of its tokens' ratios.

    Zheng et al. 2025, arXiv 2507.18071, eq. 5 to 7.

    .. math:: L_t = -\min(s A_t,\ \mathrm{clip}(s, 1-\epsilon, 1+\epsilon_{high}) A_t),
              \qquad s = \exp\Big(\frac1{|y|}\sum_t \log\rho_t\Big)

    The loss is written per token (the paper's GSPO-token, eq. 13), which has the same gradient
    where all tokens of a response have the same advantage. For a response to count once, multiply
    the weights of :func:`~fiducial.core.loss_aggregation.sequence_mean` into the advantages of the
    sum form. The true ratio of a response is the product of its tokens' ratios, not their geometric
    mean: off policy, s is a surrogate with a bias of its own.

    Args:
        logprobs, old_logprobs, advantages, mask: as for :func:`ppo_clip`.
        clip, clip_high: 3e-4 and 4e-4 in the paper, because a mean over tokens moves little.

    Returns:
        The mean over real tokens, and the metrics of :func:`ppo_clip`, where
        ``ratio`` is s.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = _count(mask)
    loss, metrics = gspo_sum(
        logprobs, old_logprobs, advantages, mask, clip=clip, clip_high=clip_high
    )
    return loss / count, _over(metrics, count)


def gspo_sum(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 3e-4,
    clip_high: float | None = 4e-4,
) -> tuple[Tensor, Metrics]:
    """:func:`gspo` summed over real tokens, metrics too."""
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    mask = mask.bool()
    advantages, high = select(advantages, mask), clip if clip_high is None else clip_high
    logprobs = select(logprobs, mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    log_s = (
        (logprobs.detach() - select(old_logprobs, mask)).sum(1, keepdim=True) / lengths
    ).expand_as(logprobs)
    ratio = (
        log_s + logprobs - logprobs.detach()
    ).exp()  # the value of s, with each token's own gradient
    loss = select(
        -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + high) * advantages), mask
    ).sum()
    return loss, {"policy_loss": loss.detach()} | _ratio_metrics(
        select(log_s, mask), _cut(ratio, advantages, clip, high), mask
    )


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, cap: float = 5.0
) -> tuple[Tensor, Metrics]:
    r"""CISPO: the ratio is a detached, capped weight, so that no token loses its gradient.

    MiniMax 2025 (M1), arXiv 2506.13585, eq. 4 and 5.

    .. math:: L_t = -\mathrm{sg}[\min(\rho_t, c)]\ A_t \log\pi(y_t)

    Without the cap it has the gradient of the unclipped surrogate. The cap reduces the weight of
    tokens that have become more than c times as likely.

    Args:
        logprobs, old_logprobs, advantages, mask: as for :func:`ppo_clip`.
        cap: c, an absolute bound of the weight, like TRL's ``epsilon_high`` for this loss (5:
            ScaleRL, arXiv 2510.13786). In veRL the bound is 1 + epsilon.

    Returns:
        The mean over real tokens, and the metrics of :func:`ppo_clip`, where
        ``clip_ratio`` is the share of capped weights.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = _count(mask)
    loss, metrics = cispo_sum(logprobs, old_logprobs, advantages, mask, cap=cap)
    return loss / count, _over(metrics, count)


def cispo_sum(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, cap: float = 5.0
) -> tuple[Tensor, Metrics]:
    """:func:`cispo` summed over real tokens, metrics too."""
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    mask = mask.bool()
    logprobs = select(logprobs, mask)
    log_ratio = logprobs.detach() - select(old_logprobs, mask)
    ratio = log_ratio.exp()
    loss = -(ratio.clamp(max=cap) * select(advantages, mask) * logprobs).sum()
    return loss, {"policy_loss": loss.detach()} | _ratio_metrics(log_ratio, ratio > cap, mask)


def _cut(ratio: Tensor, advantages: Tensor, clip: float, high: float) -> Tensor:
    """Where the clip removes the gradient."""
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - clip))


@torch.no_grad()
def _ratio_metrics(log_ratio: Tensor, cut: Tensor, mask: Tensor) -> Metrics:
    ratio = log_ratio.exp()
    return {
        "clip_ratio": (cut & mask).to(ratio.dtype).sum(),
        "approx_kl": select(log_ratio.expm1() - log_ratio, mask).sum(),
        "ratio": select(ratio, mask).sum(),
        "ratio/max": torch.where(mask, ratio, torch.zeros_like(ratio)).max(),
    }


def _count(mask: Tensor) -> Tensor:
    count = mask.bool().sum()
    if count == 0:
        raise ValueError("the mask selects nothing: a mean over no token is undefined")
    return count


def _over(metrics: Metrics, count: Tensor) -> Metrics:
    return {k: v if k.endswith("/max") else v / count for k, v in metrics.items()}
