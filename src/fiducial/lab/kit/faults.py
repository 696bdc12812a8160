r"""The gradient that each known mistake has in expectation, in closed form, and which of them a
gradient shows.

Whoever wrote it, a policy loss has on a population the gradient :math:`-E\sum_t
c_t(y)\,\nabla\log\pi(y_t|s_t)`. For the right one :math:`c_t = r(y) - \beta\sum_{u\ge
t}\log(\pi/\pi_{ref})(y_u|s_u) - b(s_t)` with any baseline b of the state. A mistake changes c in a
known way, so its gradient is a product of NumPy tables and no loss is run to get it. `explain`
finds the fewest mistakes that give the gradient that was found. Mistakes with ratios, off policy,
are in `fiducial.lab.kit.off_policy`.

Shapes: P prompts, S states of a prompt, V tokens, Y responses, T tokens of a response; see
`fiducial.lab.kit.population`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..worlds import exact
from ..worlds.world import EOS, Array, sigmoid
from .population import Population, Rows, likelihoods, outside, pairs
from .terms import (
    DISCOUNTS,
    Price,
    Terms,
    baselines,
    behind,
    credits,
    penalties,
    places,
    to_go,
    weights,
)

LEFT = 1e-6
"""A gradient is explained where no more than this share of it is left over."""


# ---- finding them ----


@dataclass(frozen=True)
class Candidate:
    """A direction of descent with these mistakes: a positive multiple of `fixed` + x * `strength` +
    y * `some` + any of `free`.

    strength: the KL penalty's part, at any x, which is then named unless it is 1. some: at any y >
    0. free: baselines, at any factors.
    """

    names: tuple[str, ...]
    fixed: Array
    strength: Array | None = None
    some: Array | None = None
    free: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The mistakes found, and the strength of the KL penalty as a multiple of the right one."""

    names: tuple[str, ...]
    strength: float = 1.0


def fit(direction: Array, candidate: Candidate, group: int = 1) -> Explanation | None:
    """The explanation, where the direction is what the candidate gives."""
    optional = [x for x in (candidate.strength, candidate.some) if x is not None]
    columns = np.stack([x.ravel() for x in (candidate.fixed, *optional, *candidate.free)], 1)
    g, lengths = direction.ravel(), np.linalg.norm(columns, axis=0)
    size, live = np.linalg.norm(g), lengths > 1e-12
    found = np.zeros(len(live))
    found[live] = np.linalg.lstsq(columns[:, live], g, rcond=1e-12)[0]
    if np.linalg.norm(g - columns @ found) > LEFT * size:
        return None
    a = float(found[0])
    if abs(a) * lengths[0] < 1e-6 * size:  # only the penalty is left
        return (
            Explanation((*candidate.names, "reward missing"))
            if candidate.strength is not None and found[1] > 0
            else None
        )
    if candidate.some is not None and found[len(optional)] / a < 1e-9:
        return None
    names = (*candidate.names, "sign turned") if a < 0 else candidate.names
    if candidate.strength is None or not live[1]:
        return Explanation(names)
    strength = float(found[1]) / a
    return Explanation((*names, *_of_strength(strength, group)), strength)


def _of_strength(strength: float, group: int) -> tuple[str, ...]:
    known = {1.0: (), 0.0: ("KL missing",), -1.0: ("KL sign turned",)}
    if group > 1:
        known[group / (group - 1)] = ("group mean includes itself",)
    return next(
        (names for value, names in known.items() if abs(strength - value) < 1e-5), ("wrong beta",)
    )


def explain(
    direction: Array, candidates: Iterable[Candidate], group: int = 1
) -> Explanation | None:
    """The fewest mistakes that give this direction of descent, or None."""
    best: Explanation | None = None
    for candidate in candidates:
        if best is not None and (len(best.names) == 1 or len(candidate.names) >= len(best.names)):
            continue
        found = fit(direction, candidate, group)
        if (
            found is not None
            and found.names
            and (best is None or len(found.names) < len(best.names))
        ):
            best = found
    return best


# ---- policies ----


