r"""Populations: batches in which every response stands exactly as often as it is likely, so that
the mean over the batch *is* the expectation.

The policy gives the three tokens of every state the probabilities 1/2, 1/4 and 1/4 in some order. A
response of at most three tokens then has a probability in 64ths, and 64 rows a prompt hold each one
as often as it should come: whatever a loss does with the batch, its gradient there is compared with
an exact one, without sampling and without looking into the loss. Preferences are made rational in
the same way: rewards are 0 or log 3, and every two responses are compared four times, of which the
Bradley-Terry model gives the better one three.

What makes mistakes visible is built in: prompts of unequal length, one with EOS inside; responses
of one, two and three tokens, some cut; padding that is EOS; a temperature that is not 1; finite
nonsense wherever the mask is false, with gradients of its own.

Shapes: P prompts, S states of a prompt, V tokens, Y responses; N rows of W columns. Column t speaks
of token t. float64; log-probabilities in nats.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.reductions import select
from ...rollout.trajectory import Trajectory
from ..worlds import exact
from ..worlds.world import EOS, Array, Tokens, Tree, World, random_reward, tree

Rows = NDArray[np.int64]
Critic = Literal["exact", "arbitrary", "none"]

PROMPTS: tuple[Tokens, ...] = ((1,), (2, EOS, 1))
"""Of one and of three tokens. An EOS inside a prompt is a token like any other: chat templates put
one behind every turn.
"""
TEMPERATURE = 0.7
BETA = 0.4
STRENGTHS = (1, 3)
"""exp(reward) in worlds of preferences: Bradley-Terry probabilities are then 1/2, 1/4 or 3/4."""


# ---- what a loss is given ----


@dataclass(frozen=True, eq=False)
class Batch:
    """N responses behind their prompts, padded right, and what is known of them. Where the mask is
    false stands finite nonsense.

    trajectory: ids, mask, prompt_lengths, lengths, finished, temperature (see
    `fiducial.rollout.trajectory.Trajectory`). logprobs: [N, W] of the policy at the sampling
    temperature, with gradient. old_logprobs, ref_logprobs: [N, W] of the policy that sampled and of
    the reference, at the same temperature. rewards: [N] of the whole responses. beta: what a nat of
    KL costs; 0 where the objective is the reward alone. advantages: [N, W] exact ones, Q - V of the
    policy that sampled: for a loss that is given its advantages. values: [N, W] of a critic in the
    state before each token, with gradient. old_values: the same when the batch was sampled,
    without. scores: [N, W] of a reward model behind each token, with gradient; that of the response
    stands at its last token. group: [N] responses with the same number belong together.
    """

    trajectory: Trajectory
    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    beta: float
    advantages: Tensor
    values: Tensor
    old_values: Tensor
    scores: Tensor
    group: Tensor
    raw: Tensor = field(repr=False)
    raw_ref: Tensor = field(repr=False)
    node: Tensor = field(repr=False)
    """[N, W] the row of the tables that a position is read from."""
    pad_id: int = EOS
    eos_id: int = EOS

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def ids(self) -> Tensor:
        """[N, W] prompt, response, padding."""
        return self.trajectory.ids

    @property
    def mask(self) -> Tensor:
        """[N, W] true at the tokens the policy chose, the ending EOS included."""
        return self.trajectory.mask

    @property
    def temperature(self) -> float:
        """Of sampling: probabilities are softmax(logits / temperature)."""
        return self.trajectory.temperature

    def logits(self) -> Tensor:
        """[N, W, V] raw logits of the policy as a causal language model returns them: position t
        predicts token t + 1. With gradient.
        """
        return self.raw

    def ref_logits(self) -> Tensor:
        """[N, W, V] raw logits of the reference."""
        return self.raw_ref


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B pairs of responses to the same prompt.

    policy_chosen, policy_rejected, ref_chosen, ref_rejected: [B] log-probabilities of whole
    responses, the first two with gradient. score_chosen, score_rejected: [B] of a reward model,
    with gradient. chosen, rejected: the same responses token by token.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    score_chosen: Tensor
    score_rejected: Tensor
    chosen: Batch
    rejected: Batch
    beta: float

    def __len__(self) -> int:
        return len(self.chosen)


# ---- where everything stands ----


@dataclass(frozen=True, eq=False)
class Layout:
    """Templates of the rows: ids, mask, node [P, Y, W], and what the rows of a table are about.

    A table has a row for every state [0, states), every complete response [ends), every position
    inside a prompt [prompts) and every column behind the end.
    """

    ids: Tensor
    mask: Tensor
    node: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    finished: Tensor
    states: int
    ends: int
    prompts: int
    rows: int


@functools.cache
def layout(
    prompts: tuple[Tokens, ...], horizon: int, widen: int = 0, garbled: bool = False
) -> Layout:
    """`widen` columns of padding more than needed, filled with tokens of all kinds; `garbled`:
    prompts of other tokens, as long as they were.
    """
    shape = tree(3, horizon)
    rng = np.random.default_rng([7, widen])
    states, responses, longest = (
        len(prompts) * len(shape.states),
        len(shape.responses),
        max(map(len, prompts)),
    )
    width = longest + horizon + widen
    ends, insides = states + len(prompts) * responses, states + len(prompts) * (responses + longest)
    ids = (
        rng.integers(0, 3, size=(len(prompts), responses, width))
        if widen
        else np.full((len(prompts), responses, width), EOS)
    )
    mask = np.zeros(ids.shape, dtype=bool)
    node = np.broadcast_to(insides + np.arange(width), ids.shape).copy()
    for p, prompt in enumerate(prompts):
        start = len(prompt)
        ids[p, :, :start] = rng.integers(0, 3, size=start) if garbled else prompt
        node[p, :, :start] = ends + p * longest + np.arange(start)
        for y, response in enumerate(shape.responses):
            stop = start + len(response)
            ids[p, y, start:stop], mask[p, y, start:stop] = response, True
            node[p, y, start - 1 : stop - 1] = (
                p * len(shape.states) + shape.path[y, : len(response)]
            )
            node[p, y, stop - 1] = states + p * responses + y
    return Layout(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.from_numpy(node),
        torch.tensor([len(p) for p in prompts]),
        torch.from_numpy(shape.lengths),
        torch.from_numpy(shape.finished),
        states,
        ends,
        insides,
        insides + width,
    )


# ---- populations ----


@dataclass(frozen=True, eq=False)
class Population:
    """A world, the policy that is learned and the one that wrote the responses.

    policy, data: [P, S, V] log-probabilities of the next token. data equals policy where the policy
    samples for itself; in 4ths, so that counts are whole. old_values: [P, S] what the critic said
    when the responses were sampled. values: [P, S] what it says now. scores: [P, Y] of a reward
    model. group: responses a prompt that are sampled together, 1 or 2.
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
        """[P, S] what a reward model says behind a token that does not end the response."""
        return _outside(
            "nonsense", len(self.world.prompts) * len(self.tree.states), "inner scores"
        ).reshape(len(self.world.prompts), -1)

    @functools.cached_property
    def positions(self) -> tuple[Rows, Rows, Array]:
        """[P, Y, W] the row of the tables behind each position, and ids; and the scores of the rows
        that are no token of a response.
        """
        where = layout(self.world.prompts, self.world.horizon)
        return (
            where.node.numpy(),
            where.ids.numpy(),
            _outside("nonsense", where.rows - where.ends, "scores"),
        )

    @functools.cached_property
    def advantages(self) -> Array:
        """[P, S, V] Q - V of the policy that sampled."""
        v, q = exact.values(self.world, self.data)
        return q - v[..., None]

    def with_(self, **changes: object) -> Population:
        """A copy with other fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


def rational(prompts: int, states: int, seed: int) -> Array:
    """[P, S, 3] log-probabilities 1/2, 1/4, 1/4, the likelier token drawn for each state."""
    likely = np.random.default_rng([seed, 11]).integers(0, 3, size=(prompts, states, 1))
    out = np.full((prompts, states, 3), 0.25)
    np.put_along_axis(out, likely, 0.5, axis=-1)
    return np.log(out)


def make_population(
    *,
    horizon: int = 3,
    group: int = 1,
    beta: float = BETA,
    temperature: float = TEMPERATURE,
    critic: Critic = "exact",
    off_policy: bool = False,
    preferences: bool = False,
    silent: bool = False,
    moved: float = 0.0,
    seed: int = 3,
) -> Population:
    """A population.

    Args:
        horizon: tokens of a response at most; 3 gives 15 responses and 64 rows a prompt, 2 gives 7
            and 16.
        group: 2 puts every response beside every other, each as often as two draws would give them.
        critic: old_values: those of the policy, any others, or 0.
        off_policy: the responses were written by another policy than the one that is learned.
        preferences: rewards are 0 or log 3, so that the odds of a comparison are whole numbers.
        silent: all rewards are 0.
        moved: deviation of the normal noise by which the logits of the policy that is learned have
            moved from those that wrote the responses.
        seed: of the tables; with 3 the two prompts have answers of different mean length.
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
        reward = random_reward(prompts, responses, seed + 1) * (not silent)
    world = World("rational", PROMPTS, reference, reward, beta, horizon)
    policy = rational(prompts, states, seed)
    data = rational(prompts, states, seed + 4) if off_policy else policy
    if moved:
        policy = exact.log_softmax(
            policy + moved * np.random.default_rng([seed, horizon, 30]).normal(size=policy.shape)
        )
    known = exact.values(world, data)[0]
    old = {"exact": known, "arbitrary": rng.normal(size=known.shape), "none": np.zeros_like(known)}[
        critic
    ]
    near = known + rng.uniform(
        -0.1, 0.1, size=known.shape
    )  # inside the range to which PPO's critics are clipped
    return Population(
        world, policy, data, temperature, old, near, rng.normal(size=reward.shape), group
    )


