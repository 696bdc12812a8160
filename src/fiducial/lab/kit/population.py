r"""Populations: batches in which each response occurs in proportion to its probability, so that the
mean over the batch *is* the expectation.

The policy gives the three tokens of every state the probabilities 1/2, 1/4 and 1/4 in some order. A
response of at most three tokens then has a probability that is a multiple of 1/64, and 64 rows per
prompt hold each response exactly as often as it should occur. So the gradient of any loss on the
batch can be compared with the exact one, without sampling and without knowing how the loss is
written. Preferences are made rational in the same way: rewards are 0 or log 3, and every pair of
responses is compared four times, of which the Bradley-Terry model awards three to the better one.

The population contains what makes mistakes visible: prompts of unequal length, one of them with EOS
inside; responses of one, two and three tokens, some of them truncated; EOS as padding; a
temperature that is not 1; and finite nonsense wherever the mask is false, with gradients of its
own.

Shapes: P prompts, S states of a prompt, V tokens, Y responses; N rows of W columns. Column t is
about token t. Everything is float64; log-probabilities are in nats.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..worlds import exact
from ..worlds.world import EOS, Array, Tokens, Tree, World, random_reward, tree
from .layout import Kind, Rows, filler, layout

Critic = Literal["exact", "arbitrary", "none"]

PROMPTS: tuple[Tokens, ...] = ((1,), (2, EOS, 1))
"""Prompts of one and of three tokens. An EOS inside a prompt is an ordinary token: chat templates
put one after every turn.
"""
TEMPERATURE = 0.7
BETA = 0.4
STRENGTHS = (1, 3)
"""exp(reward) in worlds of preferences: Bradley-Terry probabilities are then 1/2, 1/4 or 3/4."""


@dataclass(frozen=True, eq=False)
class Population:
    """A world, the policy that is learned and the policy that wrote the responses.

    policy, data: [P, S, V] log-probabilities of the next token. data equals policy where the policy
    sampled the responses itself. Its probabilities are multiples of 1/4, so that counts are whole
    numbers. old_values: [P, S] the critic's values when the responses were sampled. values: [P, S]
    its values now. scores: [P, Y] scores of a reward model. group: responses per prompt that are
    sampled together, 1 or 2.
    """

    world: World
    policy: Array
    data: Array
    temperature: float
    old_values: Array
    values: Array
    scores: Array
    group: int = 1

    @property
    def tree(self) -> Tree:
        return self.world.tree

    @functools.cached_property
    def inner_scores(self) -> Array:
        """[P, S] scores of a reward model after each token that does not end the response."""
        prompts = len(self.world.prompts)
        flat = filler("nonsense", prompts * len(self.tree.states), "inner scores")
        return flat.reshape(prompts, -1)

    @functools.cached_property
    def advantages(self) -> Array:
        """[P, S, V] Q - V of the policy that sampled."""
        v, q = exact.values(self.world, self.data)
        out: Array = q - v[..., None]
        return out

    def with_(self, **changes: object) -> Population:
        """A copy with other values in these fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


def rational(prompts: int, states: int, seed: int) -> Array:
    """[P, S, 3] log-probabilities 1/2, 1/4, 1/4; the likeliest token is drawn for each state."""
    likely = np.random.default_rng([seed, 11]).integers(0, 3, size=(prompts, states, 1))
    p = np.full((prompts, states, 3), 0.25)
    np.put_along_axis(p, likely, 0.5, axis=-1)
    out: Array = np.log(p)
    return out


