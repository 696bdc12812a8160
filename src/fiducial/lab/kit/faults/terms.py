"""The parts that losses are made of, for every response of a population at once: masks, returns, KL
penalties and baselines, right ones and wrong ones.

Shapes: P prompts, S states of a prompt, V tokens, Y responses, T tokens of a response; see
`fiducial.lab.kit.population`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...worlds import exact
from ...worlds.world import EOS, Array
from ..population import Population, likelihoods, outside


@dataclass(frozen=True, eq=False)
class Terms:
    """Quantities of every response of a population: [P, Y, T] unless another shape is given, 0
    after the end.
    """

    population: Population

    @functools.cached_property
    def mask(self) -> Array:
        """1 at tokens."""
        path = self.population.tree.path
        shape = (len(self.population.world.prompts), *path.shape)
        return np.broadcast_to(path >= 0, shape).astype(np.float64)

    @functools.cached_property
    def probability(self) -> Array:
        """[P, Y] probability of the response in the data; sums to 1 over prompts and responses."""
        return likelihoods(self.population) / len(self.population.world.prompts)

    def at_tokens(self, table: Array) -> Array:
        """The entries of a table [P, S, V] at the tokens, or of a table [P, S] at their states."""
        tree = self.population.tree
        found = table[:, tree.path, tree.token] if table.ndim == 3 else table[:, tree.path]
        return np.where(self.mask > 0, found, 0.0)

    @functools.cached_property
    def logp(self) -> Array:
        """log pi of each token."""
        return self.at_tokens(self.population.policy)

    @functools.cached_property
    def log_ratio(self) -> Array:
        """log pi / pi_ref of each token."""
        reference = exact.log_softmax(self.population.world.reference)
        return self.at_tokens(self.population.policy - reference)

    @functools.cached_property
    def lengths(self) -> Array:
        """[P, Y, 1] number of tokens."""
        return np.asarray(self.mask.sum(-1, keepdims=True))

    @functools.cached_property
    def prompt_lengths(self) -> Array:
        """[P, 1, 1] number of tokens."""
        return np.array([len(p) for p in self.population.world.prompts], dtype=float)[:, None, None]

    @functools.cached_property
    def unpadded(self) -> Array:
        """[P, Y, 1] 1 for rows without padding."""
        total = self.prompt_lengths + self.lengths
        return np.asarray(total == total.max()).astype(np.float64)

    @functools.cached_property
    def finished(self) -> Array:
        """[1, Y, 1] 1 for responses that end with EOS."""
        return self.population.tree.finished.astype(float)[None, :, None]

    @functools.cached_property
    def position(self) -> Array:
        """[T] 0, 1, ..."""
        return np.arange(self.population.tree.horizon, dtype=float)

    @functools.cached_property
    def last(self) -> Array:
        """1 at the last token of each response."""
        out: Array = self.mask * (self.position == self.lengths - 1)
        return out

    @functools.cached_property
    def reward(self) -> Array:
        """[P, Y, 1] of each response."""
        return self.population.world.reward[..., None]

    @functools.cached_property
    def old_values(self) -> Array:
        """The old value of each token's state."""
        return self.at_tokens(self.population.old_values)

    @functools.cached_property
    def after_end(self) -> Array:
        """At the last token: the entry of old_values in the column after it; 0 if the row has no
        such column.
        """
        ends, _ = outside(self.population, "old values")
        return ends[..., None] * (1 - self.unpadded) * self.last

    @functools.cached_property
    def score_functions(self) -> Array:
        """[P, Y, T, S, V] grad log pi of each token, by the raw logits of its prompt's states."""
        tree, policy = self.population.tree, np.exp(self.population.policy)
        out = np.zeros((*self.mask.shape, *policy.shape[1:]))
        for y, t in np.argwhere(tree.path >= 0):
            s, v = tree.path[y, t], tree.token[y, t]
            out[:, y, t, s] = -policy[:, s]
            out[:, y, t, s, v] += 1.0
        return out / self.population.temperature

    def gradient(self, c: Array) -> Array:
        """[P, S, V] E sum_t c_t grad log pi."""
        weights = np.broadcast_to(c, self.mask.shape) * self.mask
        return self.weighted(self.probability[..., None] * weights)

    def weighted(self, weights: Array) -> Array:
        """[P, S, V] the sum of grad log pi over tokens and responses with weights [P, Y, T]."""
        scores = self.score_functions
        prompts, states = len(scores), scores.shape[3:]
        # a product of matrices: einsum would look for the best order each time, which takes longer
        out: Array = weights.reshape(prompts, 1, -1) @ scores.reshape(
            prompts, -1, states[0] * states[1]
        )
        return out.reshape(prompts, *states)

    def value_gradient(self, c: Array, *, late: bool = False) -> Array:
        """[P, S] E sum_t c_t at each token's state, or with `late` at the state after the token."""
        tree = self.population.tree
        c = np.broadcast_to(c, self.mask.shape)
        out = np.zeros(self.population.values.shape)
        for y, t in np.argwhere(tree.path >= 0):
            if not late:
                s = tree.path[y, t]
            else:
                s = tree.path[y, t + 1] if t + 1 < tree.lengths[y] else -1
            if s >= 0:
                out[:, s] += self.probability[:, y] * c[:, y, t]
        return out


