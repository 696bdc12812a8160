"""Policies found by L-BFGS: an optimizer that knows no closed form, on a float64 table of logits
[P, S, V].

Shapes: P prompts, S states, V tokens of the vocabulary, Y responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...losses.preference import dpo_sum
from ..worlds import exact
from ..worlds.world import Array, Tree, World

STEPS = 500
"""Largest number of L-BFGS iterations."""


@dataclass(frozen=True)
class FitResult:
    """A policy found by L-BFGS."""

    logits: Array
    """[P, S, V]."""
    logp: Array
    """[P, Y] log-probabilities of its responses."""
    loss: float
    gradient: float
    """Largest absolute entry of the gradient at the end, with respect to the variables that were
    moved.
    """
    evaluations: int


def table_logprobs(tree: Tree, logits: Tensor) -> Tensor:
    """[P, Y] log-probability of every response under logits [P, S, V], differentiable."""
    path, token = torch.from_numpy(tree.path), torch.from_numpy(tree.token)
    tokens = logits.log_softmax(-1)[:, path, token]
    return torch.where(path >= 0, tokens, tokens.new_zeros(())).sum(-1)


def lbfgs(
    tree: Tree,
    objective: Callable[[Tensor], Tensor],
    start: Array,
    steps: int = STEPS,
    *,
    scale: Array | None = None,
    line_search: bool = True,
) -> FitResult:
    """Minimize a function of log-probabilities [P, Y] over tables of logits [P, S, V].

    Args:
        start: [P, S, V] the logits to begin from.
        scale: [P, S, V] the logits are start + scale * what the optimizer moves; default 1.
        line_search: use a strong Wolfe line search. Without it, steps are as long as L-BFGS
            proposes: for the last digits, where the objective no longer changes.
    """
    first = torch.tensor(start, dtype=torch.float64)
    factor = torch.ones_like(first) if scale is None else torch.tensor(scale, dtype=torch.float64)
    move = torch.zeros_like(first, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [move],
        max_iter=steps,
        max_eval=5 * steps,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe" if line_search else None,
    )
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        value = objective(table_logprobs(tree, first + factor * move))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    value = closure()
    assert move.grad is not None
    logits = (first + factor * move).detach().numpy()
    return FitResult(
        logits,
        exact.logprobs(tree, logits),
        float(value.detach()),
        float(move.grad.abs().max()),
        evaluations,
    )


def maximize(world: World) -> FitResult:
    """The policy with the largest J, by L-BFGS on -J from the reference; `loss` is -J.

    J hardly depends on what a policy does in a state that it hardly ever reaches, so on plain
    logits rare responses converge last, or never. Each round therefore moves the logits in units of
    1 / sqrt(probability of reaching that token) under the policy it starts from, so that all
    tokens count alike.
    """
    ref, reward = torch.from_numpy(exact.reference(world)), torch.from_numpy(world.reward)

    def minus_j(logp: Tensor) -> Tensor:
        return -(logp.exp() * (reward - world.beta * (logp - ref))).sum(-1).mean()

    logits = world.reference
    for search in (True, True, True, True, False):
        often = exact.visits(world.tree, logits)[..., None] * np.exp(exact.log_softmax(logits))
        found = lbfgs(
            world.tree,
            minus_j,
            logits,
            100,
            scale=np.maximum(often, 1e-300) ** -0.5,
            line_search=search,
        )
        logits = found.logits
    return found


def population_loss(
    world: World, preference: Array, weights: Array, *, label_smoothing: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """The package's DPO loss, averaged over all possible labels, as a function of log-probabilities
    [P, Y].

    Args:
        preference: [P, Y, Y] probability that the response of the second axis is preferred to that
            of the third.
        weights: [P, Y, Y] how often two responses are compared: symmetric, with a sum of 1 over
            unordered pairs.
    """
    share = weights * preference
    p, winner, loser = (torch.from_numpy(x) for x in np.nonzero(share))
    share_of = torch.from_numpy(share)[p, winner, loser]
    ref = torch.from_numpy(exact.reference(world))

    def one(*four: Tensor) -> Tensor:
        # the package's loss sums over pairs without weights, so it is given one pair at a time
        return dpo_sum(*(x[None] for x in four), beta=world.beta, label_smoothing=label_smoothing)[
            0
        ]

    def loss(logp: Tensor) -> Tensor:
        each = torch.func.vmap(one)(logp[p, winner], logp[p, loser], ref[p, winner], ref[p, loser])
        return (share_of * each).sum()

    return loss


def fit(
    world: World,
    preference: Array,
    weights: Array,
    start: Array,
    *,
    label_smoothing: float = 0.0,
    steps: int = STEPS,
) -> FitResult:
    """The policy with the least DPO loss on these labels (see `population_loss`), found from the
    logits `start` [P, S, V].

    If no finite policy has the least loss (labels that all go one way), the result is what `steps`
    iterations reach.
    """
    return lbfgs(
        world.tree,
        population_loss(world, preference, weights, label_smoothing=label_smoothing),
        start,
        steps,
    )