def policy_candidates(population: Population, objective: str) -> Iterator[Candidate]:
    """Directions in which mistaken losses push a policy, those with one mistake before those with
    two. `objective`: "J", "reward" or "kl".
    """
    t, beta = Terms(population), population.world.beta if objective == "J" else 1.0
    weight, place, penalty, credit = weights(t), places(t), penalties(t), credits(t)
    free = {
        name: [tuple(t.gradient(w * b) for b in baselines(t)) for w in ws]
        for name, ws in weight.items()
    }

    def candidate(
        names: tuple[str, ...],
        w: Array,
        reward: Array,
        price: Price,
        back: Callable[[Array], Array],
        unknown: tuple[Array, ...],
    ) -> Candidate:
        cost = t.gradient(-beta * w * (back(price.cost) if price.carried else price.cost))
        if objective == "kl":
            return Candidate(names, cost, free=unknown)
        return Candidate(
            names,
            t.gradient(w * back(reward)),
            strength=cost if objective == "J" else None,
            free=unknown,
        )

    some_places = place if objective != "kl" else {"": place[""]}
    some_penalties = penalty if objective != "reward" else {"": penalty[""]}
    some_credits = credit if objective != "kl" else {"": to_go}
    choices = [
        (tuple(n for n in (a, b, c, d) if n), a, b, c, d)
        for a in weight
        for b in some_places
        for c in some_credits
        for d in some_penalties
    ]
    for most in (0, 1, 2):
        for names, a, b, c, d in sorted(
            choices, key=lambda x: not x[1]
        ):  # where a mask and a reward explain the same, it is the mask
            if len(names) == most:
                for i, w in enumerate(weight[a]):
                    for price in some_penalties[d]:
                        yield candidate(names, w, place[b], price, credit[c], free[a][i])
        if most == 1 and objective != "kl":
            surprise = t.gradient(
                -t.logp
            )  # the gradient of the entropies, the states taken as given
            right = candidate((), t.known, place[""], penalty[""][0], to_go, ())
            yield Candidate(("entropy bonus",), right.fixed, right.strength, surprise)
            yield from _with_a_critic(t, candidate, free)


def _with_a_critic(
    t: Terms, candidate: Callable[..., Candidate], free: dict[str, list[tuple[Array, ...]]]
) -> Iterator[Candidate]:
    """A_t = sum_k (gamma lambda)^k delta_{t + k}, delta_t = r_t + gamma V_{t + 1} - V_t: rewards
    and critic apart.
    """
    reward, price = places(t)[""], penalties(t)[""][0]

    def gae(name: tuple[str, ...], x: float, critic: Array) -> Candidate:
        made = candidate(name, t.known, reward, price, functools.partial(to_go, discount=x), ())
        return Candidate(name, made.fixed + t.gradient(critic), made.strength)

    late = behind(t.value) + t.behind
    for x in DISCOUNTS:
        back = functools.partial(to_go, discount=x)
        for weight in (
            "",
            "mean of means",
            "EOS not a label",
            "last token left out",
            "first token left out",
        ):
            for i, w in enumerate(weights(t)[weight]):
                name = (weight,) if weight else ()
                made = candidate(name, w, reward, price, back, ())
                critic = t.gradient(w * back(behind(t.value) - t.value))
                if x < 1 and t.value.any():
                    yield Candidate(
                        name or ("lambda with an inexact critic",),
                        made.fixed + critic,
                        made.strength,
                    )
                    yield candidate((*name, "discount"), w, reward, price, back, free[weight][i])
        yield gae(("bootstraps past the end",), x, back(behind(t.value) - t.value + t.behind))
        yield gae(("value read one token late",), x, back(behind(late) * t.known - late))
    for gamma in DISCOUNTS[1:]:
        for lam in DISCOUNTS:
            yield gae(
                ("discount",), gamma * lam, to_go(gamma * behind(t.value) - t.value, gamma * lam)
            )


