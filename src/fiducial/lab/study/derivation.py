r"""DPO's derivation with numbers: five steps from the KL-regularised objective to a loss on pairs,
each side of each step computed on its own.

The objective :math:`J(\pi) = E[r] - \beta\,KL(\pi\|\pi_{ref})` is maximised by :math:`\pi^* =
\pi_{ref}\,e^{r/\beta}/Z(x)`; so :math:`r = \beta\log(\pi^*/\pi_{ref}) + \beta\log Z(x)`, and Z
cancels from the difference of two responses to one prompt, which is all that a Bradley-Terry label
depends on (Rafailov et al. 2023, arXiv 2305.18290, eqs. 3 to 7, appendices A.1 to A.3).

What is called numeric below was found by an optimiser that knows none of these formulas: L-BFGS on
a float64 table of logits [P, S, V], from the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...losses.preference import dpo_sum
from ..worlds import exact
from ..worlds.world import Array, Tree, World, bradley_terry, step_rewards

# ---- a table and an optimiser ----

STEPS = 500
"""Iterations of L-BFGS at the most."""


@dataclass(frozen=True)
class FitResult:
    """A policy found by L-BFGS."""

    logits: Array
    """[P, S, V]."""
    logp: Array
    """[P, Y] log-probabilities of its responses."""
    loss: float
    gradient: float
    """The largest entry of the gradient where it stopped, in absolute value, with respect to the
    variables that were moved.
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
    """The least value of a function of log-probabilities [P, Y], over tables of logits [P, S, V],
    from `start`.

    Args:
        scale: [P, S, V] the logits are start + scale * what the optimiser moves; default 1.
        line_search: strong Wolfe; without it steps are as long as L-BFGS proposes, for the last
            digits, where the objective no longer changes.
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
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
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


def maximise(world: World) -> FitResult:
    """The policy with the largest J, by L-BFGS on -J from the reference; `loss` is -J.

    J hardly depends on how a state is left that is hardly ever reached, so that on plain logits the
    rare responses converge last, if at all. Each round therefore moves the logits in units of 1 /
    sqrt(probability of coming to that token) of the policy it starts from, where all count alike.
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
    """The mean of the package's DPO loss over all labels there could be: a function of
    log-probabilities [P, Y].

    Args:
        preference: [P, Y, Y] probability that the second axis's response is preferred to the
            third's.
        weights: [P, Y, Y] how often two are compared: symmetric, 1 in sum over unordered pairs.
    """
    share = weights * preference
    p, winner, loser = (torch.from_numpy(x) for x in np.nonzero(share))
    share_of = torch.from_numpy(share)[p, winner, loser]
    ref = torch.from_numpy(exact.reference(world))

    def one(*four: Tensor) -> Tensor:
        # the shipped loss adds its pairs up without weights, so each pair is given to it alone
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
    """The policy with the least DPO loss on these labels, from the logits `start` [P, S, V]; see
    `population_loss`.

    Where no finite policy has the least loss (labels that all go one way) it is what `steps`
    iterations reach.
    """
    return lbfgs(
        world.tree,
        population_loss(world, preference, weights, label_smoothing=label_smoothing),
        start,
        steps,
    )


# ---- a state, an action, a reward ----


def setting(world: World) -> dict[str, Any]:
    """Generation as a decision process: one response that the optimum likes, token by token, with
    the optimum's probabilities, values and log-ratios.
    """
    tree, beta = world.tree, world.beta
    (best, log_z), ref = exact.optimum(world), exact.reference(world)
    logits = exact.logits_of(tree, best)
    step, step_ref = exact.log_softmax(logits), exact.log_softmax(world.reference)
    value, q = exact.soft_values(world)

    several = np.where(tree.lengths >= min(3, world.horizon), best, -np.inf)
    p, y = (int(i) for i in np.unravel_index(several.argmax(), several.shape))
    steps = []
    for t in range(int(tree.lengths[y])):
        s, a = tree.path[y, t], tree.token[y, t]
        ends = t + 1 == tree.lengths[y]
        steps.append(
            {
                "state": world.prompt_text(p) + world.response_text(y)[:t],
                "action": world.response_text(y)[t],
                "pi": float(np.exp(step[p, s, a])),
                "ref": float(np.exp(step_ref[p, s, a])),
                "log_ratio": float(step[p, s, a] - step_ref[p, s, a]),
                "reward": float(world.reward[p, y]) if ends else 0.0,
                "value": float(value[p, s]),
                "q": float(q[p, s, a]),
            }
        )
    return {
        "prompt": world.prompt_text(p),
        "response": world.response_text(y),
        "probability": float(np.exp(ref[p, y])),
        "reward": float(world.reward[p, y]),
        "steps": steps,
        "sum_log_ratio": sum(s["log_ratio"] for s in steps),
        "expected_reward": exact.expected(best, world.reward),
        "kl": exact.kl(best, ref),
        "beta": beta,
        "objective": exact.objective(world, best),
        "beta_log_z": float(beta * log_z.mean()),
        "z": [float(z) for z in np.exp(log_z)],
        "probabilities_sum": float(np.exp(exact.logprobs(tree, logits))[p].sum()),
    }


