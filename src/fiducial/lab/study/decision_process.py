"""Generation as a decision process, in one response, and the two answers to a reward that comes
only at its end.
"""

from __future__ import annotations

import numpy as np

from ..worlds import exact
from ..worlds.world import World, step_rewards
from .results import Decision, DecisionProcess, SparseAnswer


def decision_process(world: World) -> DecisionProcess:
    """One response that is likely under the optimum, token by token, with the optimum's
    probabilities, values and log-ratios.
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
            Decision(
                state=world.prompt_text(p) + world.response_text(y)[:t],
                action=world.response_text(y)[t],
                pi=float(np.exp(step[p, s, a])),
                ref=float(np.exp(step_ref[p, s, a])),
                log_ratio=float(step[p, s, a] - step_ref[p, s, a]),
                reward=float(world.reward[p, y]) if ends else 0.0,
                value=float(value[p, s]),
                q=float(q[p, s, a]),
            )
        )
    return DecisionProcess(
        prompt=world.prompt_text(p),
        response=world.response_text(y),
        probability=float(np.exp(ref[p, y])),
        reward=float(world.reward[p, y]),
        steps=steps,
        sum_log_ratio=sum(s.log_ratio for s in steps),
        expected_reward=exact.expected(best, world.reward),
        kl=exact.kl(best, ref),
        beta=beta,
        objective=exact.objective(world, best),
        beta_log_z=float(beta * log_z.mean()),
        z=[float(z) for z in np.exp(log_z)],
        probabilities_sum=float(np.exp(exact.logprobs(tree, logits))[p].sum()),
    )


def sparse_answers(world: World) -> list[SparseAnswer]:
    """The answers to a reward that comes only at the end, each with both sides of its formula.

    arm: the response as one arm of a bandit. Its gradient, E[(r - beta log-ratio) grad log pi(y)],
        is that of the decision process, E[sum_t (Q - V) grad log pi(a_t | s_t)]. The sides are the
        norms of the two at a policy half-way between reference and optimum, the difference is the
        largest one of their entries.
    steps: a perfect process reward pays the change in V* at each step. Over the response that
        `decision_process` shows, these add up to r - beta log Z.
    paid: if every step earns a reward of its own, the soft recursion still ends at beta log Z of
        their sum.
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

    shown = decision_process(world)
    earned = sum(s.q - s.value for s in shown.steps)
    which = next(p for p in range(len(world.prompts)) if world.prompt_text(p) == shown.prompt)
    total = shown.reward - beta * float(log_z[which])

    paid = step_rewards(world, seed=0)
    first, z = (
        float(exact.soft_values(paid)[0][which, 0]),
        beta * float(exact.optimum(paid)[1][which]),
    )
    norms = [float(np.sqrt((g**2).sum())) for g in (arm, process)]
    return [
        SparseAnswer("arm", norms[0], norms[1], float(np.abs(arm - process).max())),
        SparseAnswer("steps", earned, total, abs(earned - total)),
        SparseAnswer("paid", first, z, abs(first - z)),
    ]
