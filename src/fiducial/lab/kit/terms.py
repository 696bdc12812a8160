"""What losses are made of, for every response of a population at once: masks, returns, penalties
and baselines, right ones and wrong ones.

Shapes: P prompts, S states of a prompt, V tokens, Y responses, T tokens of a response; see
`fiducial.lab.kit.population`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..worlds import exact
from ..worlds.world import EOS, Array
from .population import Population, likelihoods, outside


@dataclass(frozen=True, eq=False)
class Terms:
    """Of every response of a population, [P, Y, T] where nothing else is said, 0 behind the end."""

    population: Population

    @functools.cached_property
    def known(self) -> Array:
        """1 at tokens."""
        path = self.population.tree.path
        return np.broadcast_to(path >= 0, (len(self.population.world.prompts), *path.shape)).astype(
            float
        )

    @functools.cached_property
    def likely(self) -> Array:
        """[P, Y] probability in the data; sums to 1 over all."""
        return likelihoods(self.population) / len(self.population.world.prompts)

    def of(self, table: Array) -> Array:
        """Entries of a table [P, S, V] at the tokens, or of [P, S] in their states."""
        tree = self.population.tree
        found = table[:, tree.path, tree.token] if table.ndim == 3 else table[:, tree.path]
        return np.where(self.known > 0, found, 0.0)

    @functools.cached_property
    def logp(self) -> Array:
        """log pi of each token."""
        return self.of(self.population.policy)

    @functools.cached_property
    def log_ratio(self) -> Array:
        """log pi / pi_ref of each token."""
        return self.of(self.population.policy - exact.log_softmax(self.population.world.reference))

    @functools.cached_property
    def lengths(self) -> Array:
        """[P, Y, 1]"""
        return self.known.sum(-1, keepdims=True)

    @functools.cached_property
    def prompt_lengths(self) -> Array:
        """[P, 1, 1]"""
        return np.array([len(p) for p in self.population.world.prompts], dtype=float)[:, None, None]

    @functools.cached_property
    def widest(self) -> Array:
        """[P, Y, 1] 1 for rows without padding."""
        total = self.prompt_lengths + self.lengths
        return (total == total.max()).astype(float)

    @functools.cached_property
    def finished(self) -> Array:
        """[1, Y, 1]"""
        return self.population.tree.finished.astype(float)[None, :, None]

    @functools.cached_property
    def position(self) -> Array:
        """[T]"""
        return np.arange(self.population.tree.horizon, dtype=float)

    @functools.cached_property
    def last(self) -> Array:
        """1 at last tokens."""
        return self.known * (self.position == self.lengths - 1)

    @functools.cached_property
    def reward(self) -> Array:
        """[P, Y, 1]"""
        return self.population.world.reward[..., None]

    @functools.cached_property
    def value(self) -> Array:
        """The old value of each token's state."""
        return self.of(self.population.old_values)

    @functools.cached_property
    def behind(self) -> Array:
        """What stands in the column of old values behind the last token, at the last token; 0 where
        there is no such column.
        """
        ends, _ = outside(self.population, "old values")
        return ends[..., None] * (1 - self.widest) * self.last

    @functools.cached_property
    def scores(self) -> Array:
        """[P, Y, T, S, V] grad log pi of each token by the raw logits of its prompt's states."""
        tree, policy = self.population.tree, np.exp(self.population.policy)
        out = np.zeros((*self.known.shape, *policy.shape[1:]))
        for y, t in np.argwhere(tree.path >= 0):
            s, v = tree.path[y, t], tree.token[y, t]
            out[:, y, t, s] = -policy[:, s]
            out[:, y, t, s, v] += 1.0
        return out / self.population.temperature

    def gradient(self, c: Array) -> Array:
        """[P, S, V] E sum_t c_t grad log pi."""
        return np.einsum(
            "py,pyt,pytsv->psv",
            self.likely,
            np.broadcast_to(c, self.known.shape) * self.known,
            self.scores,
            optimize=True,
        )

    def pull(self, c: Array, *, late: bool = False) -> Array:
        """[P, S] E sum_t c_t at each token's state, or at the state behind it."""
        tree = self.population.tree
        c = np.broadcast_to(c, self.known.shape)
        out = np.zeros(self.population.values.shape)
        for y, t in np.argwhere(tree.path >= 0):
            s = (
                tree.path[y, t]
                if not late
                else (tree.path[y, t + 1] if t + 1 < tree.lengths[y] else -1)
            )
            if s >= 0:
                out[:, s] += self.likely[:, y] * c[:, y, t]
        return out


