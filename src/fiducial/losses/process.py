"""The loss of process reward models: is the solution right so far? Shapes: B solutions, T tokens;
column t is about token t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.reductions import same_shape, select

Metrics = dict[str, Tensor]


def process_reward(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    r"""Binary cross-entropy at the ends of steps: Lightman et al. 2023 (arXiv 2305.20050), section
    2.6; Cobbe et al. 2021 (arXiv 2110.14168) at tokens.

    .. math:: L = -\frac1{|M|}\sum_{t\in M} c_t\log\sigma(s_t) + (1-c_t)\log\sigma(-s_t)

    Args:
        scores: [B, T] logits; the probability that the step that ends with token t is right is
            sigma(s_t).
        labels: [B, T] whether that step is right, true or 1.
        mask: [B, T] true where a labeled step ends. The caller decides which steps are labeled:
            Lightman et al. stop at the first wrong one.

    Returns:
        The mean over labeled step ends, and ``steps/accuracy`` (a score of 0 counts one half),
        ``steps/right`` (the share of labels that say right), ``steps/probability`` (the mean of
        sigma(s)).

    Raises:
        ValueError: shapes differ, or no step has a label.
    """
    count = mask.bool().sum()
    if count == 0:
        raise ValueError("the mask selects no step end: a mean over none is undefined")
    loss, metrics = process_reward_sum(scores, labels, mask)
    return loss / count, {k: v / count for k, v in metrics.items()}


def process_reward_sum(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    """:func:`process_reward` summed over labeled step ends."""
    same_shape(scores=scores, labels=labels, mask=mask)
    scores, right = select(scores, mask), labels.bool()
    loss = select(F.softplus(torch.where(right, -scores, scores)), mask).sum()
    with torch.no_grad():
        sure = torch.where(right, scores, -scores)
        correct = (sure > 0).to(scores.dtype) + 0.5 * (sure == 0).to(scores.dtype)
        metrics = {
            "loss": loss.detach(),
            "steps/accuracy": select(correct, mask).sum(),
            "steps/right": select(right.to(scores.dtype), mask).sum(),
            "steps/probability": select(scores.sigmoid(), mask).sum(),
        }
    return loss, metrics
