"""The exact gradients that the expected gradients of losses are compared with, in closed form.

Each is an ascent direction: [P, S, V] by the raw logits of a population's policy, or [P, S] by a
critic's values. The tests compare them with finite differences.
"""

from __future__ import annotations

import numpy as np

from ..worlds import exact
from ..worlds.world import Array
from .population import Population


def reward_and_kl(p: Population) -> Array:
    """J = E[r] - beta KL(pi, ref), at the policy that is learned."""
    return exact.gradient(p.world, p.policy) / p.temperature


def kl(p: Population) -> Array:
    """-KL(pi, ref)."""
    no_reward = p.world.with_(reward=np.zeros_like(p.world.reward))
    return exact.gradient(no_reward, p.policy, beta=1.0) / p.temperature


def forward_kl(p: Population) -> Array:
    """-KL(ref, pi)."""
    reference = exact.log_softmax(p.world.reference)
    return _likelihood(p, reference)


def likelihood(p: Population) -> Array:
    """E log pi of the responses in the data."""
    return _likelihood(p, p.data)


def _likelihood(p: Population, data: Array) -> Array:
    """E log pi of responses with these log-probabilities of the next token [P, S, V]."""
    out: Array = exact.visits(p.tree, data)[..., None] * (np.exp(data) - np.exp(p.policy))
    return out / p.temperature / len(p.world.prompts)


def clip(p: Population, *, low: float, high: float) -> Array:
    """PPO's surrogate of the population's advantages, state by state: visits of the old policy
    times the ratio's gradient where the clip keeps it.
    """
    ratio = np.exp(p.policy - p.data)
    kept = ~(((p.advantages > 0) & (ratio > 1 + high)) | ((p.advantages < 0) & (ratio < 1 - low)))
    return _by_state(p, np.where(kept, p.advantages * np.exp(p.policy), 0.0))


def cispo(p: Population, *, cap: float) -> Array:
    """CISPO's gradient, of the population's advantages."""
    return _by_state(p, p.advantages * np.exp(p.data) * np.minimum(np.exp(p.policy - p.data), cap))


def gspo(p: Population, *, low: float, high: float) -> Array:
    """GSPO's surrogate of the rewards, response by response: s A / |y| for each of its tokens,
    where the clip keeps it.
    """
    tree, world = p.tree, p.world
    s = np.exp((exact.logprobs(tree, p.policy) - exact.logprobs(tree, p.data)) / tree.lengths)
    kept = ~(((world.reward > 0) & (s > 1 + high)) | ((world.reward < 0) & (s < 1 - low)))
    each = np.exp(exact.logprobs(tree, p.data)) * np.where(
        kept, s * world.reward / tree.lengths, 0.0
    )
    weight = np.zeros_like(p.policy)
    for y, t in np.argwhere(tree.path >= 0):
        weight[:, tree.path[y, t], tree.token[y, t]] += each[:, y]
    out: Array = weight - np.exp(p.policy) * weight.sum(-1, keepdims=True)
    return out / p.temperature / len(world.prompts)


def _by_state(p: Population, weight: Array) -> Array:
    """[P, S, V] E sum_t c grad log pi, where weight [P, S, V] is c times the probability with which
    the token was sampled.
    """
    new = np.exp(p.policy)
    out: Array = exact.visits(p.tree, p.data)[..., None] * (
        weight - new * weight.sum(-1, keepdims=True)
    )
    return out / p.temperature / len(p.world.prompts)


def values(p: Population) -> Array:
    """Minus half the squared error of the values, weighted by the visits to each state."""
    error = exact.values(p.world, p.policy)[0] - p.values
    return exact.visits(p.tree, p.data) * error / len(p.world.prompts)
