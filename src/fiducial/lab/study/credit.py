"""Credit: the advantage that each method gives to every token, against the exact one, Q - V of the
policy.

Nothing here is sampled. Rewards and values are computed for every response, and the package's own
functions turn them into advantages. What a group or a batch would estimate (a mean of returns) is
replaced by its expectation, to which it converges as the group grows.

Shapes: P prompts, S states, Y responses, T tokens of the longest; column t is about token t.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core import advantages
from ...verbs import title
from ..worlds import exact
from ..worlds.world import Array, World
from .results import Credit, CreditedResponse, CreditRow


def exact_advantages(world: World, logits: Array) -> Array:
    """[P, Y, T] Q - V of the policy with these logits [P, S, V] at each token of each response, and
    0 after its end.
    """
    value, q = exact.values(world, logits)
    path, token = world.tree.path, world.tree.token
    return np.where(path >= 0, q[:, path, token] - value[:, path], 0.0)


def rewards(world: World, logits: Array) -> Array:
    """[P, Y, T] the reward of each token: -beta log(pi / pi_ref) at every token, and the score at
    the last one.
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
        critic: [P, S] PPO's value of each state.
        judge: [P, S] a process reward model's score of the tokens so far, in each state. A finished
            response scores one half, which is what the model of a table says.
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
        returns = advantages.sequence_return(paid, known)
        every = torch.ones(paid.shape, dtype=paid.dtype)
        add("reinforce_none", returns[:, None] * every)
        add(
            "remax",
            advantages.remax(returns, torch.full_like(returns, float(greedy[p])))[:, None] * every,
        )
        add("rloo", (returns - likely[p] @ returns)[:, None] * every)
        following = advantages.reward_to_go(paid, known)
        weight = likely[p][:, None] * known
        add("reinforce_pp", following - (likely[p][:, None] * following).sum() / weight.sum())
        for name, values in (("ppo", critic), ("perfect", truth)):
            seen = torch.from_numpy(np.where(world.tree.path >= 0, values[p][world.tree.path], 0.0))
            add(name, advantages.gae(paid, seen, known, gamma=1.0, lam=0.95)[0])
        if judge is not None:
            steps = _steps(world, judge[p])
            both = paid + torch.from_numpy(steps)
            following = advantages.reward_to_go(both, known)
            add("rloo_steps", following - likely[p] @ following)
            add("step", torch.from_numpy(steps))
    return {name: torch.stack(rows).numpy() for name, rows in out.items()}


def _steps(world: World, judge: Array) -> Array:
    """[Y, T] what each token adds to the score of the tokens before it. An empty response scores 0,
    a finished one scores one half.
    """
    path, known, lengths = world.tree.path, world.tree.path >= 0, world.tree.lengths
    before = np.where(known, judge[path], 0.0)
    before[:, 0] = 0.0
    after = np.concatenate([before[:, 1:], np.zeros((len(path), 1))], 1)
    after[np.arange(len(path)), lengths - 1] = 0.5
    return np.where(known, after - before, 0.0)


def _greedy(world: World, logits: Array) -> list[int]:
    """The response to each prompt that takes the most likely token in every state."""
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
    """Each method's advantages against the exact ones, over all tokens of all responses, weighted
    by the policy's probabilities.

    correlation: with the exact advantage. relative_error: root mean square of the difference,
    relative to that of the exact advantage. variance: relative to its mean square.
    """
    weight = np.exp(exact.logprobs(world.tree, logits))[..., None] * (world.tree.path >= 0)
    weight = weight / weight.sum()
    true = exact_advantages(world, logits)
    size = float((weight * true**2).sum())
    out = {}
    for name, one in found.items():
        mean, mean_true = float((weight * one).sum()), float((weight * true).sum())
        variance = float((weight * (one - mean) ** 2).sum())
        both = float((weight * (one - mean) * (true - mean_true)).sum())
        out[name] = {
            "correlation": both / np.sqrt(variance * (weight * (true - mean_true) ** 2).sum()),
            "relative_error": float(np.sqrt((weight * (one - true) ** 2).sum() / size)),
            "variance": variance / size,
        }
    return {name: {k: float(v) for k, v in row.items()} for name, row in out.items()}


def worked(world: World, logits: Array) -> tuple[int, int, int]:
    """(prompt, response, response): the policy's most likely right response, and the most likely
    one of the same length that differs from it by one token and is wrong.
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


ROWS = {
    "reinforce_none": "The return of the response, the same for every token.",
    "remax": "The return minus the greedy response's score, the same for every token.",
    "rloo": "The return minus the mean return (of a large group), the same for every token.",
    "reinforce_pp": "The reward-to-go minus its mean over tokens: only the KL penalty differs "
    "between tokens.",
    "ppo": "GAE, lambda 0.95, with the critic that PPO had learned by then.",
    "perfect": "GAE, lambda 0.95, with the exact V: the noise of one sample remains.",
    "rloo_steps": "The reward-to-go, with what each token adds to the process reward model's "
    "score, minus its mean at that position.",
    "step": "What the token adds to the process reward model's score. That model was trained on "
    "the reference's responses, not on this policy's.",
}
"""The rows of the table, with one sentence each."""
TITLES = {"perfect": "PPO, a perfect critic", "step": "Process reward alone"}
"""Names of the rows that are not methods of the table of methods."""


def credit(
    world: World, logits: Array, critic: Array, judge: Array | None, *, step: int, samples: int
) -> Credit:
    """Two responses token by token, and the methods over all responses.

    Args:
        critic: see `of_methods`, as for `judge`.
        step: of the training run from which the policy comes.
        samples: responses that it had learned from by then.
    """
    found, true = of_methods(world, logits, critic, judge), exact_advantages(world, logits)
    numbers = compared(world, logits, found)
    p, right, wrong = worked(world, logits)
    tokens = world.tree.token
    key = decisive(world, p)
    shown = []
    for y in (right, wrong):
        n = int(world.tree.lengths[y])
        shown.append(
            CreditedResponse(
                response=world.response_text(y),
                right=bool(world.reward[p, y] > 0.5),
                decisive=[t for t in range(n) if t in key],
                changed=[t for t in range(n) if tokens[y, t] != tokens[right, t]],
                probability=float(np.exp(exact.logprobs(world.tree, logits)[p, y])),
                exact=true[p, y, :n].tolist(),
                methods={name: one[p, y, :n].tolist() for name, one in found.items()},
            )
        )
    rows = [
        CreditRow(key=k, name=TITLES.get(k) or title(k), words=words, **numbers[k])
        for k, words in ROWS.items()
        if k in numbers
    ]
    return Credit(
        world=world.name,
        prompt=world.prompt_text(p),
        step=step,
        samples=samples,
        responses=shown,
        rows=rows,
    )


def decisive(world: World, p: int) -> set[int]:
    """Positions at which all right responses to a prompt have the same token."""
    right = world.tree.token[world.reward[p] > 0.5]
    return {
        t for t in range(right.shape[1]) if right[0, t] >= 0 and (right[:, t] == right[0, t]).all()
    }
