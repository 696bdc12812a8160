"""Which token deserves the credit: the advantage that each method gives to every token, against the
exact one, Q - V of the policy.

Nothing here is sampled: rewards and values are laid out for every response, and the package's own
functions make advantages of them. What a group or a batch would estimate (a mean of returns) is its
expectation, which is what it comes to in a large one.

Shapes: P prompts, S states, Y responses, T tokens of the longest; column t speaks of token t.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core import advantages
from ..worlds import exact
from ..worlds.world import Array, World


def exact_advantages(world: World, logits: Array) -> Array:
    """[P, Y, T] Q - V of the policy with these logits [P, S, V] at each token of each response; 0
    behind its end.
    """
    value, q = exact.values(world, logits)
    path, token = world.tree.path, world.tree.token
    return np.where(path >= 0, q[:, path, token] - value[:, path], 0.0)


def rewards(world: World, logits: Array) -> Array:
    """[P, Y, T] what each token earns: less beta log(pi / pi_ref) at every token, and the score at
    the last.
    """
    path, token, known = world.tree.path, world.tree.token, world.tree.path >= 0
    ratio = exact.log_softmax(logits) - exact.log_softmax(world.reference)
    out = np.where(known, -world.beta * ratio[:, path, token], 0.0)
    out[:, np.arange(len(path)), world.tree.lengths - 1] += world.reward
    return out


def of_methods(
    world: World, logits: Array, critic: Array, judge: Array | None = None
) -> dict[str, Array]:
    """[P, Y, T] advantages by method.

    Args:
        critic: [P, S] PPO's values of each state.
        judge: [P, S] a process reward model's score after the tokens of each state; the whole
            response scores one half, as a table has it.
    """
    known = torch.from_numpy(world.tree.path >= 0)
    earned = rewards(world, logits)
    likely = torch.from_numpy(np.exp(exact.logprobs(world.tree, logits)))
    truth, _ = exact.values(world, logits)
    greedy = world.reward[np.arange(len(world.prompts)), _greedy(world, logits)]
    out: dict[str, list[Tensor]] = {}

    def add(name: str, advantage: Tensor) -> None:
        out.setdefault(name, []).append(torch.where(known, advantage, 0.0))

    for p in range(len(world.prompts)):
        paid = torch.from_numpy(earned[p])
        whole = advantages.sequence_return(paid, known)
        every = torch.ones(paid.shape, dtype=paid.dtype)
        add("reinforce_none", whole[:, None] * every)
        add(
            "remax",
            advantages.remax(whole, torch.full_like(whole, float(greedy[p])))[:, None] * every,
        )
        add("rloo", (whole - likely[p] @ whole)[:, None] * every)
        to_go = advantages.reward_to_go(paid, known)
        add(
            "reinforce_pp",
            to_go - (likely[p][:, None] * to_go).sum() / (likely[p][:, None] * known).sum(),
        )
        for name, values in (("ppo", critic), ("perfect", truth)):
            seen = torch.from_numpy(np.where(world.tree.path >= 0, values[p][world.tree.path], 0.0))
            add(name, advantages.gae(paid, seen, known, gamma=1.0, lam=0.95)[0])
        if judge is not None:
            steps = _steps(world, judge[p])
            both = paid + torch.from_numpy(steps)
            to_go = advantages.reward_to_go(both, known)
            add("rloo_steps", to_go - likely[p] @ to_go)
            add("step", torch.from_numpy(steps))
    return {name: torch.stack(rows).numpy() for name, rows in out.items()}


def _steps(world: World, judge: Array) -> Array:
    """[Y, T] what each token adds to the score of what was said before it; nothing said scores 0,
    the whole scores one half.
    """
    path, known, lengths = world.tree.path, world.tree.path >= 0, world.tree.lengths
    before = np.where(known, judge[path], 0.0)
    before[:, 0] = 0.0
    after = np.concatenate([before[:, 1:], np.zeros((len(path), 1))], 1)
    after[np.arange(len(path)), lengths - 1] = 0.5
    return np.where(known, after - before, 0.0)


def _greedy(world: World, logits: Array) -> list[int]:
    """The response of the most likely tokens to each prompt."""
    out = []
    for p in range(len(world.prompts)):
        s = 0
        while True:
            v = int(logits[p, s].argmax())
            if world.tree.leaf[s, v] >= 0:
                out.append(int(world.tree.leaf[s, v]))
                break
            s = int(world.tree.child[s, v])
    return out


def compared(world: World, logits: Array, found: dict[str, Array]) -> dict[str, dict[str, float]]:
    """Of each method, over all tokens of all responses as often as the policy says them:
    correlation with the exact advantage, the root mean square
    of the difference relative to that of the exact one, and the variance relative to its mean
    square.
    """
    weight = np.exp(exact.logprobs(world.tree, logits))[..., None] * (world.tree.path >= 0)
    weight = weight / weight.sum()
    true = exact_advantages(world, logits)
    size = float((weight * true**2).sum())
    out = {}
    for name, one in found.items():
        mean, mean_true = float((weight * one).sum()), float((weight * true).sum())
        spread = float((weight * (one - mean) ** 2).sum())
        both = float((weight * (one - mean) * (true - mean_true)).sum())
        out[name] = {
            "correlation": both / np.sqrt(spread * (weight * (true - mean_true) ** 2).sum()),
            "relative_error": float(np.sqrt((weight * (one - true) ** 2).sum() / size)),
            "variance": spread / size,
        }
    return {name: {k: float(v) for k, v in row.items()} for name, row in out.items()}


def worked(world: World, logits: Array) -> tuple[int, int, int]:
    """(prompt, response, response): the likeliest right response of the policy, and the likeliest
    of as many tokens that one token alone made wrong.
    """
    likely = np.exp(exact.logprobs(world.tree, logits))
    right = world.reward > 0.5
    p, y = (int(i) for i in np.unravel_index(np.where(right, likely, 0.0).argmax(), likely.shape))
    tokens = world.tree.token
    one = (tokens != tokens[y]).sum(1) == 1
    near = np.where(
        one & ~right[p] & (world.tree.lengths == world.tree.lengths[y]), likely[p], -1.0
    )
    return p, y, int(near.argmax())


WORDS = {
    "reinforce_none": ("REINFORCE", "The return itself, the same for every token."),
    "remax": ("ReMax", "Less the greedy response's score, the same for every token."),
    "rloo": ("RLOO", "Less the mean return (of a large group), the same for every token."),
    "reinforce_pp": (
        "REINFORCE++",
        "The reward to go less its mean over tokens: only the price of the KL differs between "
        "tokens.",
    ),
    "ppo": ("PPO", "GAE, lambda 0.95, with the critic that PPO had learned by then."),
    "perfect": (
        "PPO, a perfect critic",
        "GAE, lambda 0.95, with V itself: what a sample still hides.",
    ),
    "rloo_steps": (
        "RLOO + process rewards",
        "The reward to go, with what each token adds to the process reward model's score, less its "
        "mean at that token.",
    ),
    "step": (
        "Process reward alone",
        "What the token adds to the process reward model's score, which speaks of the reference, "
        "not of this policy.",
    ),
}


def credit(
    world: World, logits: Array, critic: Array, judge: Array | None, *, step: int, samples: int
) -> dict[str, Any]:
    """The section of the page: two responses token by token, and the methods over all responses."""
    found, true = of_methods(world, logits, critic, judge), exact_advantages(world, logits)
    numbers = compared(world, logits, found)
    p, right, wrong = worked(world, logits)
    tokens = world.tree.token
    key = decisive(world, p)
    shown = []
    for y in (right, wrong):
        n = int(world.tree.lengths[y])
        shown.append(
            {
                "response": world.response_text(y),
                "right": bool(world.reward[p, y] > 0.5),
                "decisive": [t for t in range(n) if t in key],
                "changed": [t for t in range(n) if tokens[y, t] != tokens[right, t]],
                "probability": float(np.exp(exact.logprobs(world.tree, logits)[p, y])),
                "exact": true[p, y, :n].tolist(),
                "methods": {name: one[p, y, :n].tolist() for name, one in found.items()},
            }
        )
    rows = [
        {"key": k, "name": WORDS[k][0], "words": WORDS[k][1], **numbers[k]}
        for k in WORDS
        if k in numbers
    ]
    return {
        "world": world.name,
        "prompt": world.prompt_text(p),
        "step": step,
        "samples": samples,
        "responses": shown,
        "rows": rows,
    }


def decisive(world: World, p: int) -> set[int]:
    """Places at which all right responses to a prompt have the same token."""
    right = world.tree.token[world.reward[p] > 0.5]
    return {
        t for t in range(right.shape[1]) if right[0, t] >= 0 and (right[:, t] == right[0, t]).all()
    }
