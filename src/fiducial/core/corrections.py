r"""Weights for responses from a sampler whose log-probabilities differ from the trainer's.

:math:`w_t = \pi(y_t)/\mu(y_t)` is the probability of a token under the policy that sampled the
batch, as the trainer computes it, over the probability that the sampler reported. The exact
correction of a terminal reward is the ratio of the whole response, :math:`\prod_t w_t`. The ratio
of a token alone is biased, and so is any ratio that is clipped; the lab's table of estimators says
by how much.

Shapes: [N, T]; column t is about token t. Multiply the weights into the advantages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reductions import same_shape, select


def tis(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float = 2.0) -> Tensor:
    r"""Truncated importance sampling of each token: :math:`\min(w_t, C)`.

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy".
    """
    return select(_log_ratio(logprobs, sampler_logprobs, mask).exp().clamp(max=cap), mask)


def icepop(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float = 2.0,
    floor: float = 0.5,
) -> Tensor:
    r"""IcePop: :math:`w_t` where it lies between floor and cap, and 0 elsewhere.

    Ling team 2025, "Every Step Evolves", arXiv 2510.18855.
    """
    ratio = _log_ratio(logprobs, sampler_logprobs, mask).exp()
    return select(torch.where((ratio >= floor) & (ratio <= cap), ratio, 0.0), mask)


def sequence_tis(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float = 2.0
) -> Tensor:
    r"""The whole response's ratio, truncated: :math:`\min(\prod_t w_t, C)`. With an endless cap it
    is exact, and its variance grows with the length.
    """
    whole = _log_ratio(logprobs, sampler_logprobs, mask).sum(1, keepdim=True)
    return select(whole.exp().clamp(max=cap).expand(mask.shape), mask)


def sequence_mis(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, cap: float = 2.0
) -> Tensor:
    r"""The whole response's ratio where it is at most C, and 0 beyond: masked importance sampling.
    TRL's default, with a cap of 3.
    """
    whole = _log_ratio(logprobs, sampler_logprobs, mask).sum(1, keepdim=True).exp()
    return select(torch.where(whole <= cap, whole, 0.0).expand(mask.shape), mask)


CORRECTIONS: dict[str, Callable[..., Tensor]] = {
    "tis": tis,
    "icepop": icepop,
    "sequence_tis": sequence_tis,
    "sequence_mis": sequence_mis,
}


def off_policy_mask(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    r"""[N, T] the mask without responses that have a negative advantage and that the policy has
    left behind.

    .. math:: \frac1{|y|}\sum_t\log\frac{\pi_{old}(y_t)}{\pi(y_t)} > \delta

    What has already become unlikely teaches nothing by being pushed further. DeepSeek-V3.2, arXiv
    2512.02556, "off-policy sequence masking".

    Args:
        logprobs: [N, T] of the policy as it is now. old_logprobs: [N, T] as it sampled.
        advantages: [N, T]; the sign of their sum over a response decides.
        threshold: delta, nats per token.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    left = -_log_ratio(logprobs, old_logprobs, mask).sum(1) / mask.bool().sum(1).clamp(min=1)
    negative = select(advantages, mask).sum(1) < 0
    return mask.bool() & ~(negative & (left > threshold))[:, None]


def _log_ratio(logprobs: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    same_shape(logprobs=logprobs, sampler_logprobs=other, mask=mask)
    return (select(logprobs, mask) - select(other, mask)).detach()
