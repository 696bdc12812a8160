"""Masked reductions. A mask selects, it never multiplies: what stands on padding cannot matter, NaN
and infinity included.

Shapes: B rows, T positions. Every mean over a batch that is split (micro-batches, processes) is a
sum here, divided once, in the loop, by the global count: a mean of means weighs a token by the
company it keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes are equal, because [B] against [B, 1] would broadcast."""
    if len({tuple(t.shape) for t in tensors.values()}) != 1:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"expected equal shapes, got {shapes}: they would broadcast in silence")


def select(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is true and 0 elsewhere, with exactly zero gradient there.

    Apply it to the inputs of a formula, not to its result: the gradient of `where(mask, f(x), 0)`
    is NaN at padding whenever `f'(x)` is.
    """
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` [B, T] over the true positions of `mask` [B, T]: a scalar."""
    same_shape(x=x, mask=mask)
    return select(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` [B, T] over the true positions of `mask` [B, T]; ValueError if there is none, for
    0/0 is no mean.
    """
    count = mask.bool().sum()
    if count == 0:
        raise ValueError("the mask selects nothing: a mean over no token is undefined")
    return masked_sum(x, mask) / count


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`x` [B, T] scaled to standard deviation 1 (and shifted to mean 0) over the true positions of
    `mask`; 0 elsewhere.

    The variance is the population one, as in Ziegler et al. 2019 (arXiv 1909.08593). Statistics are
    over the whole batch given: hand it all the rows of an optimizer step, not a micro-batch, for
    its result depends on its company. They are computed in float64, in which equal values have no
    deviation; in float32 a rounding error would pass for one.
    """
    wide = x.double()
    mean = masked_mean(wide, mask)
    var = masked_mean((select(wide, mask) - mean) ** 2, mask)
    scaled = (select(wide, mask) - mean) * torch.rsqrt(var + eps)
    return select(scaled if shift_mean else scaled + mean, mask).to(x.dtype)