def group_candidates(population: Population, objective: str) -> Iterator[Candidate]:
    """Customs of GRPO, in groups of two: dividing by the deviation, means within responses or
    groups; where the penalty is in the reward, and apart.
    """
    t, beta = Terms(population), population.world.beta
    p, lengths = likelihoods(population), t.lengths[..., 0]
    together = 1 / (
        lengths[:, :, None] + lengths[:, None, :]
    )  # [P, Y, Y] of the two responses' tokens

    def over_partners(x: Array) -> Array:
        return np.einsum("pij,pj->pi", x, p)[..., None]

    alone = np.ones_like(together)
    shares: dict[tuple[str, ...], tuple[Array, Array]] = {
        (): (t.known, alone),
        ("mean of means",): (t.known / t.lengths, alone),
        ("mean of groups' means",): (t.known, together),
    }
    for inside in (True, False) if objective == "J" else (True,):
        reward = population.world.reward - (
            beta * t.log_ratio.sum(-1) if inside and objective == "J" else 0.0
        )
        difference = reward[:, :, None] - reward[:, None, :]
        for deviation, half in _halves(difference):
            for means, (w, share) in shares.items():
                names = (*deviation, *means)
                if not names:
                    continue
                gain = t.gradient(w * over_partners(half * share))
                if inside:
                    yield Candidate(names, gain)
                    continue
                for penalty, prices in penalties(t).items():
                    for price in prices:
                        cost = to_go(price.cost) if price.carried else price.cost
                        yield Candidate(
                            (*names, penalty) if penalty else names,
                            gain,
                            t.gradient(-beta * w * over_partners(share) * cost),
                        )


def _halves(difference: Array) -> Iterator[tuple[tuple[str, ...], Array]]:
    """The advantage of the first of two, by what it is compared with and divided by."""
    yield (), difference
    yield ("baseline is the group's best",), np.minimum(difference, 0.0)
    yield ("negative advantages left out",), np.maximum(difference, 0.0)
    for correction in (1, 0):
        for eps in (0.0, 1e-8, 1e-6, 1e-5, 1e-4):
            sigma = np.abs(difference) / np.sqrt(2.0 if correction else 4.0) + eps
            yield (
                ("divided by the group's deviation",),
                np.divide(difference / 2, sigma, out=np.zeros_like(difference), where=sigma > 0),
            )


def likelihood_candidates(population: Population) -> Iterator[Candidate]:
    """The negative log-likelihood of the responses as demonstrations."""
    t = Terms(population)
    for weight, ws in weights(t).items():
        for w in ws:
            yield Candidate((weight,) if weight else (), t.gradient(w))
    uniform = (
        exact.visits(population.tree, population.data)[..., None]
        * (1 / 3 - np.exp(population.policy))
        / population.temperature
    )
    yield Candidate(("label smoothing",), t.gradient(t.known), some=uniform)


def forward_candidates(population: Population) -> Iterator[Candidate]:
    """Where KL(ref, pi) is meant."""
    t, price = Terms(population), penalties(Terms(population))
    yield Candidate(("reverse instead of forward KL",), t.gradient(-to_go(t.log_ratio)))
    kinds = {
        "": "k3 as a loss",
        "KL of each token alone": "k3 of each token as a loss",
        "reverse instead of forward KL": "KL of each token alone",
    }
    for name, kind in kinds.items():
        for weight, ws in weights(t).items():
            for w in ws:
                yield Candidate(
                    tuple(n for n in (name, weight) if n), t.gradient(-w * price[kind][0].cost)
                )


def critic_candidates(population: Population) -> Iterator[Candidate]:
    """Where the squared error to mistaken returns pulls values."""
    t, beta = Terms(population), population.world.beta
    now = t.of(population.values)
    penalty, right = -beta * t.log_ratio, places(t)[""]

    def target(x: float, reward: Array, boot: Array) -> Array:
        return to_go(reward, x) + to_go(boot, x)

    steps = behind(t.value) - t.value
    for x in DISCOUNTS:
        whole = target(x, right + penalty, steps) + t.value
        for weight, ws in weights(t).items():
            for place, reward in places(t).items():
                names = tuple(n for n in (weight, place) if n)
                if len(names) < 2:
                    for w in ws:
                        yield Candidate(
                            names, t.pull(w * (target(x, reward + penalty, steps) + t.value - now))
                        )
        yield Candidate(
            ("bootstraps past the end",),
            t.pull(target(x, right + penalty, steps + t.behind) + t.value - now),
        )
        yield Candidate(
            ("penalty missing from the target",), t.pull(target(x, right, steps) + t.value - now)
        )
        yield Candidate(
            ("KL sign turned",), t.pull(target(x, right - penalty, steps) + t.value - now)
        )
        yield Candidate(("advantage as the target",), t.pull(whole - t.value - now))
        yield Candidate(("value read one token late",), t.pull(whole - behind(now), late=True))
    for gamma in DISCOUNTS[1:]:
        for lam in DISCOUNTS:
            yield Candidate(
                ("discount",),
                t.pull(
                    target(gamma * lam, right + penalty, gamma * behind(t.value) - t.value)
                    + t.value
                    - now
                ),
            )