def sparse(world: World) -> list[dict[str, Any]]:
    """The two answers to a reward that comes only at the end, each with its two sides.

    arm: the response as one arm of a bandit. Its gradient, E[(r - beta log-ratio) grad log pi(y)],
    is that of the decision process, E[sum_t (Q - V) grad log pi(a_t | s_t)]: the norms of both, at
    a policy half-way between reference and optimum, and their largest difference. steps: what a
    perfect process reward pays for a step, the change in V*; over the response that `setting` shows
    it adds up to r - beta log Z. paid: where every step earns its own reward, the soft recursion
    still ends at beta log Z of the sum.
    """
    tree, beta = world.tree, world.beta
    (best, log_z), ref = exact.optimum(world), exact.reference(world)
    logits = (exact.log_softmax(world.reference) + exact.logits_of(tree, best)) / 2
    logp, step = exact.logprobs(tree, logits), np.exp(exact.log_softmax(logits))
    weight = np.exp(logp) * (world.reward - beta * (logp - ref)) / len(world.prompts)
    arm = np.zeros_like(step)
    for t in range(tree.horizon):
        alive = np.flatnonzero(tree.path[:, t] >= 0)
        for p in range(len(arm)):
            np.add.at(arm[p], (tree.path[alive, t], tree.token[alive, t]), weight[p, alive])
            np.add.at(
                arm[p], tree.path[alive, t], -weight[p, alive, None] * step[p, tree.path[alive, t]]
            )
    process = exact.gradient(world, logits)

    shown = setting(world)
    earned = sum(s["q"] - s["value"] for s in shown["steps"])
    which = next(p for p in range(len(world.prompts)) if world.prompt_text(p) == shown["prompt"])
    total = shown["reward"] - beta * float(log_z[which])

    paid = step_rewards(world, seed=0)
    first, z = (
        float(exact.soft_values(paid)[0][which, 0]),
        beta * float(exact.optimum(paid)[1][which]),
    )
    norms = [float(np.sqrt((g**2).sum())) for g in (arm, process)]
    return [
        {
            "key": "arm",
            "left": norms[0],
            "right": norms[1],
            "difference": float(np.abs(arm - process).max()),
        },
        {"key": "steps", "left": earned, "right": total, "difference": abs(earned - total)},
        {"key": "paid", "left": first, "right": z, "difference": abs(first - z)},
    ]


# ---- frontier, best-of-n ----


def frontier(world: World, betas: Array | None = None) -> dict[str, Any]:
    """The optima of all beta, with best-of-n beside them, and how well finite differences along the
    curve agree with what its slope must be.
    """
    if betas is None:
        betas = world.beta * np.geomspace(40.0, 1 / 40, 41)
    curve = exact.frontier(world, betas)
    # dE[r] / dKL = beta and dE[r] / d(1 / beta) = Var(r), by central differences in 1 / beta
    h = 1e-4
    up, down = exact.frontier(world, betas / (1 + h)), exact.frontier(world, betas / (1 - h))
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (up.reward - down.reward) / (up.kl - down.kl)
    variance = (up.reward - down.reward) * betas / (2 * h)
    moves = (
        np.abs(up.kl - down.kl) > 1e-6
        # elsewhere, as at the end of the curve with all mass on the best response, rounding is the
        # larger part
    )
    best = exact.optimum(world)[0]
    ref = exact.reference(world)
    return {
        "world": world.name,
        "beta": curve.beta.tolist(),
        "kl": curve.kl.tolist(),
        "reward": curve.reward.tolist(),
        "optimum": {
            "kl": exact.kl(best, ref),
            "reward": exact.expected(best, world.reward),
            "beta": world.beta,
        },
        "best_of_n": [
            {k: row[k] for k in ("n", "kl", "reward")}
            for row in best_of_n(world, [2, 4, 8, 16, 64, 256])["rows"]
        ],
        "slope_error": float(np.abs(slope / betas - 1)[moves].max()),
        "variance_error": float(np.abs(variance / curve.variance - 1)[moves].max()),
    }


