r"""Advantages from rewards and values. Column t speaks of token t: its reward, and the value of the state in which it was chosen.

The mask [B, T] marks the tokens the policy chose. Gaps (a prompt in front, padding behind, a tool's answer in between) are stepped over: the
state after a token is the one in which the policy chooses next, and after its last token there is none, so the value there is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reductions import same_shape, select


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation: Schulman et al. 2015, arXiv 1506.02438, eq. 16.

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \sum_k (\gamma\lambda)^k \delta_{t+k}, \qquad \hat R_t = A_t + V_t

    Args:
        rewards: [B, T] reward of each token.
        values: [B, T] value of the state before each token, no gradient.
        mask: [B, T] true at the policy's tokens.
        gamma: discount a token; 1 for text, where only the end counts.
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
