"""What a loss is given: a batch of responses, or of pairs of responses, and how it is built."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...core.reductions import select
from ...rollout.trajectory import Trajectory
from ..worlds import exact
from ..worlds.world import EOS, Array
from .layout import Filler, Kind, Rows, filler, layout
from .population import Population


@dataclass(frozen=True, eq=False)
class Batch:
    """N responses after their prompts, padded right, with everything a loss may need. Where the
    mask is false, all tensors hold finite nonsense.

    trajectory: ids, mask, prompt_lengths, lengths, finished, temperature (see
    `fiducial.rollout.trajectory.Trajectory`). logprobs: [N, W] log-probabilities of the policy at
    the sampling temperature, with gradient. old_logprobs, ref_logprobs: [N, W] those of the policy
    that sampled and of the reference, at the same temperature. rewards: [N] one per response. beta:
    the KL penalty per nat; 0 where the objective is the reward alone. advantages: [N, W] exact
    advantages, Q - V of the policy that sampled, for a loss that takes advantages as input. values:
    [N, W] a critic's value of the state before each token, with gradient. old_values: [N, W] the
    same when the batch was sampled, without gradient. scores: [N, W] a reward model's output at
    each token, with gradient; the score of a response is at its last token. group: [N] responses
    with the same number belong together.
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
    """[N, W] the row of the tables that each position is read from."""
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
        """[N, W] true at the tokens that the policy chose, EOS included."""
        return self.trajectory.mask

    @property
    def temperature(self) -> float:
        """The sampling temperature: probabilities are softmax(logits / temperature)."""
        return self.trajectory.temperature

    def logits(self) -> Tensor:
        """[N, W, V] raw logits of the policy, as a causal language model returns them: position t
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
    responses, the first two with gradient. score_chosen, score_rejected: [B] scores of a reward
    model, with gradient. chosen, rejected: the same responses token by token.
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
    fill: Filler = "nonsense",
    garbled: bool = False,
) -> Batch:
    """The rows as a batch.

    Args:
        prompt, response, group: [N] numbers of each row.
        theta, phi, psi: [P, S, V] raw logits, [P, S] values, [P, Y] scores with gradient, for
            training. Without them, `Batch.raw`, `values` and `scores` are leaves.
        widen: number of padding columns beyond the longest row.
        fill: what stands where the mask is false.
        garbled: replace the prompts' tokens; see `layout`.
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
        rest = filler(fill, where.rows - where.states, kind, *known.shape[1:])
        return torch.cat([inside, torch.from_numpy(rest)])

    def after_the_first(found: Tensor) -> Tensor:
        return torch.cat([torch.full_like(found[:, :1], nothing), found], 1)

    def chosen(of_tokens: Tensor) -> Tensor:
        return after_the_first(of_tokens[:, :-1].gather(-1, ids[:, 1:, None])[..., 0])

    def leaf(x: Tensor) -> Tensor:
        return x if x.requires_grad else x.requires_grad_()

    # a model's logits are not normalized: a constant per state, which log-softmax removes
    shift = torch.from_numpy(np.random.default_rng(41).normal(size=(2, where.rows, 1)))
    shift = shift * (theta is None)
    raw = leaf((table("logits", population.policy * tau, theta) + shift[0])[node])
    raw_ref = (table("reference", exact.log_softmax(world.reference) * tau) + shift[1])[node]
    old = chosen((table("logits", population.data * tau)[node] / tau).log_softmax(-1))
    values = leaf(after_the_first(table("values", population.values, phi)[node[:, :-1]]))
    old_values = after_the_first(table("old values", population.old_values)[node[:, :-1]])
    inner = torch.from_numpy(population.inner_scores).reshape(-1)
    complete = (torch.from_numpy(population.scores) if psi is None else psi).reshape(-1)
    rest = torch.from_numpy(filler(fill, where.rows - where.ends, "scores"))
    scores = leaf(torch.cat([inner, complete, rest])[node])
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
    fill: Filler = "nonsense",
    garbled: bool = False,
) -> PairBatch:
    """Pairs as a batch; see `build`."""
    number = np.arange(len(prompt))

    def half(y: Rows) -> Batch:
        return build(
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

    def total(x: Batch, tokens: Tensor) -> Tensor:
        return select(tokens, x.mask).sum(1)

    w, r = half(chosen), half(rejected)
    return PairBatch(
        total(w, w.logprobs),
        total(r, r.logprobs),
        total(w, w.ref_logprobs),
        total(r, r.ref_logprobs),
        select(w.scores, w.trajectory.last).sum(1),
        select(r.scores, r.trajectory.last).sum(1),
        w,
        r,
        population.world.beta,
    )
