r"""What is known exactly about a policy in an enumerable world, in float64, without sampling or
training.

The objective is :math:`J(\pi) = E_{x, y\sim\pi}[r(x, y)] - \beta\,KL(\pi\|\pi_{ref})`, its optimum
:math:`\pi^* = \pi_{ref}\,e^{r/\beta}/Z(x)` (Korbak et al. 2022, arXiv 2205.11275; Rafailov et al.
2023, arXiv 2305.18290, eq. 4).

Shapes: logits [P, S, V] of a policy in every state, log-probabilities [P, Y] of whole responses, in
nats; see `fiducial.lab.worlds.world`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .world import Array, Tree, World


def log_softmax(logits: Array) -> Array:
    """The log-softmax along the last axis."""
    top = logits - logits.max(-1, keepdims=True)
    out: Array = top - np.log(np.exp(top).sum(-1, keepdims=True))
    return out


def logprobs(tree: Tree, logits: Array) -> Array:
    """[P, Y] log-probability of every response under logits [P, S, V]."""
    tokens = log_softmax(logits)[:, tree.path, tree.token]
    out: Array = np.where(tree.path >= 0, tokens, 0.0).sum(-1)
    return out


def logits_of(tree: Tree, logp: Array) -> Array:
    """[P, S, V] logits of the policy whose responses have these log-probabilities [P, Y]: the log
    of the total probability of the responses that begin with each state and token.
    """
    mass = np.full((logp.shape[0], len(tree.states), tree.vocabulary), -np.inf)
    for level in reversed(tree.levels):
        for p in range(len(logp)):
            below = np.where(
                tree.child[level] >= 0, _logsumexp(mass[p])[tree.child[level]], -np.inf
            )
            mass[p, level] = np.where(tree.leaf[level] >= 0, logp[p][tree.leaf[level]], below)
    return mass


def _logsumexp(x: Array) -> Array:
    top = x.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        out: Array = (safe + np.log(np.exp(x - safe).sum(-1, keepdims=True)))[..., 0]
    return out


def kl(logp: Array, logq: Array) -> float:
    """KL(p || q) in nats per response, the mean over prompts."""
    return float((np.exp(logp) * (logp - logq)).sum(-1).mean())


def total_variation(logp: Array, logq: Array) -> float:
    """Half the sum of absolute differences in probability, the mean over prompts: the largest error
    in the probability of any event.
    """
    return float(0.5 * np.abs(np.exp(logp) - np.exp(logq)).sum(-1).mean())


def expected(logp: Array, values: Array) -> float:
    """The expectation of values [P, Y], the mean over prompts."""
    return float((np.exp(logp) * values).sum(-1).mean())


def reference(world: World) -> Array:
    """[P, Y] log-probabilities of the reference."""
    return logprobs(world.tree, world.reference)


def objective(
    world: World, logp: Array, *, reward: Array | None = None, beta: float | None = None
) -> float:
    """J(pi) in units of reward."""
    beta = world.beta if beta is None else beta
    return expected(logp, world.reward if reward is None else reward) - beta * kl(
        logp, reference(world)
    )


def optimum(
    world: World, *, reward: Array | None = None, beta: float | None = None
) -> tuple[Array, Array]:
    """log pi* [P, Y] and log Z [P]: pi* = pi_ref exp(r / beta) / Z(x), Z(x) = sum_y pi_ref exp(r /
    beta).
    """
    beta = world.beta if beta is None else beta
    tilted = reference(world) + (world.reward if reward is None else reward) / beta
    log_z = _logsumexp(tilted)
    return tilted - log_z[:, None], log_z


@dataclass(frozen=True)
class Gap:
    """How far a policy is from the optimum."""

    objective: float
    """J(pi), in units of reward."""
    gap: float
    """J(pi*) - J(pi) = beta KL(pi, pi*), in units of reward."""
    relative: float
    """The gap as a share of J(pi*) - J(pi_ref): 1 for the reference, 0 for the optimum."""
    total_variation: float
    reward: float
    kl: float
    """KL(pi, pi_ref), in nats per response."""


def gap(world: World, logp: Array, *, reward: Array | None = None) -> Gap:
    """The distance of a policy [P, Y] from the optimum of its world."""
    reward = world.reward if reward is None else reward
    best, ref = optimum(world, reward=reward)[0], reference(world)
    j, top, start = (objective(world, x, reward=reward) for x in (logp, best, ref))
    return Gap(
        j,
        top - j,
        (top - j) / (top - start),
        total_variation(logp, best),
        expected(logp, reward),
        kl(logp, ref),
    )


# ---- the decision process ----


def visits(tree: Tree, logits: Array) -> Array:
    """[P, S] probability of visiting each state."""
    p = np.exp(log_softmax(logits))
    out = np.zeros(p.shape[:2])
    out[:, 0] = 1.0
    for level in tree.levels[:-1]:
        inner = tree.child[level] >= 0
        out[:, tree.child[level][inner]] = (out[:, level, None] * p[:, level])[:, inner]
    return out


def _backward(
    tree: Tree, reward: Array, step: Array, value_of: Callable[[slice, Array], Array]
) -> tuple[Array, Array]:
    """V [P, S] and Q [P, S, V], where Q is the step's reward plus the reward at the end or the V of
    the next state, and V = value_of(level, Q of the level).
    """
    values = np.zeros((len(reward), len(tree.states)))
    q = np.zeros((len(reward), len(tree.states), tree.vocabulary))
    for level in reversed(tree.levels):
        q[:, level] = step[:, level] + np.where(
            tree.leaf[level] >= 0, reward[:, tree.leaf[level]], values[:, tree.child[level]]
        )
        values[:, level] = value_of(level, q[:, level])
    return values, q


def values(world: World, logits: Array, *, beta: float | None = None) -> tuple[Array, Array]:
    """V^pi [P, S] and Q^pi [P, S, V] of a policy: the expected reward, less beta log(pi / pi_ref)
    of the tokens still to be chosen.

    Q includes the penalty of its own token, so that V is the mean of Q and the gradient of J is
    visits * pi * (Q - V).
    """
    beta = world.beta if beta is None else beta
    lp = log_softmax(logits)
    price = -beta * (lp - log_softmax(world.reference))
    return _backward(
        world.tree, world.reward, price, lambda level, q: (np.exp(lp[:, level]) * q).sum(-1)
    )


def soft_values(world: World, *, beta: float | None = None) -> tuple[Array, Array]:
    """V* [P, S] and Q* [P, S, V] of the soft recursion: Q is the reward at the end, or V of the
    next state; V(s) = beta log sum_a pi_ref(a|s) exp(Q(s, a) / beta).

    V*(s_0) = beta log Z, and beta log(pi* / pi_ref) = Q* - V* in every state: the advantage is the
    log-ratio (Rafailov et al. 2024, arXiv 2404.12358).
    """
    beta = world.beta if beta is None else beta
    ref = log_softmax(world.reference)
    none = np.zeros_like(world.reference)
    return _backward(
        world.tree, world.reward, none, lambda level, q: beta * _logsumexp(ref[:, level] + q / beta)
    )


def gradient(world: World, logits: Array, *, beta: float | None = None) -> Array:
    """The exact gradient of J with respect to logits [P, S, V]."""
    v, q = values(world, logits, beta=beta)
    weight = visits(world.tree, logits)[..., None] * np.exp(log_softmax(logits))
    return weight * (q - v[..., None]) / len(world.prompts)


def kl_by_position(tree: Tree, logits: Array, other: Array) -> Array:
    """[T] the KL of a response by position: E over the states at position t of KL(pi(.|s_t) ||
    q(.|s_t)). The sum is the KL of the response.
    """
    lp, lq = log_softmax(logits), log_softmax(other)
    each = visits(tree, logits) * (np.exp(lp) * (lp - lq)).sum(-1)
    return np.array([each[:, level].sum(-1).mean() for level in tree.levels])


# ---- the frontier, best-of-n ----


@dataclass(frozen=True)
class Frontier:
    """The best reward for every KL: the optima of several beta. Each array has one entry per beta.
    `other` is a second reward (gold) of the same policies.
    """

    beta: Array
    kl: Array
    reward: Array
    variance: Array
    """The variance of the reward under pi*_beta, which is dE[r] / d(1/beta)."""
    other: Array | None = None


def frontier(
    world: World, betas: Array, *, reward: Array | None = None, other: Array | None = None
) -> Frontier:
    """The frontier at these beta. No policy has more reward at the same KL, and dE[r] / dKL = beta
    along the curve.
    """
    reward = world.reward if reward is None else reward
    ref = reference(world)
    rows = []
    for beta in betas:
        best, _ = optimum(world, reward=reward, beta=float(beta))
        p = np.exp(best)
        mean = (p * reward).sum(-1)
        variance = (p * (reward - mean[:, None]) ** 2).sum(-1).mean()
        rows.append(
            (
                kl(best, ref),
                mean.mean(),
                variance,
                expected(best, other) if other is not None else np.nan,
            )
        )
    k, r, v, o = np.array(rows).T
    return Frontier(betas, k, r, v, o if other is not None else None)


def best_of_n(logp: Array, score: Array, n: int) -> Array:
    """[P, Y] log-probabilities of the best of n draws by `score` [P, Y]. Of equal scores, the first
    one drawn is kept.

    The probability of a score is F^n - F_below^n = F^n (1 - (1 - f / F)^n), where F is the
    probability of this score or a lower one, and f that of this score. Responses with the same
    score keep their proportions.
    """
    out = np.empty_like(logp)
    for p in range(len(logp)):
        _, which = np.unique(score[p], return_inverse=True)
        own = np.full(which.max() + 1, -np.inf)
        np.logaddexp.at(own, which, logp[p])
        above = np.append(np.logaddexp.accumulate(own[:0:-1])[::-1], -np.inf)
        with np.errstate(divide="ignore"):
            upto = np.where(
                above < np.log(0.5), np.log1p(-np.exp(above)), np.logaddexp.accumulate(own)
            )
            share = np.minimum(np.exp(own - upto), 1.0)
            times = np.where(
                share > 0, -np.expm1(n * np.log1p(-share)) / np.where(share > 0, share, 1.0), n
            )
        out[p] = logp[p] + ((n - 1) * upto + np.log(times))[which]
    return out


def best_of_n_bound(n: int | Array) -> Array:
    """log n - (n - 1) / n: an upper bound on the KL of best-of-n, reached only if no single score
    has a positive probability (Beirami et al. 2024, arXiv 2401.01879).
    """
    n = np.asarray(n, dtype=float)
    return np.log(n) - (n - 1) / n


# ---- preferences ----


def pair_weights(world: World) -> Array:
    """[P, Y, Y] equal weights for all pairs of different responses; they sum to 1 over unordered
    pairs and prompts.
    """
    y = len(world.responses)
    return np.broadcast_to(
        (1 - np.eye(y)) / (y * (y - 1) / 2) / len(world.prompts), (len(world.prompts), y, y)
    )


def dpo_loss(
    world: World,
    logp: Array,
    preference: Array,
    weights: Array | None = None,
    *,
    beta: float | None = None,
) -> float:
    """DPO's population loss: -E log sigmoid(beta h) over all pairs.

    Args:
        preference: [P, Y, Y] probability that the response of the second axis is preferred to that
            of the third.
        weights: [P, Y, Y] how often each pair is compared, symmetric; default: `pair_weights`.
    """
    beta = world.beta if beta is None else beta
    weights = pair_weights(world) if weights is None else weights
    implicit = beta * (logp - reference(world))
    margin = implicit[:, :, None] - implicit[:, None, :]
    each = np.where(weights > 0, preference * np.logaddexp(0.0, -margin), 0.0)
    return float((weights * each).sum())


def label_entropy(preference: Array, weights: Array) -> float:
    """The entropy of the labels, in nats per pair: the least loss that any scores can reach."""
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(preference > 0, -preference * np.log(preference), 0.0)
    return float((weights * each).sum())


def bayes_accuracy(preference: Array, weights: Array) -> float:
    """The highest expected accuracy on these labels: the mean of max(p, 1 - p) over the pairs."""
    upper = np.triu(np.ones(preference.shape[-2:]), 1)
    total = (weights * upper).sum()
    return float((weights * upper * np.maximum(preference, 1 - preference)).sum() / total)