def likelihoods(population: Population) -> Array:
    """[P, Y] probabilities of the responses in the data."""
    return np.exp(exact.logprobs(population.tree, population.data))


def rows(population: Population) -> tuple[Rows, Rows, Rows]:
    """Prompt, response and group [N] of each row of the population, in no order; the rows of a
    group stand together.
    """
    copies = 4**population.tree.horizon
    counts = np.rint(likelihoods(population) * copies).astype(int)
    assert (counts.sum(1) == copies).all(), "the probabilities are not whole numbers of 1 / copies"
    listed = [np.repeat(np.arange(counts.shape[1]), c) for c in counts]
    if population.group > 1:
        listed = [np.stack(np.meshgrid(y, y, indexing="ij"), -1).reshape(-1) for y in listed]
    order = _shuffled(sum(map(len, listed)), population.group)
    prompt, response = (
        np.repeat(np.arange(len(counts)), len(listed[0]))[order],
        np.concatenate(listed)[order],
    )
    return (
        prompt,
        response,
        prompt if population.group == 1 else np.arange(len(prompt)) // population.group,
    )


def _shuffled(n: int, group: int = 1) -> Rows:
    """An order without meaning: in a sorted batch micro-batches would hold one response each."""
    return np.random.default_rng(5).permutation(np.arange(n).reshape(-1, group)).reshape(-1)


