r"""Check your loss: hand over a function from a batch to a scalar, get back its bias, what it
costs, and the name of the mistake.

    from fiducial.lab import check_policy_loss

    def mine(batch):                                            # REINFORCE, the penalty in the reward
        penalty = batch.beta * (batch.logprobs - batch.ref_logprobs).detach()
        paid = batch.rewards - (penalty * batch.mask).sum(1)
        return -(paid[:, None] * batch.logprobs * batch.mask).sum() / batch.mask.sum()

    print(check_policy_loss(mine))

The batch is a population (`fiducial.lab.kit.population`): its mean is an expectation, so the gradient
of the loss is compared with the exact one to rounding. Only its direction is judged: a sum, a mean
over tokens and a mean over responses are one loss at three learning rates. What is wrong is then
looked for in this order: no gradient, or one that is not finite; log-probabilities read at the
wrong place or temperature; the mistakes of `fiducial.lab.kit.faults`, by their gradients in closed
form; gradients where none should be; changes of the batch that should change nothing (more padding,
other prompts, another order, every row twice); and what must be taken away for the bias to go.
Statistics of small batches need `unbiased`. What no loss can show is not checked: tokenisation,
sampling, dropout at another time, accumulation over micro-batches and processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..worlds import exact
from ..worlds.world import Array
from . import faults, off_policy, targets
from .diagnosis import LIKELIHOOD, Case, Change, Loss, Verdict, judge, look, scalar
from .faults import Candidate
from .population import (
    Batch,
    Critic,
    PairBatch,
    Population,
    Rows,
    build,
    build_pairs,
    draw,
    make_population,
    pairs,
    rows,
)

Objective = Literal["J", "reward", "kl", "forward_kl", "clip", "gspo", "cispo", "moved"]


# ---- policies ----

WORDS: dict[str, str] = {
    "J": "policy loss, E[r] - beta KL(pi, ref)",
    "reward": "policy loss, E[r]",
    "kl": "KL loss, KL(pi, ref)",
    "forward_kl": "KL loss, KL(ref, pi)",
    "clip": "clipped surrogate, off policy",
    "gspo": "GSPO's surrogate, off policy",
    "cispo": "CISPO's gradient, off policy",
    "moved": "policy loss, E[r], off policy",
}
OFF_POLICY = ("clip", "gspo", "cispo", "moved")
MOVED = 0.5
"""How far: ratios of tokens go from 0.26 to 1.83."""


def check_policy_loss(
    loss: Callable[[Batch], Any],
    objective: Objective = "J",
    *,
    group: int = 1,
    critic: Critic = "exact",
    clip: float = 0.2,
    clip_high: float | None = None,
    cap: float = 1.5,
    train: bool = True,
) -> Verdict:
    """Whether minus the expected gradient of a policy loss is that of the objective.

    Args:
        loss: from a Batch to a scalar. It takes what it needs of: `logits()` or `logprobs`,
            `old_logprobs`, `ref_logprobs`, `rewards`, `beta`, `mask`, `old_values`, `advantages`
            (exact ones), `group`.
        objective: "J": E[r] - beta KL(pi, ref). "reward": E[r] (the batch's beta is 0). "kl",
            "forward_kl": the loss is KL(pi, ref), or KL(ref, pi), of responses that the policy
            sampled. The others are at a policy that has moved from the one that sampled. "clip":
            PPO's surrogate, of the batch's `advantages`. "gspo": GSPO's, of the `rewards` as
            advantages. "cispo": CISPO's gradient, of the `advantages`. "moved": E[r] of the policy
            that has moved, which only the ratio of the whole response has: for corrections between
            sampler and trainer.
        group: 2: rows 2i and 2i + 1 are two responses to one prompt, and `batch.group` says so; for
            RLOO, GRPO and their kind. 1: all 64 responses to a prompt have one number.
        critic: what `old_values` are: those of the policy, wrong ones, or 0. With lambda below 1
            only the first gives the exact gradient.
        clip, clip_high: epsilon of "clip" and "gspo", and that above 1 where it is another. cap: of
            "cispo". What lies between two ratios of the population cannot be told apart.
        train: also train a table of logits with it (about a second).

    Raises:
        ValueError: the loss returned no scalar, or there is no such objective or group.
    """
    if objective not in WORDS:
        raise ValueError(f"objective must be one of {', '.join(WORDS)}, not {objective!r}")
    if group not in (1, 2):
        raise ValueError(f"group must be 1 or 2, not {group}")
    return judge(
        loss,
        policy_case(objective, group=group, critic=critic, clip=clip, clip_high=clip_high, cap=cap),
        train=train,
    )


@functools.cache
def policy_case(
    objective: Objective = "J",
    *,
    group: int = 1,
    critic: Critic = "exact",
    clip: float = 0.2,
    clip_high: float | None = None,
    cap: float = 1.5,
) -> Case:
    """The case of :func:`check_policy_loss`."""
    beta = 0.0 if objective in ("reward", "moved") else 0.4
    low, high = clip, clip if clip_high is None else clip_high
    far = (
        objective == "clip" and low == high
    )  # ratios of 1/2, 1 and 2; bounds that differ need ratios that come between them
    population = make_population(
        horizon=3 if group == 1 else 2,
        group=group,
        beta=beta,
        critic=critic,
        off_policy=far,
        silent=objective in ("kl", "forward_kl"),
        moved=MOVED if objective in OFF_POLICY and not far else 0.0,
    )
    goals: dict[str, Callable[[Population], Array]] = {
        "J": targets.reward_and_kl,
        "reward": targets.reward_and_kl,
        "moved": targets.reward_and_kl,
        "kl": targets.kl,
        "forward_kl": targets.forward_kl,
        "clip": functools.partial(targets.clip, low=low, high=high),
        "gspo": functools.partial(targets.gspo, low=low, high=high),
        "cispo": functools.partial(targets.cispo, cap=cap),
    }

    def candidates(p: Population) -> Iterator[Candidate]:
        if objective == "clip":
            yield from off_policy.clip_candidates(p, low, high)
        elif objective == "gspo":
            yield from off_policy.gspo_candidates(p, low, high)
        elif objective == "cispo":
            yield from off_policy.cispo_candidates(p, cap)
        elif objective == "moved":
            yield from off_policy.moved_candidates(p)
        elif objective == "forward_kl":
            yield from faults.forward_candidates(p)
        else:
            if group > 1 and objective != "kl":  # first, for here the baseline is known
                yield from faults.group_candidates(p, objective)
            yield from faults.policy_candidates(p, objective)

    without: dict[str, Callable[[Population], Population]] = {
        "rewards": lambda p: p.with_(world=p.world.with_(reward=np.zeros_like(p.world.reward))),
        "the distance to the reference": lambda p: p.with_(world=p.world.with_(reference=p.policy)),
        "a critic": lambda p: p.with_(old_values=np.zeros_like(p.old_values)),
        "the temperature": lambda p: p.with_(temperature=1.0),
    }
    return Case(
        WORDS[objective] + (f", groups of {group}" if group > 1 else ""),
        "raw",
        population,
        goals[objective],
        _make,
        candidates,
        None
        if objective in OFF_POLICY
        else functools.partial(
            _train_policy, population=population, objective=objective, critic=critic
        ),
        without,
        group,
        "k1 as a loss" if objective == "kl" else "zero in expectation",
    )


def _make(p: Population, change: Change) -> Batch:
    prompt, response, group = rows(p)
    prompt, response, group = _rearranged(change, p.group, prompt, response, group)
    if p.group > 1 and (change.copies > 1 or change.half is not None):
        group = np.arange(len(prompt)) // p.group
    return build(
        p, prompt, response, group, widen=change.widen, fill=change.fill, garbled=change.garbled
    )


def _rearranged(change: Change, group: int, *numbers: Rows) -> list[Rows]:
    """Row numbers of the changed batch, whole groups at a time."""
    n = len(numbers[0])
    order = np.arange(n).reshape(-1, group)
    if change.order:
        order = np.random.default_rng(3).permutation(order)
    if change.half is not None:
        order = order[change.half :: 2]
    return [np.concatenate([x[order.reshape(-1)]] * change.copies) for x in numbers]


def _train_policy(
    loss: Loss,
    *,
    population: Population,
    objective: str,
    critic: Critic,
    iterations: int = 150,
    n: int = 256,
) -> float:
    """Sample, step, and again: the share of the way that is left. Adam at a falling rate, so that
    the scale of the loss does not matter.
    """
    world, tau = population.world, population.temperature
    reference = exact.log_softmax(world.reference)
    start = population.policy if objective in ("kl", "forward_kl") else reference
    theta = torch.from_numpy(start * tau).clone().requires_grad_()
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for step in range(iterations):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / iterations)
        now = exact.log_softmax(theta.detach().numpy() / tau)
        at = population.with_(policy=now, data=now)
        if critic == "exact":
            at = at.with_(old_values=exact.values(world, now)[0])
        value = scalar(loss(build(at, *draw(at, n, rng), theta=theta)))
        if not value.requires_grad:
            return 1.0
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if theta.grad is None or not theta.grad.isfinite().all():
            return math.inf
        optimizer.step()
    end = exact.logprobs(population.tree, exact.log_softmax(theta.detach().numpy() / tau))
    first, ref = exact.logprobs(population.tree, start), exact.reference(world)
    if objective == "kl":
        return exact.kl(end, ref) / exact.kl(first, ref)
    if objective == "forward_kl":
        return exact.kl(ref, end) / exact.kl(ref, first)
    if objective == "reward":
        top = float(world.reward.max(1).mean())
        return (top - exact.expected(end, world.reward)) / (top - exact.expected(ref, world.reward))
    return exact.gap(world, end).relative


def check_likelihood(loss: Callable[[Batch], Any], *, train: bool = True) -> Verdict:
    """Whether the gradient of a loss for supervised fine-tuning is that of the negative
    log-likelihood, every token weighing the same.

    Args:
        loss: from a Batch of demonstrations (`logits()` or `logprobs`, `ids`, `mask`; the
            temperature is 1) to a scalar.
        train: see :func:`check_policy_loss`.
    """
    return judge(loss, likelihood_case(), train=train)


@functools.cache
def likelihood_case() -> Case:
    """The case of :func:`check_likelihood`."""
    population = make_population(temperature=1.0, off_policy=True)

    def goal(p: Population) -> Array:
        return (
            exact.visits(p.tree, p.data)[..., None]
            * (np.exp(p.data) - np.exp(p.policy))
            / p.temperature
            / len(p.world.prompts)
        )

    return Case(
        LIKELIHOOD,
        "raw",
        population,
        goal,
        _make,
        faults.likelihood_candidates,
        functools.partial(_train_likelihood, population=population),
    )


def _train_likelihood(
    loss: Loss, *, population: Population, iterations: int = 150, n: int = 256
) -> float:
    """KL(data, policy) that is left of where it began."""
    tree = population.tree
    theta = torch.from_numpy(population.policy.copy()).requires_grad_()
    rng, optimizer = np.random.default_rng(0), torch.optim.Adam([theta], lr=0.1)
    for step in range(iterations):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / iterations)
        optimizer.zero_grad()
        scalar(loss(build(population, *draw(population, n, rng), theta=theta))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    data = exact.logprobs(tree, population.data)
    end = exact.logprobs(tree, exact.log_softmax(theta.detach().numpy()))
    return exact.kl(data, end) / exact.kl(data, exact.logprobs(tree, population.policy))


# ---- pairs ----


def _make_pairs(p: Population, change: Change) -> PairBatch:
    prompt, chosen, rejected = _rearranged(change, 1, *pairs(p))
    return build_pairs(
        p, prompt, chosen, rejected, widen=change.widen, fill=change.fill, garbled=change.garbled
    )


def check_preference_loss(
    loss: Callable[[PairBatch], Any], beta: float = 0.4, *, train: bool = True
) -> Verdict:
    """Whether a preference loss is DPO's: its expected gradient at a policy that is no optimum,
    where beta inside the sigmoid matters.

    Args:
        loss: from a PairBatch to a scalar: of `policy_chosen`, ..., `ref_rejected` [B], or of the
            tokens of `chosen` and `rejected`.
        beta: the strength that the loss is to have; the batch's `beta` is the same.
        train: minimise it from the reference (L-BFGS on the population) and say what is left of the
            gap to pi*.
    """
    return judge(loss, preference_case(beta), train=train)


@functools.cache
def preference_case(beta: float = 0.4) -> Case:
    """The case of :func:`check_preference_loss`."""
    population = make_population(temperature=1.0, preferences=True, beta=beta)

    def train(loss: Loss) -> float:
        world = population.world
        prompt, chosen, rejected = pairs(population)
        start = exact.log_softmax(world.reference)
        theta = _minimise(
            lambda x: loss(build_pairs(population, prompt, chosen, rejected, theta=x)), start
        )
        return (
            exact.gap(world, exact.logprobs(population.tree, theta)).relative
            if np.isfinite(theta).all()
            else math.inf
        )

    without: dict[str, Callable[[Population], Population]] = {
        "the reference": lambda p: p.with_(
            world=p.world.with_(reference=np.zeros_like(p.world.reference))
        ),
        "beta": lambda p: p.with_(world=p.world.with_(beta=1.0)),
    }
    return Case(
        f"preference loss, DPO at beta {beta:g}",
        "raw",
        population,
        faults.preference_gradient,
        _make_pairs,
        faults.preference_candidates,
        train,
        without,
    )


def check_reward_loss(loss: Callable[[PairBatch], Any], *, train: bool = True) -> Verdict:
    """Whether the loss of a reward model is the Bradley-Terry likelihood of scores that stand at
    each response's last token.

    Args:
        loss: from a PairBatch to a scalar: of `score_chosen` and `score_rejected` [B], or of
            `chosen.scores` and `rejected.scores` [B, W], each column the head's output at that
            token.
        train: minimise it from scores of 0 and say how far the policy that is best by the learned
            scores stays from pi*.
    """
    return judge(loss, reward_case(), train=train)


@functools.cache
def reward_case() -> Case:
    """The case of :func:`check_reward_loss`."""
    population = make_population(temperature=1.0, preferences=True)

    def train(loss: Loss) -> float:
        world = population.world
        prompt, chosen, rejected = pairs(population)
        psi = _minimise(
            lambda x: loss(build_pairs(population, prompt, chosen, rejected, psi=x)),
            np.zeros_like(world.reward),
        )
        if not np.isfinite(psi).all():
            return math.inf
        return exact.gap(world, exact.optimum(world, reward=psi)[0]).relative

    return Case(
        "reward model, Bradley-Terry",
        "scores",
        population,
        faults.reward_gradient,
        _make_pairs,
        faults.reward_candidates,
        train,
    )


def _minimise(closure: Callable[[Tensor], Any], start: Array, steps: int = 150) -> Array:
    """L-BFGS on the whole population."""
    x = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=steps,
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


# ---- critics ----


def check_value_loss(loss: Callable[[Batch], Any], *, train: bool = True) -> Verdict:
    """Whether the fixed point of a critic's loss is V^pi: the rewards and penalties to come, from
    each state.

    The values stand within 0.1 of those of the policy, inside the range to which PPO clips them,
    and `old_values` are exact: every lambda has the same fixed point.

    Args:
        loss: from a Batch to a scalar, of `values` (with gradient), `old_values`, `rewards`,
            `beta`, `logprobs`, `ref_logprobs`, `mask`.
        train: fit a table of values with it and say what is left of its error.
    """
    return judge(loss, value_case(), train=train)


@functools.cache
def value_case() -> Case:
    """The case of :func:`check_value_loss`."""
    population = make_population()

    def goal(p: Population) -> Array:
        return (
            exact.visits(p.tree, p.data)
            * (exact.values(p.world, p.policy)[0] - p.values)
            / len(p.world.prompts)
        )

    return Case(
        "critic, V of the policy",
        "values",
        population,
        goal,
        _make,
        faults.critic_candidates,
        functools.partial(_train_critic, population=population),
    )


def _train_critic(
    loss: Loss, *, population: Population, iterations: int = 150, n: int = 256
) -> float:
    """The root mean square error that is left, from values of 0; old values are those of a moment ago."""
    phi = torch.zeros(population.values.shape, dtype=torch.float64, requires_grad=True)
    rng, optimizer = np.random.default_rng(0), torch.optim.Adam([phi], lr=0.1)
    for step in range(iterations):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / iterations)
        optimizer.zero_grad()
        at = population.with_(old_values=phi.detach().numpy().copy())
        scalar(loss(build(at, *draw(at, n, rng), phi=phi))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    truth, visits = (
        exact.values(population.world, population.policy)[0],
        exact.visits(population.tree, population.policy),
    )
    error = visits * (phi.detach().numpy() - truth) ** 2
    return math.sqrt(float(error.sum() / (visits * truth**2).sum()))


# ---- small batches ----


@dataclass(frozen=True)
class Draws:
    """Monte-Carlo estimates against the exact gradient.

    z: [seeds] the largest |z| over the parameters. chi2: [seeds] the squared distance in units of
    its covariance, over its degrees of freedom.
    """

    z: tuple[float, ...]
    chi2: tuple[float, ...]
    dof: int
    ok: bool


def unbiased(
    loss: Callable[[Batch], Any],
    objective: Objective | Literal["likelihood"] = "J",
    *,
    group: int = 1,
    critic: Critic = "exact",
    batch: int = 32,
    n: int = 20_000,
    seeds: tuple[int, ...] = (0, 1, 2),
    scale: float | None = None,
) -> Draws:
    """Whether the mean gradient of small sampled batches is the exact one. Only this sees what
    statistics of a small batch do.

    Args:
        objective, group, critic: see :func:`check_policy_loss`.
        batch, n: responses in a batch, and in all.
        scale: the length that the gradient should have over the exact one (1: a mean over responses
            of sums over tokens); None: any.

    Returns:
        ok where, for every seed, no parameter is 4.5 deviations off and chi2 is within five of its
        own deviations of 1.
    """
    case = (
        likelihood_case()
        if objective == "likelihood"
        else policy_case(objective, group=group, critic=critic)
    )
    target = case.exact(case.population).ravel()
    zs, chis, dof = [], [], 1
    for seed in seeds:
        rng = np.random.default_rng([seed, 17])
        batches = (
            build(case.population, *draw(case.population, batch, rng)) for _ in range(n // batch)
        )
        found = np.stack(
            [-case.parameters(look(loss, b, case.what).table).ravel() for b in batches]
        )
        mean, covariance = found.mean(0), np.cov(found.T) / len(found)
        values, vectors = np.linalg.eigh(covariance)
        live = values > 1e-9 * values.max()
        white = vectors[:, live] / np.sqrt(values[live])
        m, t = mean @ white, target @ white
        best = float(m @ t / (t @ t)) if scale is None else scale
        dof = int(live.sum()) - (scale is None)
        deviation = np.sqrt(np.diag(covariance))
        zs.append(
            float((np.abs(mean - best * target) / np.where(deviation > 0, deviation, np.inf)).max())
        )
        chis.append(float(((m - best * t) ** 2).sum()) / dof)
    ok = max(zs) < 4.5 and all(abs(c - 1) < 5 * math.sqrt(2 / dof) for c in chis)
    return Draws(tuple(zs), tuple(chis), dof, ok)
