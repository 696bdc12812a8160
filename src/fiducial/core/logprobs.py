r"""Log-probabilities of chosen tokens from hidden states, in chunks: the whole [B, T, V] of logits
is never held.

Shapes: N labeled tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import kl
from .reductions import select

CHUNK_BYTES = 32 * 2**20
"""Logits held at a time. A vocabulary that fits a whole micro-batch into this is done in one piece
and nothing is computed twice.
"""

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, H] to logits [n, V]."""


def chosen_logprobs(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    vocabulary: int,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probability of each label, :math:`\log\mathrm{softmax}(z/\tau)_y`, computed in float32
    whatever the type of the hidden states.

    Where more than one chunk is needed and gradients are on, a chunk's logits are computed again in
    the backward pass instead of being kept.

    Args:
        hidden: [N, H] states from which each label is predicted.
        labels: [N] token ids.
        head: the vocabulary projection.
        vocabulary: V, from which the size of a chunk follows.
        temperature: divides the logits; the same as in sampling.
        entropy: also return the entropy of each distribution, without gradient.

    Returns:
        logprobs [N] and entropies [N] (or None), both float32 (float64 for a float64 model), in
        nats.
    """
    n = hidden.shape[0]
    if n == 0:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=_precision(hidden))
        return empty, (empty.detach() if entropy else None)
    size = max(1, chunk_bytes // (vocabulary * 4))
    recompute = n > size and torch.is_grad_enabled()
    pieces = []
    for start in range(0, n, size):
        args = (
            hidden[start : start + size],
            labels[start : start + size],
            head,
            temperature,
            entropy,
        )
        pieces.append(
            checkpoint(_piece, *args, use_reentrant=False) if recompute else _piece(*args)
        )
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), (torch.cat(entropies) if entropy else None)


class Compared(NamedTuple):
    """Two models at the same N states, [N] each, in nats: KL(first || second) over the whole
    vocabulary, both log-probabilities of the label, and the
    entropy of the first. The KL and the first log-probability carry a gradient, the others none."""

    kl: Tensor
    logprobs: Tensor
    other_logprobs: Tensor
    entropy: Tensor


def compared(
    hidden: Tensor,
    other: Tensor,
    labels: Tensor,
    head: Head,
    other_head: Head,
    vocabulary: int,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Compared:
    """The exact KL of two models over one vocabulary, state by state, in chunks as
    :func:`chosen_logprobs`. The second model is a fixed mark.

    Args:
        hidden: [N, H] states of the model that learns. other: [N, H'] states of the other one,
            whose width may be another.
        labels: [N] token ids.
        head, other_head: their vocabulary projections, to V logits each.
        vocabulary: V, from which the size of a chunk follows.
        temperature: divides the logits of both.
    """
    n = hidden.shape[0]
    if n == 0:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=_precision(hidden))
        return Compared(empty, empty, empty.detach(), empty.detach())
    size = max(1, chunk_bytes // (vocabulary * 4 * 2))
    recompute = n > size and torch.is_grad_enabled()
    pieces = []
    for start in range(0, n, size):
        here = slice(start, start + size)
        args = (hidden[here], other[here].detach(), labels[here], head, other_head, temperature)
        pieces.append(
            checkpoint(_compared, *args, use_reentrant=False) if recompute else _compared(*args)
        )
    return Compared(*(torch.cat(p) for p in zip(*pieces, strict=True)))


def _compared(
    hidden: Tensor, other: Tensor, labels: Tensor, head: Head, other_head: Head, temperature: float
) -> Compared:
    logits = head(hidden).to(_precision(hidden)) / temperature
    with torch.no_grad():
        theirs = other_head(other).to(logits.dtype) / temperature
        entropy = _entropy(logits.log_softmax(-1))
        other_logprobs = -F.cross_entropy(theirs, labels, reduction="none")
    return Compared(
        kl.exact(logits, theirs),
        -F.cross_entropy(logits, labels, reduction="none"),
        other_logprobs,
        entropy,
    )


def _piece(
    hidden: Tensor, labels: Tensor, head: Head, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits = head(hidden).to(_precision(hidden))
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = -F.cross_entropy(logits, labels, reduction="none")
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, _entropy(logits.log_softmax(-1))


def _entropy(logp: Tensor) -> Tensor:
    """[N] entropies of distributions [N, V]; p log p of a token of probability 0 is 0."""
    return -(logp.exp() * select(logp, logp > -torch.inf)).sum(-1)


def _precision(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
