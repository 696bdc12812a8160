"""Short trainings of a table with a loss: the share of the way to the optimum that they leave."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..worlds import exact
from ..worlds.world import Array
from .batch import Batch, build, build_pairs
from .measure import Loss, scalar
from .population import Critic, Population, draw, pairs

STEPS = 150
ROWS = 256
RATE = 0.1


def _train(loss: Loss, parameter: Tensor, sample: Callable[[], Batch]) -> float | None:
    """Train with Adam at a falling rate, so that the scale of the loss does not matter.

    Returns:
        None if the training ran to its end; 1 if the loss does not depend on the parameter, and
        infinity if the gradient is not finite.
    """
    optimizer = torch.optim.Adam([parameter], lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        value = scalar(loss(sample()))
        if not value.requires_grad:
            return 1.0
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if parameter.grad is None or not parameter.grad.isfinite().all():
            return math.inf
        optimizer.step()
    return None


def _minimize(closure: Callable[[Tensor], object], start: Array) -> Array:
    """Minimize with L-BFGS on the whole population."""
    x = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=STEPS,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = scalar(closure(x))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(step)  # type: ignore[no-untyped-call]
    return x.detach().numpy()


def train_policy(loss: Loss, population: Population, objective: str, critic: Critic) -> float:
    """Sample from the policy, take a step, and repeat."""
    world, tree, tau = population.world, population.tree, population.temperature
    start = exact.log_softmax(world.reference)
    if objective in ("kl", "forward_kl"):
        start = population.policy
    theta = torch.from_numpy(start * tau).clone().requires_grad_()
    rng = np.random.default_rng(0)

    def sample() -> Batch:
        now = exact.log_softmax(theta.detach().numpy() / tau)
        at = population.with_(policy=now, data=now)
        if critic == "exact":
            at = at.with_(old_values=exact.values(world, now)[0])
        return build(at, *draw(at, ROWS, rng), theta=theta)

    if (stopped := _train(loss, theta, sample)) is not None:
        return stopped
    end = exact.logprobs(tree, exact.log_softmax(theta.detach().numpy() / tau))
    first, ref = exact.logprobs(tree, start), exact.reference(world)
    if objective == "kl":
        return exact.kl(end, ref) / exact.kl(first, ref)
    if objective == "forward_kl":
        return exact.kl(ref, end) / exact.kl(ref, first)
    if objective == "reward":
        top = float(world.reward.max(1).mean())
        return (top - exact.expected(end, world.reward)) / (top - exact.expected(ref, world.reward))
    return exact.gap(world, end).relative


def train_likelihood(loss: Loss, population: Population) -> float:
    """Train on sampled demonstrations: KL(data, policy) as a share of what it was at the start."""
    tree = population.tree
    theta = torch.from_numpy(population.policy.copy()).requires_grad_()
    rng = np.random.default_rng(0)

    def sample() -> Batch:
        return build(population, *draw(population, ROWS, rng), theta=theta)

    if (stopped := _train(loss, theta, sample)) is not None:
        return stopped
    data = exact.logprobs(tree, population.data)
    end = exact.logprobs(tree, exact.log_softmax(theta.detach().numpy()))
    return exact.kl(data, end) / exact.kl(data, exact.logprobs(tree, population.policy))


def train_preference(loss: Loss, population: Population) -> float:
    """Minimize the loss on all pairs, from the reference: the relative gap to pi* that is left."""
    world = population.world
    listed = pairs(population)
    theta = _minimize(
        lambda x: loss(build_pairs(population, *listed, theta=x)),
        exact.log_softmax(world.reference),
    )
    if not np.isfinite(theta).all():
        return math.inf
    return exact.gap(world, exact.logprobs(population.tree, theta)).relative


def train_reward(loss: Loss, population: Population) -> float:
    """Minimize the loss on all pairs, from scores of 0: the relative gap of the policy that is
    optimal for the learned scores.
    """
    world = population.world
    listed = pairs(population)
    psi = _minimize(
        lambda x: loss(build_pairs(population, *listed, psi=x)), np.zeros_like(world.reward)
    )
    if not np.isfinite(psi).all():
        return math.inf
    return exact.gap(world, exact.optimum(world, reward=psi)[0]).relative


def train_critic(loss: Loss, population: Population) -> float:
    """Fit a table of values from 0, each step with the values of the step before as old values: the
    root mean square error that is left, as a share of that at the start.
    """
    phi = torch.zeros(population.values.shape, dtype=torch.float64, requires_grad=True)
    rng = np.random.default_rng(0)

    def sample() -> Batch:
        at = population.with_(old_values=phi.detach().numpy().copy())
        return build(at, *draw(at, ROWS, rng), phi=phi)

    if (stopped := _train(loss, phi, sample)) is not None:
        return stopped
    truth = exact.values(population.world, population.policy)[0]
    visits = exact.visits(population.tree, population.policy)
    error = visits * (phi.detach().numpy() - truth) ** 2
    return math.sqrt(float(error.sum() / (visits * truth**2).sum()))
