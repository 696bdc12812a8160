"""The gradient of a loss on one batch, and its comparison with an exact one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..worlds.world import Array
from .batch import Batch, PairBatch
from .layout import Rows

Loss = Callable[[Any], object]
"""From a Batch or PairBatch to a scalar tensor, or to a tuple whose first entry is one."""
Learned = Literal["raw", "values", "scores"]
"""The tensor of a Batch that is learned: raw logits, a critic's values, or a reward model's scores.
"""


@dataclass(frozen=True, eq=False)
class LossGradient:
    """The value and the gradient of a loss on one batch.

    table: [E, ...] the gradient by every row of the learned table: states, complete responses,
    positions inside prompts, columns after the end. sides: the batch, or its chosen and its
    rejected half. rows: the gradients of the sides [N, W, ...], row by row. node: [N, W] of each
    side, the row of the table that a position belongs to. missing: the loss does not depend on what
    is learned.
    """

    value: float
    table: Array
    sides: tuple[Batch, ...]
    rows: tuple[Array, ...]
    node: tuple[Rows, ...]
    missing: bool

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.value) and np.isfinite(self.table).all())


def scalar(returned: object) -> Tensor:
    """The loss in what a function returned.

    Raises:
        ValueError: there is no scalar tensor in it.
    """
    loss = returned[0] if isinstance(returned, tuple) and returned else returned
    if not isinstance(loss, Tensor):
        raise ValueError(
            "a loss must return a scalar tensor, or a tuple whose first entry is one, not "
            f"{type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"a loss must return a scalar tensor, not one of shape {list(loss.shape)}: take the "
            "sum or the mean"
        )
    return loss.reshape(())


def loss_gradient(loss: Loss, batch: Batch | PairBatch, learned: Learned) -> LossGradient:
    """Evaluate the loss and differentiate it by what is learned."""
    sides = (batch,) if isinstance(batch, Batch) else (batch.chosen, batch.rejected)
    leaves: list[Tensor] = [getattr(s, learned) for s in sides]
    value = scalar(loss(batch))
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    rows = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    size = max(int(s.node.max()) for s in sides) + 2
    node = [s.node for s in sides]
    if learned == "values":
        # the value in column t is of the state at position t - 1; the first column has no state
        node = [torch.cat([torch.full_like(n[:, :1], size - 1), n[:, :-1]], 1) for n in node]
    table = torch.zeros((size, *rows[0].shape[2:]), dtype=torch.float64)
    for n, g in zip(node, rows, strict=True):
        table.index_add_(0, n.reshape(-1), g.double().reshape(-1, *g.shape[2:]))
    return LossGradient(
        float(value.detach()),
        table.numpy(),
        sides,
        tuple(g.double().numpy() for g in rows),
        tuple(n.numpy() for n in node),
        all(g is None for g in found),
    )


@dataclass(frozen=True)
class Measured:
    """A direction compared with the exact one; see `Verdict`."""

    cosine: float
    relative_bias: float
    scale: float


def measure(found: Array, target: Array) -> Measured:
    """Compare two gradients of the same shape."""
    g, t = found.ravel(), target.ravel()
    gg, gt, tt = float(g @ g), float(g @ t), float(t @ t)
    if gg <= 1e-24 * tt:
        return Measured(0.0, 1.0, 0.0)
    best = max(gt / gg, 0.0)
    return Measured(
        gt / math.sqrt(gg * tt), float(np.linalg.norm(best * g - t)) / math.sqrt(tt), gt / tt
    )
