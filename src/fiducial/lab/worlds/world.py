"""A world small enough to enumerate: every response to every prompt, its probability, its reward.

Generation is a decision process. The state is the prompt with the tokens so far, s_t = (x, y_<t);
the action is the next token y_t; the transition is deterministic. An episode is a response, which
ends with EOS (token 0) or is truncated at the horizon. Its reward comes once, at the end. All
arrays are float64.

Shapes: P prompts, S states of a prompt (prefixes after which a token is chosen), V tokens, Y
responses, T horizon.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tokens = tuple[int, ...]

EOS = 0
LETTERS = ".abcdefghijklmnopqrstuvwxyz"
"""Each token as text, by its number. A full stop ends a response."""


@dataclass(frozen=True)
class Tree:
    """The responses to a prompt and the states on the way, the same for every prompt.

    responses: Y token tuples, including the final EOS.
    states: S prefixes, ordered by length, then by their tokens.
    path, token: [Y, T] the state in which each token of a response is chosen, and that token; -1
    after the end.
    child, leaf: [S, V] the state that a token leads to, or the response that it completes. One of
    the two is -1.
    lengths: [Y] number of tokens. finished: [Y] false if the horizon truncated the response.
    """

    vocabulary: int
    horizon: int
    responses: tuple[Tokens, ...] = field(repr=False)
    states: tuple[Tokens, ...] = field(repr=False)
    path: NDArray[np.int64] = field(repr=False)
    token: NDArray[np.int64] = field(repr=False)
    child: NDArray[np.int64] = field(repr=False)
    leaf: NDArray[np.int64] = field(repr=False)
    lengths: NDArray[np.int64] = field(repr=False)
    finished: NDArray[np.bool_] = field(repr=False)
    levels: tuple[slice, ...] = field(repr=False)
    """The states of each length, from 0 to T - 1."""


@functools.cache
def tree(vocabulary: int, horizon: int) -> Tree:
    """All responses of at most `horizon` tokens: 15 for 3 tokens and horizon 3, 121 for 4 and 4,
    19,531 for 6 and 6.
    """
    level: list[Tokens] = [()]
    states: list[Tokens] = []
    levels = []
    for _ in range(horizon):
        levels.append(slice(len(states), len(states) + len(level)))
        states += level
        level = [(*s, v) for s in level for v in range(1, vocabulary)]
    number = {s: i for i, s in enumerate(states)}
    responses = sorted([(*s, EOS) for s in states] + level)
    path, token = np.full((len(responses), horizon), -1), np.full((len(responses), horizon), -1)
    child, leaf = np.full((len(states), vocabulary), -1), np.full((len(states), vocabulary), -1)
    for y, response in enumerate(responses):
        for t, v in enumerate(response):
            s = number[response[:t]]
            path[y, t], token[y, t] = s, v
            if t + 1 == len(response):
                leaf[s, v] = y
            else:
                child[s, v] = number[response[: t + 1]]
    return Tree(
        vocabulary,
        horizon,
        tuple(responses),
        tuple(states),
        path,
        token,
        child,
        leaf,
        np.array([len(r) for r in responses]),
        np.array([r[-1] == EOS for r in responses]),
        tuple(levels),
    )


@dataclass(frozen=True, eq=False)
class World:
    """Prompts, a frozen reference, a reward for every response, and the strength of the KL penalty.

    Prompts are equally likely. No prompt may be a prefix of another, so that every text belongs to
    one prompt.

    reference: [P, S, V] logits.
    reward: [P, Y] the true (gold) reward of the whole response.
    beta: the KL penalty per nat, in units of reward.
    proxy: [P, Y] the reward that a learned reward model might give; None: there is no proxy.
    step_reward: [P, S, V] the reward of each step, where `reward` is the sum over the steps (a
    process reward); None: the reward comes only at the end.
    """

    name: str
    prompts: tuple[Tokens, ...]
    reference: Array
    reward: Array
    beta: float
    horizon: int
    proxy: Array | None = None
    step_reward: Array | None = None

    def __post_init__(self) -> None:
        shape = (len(self.prompts), len(self.tree.states), self.vocabulary)
        if self.reference.shape != shape:
            raise ValueError(
                f"reference must be logits of shape {list(shape)}, not {list(self.reference.shape)}"
            )
        for name in ("reward", "proxy"):
            value = getattr(self, name)
            if value is not None and value.shape != (len(self.prompts), len(self.tree.responses)):
                raise ValueError(
                    f"{name} must have one number per prompt and response, "
                    f"{[len(self.prompts), len(self.tree.responses)]}, not {list(value.shape)}"
                )
        if self.step_reward is not None and self.step_reward.shape != shape:
            raise ValueError(
                f"step_reward must have the shape of reference, {list(shape)}, not "
                f"{list(self.step_reward.shape)}"
            )
        for i, a in enumerate(self.prompts):
            for j, b in enumerate(self.prompts):
                if i != j and b[: len(a)] == a:
                    raise ValueError(
                        f"prompt {a} is a prefix of prompt {b}: some texts would belong to both"
                    )

    @property
    def vocabulary(self) -> int:
        return int(self.reference.shape[-1])

    @functools.cached_property
    def tree(self) -> Tree:
        return tree(self.vocabulary, self.horizon)

    @property
    def responses(self) -> tuple[Tokens, ...]:
        return self.tree.responses

    def with_(self, **changes: Any) -> World:
        """A copy with other values in these fields."""
        return replace(self, **changes)

    # -- as text, for code that users run

    def prompt_text(self, p: int) -> str:
        return "".join(LETTERS[t] for t in self.prompts[p])

    def response_text(self, y: int) -> str:
        """The completion as in a row of data: with a full stop unless it was truncated."""
        return "".join(LETTERS[t] for t in self.responses[y])

    @functools.cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        prompts = {self.prompt_text(p): p for p in range(len(self.prompts))}
        return prompts, {
            "".join(LETTERS[t] for t in r if t != EOS): y for y, r in enumerate(self.responses)
        }

    def scores(
        self, prompts: list[str], completions: list[str], table: str = "reward"
    ) -> list[float]:
        """The rewards of sampled texts; completions without EOS, as reward functions get them."""
        p_of, y_of = self._numbers
        values = getattr(self, table)
        return [
            float(values[p_of[p], y_of[c.rstrip(LETTERS[EOS])]])
            for p, c in zip(prompts, completions, strict=True)
        ]

    # -- on disk

    def save(self, path: Path) -> None:
        """Write the tables; `World.load` reads them back bit by bit."""
        arrays = {
            k: v
            for k in ("reference", "reward", "proxy", "step_reward")
            if (v := getattr(self, k)) is not None
        }
        facts = {
            "name": self.name,
            "prompts": self.prompts,
            "beta": self.beta,
            "horizon": self.horizon,
        }
        with open(path, "wb") as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **arrays)

    @staticmethod
    def load(path: Path) -> World:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            facts = json.loads(str(found["facts"]))
            arrays = {
                k: found[k] for k in ("reference", "reward", "proxy", "step_reward") if k in found
            }
        return World(
            facts["name"],
            tuple(tuple(p) for p in facts["prompts"]),
            beta=facts["beta"],
            horizon=facts["horizon"],
            **arrays,
        )


# ---- rewards ----


def prompts_for(count: int, vocabulary: int, *, uneven: bool = False) -> tuple[Tokens, ...]:
    """`count` prompts of letters, none of them a prefix of another. uneven: every second prompt is
    one token longer.
    """
    if vocabulary < 3 and count > 1:
        raise ValueError(
            f"a vocabulary of {vocabulary} has only one letter besides EOS, so one of two prompts "
            "would be a prefix of the other"
        )
    width = 1
    while (vocabulary - 1) ** width < count:
        width += 1
    words: list[Tokens] = [()]
    for _ in range(width):
        words = [(*w, v) for w in words for v in range(1, vocabulary)]
    return tuple((*w, 1) if uneven and i % 2 else w for i, w in enumerate(words[:count]))


def random_reward(prompts: int, responses: int, seed: int, scale: float = 1.0) -> Array:
    """[P, Y] independent normal rewards, all different."""
    return np.random.default_rng([seed, 1]).normal(size=(prompts, responses)) * scale


def sparse_reward(prompts: int, tree: Tree, seed: int, share: float = 0.1) -> Array:
    """[P, Y] 1 for a few responses, 0 for all others, as a verifier gives it. At least one response
    per prompt is right, and never one of a single token.
    """
    rng = np.random.default_rng([seed, 2])
    long = np.flatnonzero(tree.lengths > 1)
    out = np.zeros((prompts, len(tree.responses)))
    for p in range(prompts):
        out[p, rng.choice(long, size=max(1, round(share * len(long))), replace=False)] = 1.0
    return out


def letters_in_place(
    prompts: int, tree: Tree, seed: int, *, keys: int, within: int
) -> tuple[Array, list[dict[int, int]]]:
    """[P, Y] 1 for the responses that have certain letters at certain positions, whatever the other
    letters are; and the letters of each prompt, {position: token}.

    Args:
        keys: number of positions that count, drawn for each prompt among the first `within`. The
            last of these always counts, so nothing is decided before it.
    """
    rng = np.random.default_rng([seed, 6])
    out, wanted = np.zeros((prompts, len(tree.responses))), []
    for p in range(prompts):
        places = sorted([*rng.choice(within - 1, keys - 1, replace=False).tolist(), within - 1])
        key = dict(zip(places, rng.integers(1, tree.vocabulary, keys).tolist(), strict=True))
        out[p] = [all(len(y) > t and y[t] == v for t, v in key.items()) for y in tree.responses]
        wanted.append(key)
    return out, wanted


def exploited(
    reward: Array,
    reference: Array,
    seed: int,
    *,
    noise: float = 0.3,
    mass: float = 0.02,
    gold: float = -2.0,
    proxy: float = 3.0,
) -> tuple[Array, Array]:
    """(gold, proxy) [P, Y]: the proxy is gold with a little noise, except for the exploit: a few
    unlikely responses with a high proxy reward and a low gold reward.

    Args:
        reference: [P, Y] probabilities of the responses. The exploit consists of the least likely
            ones, up to a total probability of `mass`, and of at least one.
        noise: standard deviation of the noise.
        gold: the true reward of the exploit.
        proxy: the proxy reward of the exploit, above the best true reward of the prompt.
    """
    rng = np.random.default_rng([seed, 3])
    true, learned = reward.copy(), reward + rng.normal(size=reward.shape) * noise
    for p, probabilities in enumerate(reference):
        order = np.argsort(probabilities, kind="stable")
        few = order[: max(1, int(np.searchsorted(np.cumsum(probabilities[order]), mass)))]
        true[p, few], learned[p, few] = gold, reward[p].max() + proxy
    return true, learned


def step_rewards(world: World, seed: int, scale: float = 0.5) -> World:
    """The world with a reward for each step [P, S, V]; the reward of a response is the sum over its
    steps.
    """
    steps = np.random.default_rng([seed, 4]).normal(size=world.reference.shape) * scale
    known = world.tree.path >= 0
    total = np.where(known, steps[:, world.tree.path, world.tree.token], 0.0).sum(-1)
    return world.with_(reward=total, step_reward=steps)


# ---- annotators: [P, Y, Y] the probability that the response of the second axis is preferred to
# that of the third ----


def bradley_terry(reward: Array, scale: float = 1.0) -> Array:
    """Bradley and Terry 1952: the sigmoid of the difference in reward."""
    return sigmoid(scale * (reward[:, :, None] - reward[:, None, :]))


def flipped(preference: Array, share: float) -> Array:
    """Annotators who give the opposite answer in this share of cases."""
    return share + (1 - 2 * share) * preference


def length_biased(reward: Array, lengths: NDArray[np.int64], nats_per_token: float) -> Array:
    """Annotators who also prefer longer responses."""
    return sigmoid(
        reward[:, :, None]
        - reward[:, None, :]
        + nats_per_token * (lengths[:, None] - lengths[None, :])
    )


def intransitive(reward: Array, seed: int, twist: float) -> Array:
    """Annotators whom no reward explains: every pair has an additional antisymmetric log-odds of
    its own (standard deviation `twist`), so that preferences may be cyclic.
    """
    noise = (
        np.random.default_rng([seed, 5]).normal(
            size=(reward.shape[0], reward.shape[1], reward.shape[1])
        )
        * twist
    )
    return sigmoid(
        reward[:, :, None]
        - reward[:, None, :]
        + np.triu(noise, 1)
        - np.triu(noise, 1).swapaxes(1, 2)
    )


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(x / 2))