# ---- pairs ----


def pair_weights(population: Population) -> Array:
    """[P, Y, Y] how often the second axis's response was preferred to the third's; sums to 1."""
    prompt, chosen, rejected = pairs(population)
    out = np.zeros((len(population.world.prompts), *[len(population.world.responses)] * 2))
    np.add.at(out, (prompt, chosen, rejected), 1.0 / len(prompt))
    return out


SLOPES: dict[str, Callable[[Array], Array]] = {
    "": lambda u: sigmoid(-u),
    "no logarithm": lambda u: sigmoid(u) * sigmoid(-u),
    "hinge": lambda u: (u < 1).astype(float),
    "squared margin": lambda u: 2 * (0.5 - u),
}
"""-dL/du of a loss of the margin u, which holds beta, up to a factor; by what the loss is."""


def preference_gradient(
    population: Population,
    *,
    weight: Array | None = None,
    ref: float | None = 1.0,
    beta: float | None = None,
    kind: str = "",
    given: Array | float = 0.0,
) -> Array:
    """[P, S, V] minus the gradient of the expected DPO loss.

    Args:
        weight: [P, Y, T] how much a token counts in a log-ratio.
        ref: the factor of the reference's log-probabilities; None: the reference is the policy.
        beta: inside the loss; negative: chosen and rejected are exchanged.
        given: [P, Y] what padding adds to a log-ratio.
    """
    t = Terms(population)
    beta = population.world.beta if beta is None else beta
    weight = t.known if weight is None else weight
    other = t.logp if ref is None else ref * (t.logp - t.log_ratio)
    ratio = (weight * (t.logp - other)).sum(-1) + given
    slope = pair_weights(population) * SLOPES[kind](beta * (ratio[:, :, None] - ratio[:, None, :]))
    return np.einsum(
        "py,pyt,pytsv->psv", beta * (slope.sum(2) - slope.sum(1)), weight, t.scores, optimize=True
    )


def _padding(population: Population) -> tuple[Array, Array]:
    """[P, Y] the log-ratio of the first token of padding, and of all of it. Padding is EOS."""
    t = Terms(population)
    first, more = (
        a - b
        for a, b in zip(
            _pad_logprobs(population, "logits"), _pad_logprobs(population, "reference"), strict=True
        )
    )
    width = int((t.prompt_lengths + t.lengths).max())
    start = (t.prompt_lengths + t.lengths)[..., 0].astype(int)
    # the first column behind the end is predicted at the last token, a later one at the padding
    # before it
    later = np.array([[more[s:-1].sum() if s < width else 0.0 for s in row] for row in start])
    first = first * (start < width)
    return first, first + later


def _pad_logprobs(
    population: Population, kind: Literal["logits", "reference"]
) -> tuple[Array, Array]:
    ends, columns = outside(population, kind, 3)
    return tuple(exact.log_softmax(x / population.temperature)[..., EOS] for x in (ends, columns))  # type: ignore[return-value]


