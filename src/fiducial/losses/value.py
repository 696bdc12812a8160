"""The critic's loss.

Shapes: [B, T]; column t is the value of the state in which token t was chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.reductions import same_shape, select

Metrics = dict[str, Tensor]


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Metrics]:
    r"""Squared error to the lambda-return, with the value kept near its old one.

    Ziegler et al. 2019 (arXiv 1909.08593, their code).

    .. math:: L_t = \tfrac12\max\big((V_t-\hat R_t)^2,\
              (\mathrm{clip}(V_t, V^{old}_t\pm\epsilon)-\hat R_t)^2\big)

    Args:
        values: [B, T] of the critic, with gradient.
        old_values: [B, T] when the batch was sampled.
        returns: [B, T] lambda-returns, advantage plus old value.
        mask: [B, T] true at the policy's tokens.
        clip: epsilon in units of reward; None: plain squared error.

    Returns:
        The mean over real tokens, and ``value_clip_ratio`` (share of tokens where the clipped
        branch is the larger).

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = mask.bool().sum()
    if count == 0:
        raise ValueError("the mask selects nothing: a mean over no token is undefined")
    loss, metrics = clipped_value_sum(values, old_values, returns, mask, clip=clip)
    return loss / count, {k: v / count for k, v in metrics.items()}


def clipped_value_sum(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Metrics]:
    """:func:`clipped_value` summed over real tokens, metrics too."""
    same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    mask = mask.bool()
    values, old_values, returns = (
        select(values, mask),
        select(old_values, mask),
        select(returns, mask),
    )
    plain = (values - returns) ** 2
    if clip is None:
        terms, cut = plain, torch.zeros_like(mask)
    else:
        held = old_values + (values - old_values).clamp(-clip, clip)
        clipped = (held - returns) ** 2
        terms = torch.maximum(plain, clipped)
        cut = (clipped > plain) & (
            (values - old_values).abs() > clip
        )  # the second for rounding, where nothing was held
    loss = 0.5 * terms.sum()
    return loss, {
        "value_loss": loss.detach(),
        "value_clip_ratio": (cut & mask).to(values.dtype).sum(),
    }