def draw(population: Population, n: int, rng: np.random.Generator) -> tuple[Rows, Rows, Rows]:
    """Prompt, response and group of n sampled rows, as many for each prompt."""
    each = n // len(population.world.prompts)
    p = likelihoods(population)
    listed = [rng.choice(p.shape[1], size=each, p=row / row.sum()) for row in p]
    prompt = np.repeat(np.arange(len(p)), each)
    return (
        prompt,
        np.concatenate(listed),
        prompt if population.group == 1 else np.arange(len(prompt)) // population.group,
    )


def pairs(population: Population) -> tuple[Rows, Rows, Rows]:
    """Prompt, chosen and rejected response [B] of every pair of the population of preferences."""
    strength = np.rint(np.exp(population.world.reward)).astype(int)
    out = []
    for p, k in enumerate(strength):
        for i in range(len(k)):
            for j in range(i):
                won = 4 * k[i] // (k[i] + k[j])
                out += [(p, i, j)] * won + [(p, j, i)] * (4 - won)
    prompt, chosen, rejected = np.array(out)[_shuffled(len(out))].T
    return prompt, chosen, rejected


# ---- building ----

Outside = Literal["nonsense", "other", "nan"]
Kind = Literal[
    "logits", "reference", "values", "old values", "inner scores", "scores", "advantages"
]


def _outside(fill: Outside, rows: int, kind: Kind, *trailing: int) -> Array:
    """Rows of a table that are about no token of the policy's."""
    if fill == "nan":
        return np.full((rows, *trailing), np.nan)
    return np.random.default_rng([get_args(Kind).index(kind), fill == "other", 13]).normal(
        size=(rows, *trailing)
    )


def outside(population: Population, kind: Kind, *trailing: int) -> tuple[Array, Array]:
    """[P, Y, ...] what stands in a table at each response's last token, where nothing follows, and
    [W, ...] in each column of padding.
    """
    where = layout(population.world.prompts, population.world.horizon)
    rest = _outside("nonsense", where.rows - where.states, kind, *trailing)
    ends = rest[: where.ends - where.states].reshape(len(population.world.prompts), -1, *trailing)
    return ends, rest[where.prompts - where.states :]


