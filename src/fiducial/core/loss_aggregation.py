"""How much each token counts in the loss of one optimizer step.

Each function maps a mask [N, T] over all rows of the step to weights [N, T] that sum to 1 (for
`constant`: to at most 1). Multiply them into a policy loss's advantages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import select


def sequence_mean(mask: Tensor) -> Tensor:
    r"""GRPO: :math:`\frac1N\sum_i\frac1{|y_i|}`, every response counts the same, so a token of a
    short one counts for more. arXiv 2402.03300, eq. 3.
    """
    mask = mask.bool()
    each = mask.sum(1, keepdim=True)
    rows = (each > 0).sum().clamp(min=1)
    return select(
        torch.ones(mask.shape, dtype=torch.float64, device=mask.device) / each.clamp(min=1) / rows,
        mask,
    )


def token_mean(mask: Tensor) -> Tensor:
    r"""DAPO: :math:`1/\sum_i|y_i|`. Every token of the step counts the same.

    Yu et al. 2025, arXiv 2503.14476, eq. 12.
    """
    return mask.double() / mask.bool().sum().clamp(min=1)


def constant(mask: Tensor, length: int) -> Tensor:
    r"""Dr. GRPO: :math:`1/(N\,L)` with the constant L, the longest that a response may be.

    It is the sum over tokens up to a constant factor. Liu et al. 2025, arXiv 2503.20783.
    """
    return mask.double() / (mask.shape[0] * length)