def best_of_n(world: World, ns: list[int]) -> dict[str, Any]:
    """The exact best of n draws of the reference by the true reward: KL, reward, and how often it
    beats one draw (a tie is half a win).

    `ideal` is the same for 4,096 equally likely responses of different reward: the nearer to scores
    without mass, the nearer the KL comes to its bound.
    """
    ref = exact.reference(world)
    rows = []
    for n in ns:
        logp = exact.best_of_n(ref, world.reward, n)
        rows.append(
            {
                "n": n,
                "kl": exact.kl(logp, ref),
                "bound": float(exact.best_of_n_bound(n)),
                "reward": exact.expected(logp, world.reward),
                "win_rate": win_rate(logp, ref, world.reward),
                "win_bound": n / (n + 1),
            }
        )
    even = np.full((1, 4096), -np.log(4096))
    many = {n: exact.kl(exact.best_of_n(even, np.arange(4096.0)[None], n), even) for n in ns}
    return {
        "world": world.name,
        "rows": rows,
        "ideal": [
            {"n": n, "kl": kl, "bound": float(exact.best_of_n_bound(n))} for n, kl in many.items()
        ],
    }


def win_rate(logp: Array, logq: Array, score: Array) -> float:
    """How often a response of the one policy [P, Y] has a higher score than one of the other, a tie
    counted half; the mean over prompts.
    """
    rates = []
    for p, q, s in zip(np.exp(logp), np.exp(logq), score, strict=True):
        _, which = np.unique(s, return_inverse=True)
        mass = np.bincount(which, weights=q)
        rates.append((p * (np.cumsum(mass) - 0.5 * mass)[which]).sum())
    return float(np.mean(rates))


# ---- the five steps ----

Row = tuple[str, float, float]


def _step(
    key: str,
    title: str,
    words: str,
    left_name: str,
    right_name: str,
    difference: float,
    rows: list[Row],
) -> dict[str, Any]:
    return {
        "key": key,
        "title": title,
        "words": words,
        "left_name": left_name,
        "right_name": right_name,
        "difference": float(difference),
        "rows": [[label, float(left), float(right)] for label, left, right in rows],
    }


