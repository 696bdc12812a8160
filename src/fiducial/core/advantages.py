r"""Advantages from rewards, with a critic or against a baseline.

Column t is about token t: its reward, and the value of the state before it. The mask [B, T] marks
the tokens that the policy chose. Gaps (a prompt before, padding after, a tool's output between) are
skipped: the state after a token is the one in which the policy chooses next, and the value after
its last token is 0.

Without a critic a response is one arm of a bandit: its return, minus a baseline, is the credit of
every one of its tokens. A baseline does not change the expected gradient as long as it does not
depend on the response itself. The functions of groups take returns [N] of whole responses, or
[N, T] from each token on. `groups` [N] are ids, in any order and of any size, so that nothing
depends on the position of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import same_shape, select, whiten


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation: Schulman et al. 2015, arXiv 1506.02438, eq. 16.

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad
              A_t = \sum_k (\gamma\lambda)^k \delta_{t+k}, \qquad \hat R_t = A_t + V_t

    Args:
        rewards: [B, T] reward of each token.
        values: [B, T] value of the state before each token, no gradient.
        mask: [B, T] true at the policy's tokens.
        gamma: discount per token; 1 for text, where only the end counts.
        lam: 1 gives the Monte-Carlo return less the value, 0 the one-step TD error.

    Returns:
        advantages and lambda-returns (the critic's target), both [B, T] and 0 outside the mask.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(rewards=rewards, values=values, mask=mask)
    mask = mask.bool()
    rewards, values = select(rewards, mask), select(values, mask)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    running = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * running
        advantages[:, t] = select(advantage, here)
        next_value = torch.where(here, values[:, t], next_value)
        running = torch.where(here, advantage, running)
    return advantages, advantages + values


# ---- returns: what a token is credited with ----


def sequence_return(rewards: Tensor, mask: Tensor) -> Tensor:
    """The return [N] of each response: the sum of its rewards [N, T].

    Raises:
        ValueError: shapes differ.
    """
    same_shape(rewards=rewards, mask=mask)
    return select(rewards, mask).sum(1)


def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    r"""[N, T] the reward from each token on, :math:`\sum_{k\ge t} r_k`; 0 outside the mask. What
    came before a token was not caused by it.

    The expected gradient is that of :func:`sequence_return`. Where rewards come before the end (a
    KL penalty per token, rewards of steps) the variance differs, and is usually smaller.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(rewards=rewards, mask=mask)
    rewards = select(rewards, mask)
    return select(rewards.flip(1).cumsum(1).flip(1), mask)


# ---- baselines ----


def leave_one_out(returns: Tensor, groups: Tensor) -> Tensor:
    r"""RLOO: the mean of the *others* in the group as the baseline. Kool et al. 2019; Ahmadian et
    al. 2024, arXiv 2402.14740, eq. 8.

    .. math:: A_i = R_i - \frac1{G-1}\sum_{j\ne i} R_j = \frac{G}{G-1}(R_i - \bar R)

    The others do not depend on response i, so the expected gradient is exact.

    Args:
        returns: [N] or [N, T]. groups: [N] ids; every group needs two responses.

    Raises:
        ValueError: a group of one, which has no others.
    """
    size = _size(returns, groups)
    if bool((size < 2).any()):
        raise ValueError(
            "leave-one-out needs two responses a group: one alone has no others to be compared with"
        )
    return (returns - _mean(returns, groups)) * size / (size - 1)


def group_mean(returns: Tensor, groups: Tensor) -> Tensor:
    r"""Dr. GRPO: the group's mean as the baseline, and no division.

    Liu et al. 2025, arXiv 2503.20783.

    .. math:: A_i = R_i - \bar R

    The mean includes the response itself, so for groups of G the expected gradient is exactly
    (G - 1) / G of the true one: the direction is right.

    Args:
        returns: [N] or [N, T]. groups: [N] ids. A response alone in its group gets 0.
    """
    return returns - _mean(returns, groups)


def group_normalised(returns: Tensor, groups: Tensor, *, eps: float = 1e-4) -> Tensor:
    r"""GRPO: mean and deviation of the group. Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300,
    section 4.1.2.

    .. math:: A_i = \frac{R_i - \bar R}{\sigma + \epsilon}

    The deviation is that of a sample (division by G - 1), as in the code that people compare with.
    Dividing by it weighs prompts up whose responses hardly differ, and makes the scale of the
    rewards, and with it beta, mean something else in every group: the direction is biased (Liu et
    al. 2025).

    Args:
        returns: [N] or [N, T]. groups: [N] ids. A response alone in its group, and a group of equal
            returns, get 0.
        eps: TRL's and OpenRLHF's 1e-4.
    """
    size, centred = _size(returns, groups), group_mean(returns, groups)
    variance = _mean(centred**2, groups) * size / (size - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


def remax(returns: Tensor, greedy: Tensor) -> Tensor:
    """ReMax: the score of the greedy response to the same prompt as the baseline, which no sampled
    response has a part in. Li et al. 2023, arXiv 2310.10505.

    Args:
        returns: [N] or [N, T]. greedy: [N] score of the most likely response to each row's prompt.

    Raises:
        ValueError: not one greedy score a row.
    """
    if greedy.shape != returns.shape[:1]:
        raise ValueError(
            f"one greedy score a row: got {list(greedy.shape)} for {list(returns.shape)}"
        )
    return returns - (greedy if returns.dim() == 1 else greedy[:, None])


def whitened(returns: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE++: mean 0 and standard deviation 1 over all tokens of the batch.

    Hu 2025, arXiv 2501.03262, eq. 9. A response contributes to its own baseline and scale, little
    in a large batch.

    Args:
        returns: [N, T] from each token on. mask: [N, T] true at the policy's tokens.
    """
    return whiten(returns, mask)


def nonzero_std(returns: Tensor, groups: Tensor) -> Tensor:
    """[N] true where the responses of a row's group [N] do not all have one return [N]: groups
    without spread teach nothing.
    """
    number, sizes = _numbered(returns, groups)
    low, high = (
        torch.zeros(len(sizes), dtype=returns.dtype, device=returns.device).scatter_reduce(
            0, number, returns, reduce=r, include_self=False
        )
        for r in ("amin", "amax")
    )
    return (high - low > 1e-6 * (1 + torch.maximum(high.abs(), low.abs())))[number]


def _numbered(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups as numbers from 0 on [N], and how many rows each has."""
    if groups.shape != x.shape[:1]:
        raise ValueError(f"one group id a row: got {list(groups.shape)} for {list(x.shape)}")
    _, number, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    return number.to(x.device), sizes.to(x.device)


def _size(x: Tensor, groups: Tensor) -> Tensor:
    """How many rows are in each row's group, [N] or [N, 1] as `x` is [N] or [N, T]."""
    number, sizes = _numbered(x, groups)
    return sizes[number].to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _mean(x: Tensor, groups: Tensor) -> Tensor:
    """The mean over a row's group, for each row of `x` [N, ...]. Added up in float64: equal returns
    must differ from their mean by nothing.
    """
    number, sizes = _numbered(x, groups)
    total = torch.zeros((len(sizes), *x.shape[1:]), dtype=torch.float64, device=x.device).index_add(
        0, number, x.double()
    )
    return (total / sizes.view(-1, *[1] * (x.dim() - 1)))[number].to(x.dtype)
