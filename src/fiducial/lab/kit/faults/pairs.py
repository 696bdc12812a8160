"""The gradients of preference losses and of reward models' losses: right ones and mistaken ones.

Shapes: P prompts, S states of a prompt, V tokens, Y responses, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ...worlds import exact
from ...worlds.world import EOS, Array, sigmoid
from ..layout import Rows, filler, layout
from ..population import Population, outside, pairs
from .explain import Candidate
from .terms import Terms, token_weights


def pair_weights(population: Population) -> Array:
    """[P, Y, Y] how often the response of the second axis was preferred to that of the third; sums
    to 1.
    """
    prompt, chosen, rejected = pairs(population)
    out = np.zeros((len(population.world.prompts), *[len(population.world.responses)] * 2))
    np.add.at(out, (prompt, chosen, rejected), 1.0 / len(prompt))
    return out


SLOPES: dict[str, Callable[[Array], Array]] = {
    "": lambda u: sigmoid(-u),
    "no logarithm": lambda u: sigmoid(u) * sigmoid(-u),
    "hinge loss": lambda u: (u < 1).astype(float),
    "squared loss": lambda u: 2 * (0.5 - u),
}
"""-dL/du, up to a factor, of a loss of the margin u (which includes beta), by mistake."""


# ---- preferences ----


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
        weight: [P, Y, T] how much each token counts in a log-ratio.
        ref: the factor of the reference's log-probabilities; None: the reference is the policy.
        beta: beta inside the loss; negative: chosen and rejected are swapped.
        kind: a key of SLOPES.
        given: [P, Y] what padding adds to a log-ratio.
    """
    t = Terms(population)
    beta = population.world.beta if beta is None else beta
    weight = t.mask if weight is None else weight
    other = t.logp if ref is None else ref * (t.logp - t.log_ratio)
    ratio = (weight * (t.logp - other)).sum(-1) + given
    slope = pair_weights(population) * SLOPES[kind](beta * (ratio[:, :, None] - ratio[:, None, :]))
    each = beta * (slope.sum(2) - slope.sum(1))
    return t.weighted(each[..., None] * weight)


def _padding(population: Population) -> tuple[Array, Array]:
    """[P, Y] the log-ratio of the first token of padding, and of all padding. Padding is EOS."""
    t = Terms(population)

    def eos_logprobs(table: Array) -> Array:
        return exact.log_softmax(table / population.temperature)[..., EOS]

    policy, reference = outside(population, "logits", 3), outside(population, "reference", 3)
    first = eos_logprobs(policy[0]) - eos_logprobs(reference[0])
    more = eos_logprobs(policy[1]) - eos_logprobs(reference[1])
    width = int((t.prompt_lengths + t.lengths).max())
    start = (t.prompt_lengths + t.lengths)[..., 0].astype(int)
    # the first column after the end is predicted at the last token, a later one at the padding
    # before it
    later = np.array([[more[s:-1].sum() if s < width else 0.0 for s in row] for row in start])
    first = first * (start < width)
    return first, first + later


def preference_candidates(population: Population) -> Iterator[Candidate]:
    """Descent directions of mistaken preference losses."""
    beta, t = population.world.beta, Terms(population)
    weights = token_weights(t)
    counted: dict[str, list[tuple[Array, Array | float]]] = {
        name: [(w, 0.0) for w in weights[name]]
        for name in ("", "EOS masked out", "last token left out", "first token left out")
    }
    first, padding = _padding(population)
    counted["divided by the length"] = [(w, 0.0) for w in weights["mean of response means"]]
    counted["first token left out"] += [(t.mask * (t.position > 0), first)]
    counted["trains on padding"] = [(t.mask, padding)]
    right, swapped = preference_gradient(population), preference_gradient(population, beta=-beta)
    yield Candidate(("chosen and rejected swapped",), swapped)
    yield Candidate(("label smoothing",), right, extra=swapped)
    refs = {
        "": 1.0,
        "reference missing": 0.0,
        "reference has the wrong sign": -1.0,
        "reference is the policy": None,
    }
    betas = {"": beta, "beta missing": 1.0, "beta applied twice": beta**2}
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
                found = preference_gradient(
                    population, weight=w, ref=refs[b], beta=betas[c], kind=d, given=given
                )
                yield Candidate(names, found)