def derive(world: World) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The steps of the derivation, left and right side of each, and what minimising DPO's loss
    recovers of the optimum.
    """
    numeric = maximise(world).logp
    steps = [
        _objective(world),
        _partition(world),
        _optimal_policy(world, numeric),
        _reward(world, numeric),
        _cancels(world, numeric),
    ]
    return steps, recovered(world)


def _text(world: World, p: int, y: int) -> str:
    return f"{world.prompt_text(p)} → {world.response_text(y)}"


def _few(world: World, count: int) -> list[tuple[int, int]]:
    """Prompts and responses from the likeliest to the least likely under the optimum, evenly apart
    in rank.
    """
    order = np.argsort(-exact.optimum(world)[0], axis=None, kind="stable")
    return [
        (int(i) // len(world.responses), int(i) % len(world.responses))
        for i in order[np.linspace(0, len(order) - 1, count).astype(int)]
    ]


def _objective(world: World) -> dict[str, Any]:
    best, log_z = exact.optimum(world)
    ref = exact.reference(world)
    rng = np.random.default_rng(0)
    policies = {
        "reference": ref,
        "optimum": best,
        "a random policy": exact.logprobs(world.tree, rng.normal(size=world.reference.shape)),
        "another": exact.logprobs(world.tree, 2 * rng.normal(size=world.reference.shape)),
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
        "Whatever the policy, its reward less β KL to the reference is a constant less β KL to the "
        "policy π*. "
        "So π* is the best there is, and what any other policy lacks is that distance.",
        "E[r] - β KL(π ‖ ref)",
        "β E[log Z] - β KL(π ‖ π*)",
        max(abs(a - b) for _, a, b in rows),
        rows,
    )


def _partition(world: World) -> dict[str, Any]:
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
        f"Z(x) sums over all {len(world.responses):,} responses to a prompt. Going backwards "
        "through the states, "
        "V(s) = β log Σ ref(a|s) exp(Q(s, a) / β), leads to the same number: β log Z is what the "
        "prompt is worth under the best policy.",
        "Σ ref(y|x) exp(r / β)",
        "exp(V(x) / β)",
        max(abs(a - b) for _, a, b in rows),
        rows[:6],
    )


def _optimal_policy(world: World, numeric: Array) -> dict[str, Any]:
    best, _ = exact.optimum(world)
    rows = [
        (_text(world, p, y), np.exp(best[p, y]), np.exp(numeric[p, y])) for p, y in _few(world, 5)
    ]
    return _step(
        "optimal_policy",
        "The best policy has a formula",
        "An optimiser that knows only the objective climbs from the reference and ends at the "
        "policy that the formula names. "
        "The rows are probabilities; the difference is that of log-probabilities, over all "
        "responses.",
        "ref exp(r / β) / Z",
        "argmax of E[r] - β KL, found numerically",
        np.abs(best - numeric).max(),
        rows,
    )


def _reward(world: World, numeric: Array) -> dict[str, Any]:
    _, log_z = exact.optimum(world)
    implied = world.beta * (numeric - exact.reference(world)) + world.beta * log_z[:, None]
    rows = [(_text(world, p, y), implied[p, y], world.reward[p, y]) for p, y in _few(world, 5)]
    return _step(
        "reward",
        "Turned round, the policy holds the reward",
        "How much likelier the best policy makes a response than the reference does says what its "
        "reward is, but for β log Z(x), "
        "which all responses to a prompt share. The policy is the one found numerically.",
        "β log(π* / ref) + β log Z",
        "r",
        np.abs(implied - world.reward).max(),
        rows,
    )


def _cancels(world: World, numeric: Array) -> dict[str, Any]:
    def sides(w: World, logp: Array) -> tuple[Array, Array]:
        implicit = w.beta * (logp - exact.reference(w))  # no Z
        left = 1 / (1 + np.exp(-(implicit[:, :, None] - implicit[:, None, :])))
        return left, bradley_terry(w.reward)

    shift = np.random.default_rng(1).normal(size=(len(world.prompts), 1)) * 2
    moved = world.with_(reward=world.reward + shift)
    (left, right), (left_moved, right_moved) = (
        sides(world, numeric),
        sides(moved, maximise(moved).logp),
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
        "Two responses to one prompt share Z, so the probability that one is preferred follows "
        "from the policy alone: that is DPO's loss. "
        f"A reward shifted by any number for each prompt has another Z ({z_moved[p]:.3g} in place "
        f"of {z[p]:.3g} for prompt {world.prompt_text(p)}), "
        "the same best policy and the same labels.",
        "sigmoid(β log π*/ref of the one - that of the other)",
        "Bradley-Terry, sigmoid(r - r')",
        difference,
        rows,
    )


def recovered(world: World) -> dict[str, Any]:
    """What minimising the package's DPO loss over all pairs, labelled by Bradley-Terry with the
    true reward, recovers of the optimum.
    """
    preference, weights = bradley_terry(world.reward), exact.pair_weights(world)
    best, _ = exact.optimum(world)
    found = fit(world, preference, weights, world.reference)
    at = torch.tensor(exact.logits_of(world.tree, best), requires_grad=True)
    (gradient,) = torch.autograd.grad(
        population_loss(world, preference, weights)(table_logprobs(world.tree, at)), at
    )
    return {
        "loss": found.loss,
        "entropy": exact.label_entropy(preference, weights),
        "largest_logprob_error": float(np.abs(found.logp - best).max()),
        "gradient_at_optimum": float(gradient.abs().max()),
    }
