"""The kinds of loss that can be checked: policy losses, likelihoods, pairs, critics."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from ..worlds.world import Array
from . import critic_target, targets, training
from .batch import Batch, PairBatch, build, build_pairs
from .case import Case, Change, Closer
from .clip_range import ClipRange, clip_range, ratio_of_itself
from .diagnosis import LIKELIHOOD
from .faults import critics, off_policy, policies
from .faults import pairs as pair_faults
from .faults.explain import Candidate
from .layout import Rows
from .measure import Loss
from .population import Critic, Population, make_population, pairs, rows

Objective = Literal["J", "reward", "kl", "forward_kl", "clip", "gspo", "cispo", "moved"]

TITLES: dict[str, str] = {
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
OWN_RATIO = (
    "The ratio is built from log-probabilities and a detached copy of themselves, so it is always "
    "1 and no clip ever acts. This is right for one optimizer step per batch. For more, use "
    'old_logprobs, and check the loss with objective "clip" too.'
)
MOVED = 0.5
"""Standard deviation of the noise between the two policies: token ratios range from 0.26 to 1.83.
"""


@functools.cache
def policy_case(
    objective: Objective = "J",
    *,
    group: int = 1,
    critic: Critic = "exact",
    clip: float = 0.2,
    clip_high: float | None = None,
    cap: float = 1.5,
    horizon: int | None = None,
) -> Case:
    """The case of `check_policy_loss`. horizon: most tokens of a response; default: 3, or 2 in
    groups.
    """
    low, high = clip, clip if clip_high is None else clip_high
    # For one clip range, ratios of 1/2, 1 and 2 are enough. To tell two bounds apart there must be
    # ratios between them.
    far = objective == "clip" and low == high
    population = make_population(
        horizon=horizon or (3 if group == 1 else 2),
        group=group,
        beta=0.0 if objective in ("reward", "moved") else 0.4,
        critic=critic,
        off_policy=far,
        no_reward=objective in ("kl", "forward_kl"),
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
            yield from policies.forward_candidates(p)
        else:
            if group > 1 and objective != "kl":  # these first, because they know the baseline
                yield from policies.group_candidates(p, objective)
            yield from policies.policy_candidates(p, objective)

    def closer(loss: Loss) -> Closer:
        if objective not in OFF_POLICY:
            own = ratio_of_itself(loss, build(population, *rows(population)))
            return Closer(remarks=(OWN_RATIO,) if own else ())
        found = clip_range(loss, population, one_token=objective == "moved")
        if found is None and objective == "moved":  # ratios of tokens in place of that of the whole
            found = clip_range(loss, population)
        if found is None:
            return Closer()
        if objective in ("cispo", "moved"):
            return _of_cap(found, objective, cap)
        return _of_clip(found, objective, population, (low, high))

    train = functools.partial(
        training.train_policy, population=population, objective=objective, critic=critic
    )
    return Case(
        TITLES[objective] + (f", groups of {group}" if group > 1 else ""),
        "raw",
        population,
        goals[objective],
        _make,
        candidates,
        None if objective in OFF_POLICY else train,
        {
            "rewards": lambda p: p.with_(world=p.world.with_(reward=np.zeros_like(p.world.reward))),
            "the distance to the reference": lambda p: p.with_(
                world=p.world.with_(reference=p.policy)
            ),
            "a critic": lambda p: p.with_(old_values=np.zeros_like(p.old_values)),
            "the temperature": lambda p: p.with_(temperature=1.0),
        },
        group,
        "k1 as a loss" if objective == "kl" else "zero in expectation",
        None if objective in ("kl", "forward_kl") else closer,
    )


def _of_clip(
    found: ClipRange, objective: Objective, population: Population, meant: tuple[float, float]
) -> Closer:
    """The clip that was measured beside the one that is meant."""
    low = 1 - found.low.ratio if found.low else math.inf
    high = found.high.ratio - 1 if found.high else math.inf
    # the lower bound of a clip of 1 or more is a ratio that does not exist
    right = all(
        bool(edge.stops and abs(got / want - 1) < 0.01) if edge else want >= most
        for edge, got, want, most in (
            (found.low, low, meant[0], 0.999),
            (found.high, high, meant[1], 999.0),
        )
    )
    said = found.sentence()
    if right:
        return Closer(remarks=(said,))
    if found.low is None and found.high is None and found.dual is None:
        return Closer(("not clipped",))
    asked = f"{1 - meant[0]:.6g} and {1 + meant[1]:.6g}"
    other = policy_case(objective, group=population.group, clip=low, clip_high=high)
    measured = replace(other, population=population)
    return Closer(("wrong clip range",), (f"{said} The check asks for {asked}.",), case=measured)


def _of_cap(found: ClipRange, objective: Objective, meant: float) -> Closer:
    """The cap that was measured beside the one that is meant; where responses are reweighted, no
    cap and no bound is meant.
    """
    said = found.sentence()
    edges = [e for e in (found.low, found.high, found.dual) if e is not None]
    if objective == "moved":
        if not edges:
            return Closer()
        kind = "weights masked" if any(e.stops for e in edges) else "weights truncated"
        caps = tuple(e.ratio for e in edges if e.ratio > 1)
        floors = tuple(e.ratio for e in edges if e.ratio < 1)
        candidates = functools.partial(off_policy.moved_candidates, caps=caps, floors=floors)
        return Closer((kind,), (said,), case=replace(policy_case("moved"), candidates=candidates))
    high = found.high
    if high is None or not high.stops:
        cap = high.ratio if high else math.inf
        if (cap == meant) if high is None else abs(cap / meant - 1) < 0.01:
            return Closer(remarks=(said,))
        if high is None:
            return Closer(("not capped",))
        measured = policy_case(objective, cap=cap)
        return Closer(
            ("wrong clip range",),
            (f"{said} The check asks for a cap of {meant:.6g}.",),
            case=measured,
        )
    return Closer(("gradient dropped beyond the cap",), (said,))


@functools.cache
def likelihood_case() -> Case:
    """The case of `check_likelihood`."""
    population = make_population(temperature=1.0, off_policy=True)
    return Case(
        LIKELIHOOD,
        "raw",
        population,
        targets.likelihood,
        _make,
        policies.likelihood_candidates,
        functools.partial(training.train_likelihood, population=population),
    )


@functools.cache
def preference_case(beta: float = 0.4) -> Case:
    """The case of `check_preference_loss`."""
    population = make_population(temperature=1.0, preferences=True, beta=beta)
    return Case(
        f"preference loss, DPO at beta {beta:g}",
        "raw",
        population,
        pair_faults.preference_gradient,
        _make_pairs,
        pair_faults.preference_candidates,
        functools.partial(training.train_preference, population=population),
        {
            "the reference": lambda p: p.with_(
                world=p.world.with_(reference=np.zeros_like(p.world.reference))
            ),
            "beta": lambda p: p.with_(world=p.world.with_(beta=1.0)),
        },
    )


@functools.cache
def reward_case() -> Case:
    """The case of `check_reward_loss`."""
    population = make_population(temperature=1.0, preferences=True)
    return Case(
        "reward model, Bradley-Terry",
        "scores",
        population,
        pair_faults.reward_gradient,
        _make_pairs,
        pair_faults.reward_candidates,
        functools.partial(training.train_reward, population=population),
    )


@functools.cache
def value_case() -> Case:
    """The case of `check_value_loss`."""
    population = make_population()
    return Case(
        "critic, V of the policy",
        "values",
        population,
        targets.values,
        _make,
        critics.critic_candidates,
        functools.partial(training.train_critic, population=population),
        closer=functools.partial(
            critic_target.closer, exact=population, wrong=make_population(critic="arbitrary")
        ),
    )


# ---- batches ----


def _make(p: Population, change: Change) -> Batch:
    prompt, response, group = _rearranged(change, p.group, *rows(p))
    if p.group > 1 and (change.copies > 1 or change.half is not None):
        group = np.arange(len(prompt)) // p.group
    return build(
        p, prompt, response, group, widen=change.widen, fill=change.fill, garbled=change.garbled
    )


def _make_pairs(p: Population, change: Change) -> PairBatch:
    prompt, chosen, rejected = _rearranged(change, 1, *pairs(p))
    return build_pairs(
        p, prompt, chosen, rejected, widen=change.widen, fill=change.fill, garbled=change.garbled
    )


def _rearranged(change: Change, group: int, *numbers: Rows) -> list[Rows]:
    """Row numbers of the changed batch, whole groups at a time."""
    order = np.arange(len(numbers[0])).reshape(-1, group)
    if change.order:
        order = np.random.default_rng(3).permutation(order)
    if change.half is not None:
        order = order[change.half :: 2]
    return [np.concatenate([x[order.reshape(-1)]] * change.copies) for x in numbers]