def preference_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken preference losses."""
    beta, t = population.world.beta, Terms(population)
    counted: dict[str, list[tuple[Array, Array | float]]] = {
        name: [(w, 0.0) for w in weights(t)[name]]
        for name in ("", "EOS not a label", "last token left out", "first token left out")
    }
    first, padding = _padding(population)
    counted["divided by the length"] = [(w, 0.0) for w in weights(t)["mean of means"]]
    counted["first token left out"] += [(t.known * (t.position > 0), first)]
    counted["trains on padding"] = [(t.known, padding)]
    right, swapped = preference_gradient(population), preference_gradient(population, beta=-beta)
    yield Candidate(("chosen and rejected exchanged",), swapped)
    yield Candidate(("label smoothing",), right, some=swapped)
    refs = {
        "": 1.0,
        "reference missing": 0.0,
        "reference turned round": -1.0,
        "reference is the policy": None,
    }
    betas = {"": beta, "beta missing": 1.0, "beta twice": beta**2}
    choices = [
        (tuple(n for n in (a, b, c, d) if n), a, b, c, d)
        for a in counted
        for b in refs
        for c in betas
        for d in SLOPES
    ]
    for names, a, b, c, d in sorted(choices, key=lambda x: len(x[0])):
        if len(names) <= 2:
            for w, given in counted[a]:
                yield Candidate(
                    names,
                    preference_gradient(
                        population, weight=w, ref=refs[b], beta=betas[c], kind=d, given=given
                    ),
                )


def score_table(population: Population) -> Array:
    """[P, S + Y] scores behind each token that does not end a response, and of each response."""
    return np.concatenate([population.inner_scores, population.scores], 1)


def reward_gradient(
    population: Population,
    *,
    pooling: Array | None = None,
    given: Array | float = 0.0,
    sign: float = 1.0,
    kind: str = "",
) -> Array:
    """[P, S + Y] minus the gradient of the expected Bradley-Terry loss.

    Args:
        pooling: [P, Y, S + Y] how a response's score is read from the table; default: its own.
        given: [P, Y] what is read outside it, from padding or the prompt.
        sign: -1: chosen and rejected are exchanged.
    """
    states, responses = len(population.tree.states), len(population.tree.responses)
    if pooling is None:
        pooling = np.broadcast_to(
            np.eye(states + responses)[states:],
            (len(population.world.prompts), responses, states + responses),
        )
    score = np.einsum("pyk,pk->py", pooling, score_table(population)) + given
    slope = pair_weights(population) * SLOPES[kind](sign * (score[:, :, None] - score[:, None, :]))
    return sign * np.einsum("py,pyk->pk", slope.sum(2) - slope.sum(1), pooling)


def reward_candidates(population: Population) -> Iterator[Candidate]:
    """Mistaken losses of reward models: read elsewhere, or another function of the margin."""
    world, tree = population.world, population.tree
    node, ids, rest = population.positions
    states, responses, width = len(tree.states), len(tree.responses), node.shape[2]
    first_row, ends = len(world.prompts) * states, len(world.prompts) * (states + responses)

    def read(
        columns: Callable[[int, int, Rows], list[int]], mean: bool = False
    ) -> tuple[Array, Array]:
        pooling, given = (
            np.zeros((len(world.prompts), responses, states + responses)),
            np.zeros((len(world.prompts), responses)),
        )
        for p, y in np.ndindex(*given.shape):
            chosen = columns(len(world.prompts[p]), int(tree.lengths[y]), ids[p, y])
            for n in (int(node[p, y, c]) for c in chosen):
                share = 1 / len(chosen) if mean else 1.0
                if n >= ends:
                    given[p, y] += share * rest[n - ends]
                else:
                    pooling[p, y, n - p * states if n < first_row else states + y] += share
        return pooling, given

    readings = {
        "": read(lambda p, n, row: [p + n - 1]),
        "score read one token early": read(lambda p, n, row: [p + n - 2]),
        "EOS taken for padding": read(lambda p, n, row: [int(np.flatnonzero(row != EOS).max())]),
        "first EOS of the row": read(lambda p, n, row: [int((row == EOS).argmax())]),
        "the token before the first EOS": read(lambda p, n, row: [int((row == EOS).argmax()) - 1]),
        "score read at the first padding": read(lambda p, n, row: [min(p + n, width - 1)]),
        "score read in the last column": read(lambda p, n, row: [width - 1]),
        "score read without the prompt": read(lambda p, n, row: [n - 1]),
        "score is a mean over tokens": read(lambda p, n, row: list(range(p, p + n)), mean=True),
        "score is a sum over tokens": read(lambda p, n, row: list(range(p, p + n))),
    }
    kinds = [k for k in SLOPES if k != "squared margin"]
    for most in (0, 1, 2):
        for reading, (pooling, given) in readings.items():
            for exchanged, sign in (("", 1.0), ("chosen and rejected exchanged", -1.0)):
                for kind in kinds:
                    name = (
                        "first EOS of the row"
                        if reading == "the token before the first EOS"
                        else reading
                    )
                    names = tuple(n for n in (name, exchanged, kind) if n)
                    if len(names) == most:
                        yield Candidate(
                            names,
                            reward_gradient(
                                population, pooling=pooling, given=given, sign=sign, kind=kind
                            ),
                        )
    both = pair_weights(population) + pair_weights(population).swapaxes(1, 2)
    pull = -(both * (population.scores[:, :, None] + population.scores[:, None, :])).sum(2)
    centred = np.concatenate([np.zeros((len(world.prompts), states)), pull], 1)
    yield Candidate(("centred scores",), reward_gradient(population), some=centred)
