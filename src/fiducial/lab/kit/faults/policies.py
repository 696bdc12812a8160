r"""The gradients of mistaken policy losses, likelihoods and KL losses, where the policy sampled the
responses itself.

Every policy loss, whoever wrote it, has on a population the gradient :math:`-E\sum_t
c_t(y)\,\nabla\log\pi(y_t|s_t)`. For the right one :math:`c_t = r(y) - \beta\sum_{u\ge
t}\log(\pi/\pi_{ref})(y_u|s_u) - b(s_t)` with any baseline b of the state. A mistake changes c in a
known way, so its gradient is a product of NumPy tables, and no loss is run to get it.

Shapes: P prompts, S states of a prompt, V tokens, Y responses, T tokens of a response; see
`fiducial.lab.kit.population`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from ...worlds import exact
from ...worlds.world import Array
from ..population import Population, likelihoods
from .explain import Candidate
from .terms import (
    DISCOUNTS,
    Penalty,
    Terms,
    baselines,
    credits,
    next_column,
    penalties,
    reward_placements,
    reward_to_go,
    token_weights,
)


def policy_candidates(population: Population, objective: str) -> Iterator[Candidate]:
    """Descent directions of mistaken policy losses: first without a mistake, then with one, then
    with two. `objective`: "J", "reward" or "kl".
    """
    t = Terms(population)
    beta = population.world.beta if objective == "J" else 1.0
    weights, places = token_weights(t), reward_placements(t)
    kinds, returns = penalties(t), credits(t)
    subtracted = {
        name: [tuple(t.gradient(w * b) for b in baselines(t)) for w in ws]
        for name, ws in weights.items()
    }

    def candidate(
        names: tuple[str, ...],
        w: Array,
        reward: Array,
        penalty: Penalty,
        credit: Callable[[Array], Array],
        unknown: tuple[Array, ...],
    ) -> Candidate:
        charged = credit(penalty.cost) if penalty.to_earlier else penalty.cost
        cost = t.gradient(-beta * w * charged)
        if objective == "kl":
            return Candidate(names, cost, baselines=unknown)
        gain = t.gradient(w * credit(reward))
        return Candidate(names, gain, cost if objective == "J" else None, baselines=unknown)

    if objective == "kl":
        places, returns = {"": places[""]}, {"": reward_to_go}
    if objective == "reward":
        kinds = {"": kinds[""]}
    choices = [
        (tuple(n for n in (a, b, c, d) if n), a, b, c, d)
        for a in weights
        for b in places
        for c in returns
        for d in kinds
    ]
    # where a mask and a reward explain the same gradient, the mask is named
    choices.sort(key=lambda x: not x[1])
    for most in (0, 1, 2):
        for names, a, b, c, d in choices:
            if len(names) == most:
                for i, w in enumerate(weights[a]):
                    for penalty in kinds[d]:
                        yield candidate(names, w, places[b], penalty, returns[c], subtracted[a][i])
        if most == 1 and objective != "kl":
            # the gradient of the entropies, for given states
            surprise = t.gradient(-t.logp)
            right = candidate((), t.mask, places[""], kinds[""][0], reward_to_go, ())
            yield Candidate(("entropy bonus",), right.gradient, right.penalty, surprise)
            yield from _with_a_critic(t, candidate, subtracted)


def _with_a_critic(
    t: Terms,
    candidate: Callable[..., Candidate],
    subtracted: dict[str, list[tuple[Array, ...]]],
) -> Iterator[Candidate]:
    """A_t = sum_k (gamma lambda)^k delta_{t + k} with delta_t = r_t + gamma V_{t + 1} - V_t, split
    into the part of the rewards and the part of the critic.
    """
    reward, penalty, values = reward_placements(t)[""], penalties(t)[""][0], t.old_values

    def gae(name: str, x: float, critic: Array) -> Candidate:
        credit = functools.partial(reward_to_go, discount=x)
        made = candidate((name,), t.mask, reward, penalty, credit, ())
        return Candidate((name,), made.gradient + t.gradient(critic), made.penalty)

    late = next_column(values) + t.after_end
    steps = next_column(values) - values
    for x in DISCOUNTS:
        credit = functools.partial(reward_to_go, discount=x)
        for weight in (
            "",
            "mean of response means",
            "EOS masked out",
            "last token left out",
            "first token left out",
        ):
            for i, w in enumerate(token_weights(t)[weight]):
                names = (weight,) if weight else ()
                made = candidate(names, w, reward, penalty, credit, ())
                critic = t.gradient(w * credit(steps))
                if x < 1 and values.any():
                    yield Candidate(
                        names or ("lambda with an inexact critic",),
                        made.gradient + critic,
                        made.penalty,
                    )
                    yield candidate(
                        (*names, "discount"), w, reward, penalty, credit, subtracted[weight][i]
                    )
        yield gae("bootstrap past the end", x, credit(steps + t.after_end))
        yield gae("value read one token late", x, credit(next_column(late) * t.mask - late))
    for gamma in DISCOUNTS[1:]:
        for lam in DISCOUNTS:
            critic = reward_to_go(gamma * next_column(values) - values, gamma * lam)
            yield gae("discount", gamma * lam, critic)


def group_candidates(population: Population, objective: str) -> Iterator[Candidate]:
    """The customs of GRPO, in groups of two: division by the standard deviation, means within
    responses or groups; with the penalty in the reward and with the penalty as a term of its own.
    """
    t, beta = Terms(population), population.world.beta
    p, lengths = likelihoods(population), t.lengths[..., 0]
    # [P, Y, Y] one over the number of tokens of both responses
    together = 1 / (lengths[:, :, None] + lengths[:, None, :])

    def over_partners(x: Array) -> Array:
        out: Array = np.einsum("pij,pj->pi", x, p)
        return out[..., None]

    alone = np.ones_like(together)
    shares: dict[tuple[str, ...], tuple[Array, Array]] = {
        (): (t.mask, alone),
        ("mean of response means",): (t.mask / t.lengths, alone),
        ("mean of group means",): (t.mask, together),
    }
    for inside in (True, False) if objective == "J" else (True,):
        penalty = beta * t.log_ratio.sum(-1) if inside and objective == "J" else 0.0
        reward = population.world.reward - penalty
        difference = reward[:, :, None] - reward[:, None, :]
        for baseline, half in _halves(difference):
            for means, (w, share) in shares.items():
                names = (*baseline, *means)
                if not names:
                    continue
                gain = t.gradient(w * over_partners(half * share))
                if inside:
                    yield Candidate(names, gain)
                    continue
                for name, kinds in penalties(t).items():
                    for kind in kinds:
                        cost = reward_to_go(kind.cost) if kind.to_earlier else kind.cost
                        yield Candidate(
                            (*names, name) if name else names,
                            gain,
                            t.gradient(-beta * w * over_partners(share) * cost),
                        )


def _halves(difference: Array) -> Iterator[tuple[tuple[str, ...], Array]]:
    """The advantage of the first of two responses, by what it is compared with and divided by."""
    yield (), difference
    yield ("baseline is the group's best",), np.minimum(difference, 0.0)
    yield ("negative advantages left out",), np.maximum(difference, 0.0)
    for correction in (1, 0):
        for eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-4):
            sigma = np.abs(difference) / np.sqrt(2.0 if correction else 4.0) + eps
            yield (
                ("divided by the group's standard deviation",),
                np.divide(difference / 2, sigma, out=np.zeros_like(difference), where=sigma > 0),
            )


def likelihood_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken negative log-likelihoods of the responses as demonstrations."""
    t = Terms(population)
    for weight, ws in token_weights(t).items():
        for w in ws:
            yield Candidate((weight,) if weight else (), t.gradient(w))
    uniform = (
        exact.visits(population.tree, population.data)[..., None]
        * (1 / 3 - np.exp(population.policy))
        / population.temperature
    )
    yield Candidate(("label smoothing",), t.gradient(t.mask), extra=uniform)


def forward_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken losses where KL(ref, pi) is intended."""
    t = Terms(population)
    kinds = penalties(t)
    yield Candidate(("reverse instead of forward KL",), t.gradient(-reward_to_go(t.log_ratio)))
    for name, kind in {
        "": "k3 as a loss",
        "KL not credited to earlier tokens": "per-token k3 as a loss",
        "reverse instead of forward KL": "KL not credited to earlier tokens",
    }.items():
        for weight, ws in token_weights(t).items():
            for w in ws:
                names = tuple(n for n in (name, weight) if n)
                yield Candidate(names, t.gradient(-w * kinds[kind][0].cost))