def build(
    population: Population,
    prompt: Rows,
    response: Rows,
    group: Rows,
    *,
    theta: Tensor | None = None,
    phi: Tensor | None = None,
    psi: Tensor | None = None,
    widen: int = 0,
    fill: Outside = "nonsense",
    garbled: bool = False,
) -> Batch:
    """The rows as a batch.

    Args:
        prompt, response, group: [N] of each row.
        theta, phi, psi: [P, S, V] raw logits, [P, S] values, [P, Y] scores with gradient, to train
            them. Without them `Batch.raw`, `values` and `scores` are leaves.
        widen: columns of padding on top of the longest row. fill: what stands where the mask is
            false. garbled: see `layout`.
    """
    world, tau = population.world, population.temperature
    where = layout(world.prompts, world.horizon, widen, garbled)
    p, y = torch.from_numpy(prompt), torch.from_numpy(response)
    lengths = where.prompt_lengths[p] + where.response_lengths[y]
    width = int(lengths.max()) + widen
    ids, mask, node = (x[p, y][:, :width] for x in (where.ids, where.mask, where.node))
    nothing = float("nan") if fill == "nan" else -0.3  # in the first column, which nothing predicts

    def table(kind: Kind, known: Array, learned: Tensor | None = None) -> Tensor:
        known = known.reshape(where.states, *known.shape[2:])
        inside = torch.from_numpy(known) if learned is None else learned.reshape(known.shape)
        return torch.cat(
            [
                inside,
                torch.from_numpy(_outside(fill, where.rows - where.states, kind, *known.shape[1:])),
            ]
        )

    def behind_the_first(found: Tensor) -> Tensor:
        return torch.cat([torch.full_like(found[:, :1], nothing), found], 1)

    def chosen(of_tokens: Tensor) -> Tensor:
        return behind_the_first(of_tokens[:, :-1].gather(-1, ids[:, 1:, None])[..., 0])

    def leaf(x: Tensor) -> Tensor:
        return x if x.requires_grad else x.requires_grad_()

    raw = leaf(table("logits", population.policy * tau, theta)[node])
    raw_ref = table("reference", exact.log_softmax(world.reference) * tau)[node]
    old = chosen((table("logits", population.data * tau)[node] / tau).log_softmax(-1))
    values = leaf(behind_the_first(table("values", population.values, phi)[node[:, :-1]]))
    old_values = behind_the_first(table("old values", population.old_values)[node[:, :-1]])
    complete = torch.from_numpy(population.scores) if psi is None else psi
    rest = torch.from_numpy(_outside(fill, where.rows - where.ends, "scores"))
    scores = leaf(
        torch.cat(
            [torch.from_numpy(population.inner_scores).reshape(-1), complete.reshape(-1), rest]
        )[node]
    )
    number = torch.arange(len(prompt))
    trajectory = Trajectory(
        ids,
        mask,
        select(old, mask),
        where.prompt_lengths[p],
        lengths,
        where.finished[y],
        torch.from_numpy(group),
        number % population.group if population.group > 1 else number,
        tau,
    )
    return Batch(
        trajectory,
        chosen((raw / tau).log_softmax(-1)),
        old,
        chosen((raw_ref / tau).log_softmax(-1)),
        torch.from_numpy(world.reward[prompt, response]),
        world.beta,
        chosen(table("advantages", population.advantages)[node]),
        values,
        old_values,
        scores,
        trajectory.prompt,
        raw,
        raw_ref,
        node,
    )


def build_pairs(
    population: Population,
    prompt: Rows,
    chosen: Rows,
    rejected: Rows,
    *,
    theta: Tensor | None = None,
    psi: Tensor | None = None,
    widen: int = 0,
    fill: Outside = "nonsense",
    garbled: bool = False,
) -> PairBatch:
    """Pairs as a batch; see `build`."""
    world, number = population.world, np.arange(len(prompt))
    w, r = (
        build(
            population,
            prompt,
            y,
            number,
            theta=theta,
            psi=psi,
            widen=widen,
            fill=fill,
            garbled=garbled,
        )
        for y in (chosen, rejected)
    )

    def whole(x: Batch, tokens: Tensor) -> Tensor:
        return select(tokens, x.mask).sum(1)

    return PairBatch(
        whole(w, w.logprobs),
        whole(r, r.logprobs),
        whole(w, w.ref_logprobs),
        whole(r, r.ref_logprobs),
        select(w.scores, w.trajectory.last).sum(1),
        select(r.scores, r.trajectory.last).sum(1),
        w,
        r,
        world.beta,
    )
