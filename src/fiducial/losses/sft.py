"""The loss of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from ..core.reductions import masked_sum, same_shape

Metrics = dict[str, Tensor]


def nll(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    r"""Negative log-likelihood of the labeled tokens, :math:`-\frac1N\sum_t \log\pi(y_t)`.

    N is the number of labeled tokens in the whole batch.

    Args:
        logprobs: [B, T] log-probability of each token, in nats.
        mask: [B, T] true at labeled tokens.

    Raises:
        ValueError: shapes differ, or no token is labeled.
    """
    count = mask.bool().sum()
    if count == 0:
        raise ValueError("no token is labeled: there is nothing to learn from")
    loss, metrics = nll_sum(logprobs, mask)
    return loss / count, {k: v / count for k, v in metrics.items()}


def nll_sum(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    """:func:`nll` summed over the labeled tokens."""
    same_shape(logprobs=logprobs, mask=mask)
    loss = -masked_sum(logprobs, mask)
    return loss, {"loss": loss.detach()}