def to_go(x: Array, discount: float = 1.0) -> Array:
    """sum_{u >= t} discount^(u - t) x_u along the last axis."""
    out, running = np.zeros_like(x), np.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        running = x[..., t] + discount * running
        out[..., t] = running
    return out


def behind(x: Array) -> Array:
    """Column t + 1 in column t, 0 in the last."""
    return np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], -1)


DISCOUNTS = (1.0, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5, 0.0)


def weights(t: Terms) -> dict[str, list[Array]]:
    """How much each token counts, by mistake."""
    mean = (t.likely[..., None] * t.lengths).sum(1, keepdims=True) / t.likely.sum(1)[:, None, None]
    return {
        "": [t.known],
        "mean of means": [t.known / t.lengths, t.known / (t.lengths + t.prompt_lengths)],
        "EOS not a label": [t.known - t.last * t.finished],
        "last token left out": [t.known - t.last],
        "first token left out": [t.known * (t.position > 0)],
        "cut responses left out": [t.known * t.finished],
        "mean of groups' means": [t.known / mean],
    }


def places(t: Terms) -> dict[str, Array]:
    """Each token's reward, by mistake."""
    reward = t.reward * t.last
    inside = np.array([EOS in p for p in t.population.world.prompts])[:, None, None]
    return {
        "": reward,
        "reward lost on padded rows": reward * t.widest,
        "reward placed without the prompt": t.reward
        * t.known
        * (t.position == t.lengths - 1 - t.prompt_lengths),
        "reward lost at EOS": reward * (1 - t.finished),
        "reward lost where cut": reward * t.finished,
        "first EOS of the row": reward * t.finished * ~inside,
        "reward at every token": t.reward * t.known,
    }


@dataclass(frozen=True)
class Price:
    """What a token pays for its log-ratio; `carried`: it is credited to earlier tokens too, or else
    it is the token's coefficient as it stands.
    """

    cost: Array
    carried: bool = True


def penalties(t: Terms) -> dict[str, list[Price]]:
    """The KL penalty, by mistake. A loss f of a log-ratio has the coefficient f', of a token's own
    ratio or of the whole response's.
    """
    lr, whole = t.log_ratio, t.log_ratio.sum(-1, keepdims=True) * t.known
    so_far, all_of_it = np.cumsum(t.logp, -1) * t.known, t.logp.sum(-1, keepdims=True)
    return {
        "": [Price(lr)],
        "k2 in the reward": [Price(lr**2 / 2), Price(whole**2 / 2, False)],
        "k3 in the reward": [Price(np.expm1(-lr) + lr), Price(np.expm1(-whole) + whole, False)],
        "KL cut off at zero": [Price(np.maximum(lr, 0.0)), Price(np.maximum(whole, 0.0), False)],
        "|log-ratio| in the reward": [Price(np.abs(lr)), Price(np.abs(whole), False)],
        "KL divided by the length": [Price(lr / t.lengths)],
        "KL of each token alone": [Price(lr, False)],
        "k3 as a loss": [Price(-np.expm1(-whole), False)],
        "k3 of each token as a loss": [Price(-np.expm1(-lr), False)],
        "k3 of the inverse ratio as a loss": [
            Price(np.expm1(lr), False),
            Price(np.expm1(whole), False),
        ],
        # -A(theta) sum log pi: the derivative of the second factor is right, that of the first adds
        # log pi to the cost
        "advantage carries a gradient": [
            Price(to_go(lr) + so_far, False),
            Price(whole + all_of_it, False),
        ],
    }


def credits(t: Terms) -> dict[str, Callable[[Array], Array]]:
    """From rewards of tokens to what a token is credited with, by mistake."""
    return {
        "": to_go,
        "return without the token's own reward": lambda x: (to_go(x) - x) * t.known,
        "each token paid alone": lambda x: (
            x
        ),  # and the sum from the start: the difference was paid before, a baseline
    }


def baselines(t: Terms) -> list[Array]:
    """What a right loss may subtract, and a wrong one then subtracts in its own way: a constant for
    each prompt, the critic, what was paid before.
    """
    prompts = [t.known * (np.arange(len(t.known)) == p)[:, None, None] for p in range(len(t.known))]
    return [*prompts, t.value, (np.cumsum(t.log_ratio, -1) - t.log_ratio) * t.known]