def make_population(
    *,
    horizon: int = 3,
    group: int = 1,
    beta: float = BETA,
    temperature: float = TEMPERATURE,
    critic: Critic = "exact",
    off_policy: bool = False,
    preferences: bool = False,
    no_reward: bool = False,
    moved: float = 0.0,
    seed: int = 3,
) -> Population:
    """Make a population.

    Args:
        horizon: most tokens of a response. 3 gives 15 responses and 64 rows per prompt, 2 gives 7
            and 16.
        group: 2 pairs every response with every other, as often as two draws would give the pair.
        critic: old_values are those of the policy ("exact"), arbitrary ones, or 0 ("none").
        off_policy: the responses were written by another policy than the one that is learned.
        preferences: rewards are 0 or log 3, so that the odds of a comparison are whole numbers.
        no_reward: all rewards are 0.
        moved: standard deviation of the normal noise that separates the logits of the policy that
            is learned from those that wrote the responses.
        seed: random seed of the tables. With 3, the responses to the two prompts differ in mean
            length.
    """
    shape = tree(3, horizon)
    prompts, states, responses = len(PROMPTS), len(shape.states), len(shape.responses)
    rng = np.random.default_rng([seed, horizon, 12])
    reference = exact.log_softmax(rng.normal(size=(prompts, states, 3)) * 0.7)
    if preferences:
        reward = np.log(
            np.stack([rng.permutation(np.resize(STRENGTHS, responses)) for _ in PROMPTS])
        )
    else:
        reward = random_reward(prompts, responses, seed + 1) * (not no_reward)
    world = World("rational", PROMPTS, reference, reward, beta, horizon)
    policy = rational(prompts, states, seed)
    data = rational(prompts, states, seed + 4) if off_policy else policy
    if moved:
        noise = np.random.default_rng([seed, horizon, 30]).normal(size=policy.shape)
        policy = exact.log_softmax(policy + moved * noise)
    known = exact.values(world, data)[0]
    old = {"exact": known, "arbitrary": rng.normal(size=known.shape), "none": np.zeros_like(known)}
    # inside the range to which PPO clips the critic
    near = known + rng.uniform(-0.1, 0.1, size=known.shape)
    scores = rng.normal(size=reward.shape)
    return Population(world, policy, data, temperature, old[critic], near, scores, group)


def likelihoods(population: Population) -> Array:
    """[P, Y] probabilities of the responses in the data."""
    return np.exp(exact.logprobs(population.tree, population.data))


def outside(population: Population, kind: Kind, *trailing: int) -> tuple[Array, Array]:
    """What a table holds where no token of the policy follows: [P, Y, ...] at the last token of
    each response, and [W, ...] in each column of padding.
    """
    where = layout(population.world.prompts, population.world.horizon)
    rest = filler("nonsense", where.rows - where.states, kind, *trailing)
    ends = rest[: where.ends - where.states].reshape(len(population.world.prompts), -1, *trailing)
    return ends, rest[where.prompts - where.states :]


# ---- rows ----


def rows(population: Population) -> tuple[Rows, Rows, Rows]:
    """Prompt, response and group [N] of each row of the population, shuffled. The rows of a group
    are adjacent.
    """
    copies = 4**population.tree.horizon
    counts = np.rint(likelihoods(population) * copies).astype(int)
    assert (counts.sum(1) == copies).all(), "the probabilities are not multiples of 1 / copies"
    listed = [np.repeat(np.arange(counts.shape[1]), c) for c in counts]
    if population.group > 1:
        listed = [np.stack(np.meshgrid(y, y, indexing="ij"), -1).reshape(-1) for y in listed]
    order = _shuffled(sum(map(len, listed)), population.group)
    prompt = np.repeat(np.arange(len(counts)), len(listed[0]))[order]
    return prompt, np.concatenate(listed)[order], _groups(population, prompt)


def _groups(population: Population, prompt: Rows) -> Rows:
    if population.group == 1:
        return prompt
    return np.arange(len(prompt)) // population.group


def _shuffled(n: int, group: int = 1) -> Rows:
    """A random order: in a sorted batch, each micro-batch would hold copies of one response."""
    return np.random.default_rng(5).permutation(np.arange(n).reshape(-1, group)).reshape(-1)


def draw(population: Population, n: int, rng: np.random.Generator) -> tuple[Rows, Rows, Rows]:
    """Prompt, response and group of n sampled rows, the same number for each prompt."""
    each = n // len(population.world.prompts)
    p = likelihoods(population)
    listed = [rng.choice(p.shape[1], size=each, p=row / row.sum()) for row in p]
    prompt = np.repeat(np.arange(len(p)), each)
    return prompt, np.concatenate(listed), _groups(population, prompt)


def pairs(population: Population) -> tuple[Rows, Rows, Rows]:
    """Prompt, chosen and rejected response [B] of every pair in a population of preferences."""
    strength = np.rint(np.exp(population.world.reward)).astype(int)
    out = []
    for p, k in enumerate(strength):
        for i in range(len(k)):
            for j in range(i):
                won = 4 * k[i] // (k[i] + k[j])
                out += [(p, i, j)] * won + [(p, j, i)] * (4 - won)
    prompt, chosen, rejected = np.array(out)[_shuffled(len(out))].T
    return prompt, chosen, rejected