# ---- reward models ----


def score_table(population: Population) -> Array:
    """[P, S + Y] scores after each token that does not end a response, and of each response."""
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
        pooling: [P, Y, S + Y] how a response's score is read from the table; default: its own
            entry.
        given: [P, Y] the part that is read from padding or the prompt, outside the table.
        sign: -1: chosen and rejected are swapped.
        kind: a key of SLOPES.
    """
    states, responses = len(population.tree.states), len(population.tree.responses)
    if pooling is None:
        pooling = np.broadcast_to(
            np.eye(states + responses)[states:],
            (len(population.world.prompts), responses, states + responses),
        )
    score = np.einsum("pyk,pk->py", pooling, score_table(population)) + given
    slope = pair_weights(population) * SLOPES[kind](sign * (score[:, :, None] - score[:, None, :]))
    out: Array = sign * np.einsum("py,pyk->pk", slope.sum(2) - slope.sum(1), pooling)
    return out


def reward_candidates(population: Population) -> Iterator[Candidate]:
    """Descent directions of mistaken reward-model losses: scores read elsewhere, or another
    function of the margin.
    """
    world, tree = population.world, population.tree
    where = layout(world.prompts, world.horizon)
    node, ids = where.node.numpy(), where.ids.numpy()
    rest = filler("nonsense", where.rows - where.ends, "scores")
    states, responses, width = len(tree.states), len(tree.responses), node.shape[2]

    def read(
        columns: Callable[[int, int, Rows], list[int]], mean: bool = False
    ) -> tuple[Array, Array]:
        pooling = np.zeros((len(world.prompts), responses, states + responses))
        given = np.zeros((len(world.prompts), responses))
        for p, y in np.ndindex(*given.shape):
            chosen = columns(len(world.prompts[p]), int(tree.lengths[y]), ids[p, y])
            for n in (int(node[p, y, c]) for c in chosen):
                share = 1 / len(chosen) if mean else 1.0
                if n >= where.ends:
                    given[p, y] += share * rest[n - where.ends]
                else:
                    entry = n - p * states if n < where.states else states + y
                    pooling[p, y, entry] += share
        return pooling, given

    readings = [
        ("", read(lambda p, n, row: [p + n - 1])),
        ("score read one token early", read(lambda p, n, row: [p + n - 2])),
        (
            "EOS mistaken for padding",
            read(lambda p, n, row: [int(np.flatnonzero(row != EOS).max())]),
        ),
        ("first EOS of the row", read(lambda p, n, row: [int((row == EOS).argmax())])),
        ("first EOS of the row", read(lambda p, n, row: [int((row == EOS).argmax()) - 1])),
        ("score read at the first padding", read(lambda p, n, row: [min(p + n, width - 1)])),
        ("score read in the last column", read(lambda p, n, row: [width - 1])),
        ("score position ignores the prompt", read(lambda p, n, row: [n - 1])),
        (
            "score is a mean over tokens",
            read(lambda p, n, row: list(range(p, p + n)), mean=True),
        ),
        ("score is a sum over tokens", read(lambda p, n, row: list(range(p, p + n)))),
    ]
    kinds = [k for k in SLOPES if k != "squared loss"]
    for most in (0, 1, 2):
        for reading, (pooling, given) in readings:
            for swapped, sign in (("", 1.0), ("chosen and rejected swapped", -1.0)):
                for kind in kinds:
                    names = tuple(n for n in (reading, swapped, kind) if n)
                    if len(names) == most:
                        found = reward_gradient(
                            population, pooling=pooling, given=given, sign=sign, kind=kind
                        )
                        yield Candidate(names, found)
    both = pair_weights(population) + pair_weights(population).swapaxes(1, 2)
    pull = -(both * (population.scores[:, :, None] + population.scores[:, None, :])).sum(2)
    toward_zero = np.concatenate([np.zeros((len(world.prompts), states)), pull], 1)
    yield Candidate(("centered scores",), reward_gradient(population), extra=toward_zero)