def reward_to_go(x: Array, discount: float = 1.0) -> Array:
    """sum_{u >= t} discount^(u - t) x_u along the last axis."""
    out, running = np.zeros_like(x), np.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        running = x[..., t] + discount * running
        out[..., t] = running
    return out


def next_column(x: Array) -> Array:
    """Column t + 1 in place of column t, 0 in the last."""
    return np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], -1)


DISCOUNTS = (1.0, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5, 0.0)


def token_weights(t: Terms) -> dict[str, list[Array]]:
    """How much each token counts, by mistake. "" is the right weight."""
    mean = (t.probability[..., None] * t.lengths).sum(1, keepdims=True)
    mean = mean / t.probability.sum(1)[:, None, None]
    return {
        "": [t.mask],
        "mean of response means": [t.mask / t.lengths, t.mask / (t.lengths + t.prompt_lengths)],
        "EOS masked out": [t.mask - t.last * t.finished],
        "last token left out": [t.mask - t.last],
        "first token left out": [t.mask * (t.position > 0)],
        "truncated responses left out": [t.mask * t.finished],
        "mean of group means": [t.mask / mean],
    }


def reward_placements(t: Terms) -> dict[str, Array]:
    """The reward of each token, by mistake."""
    reward = t.reward * t.last
    from_row_start = t.position == t.lengths - 1 - t.prompt_lengths
    eos_inside = np.array([EOS in p for p in t.population.world.prompts])[:, None, None]
    return {
        "": reward,
        "reward lost on padded rows": reward * t.unpadded,
        "reward position ignores the prompt": t.reward * t.mask * from_row_start,
        "reward lost at EOS": reward * (1 - t.finished),
        "reward lost on truncated responses": reward * t.finished,
        "first EOS of the row": reward * t.finished * ~eos_inside,
        "reward at every token": t.reward * t.mask,
    }


@dataclass(frozen=True)
class Penalty:
    """What a token is charged for its log-ratio. to_earlier: earlier tokens are charged too;
    otherwise `cost` is the token's coefficient as it stands.
    """

    cost: Array
    to_earlier: bool = True


def penalties(t: Terms) -> dict[str, list[Penalty]]:
    """The KL penalty, by mistake. A loss f of a log-ratio has the coefficient f', of a token's own
    log-ratio or of that of the whole response.
    """
    lr, whole = t.log_ratio, t.log_ratio.sum(-1, keepdims=True) * t.mask
    so_far, total = np.cumsum(t.logp, -1) * t.mask, t.logp.sum(-1, keepdims=True)

    def in_reward(f: Callable[[Array], Array]) -> list[Penalty]:
        return [Penalty(f(lr)), Penalty(f(whole), False)]

    return {
        "": [Penalty(lr)],
        "k2 in the reward": in_reward(lambda x: x**2 / 2),
        "k3 in the reward": in_reward(lambda x: np.expm1(-x) + x),
        "KL clipped at zero": in_reward(lambda x: np.maximum(x, 0.0)),
        "|log-ratio| in the reward": in_reward(np.abs),
        "KL divided by the length": [Penalty(lr / t.lengths)],
        "KL not credited to earlier tokens": [Penalty(lr, False)],
        "k3 as a loss": [Penalty(-np.expm1(-whole), False)],
        "per-token k3 as a loss": [Penalty(-np.expm1(-lr), False)],
        "k3 of the inverse ratio as a loss": [
            Penalty(np.expm1(lr), False),
            Penalty(np.expm1(whole), False),
        ],
        # -A(theta) sum log pi: the derivative of the second factor is right, that of the first adds
        # log pi to the cost
        "advantage not detached": [
            Penalty(reward_to_go(lr) + so_far, False),
            Penalty(whole + total, False),
        ],
    }


def _unchanged(x: Array) -> Array:
    return x


def credits(t: Terms) -> dict[str, Callable[[Array], Array]]:
    """From the rewards of tokens to what each token is credited with, by mistake."""
    return {
        "": reward_to_go,
        "return without the token's own reward": lambda x: (reward_to_go(x) - x) * t.mask,
        # the sum from the start has the same gradient: what came earlier is a baseline
        "no reward-to-go": _unchanged,
    }


def baselines(t: Terms) -> list[Array]:
    """What a right loss may subtract, and a wrong one then subtracts in its own way: a constant per
    prompt, the critic's value, and the earlier penalties.
    """
    prompts = [t.mask * (np.arange(len(t.mask)) == p)[:, None, None] for p in range(len(t.mask))]
    return [*prompts, t.old_values, (np.cumsum(t.log_ratio, -1) - t.log_ratio) * t.mask]
