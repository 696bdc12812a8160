"""A world small enough to enumerate: every response to every prompt, its probability, its reward.

Generation as a decision process: the state is the prompt with the tokens so far, s_t = (x, y_<t);
the action is the next token y_t; the transition is certain; an episode is a response, which ends
with EOS (token 0) or is cut at the horizon; its reward comes once, at the end. All arrays are
float64.

Shapes: P prompts, S states of a prompt (prefixes in which a token is chosen), V tokens, Y
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
"""The token with this number as text; a full stop ends a response."""


@dataclass(frozen=True)
class Tree:
    """The responses to a prompt and the states on the way. The same tree stands behind every prompt.

    responses: Y token tuples, the ending EOS included.
    states: S prefixes, by length, then in the order of their tokens.
    path, token: [Y, T] the state in which each token of a response is chosen, and that token; -1
    behind the end. child, leaf: [S, V] the state behind a state and a token, or the response that
    it completes; -1 for the other. lengths: [Y] tokens. finished: [Y] false where the horizon cut
    the response.
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
    """All responses of at most `horizon` tokens: 15 for 3 and 3, 121 for 4 and 4, 19,531 for 6 and 6."""
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
    """Prompts, a frozen reference, a reward for every response, and the strength of the pull to the
    reference.

    Prompts are equally likely. None may be the beginning of another, so that a text belongs to one
    prompt alone.

    reference: [P, S, V] logits.
    reward: [P, Y] the true (gold) reward of the whole response.
    beta: nats cost beta units of reward each.
    proxy: [P, Y] what a learned reward model might give instead; None: the true reward is known.
    step_reward: [P, S, V] where the reward is the sum of what each step earns (a process reward);
    None: it comes at the end only.
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
                    f"{name} must have one number a prompt and response, "
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
                        f"prompt {a} is the beginning of prompt {b}: a text would belong to both"
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
        """A copy with other fields."""
        return replace(self, **changes)

    # -- as text, for the code that users run

    def prompt_text(self, p: int) -> str:
        return "".join(LETTERS[t] for t in self.prompts[p])

    def response_text(self, y: int) -> str:
        """The completion as a row holds it: with its full stop if it ended, without if it was cut."""
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
        """The reward of sampled texts (a completion without its EOS, as reward functions get it):
        what `fiducial ppo` is given in the lab.
        """
        p_of, y_of = self._numbers
        values = getattr(self, table)
        return [
            float(values[p_of[p], y_of[c.rstrip(LETTERS[EOS])]])
            for p, c in zip(prompts, completions, strict=True)
        ]

    # -- on disk

    def save(self, path: Path) -> None:
        """Write the tables; `World.load` reads them back to the bit."""
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
    """`count` prompts of letters, none the beginning of another; with `uneven` every second one is
    a token longer.
    """
    if vocabulary < 3 and count > 1:
        raise ValueError(
            f"a vocabulary of {vocabulary} has one letter beside EOS, and of two texts in one "
            "letter one is the beginning of the other"
        )
    width = 1
    while (vocabulary - 1) ** width < count:
        width += 1
    words: list[Tokens] = [()]
    for _ in range(width):
        words = [(*w, v) for w in words for v in range(1, vocabulary)]
    return tuple((*w, 1) if uneven and i % 2 else w for i, w in enumerate(words[:count]))


def random_reward(prompts: int, responses: int, seed: int, scale: float = 1.0) -> Array:
    """[P, Y] independent normal rewards: every response differs."""
    return np.random.default_rng([seed, 1]).normal(size=(prompts, responses)) * scale


def sparse_reward(prompts: int, tree: Tree, seed: int, share: float = 0.1) -> Array:
    """[P, Y] one for a few responses, zero for all others, as a verifier gives it. At least one
    response a prompt is right, and never one of a single token.
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
    """[P, Y] one for the responses that have certain letters at certain places, whatever stands at
    the others; and those, {place: token} of each prompt.

    Args:
        keys: places that count, drawn for each prompt among the first `within`, the last of which
            is always one: before it nothing is decided.
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
    """(gold, proxy) [P, Y]: the proxy is gold with a little noise, but for a few unlikely responses
    that it loves and that gold hates.

    Args:
        reference: [P, Y] probabilities of the responses; the exploit is made of the least likely
            ones, up to `mass` of them together, and at least one.
        gold: the true reward of the exploit.
        proxy: how far the proxy puts it above the best true reward of its prompt.
    """
    rng = np.random.default_rng([seed, 3])
    true, learned = reward.copy(), reward + rng.normal(size=reward.shape) * noise
    for p, probabilities in enumerate(reference):
        order = np.argsort(probabilities, kind="stable")
        few = order[: max(1, int(np.searchsorted(np.cumsum(probabilities[order]), mass)))]
        true[p, few], learned[p, few] = gold, reward[p].max() + proxy
    return true, learned


def step_rewards(world: World, seed: int, scale: float = 0.5) -> World:
    """The world with a reward for each step [P, S, V], and the sum of a response's steps as its reward."""
    steps = np.random.default_rng([seed, 4]).normal(size=world.reference.shape) * scale
    known = world.tree.path >= 0
    total = np.where(known, steps[:, world.tree.path, world.tree.token], 0.0).sum(-1)
    return world.with_(reward=total, step_reward=steps)


# ---- annotators: p [P, Y, Y], the probability that response i (second axis) is preferred to j
# (third) ----


def bradley_terry(reward: Array, scale: float = 1.0) -> Array:
    """Bradley and Terry 1952: sigmoid of the difference in reward."""
    return sigmoid(scale * (reward[:, :, None] - reward[:, None, :]))


def flipped(preference: Array, share: float) -> Array:
    """A share of the answers is given the wrong way round."""
    return share + (1 - 2 * share) * preference


def length_biased(reward: Array, lengths: NDArray[np.int64], nats_per_token: float) -> Array:
    """Annotators who also like what is longer."""
    return sigmoid(
        reward[:, :, None]
        - reward[:, None, :]
        + nats_per_token * (lengths[:, None] - lengths[None, :])
    )


def intransitive(reward: Array, seed: int, twist: float) -> Array:
    """Annotators no reward can explain: every pair gets an antisymmetric nat-score of its own on
    top, so that preferences may run in circles.
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
