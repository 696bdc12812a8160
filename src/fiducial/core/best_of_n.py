"""Best of n: its expected value, estimated from more than n samples, and a bound of its KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reductions import same_shape


def kl_bound(n: int) -> float:
    r""":math:`\log n - \frac{n-1}{n}`, in nats: the largest possible KL(best of n, model).

    Beirami et al. 2024 (arXiv 2401.01879). It is reached where no two responses have the same
    score; equal scores and few distinct responses only lower it. It holds for any score, and for a
    mean over prompts as for each of them.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return math.log(n) - (n - 1) / n


def expected_best_of(
    scores: Tensor | Sequence[float], values: Tensor | Sequence[float], n: int
) -> float:
    r"""The unbiased estimate of the expected value of the best of n samples, from N of them: the
    mean over all subsets of n.

    .. math:: \sum_{i=n-1}^{N-1} \frac{\binom{i}{n-1}}{\binom{N}{n}}\; g_{(i)}

    with :math:`g_{(i)}` the value of the sample with the i-th lowest score, counted from 0: it is
    the best of a subset if the other n - 1 are below it. Nakano et al. 2021 (WebGPT, arXiv
    2112.09332, appendix); pass@k of Chen et al. 2021 (arXiv 2107.03374) is the case of values 0 and
    1.

    Samples of equal score are equally likely to be picked, whatever the order in which they come:
    each has the mean of their weights.

    Args:
        scores: [N] by which the best is picked.
        values: [N] what a sample is worth; the scores themselves, or a judge that the choice did
            not see.
        n: from 1, which gives the mean, to N, which gives the value of the best.

    Returns:
        In the units of the values. Samples of one prompt only: the best of n is chosen among
        answers to the same question.

    Raises:
        ValueError: shapes differ or are not [N], a number is not finite, or n is not in 1 to N.
    """
    scores, values = (
        torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (scores, values)
    )
    same_shape(scores=scores, values=values)
    if scores.ndim != 1:
        raise ValueError(f"expected one score a sample, [N], got {list(scores.shape)}")
    if not bool(torch.isfinite(scores).all() & torch.isfinite(values).all()):
        raise ValueError(
            "scores and values must be finite: a sample without a score has no place in the order"
        )
    size = len(scores)
    if not 1 <= n <= size:
        raise ValueError(f"n must be from 1 to the {size} samples that there are, not {n}")

    # from the top: C(N-1, n-1) / C(N, n) = n / N, and C(i-1, n-1) = C(i, n-1) (i - n + 1) / i; no
    # factorial is ever formed
    i = torch.arange(size - 1, 0, -1, dtype=torch.float64)
    weights = (
        n
        / size
        * torch.cat([torch.ones(1, dtype=torch.float64), (i - n + 1).clamp(min=0) / i])
        .cumprod(0)
        .flip(0)
    )

    _, place, count = torch.unique(scores, return_inverse=True, return_counts=True)
    zero = torch.zeros(len(count), dtype=torch.float64)
    mean = zero.index_add(0, place, values) / count
    weight = zero.index_add(0, torch.arange(len(count)).repeat_interleave(count), weights)
    return float(weight @ mean)
