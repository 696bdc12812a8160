"""Policy-gradient losses on sampled tokens.

Shapes: [B, T]; column t speaks of token t. Log-probabilities in nats, at the sampling temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.reductions import same_shape, select

Metrics = dict[str, Tensor]


def ppo_clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2) -> tuple[Tensor, Metrics]:
    r"""The clipped surrogate: eq. 7 of Schulman et al. 2017, arXiv 1707.06347, as a loss.

    .. math:: L_t = -\min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t), \qquad \rho_t = \pi(y_t)/\pi_{old}(y_t)

    Args:
        logprobs: [B, T] of the policy, with gradient.
        old_logprobs: [B, T] of the policy that sampled, recomputed by the trainer, so that the ratio is 1 in the first step.
        advantages: [B, T], no gradient.
        mask: [B, T] true at the policy's tokens.
        clip: epsilon; 0.2 in the paper and in Ziegler et al. 2019.

    Returns:
        The mean over real tokens, and ``clip_ratio`` (share of tokens whose gradient the clip has cut), ``approx_kl`` (k3 of old against new, in
        nats a token), ``ratio``; ``ratio/max`` is the largest.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = mask.bool().sum()
    if count == 0:
        raise ValueError("the mask selects nothing: a mean over no token is undefined")
    loss, metrics = ppo_clip_sum(logprobs, old_logprobs, advantages, mask, clip=clip)
    return loss / count, {k: v if k.endswith("/max") else v / count for k, v in metrics.items()}


def ppo_clip_sum(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2) -> tuple[Tensor, Metrics]:
    """:func:`ppo_clip` summed over real tokens, metrics too (``/max`` stays a maximum)."""
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    mask = mask.bool()
    advantages = select(advantages, mask)
    log_ratio = select(logprobs, mask) - select(old_logprobs, mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = select(-torch.minimum(ratio * advantages, clipped * advantages), mask).sum()
    with torch.no_grad():
        cut = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
        metrics = {
            "policy_loss": loss.detach(),
            "clip_ratio": (cut & mask).to(ratio.dtype).sum(),
            "approx_kl": select(log_ratio.expm1() - log_ratio, mask).sum(),
            "ratio": select(ratio, mask).sum(),
            "ratio/max": torch.where(mask, ratio, torch.zeros_like(ratio)).max(),
        }
    return loss, metrics
