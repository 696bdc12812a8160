r"""The derivation of DPO with numbers: five steps from the KL-regularized objective to a loss on
pairs. Both sides of each step are computed independently.

The objective :math:`J(\pi) = E[r] - \beta\,KL(\pi\|\pi_{ref})` is maximized by :math:`\pi^* =
\pi_{ref}\,e^{r/\beta}/Z(x)`; so :math:`r = \beta\log(\pi^*/\pi_{ref}) + \beta\log Z(x)`. Z cancels
from the difference of two responses to one prompt, and a Bradley-Terry label depends on that
difference alone (Rafailov et al. 2023, arXiv 2305.18290, eqs. 3 to 7, appendices A.1 to A.3).

What is called numeric below was found by `optimize.maximize`, which knows none of these formulas.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from ..worlds import exact
from ..worlds.world import Array, World, bradley_terry
from .optimize import fit, maximize, population_loss, table_logprobs
from .results import DerivationStep, Recovered

Row = tuple[str, float, float]
Key = Literal["objective", "partition", "optimal_policy", "reward", "cancels"]


def derive(world: World) -> tuple[list[DerivationStep], Recovered]:
    """The steps of the derivation with both sides of each, and what minimizing DPO's loss recovers
    of the optimum.
    """
    numeric = maximize(world).logp
    steps = [
        _objective(world),
        _partition(world),
        _optimal_policy(world, numeric),
        _reward(world, numeric),
        _cancels(world, numeric),
    ]
    return steps, recovered(world)


def _step(
    key: Key,
    title: str,
    words: str,
    sides: tuple[str, str],
    difference: float,
    rows: list[Row],
) -> DerivationStep:
    return DerivationStep(
        key=key,
        title=title,
        words=words,
        left_name=sides[0],
        right_name=sides[1],
        difference=float(difference),
        rows=[(label, float(left), float(right)) for label, left, right in rows],
    )


def _text(world: World, p: int, y: int) -> str:
    return f"{world.prompt_text(p)} → {world.response_text(y)}"


def _few(world: World, count: int) -> list[tuple[int, int]]:
    """`count` prompts and responses, evenly spaced in rank from the most to the least likely under
    the optimum.
    """
    order = np.argsort(-exact.optimum(world)[0], axis=None, kind="stable")
    return [
        (int(i) // len(world.responses), int(i) % len(world.responses))
        for i in order[np.linspace(0, len(order) - 1, count).astype(int)]
    ]


def _objective(world: World) -> DerivationStep:
    best, log_z = exact.optimum(world)
    ref = exact.reference(world)
    rng = np.random.default_rng(0)
    policies = {
        "reference": ref,
        "optimum": best,
        "a random policy": exact.logprobs(world.tree, rng.normal(size=world.reference.shape)),
        "another random policy": exact.logprobs(
            world.tree, 2 * rng.normal(size=world.reference.shape)
        ),
        "best of 4": exact.best_of_n(ref, world.reward, 4),
    }
    rows = [
        (
            name,
            exact.objective(world, logp),
            world.beta * float(log_z.mean()) - world.beta * exact.kl(logp, best),
        )
        for name, logp in policies.items()
    ]
    return _step(
        "objective",
        "The objective is a distance to one policy",
        "For every policy, the mean reward minus β KL to the reference equals a constant minus β "
        "KL to the policy π*. So π* is the best policy, and the gap of any other policy is β times "
        "that distance.",
        ("E[r] - β KL(π ‖ ref)", "β E[log Z] - β KL(π ‖ π*)"),
        max(abs(a - b) for _, a, b in rows),
        rows,
    )


def _partition(world: World) -> DerivationStep:
    terms = np.exp(exact.reference(world)) * np.exp(world.reward / world.beta)
    value, _ = exact.soft_values(world)
    right = np.exp(value[:, 0] / world.beta)
    rows = [
        (world.prompt_text(p), float(terms[p].sum()), float(right[p]))
        for p in range(len(world.prompts))
    ]
    return _step(
        "partition",
        "The constant Z is the value of the prompt",
        f"Z(x) sums over all {len(world.responses):,} responses to a prompt. The backward "
        "recursion through the states, V(s) = β log Σ ref(a|s) exp(Q(s, a) / β), gives the same "
        "number: β log Z is the value of the prompt under the best policy.",
        ("Σ ref(y|x) exp(r / β)", "exp(V(x) / β)"),
        max(abs(a - b) for _, a, b in rows),
        rows[:6],
    )


def _optimal_policy(world: World, numeric: Array) -> DerivationStep:
    best, _ = exact.optimum(world)
    rows = [
        (_text(world, p, y), np.exp(best[p, y]), np.exp(numeric[p, y])) for p, y in _few(world, 5)
    ]
    return _step(
        "optimal_policy",
        "The best policy has a formula",
        "An optimizer that knows only the objective starts at the reference and ends at the policy "
        "that the formula gives. The rows show probabilities; the difference is the largest one of "
        "log-probabilities over all responses.",
        ("ref exp(r / β) / Z", "argmax of E[r] - β KL, found numerically"),
        np.abs(best - numeric).max(),
        rows,
    )


def _reward(world: World, numeric: Array) -> DerivationStep:
    _, log_z = exact.optimum(world)
    implied = world.beta * (numeric - exact.reference(world)) + world.beta * log_z[:, None]
    rows = [(_text(world, p, y), implied[p, y], world.reward[p, y]) for p, y in _few(world, 5)]
    return _step(
        "reward",
        "Solved for the reward, the formula gives it from the policy",
        "The log-ratio of the best policy to the reference gives the reward of a response up to "
        "β log Z(x), which all responses to a prompt share. The policy is the one found "
        "numerically.",
        ("β log(π* / ref) + β log Z", "r"),
        np.abs(implied - world.reward).max(),
        rows,
    )


def _cancels(world: World, numeric: Array) -> DerivationStep:
    def sides(w: World, logp: Array) -> tuple[Array, Array]:
        implicit = w.beta * (logp - exact.reference(w))  # no Z
        left = 1 / (1 + np.exp(-(implicit[:, :, None] - implicit[:, None, :])))
        return left, bradley_terry(w.reward)

    shift = np.random.default_rng(1).normal(size=(len(world.prompts), 1)) * 2
    moved = world.with_(reward=world.reward + shift)
    (left, right), (left_moved, right_moved) = (
        sides(world, numeric),
        sides(moved, maximize(moved).logp),
    )
    different = ~np.eye(len(world.responses), dtype=bool)
    difference = max(np.abs(a - right)[:, different].max() for a in (left, left_moved, right_moved))
    few = _few(world, 4)
    pairs = [(p, y, few[(i + 1) % len(few)][1]) for i, (p, y) in enumerate(few)]
    pairs = [(p, i, j if i != j else (i + 1) % len(world.responses)) for p, i, j in pairs]
    rows = [
        (f"{_text(world, p, i)} over {world.response_text(j)}", left[p, i, j], right[p, i, j])
        for p, i, j in pairs
    ]
    p, i, j = pairs[0]
    rows.append(
        (f"the first, r shifted by {shift[p, 0]:+.2f}", left_moved[p, i, j], right_moved[p, i, j])
    )
    z, z_moved = (np.exp(exact.optimum(w)[1]) for w in (world, moved))
    return _step(
        "cancels",
        "In a pair, Z cancels",
        "Two responses to one prompt share Z, so the policy alone gives the probability that one "
        "is preferred: this is DPO's loss. A reward that is shifted by a constant for each prompt "
        f"has another Z ({z_moved[p]:.3g} instead of {z[p]:.3g} for prompt "
        f"{world.prompt_text(p)}), but the same best policy and the same labels.",
        (
            "sigmoid(β log π*/ref of the first - that of the second)",
            "Bradley-Terry, sigmoid(r - r')",
        ),
        difference,
        rows,
    )


def recovered(world: World) -> Recovered:
    """What minimizing the package's DPO loss over all pairs, labeled by Bradley-Terry with the
    true reward, recovers of the optimum.
    """
    preference, weights = bradley_terry(world.reward), exact.pair_weights(world)
    best, _ = exact.optimum(world)
    found = fit(world, preference, weights, world.reference)
    at = torch.tensor(exact.logits_of(world.tree, best), requires_grad=True)
    (gradient,) = torch.autograd.grad(
        population_loss(world, preference, weights)(table_logprobs(world.tree, at)), at
    )
    return Recovered(
        loss=found.loss,
        entropy=exact.label_entropy(preference, weights),
        largest_logprob_error=float(np.abs(found.logp - best).max()),
        gradient_at_optimum=float(gradient.abs().max()),
    )
