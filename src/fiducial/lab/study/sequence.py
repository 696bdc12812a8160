"""The sequence-level losses as the methods put them together, on the batches of the kit, and their
rows in the table of estimators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import losses
from ...core import advantages, corrections, kl
from ...core.loss_aggregation import constant, sequence_mean, token_mean
from ...rewards import Scored
from ...rollout.shaping import Looks, ScoreSettings, shape
from ..kit import cases as kit
from ..kit.batch import Batch
from ..kit.case import Case
from ..kit.measure import Loss
from ..kit.population import Population
from ..worlds import exact

# ---- the losses ----


def paid(batch: Batch) -> Tensor:
    """Rewards of tokens [N, W] as the methods shape them: k1 at every token, the score at the last."""
    looks = Looks(
        batch.logprobs.detach(),
        batch.ref_logprobs,
        torch.zeros_like(batch.ref_logprobs),
        batch.old_values,
    )
    return shape(
        batch.trajectory,
        Scored(batch.rewards.tolist(), {}),
        looks,
        ScoreSettings(),
        {"beta": batch.beta},
    )[0]


def whole(batch: Batch) -> Tensor:
    """Returns [N] of whole responses."""
    return advantages.sequence_return(paid(batch), batch.mask)


def reinforce(batch: Batch, advantage: Tensor) -> Tensor:
    """The policy gradient of advantages [N] or [N, W]: a mean over responses of sums over their tokens."""
    each = advantage if advantage.dim() == 2 else advantage[:, None].expand(batch.mask.shape)
    return losses.reinforce_sum(batch.logprobs, each, batch.mask)[0] / len(batch)


def reinforce_plus_plus(batch: Batch) -> Tensor:
    """REINFORCE++: the reward to go, whitened over the batch."""
    return reinforce(
        batch, advantages.whitened(advantages.reward_to_go(paid(batch), batch.mask), batch.mask)
    )


def grouped(
    batch: Batch, advantage: Callable[[Tensor, Tensor], Tensor], weights: Callable[[Tensor], Tensor]
) -> Tensor:
    """GRPO's kin: returns [N] and groups [N] to advantages [N], a mask to the weights of its
    tokens, PPO's clip.
    """
    each = advantage(whole(batch), batch.group)[:, None] * weights(batch.mask)
    return losses.ppo_clip_sum(batch.logprobs, batch.old_logprobs, each, batch.mask)[0]


def grpo(batch: Batch) -> Tensor:
    """GRPO as its paper has it: both divisions, and k3 of each token in the loss."""
    weights = sequence_mean(batch.mask)
    each = advantages.group_normalised(batch.rewards, batch.group)[:, None] * weights
    price = kl.penalty(
        batch.logprobs, batch.ref_logprobs, batch.old_logprobs, batch.mask, estimator="forward_k3"
    )
    return (
        losses.ppo_clip_sum(batch.logprobs, batch.old_logprobs, each, batch.mask)[0]
        + batch.beta * (weights * price).sum()
    )


def by_group(mask: Tensor, size: int = 2) -> Tensor:
    """Weights of DAPO where a step is one group; the rows of a group stand together."""
    return torch.cat([token_mean(m) for m in mask.split(size)]) * size / len(mask)


def centred(batch: Batch) -> Tensor:
    """[N, W] scores less their mean, which is what a running mean comes to, at every token."""
    return (batch.rewards - batch.rewards.mean())[:, None].expand(batch.mask.shape)


def corrected(
    batch: Batch, weights: Callable[..., Tensor] | None = None, **keywords: Any
) -> Tensor:
    """The policy gradient at the policy as it is now, of responses that another one wrote."""
    w = (
        batch.mask.double()
        if weights is None
        else weights(batch.logprobs, batch.old_logprobs, batch.mask, **keywords)
    )
    return reinforce(batch, w * centred(batch))


def surrogate(batch: Batch, loss_sum: Callable[..., tuple[Tensor, Any]], **keywords: Any) -> Tensor:
    """A surrogate for more steps on the same responses: a mean over responses of sums over their
    tokens.
    """
    return loss_sum(batch.logprobs, batch.old_logprobs, centred(batch), batch.mask, **keywords)[
        0
    ] / len(batch)


def gspo(batch: Batch, **keywords: Any) -> Tensor:
    """GSPO: every response counts once."""
    return losses.gspo_sum(
        batch.logprobs,
        batch.old_logprobs,
        centred(batch) * sequence_mean(batch.mask),
        batch.mask,
        **keywords,
    )[0]


def greedy_returns(population: Population) -> Tensor:
    """[P] the return of the likeliest response to each prompt, token by token: what ReMax compares
    with.
    """
    out = []
    logp, ref = (
        exact.logprobs(population.tree, x) for x in (population.policy, population.world.reference)
    )
    for p, table in enumerate(population.policy):
        state = 0
        while (y := int(population.tree.leaf[state, table[state].argmax()])) < 0:
            state = int(population.tree.child[state, table[state].argmax()])
        out.append(population.world.reward[p, y] - population.world.beta * (logp - ref)[p, y])
    return torch.tensor(out, dtype=torch.float64)


# ---- their rows ----

Add = Callable[[str, str, Case, Loss, str], None]


def rows(add: Add) -> None:
    """On policy: baselines and groups of two."""
    j, one, two = "grad J", kit.policy_case(), kit.policy_case(group=2)
    greedy = greedy_returns(one.population)
    add(
        "REINFORCE, no baseline",
        j,
        one,
        lambda b: reinforce(b, whole(b)),
        "The whole return as the credit of every token: exact, and noisy.",
    )
    add(
        "REINFORCE, running mean",
        j,
        one,
        lambda b: reinforce(b, whole(b) - whole(b).mean()),
        "A constant knows nothing of the response.",
    )
    add(
        "REINFORCE, greedy response's score (ReMax)",
        j,
        one,
        lambda b: reinforce(b, advantages.remax(whole(b), greedy[b.group])),
        "No sampled response has a part in it.",
    )
    add(
        "REINFORCE, leave-one-out of 2 (RLOO)",
        j,
        two,
        lambda b: reinforce(b, advantages.leave_one_out(whole(b), b.group)),
        "The others of the group know nothing of the response.",
    )

    plain: Callable[[Tensor], Tensor] = functools.partial(constant, length=1)
    by_length = functools.partial(constant, length=two.population.world.horizon)
    kin: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
        "group mean, groups of 2": (
            advantages.group_mean,
            plain,
            "It holds the response itself: short by (G - 1) / G, in the right direction.",
        ),
        "Dr. GRPO, groups of 2": (
            advantages.group_mean,
            by_length,
            "The group's mean, and a constant length: the right direction at another rate.",
        ),
        "GRPO's deviation alone, groups of 2": (
            advantages.group_normalised,
            plain,
            "Groups that hardly differ weigh as much as others.",
        ),
        "GRPO's mean within each response alone, groups of 2": (
            advantages.group_mean,
            sequence_mean,
            "A token of a short response weighs more.",
        ),
        "GRPO, groups of 2, k1 in the reward": (
            advantages.group_normalised,
            sequence_mean,
            "Both divisions; here responses of one token break even, so that the second changes no "
            "more than the length.",
        ),
        "DAPO's mean over tokens, steps of one group": (
            advantages.group_mean,
            by_group,
            "The denominator knows the responses; in a large step it is nearly a constant.",
        ),
    }
    for name, (advantage, weights, words) in kin.items():
        add(name, j, two, functools.partial(grouped, advantage=advantage, weights=weights), words)
    add(
        "GRPO, groups of 2, k3 in the loss",
        j,
        two,
        grpo,
        "Its paper's form: both divisions, and the forward KL.",
    )


def off_policy_rows(add: Add) -> None:
    """Of responses that another policy wrote, against the exact policy gradient at the policy that
    has moved.
    """
    goal, case = "grad E[r] at the policy that has moved", kit.policy_case("moved")
    inf = math.inf
    for name, words, loss in (
        ("not corrected", "The responses of the one, as if the other had written them.", corrected),
        (
            "token ratios, no cap",
            "A token's own ratio: neither the way there nor what comes after is corrected.",
            _with(corrections.tis, cap=inf),
        ),
        ("TIS, cap 1.5", "Token ratios, cut.", _with(corrections.tis, cap=1.5)),
        (
            "IcePop, 0.5 to 2",
            "Token ratios, and none beyond the bounds.",
            _with(corrections.icepop, cap=2.0, floor=0.5),
        ),
        (
            "sequence ratio, no cap",
            "The ratio of the whole response is the exact correction.",
            _with(corrections.sequence_tis, cap=inf),
        ),
        (
            "sequence TIS, cap 2",
            "Cut, it keeps a part of the bias.",
            _with(corrections.sequence_tis, cap=2.0),
        ),
        (
            "sequence MIS, cap 2",
            "Responses beyond the cap are left out.",
            _with(corrections.sequence_mis, cap=2.0),
        ),
        (
            "PPO's clip, 0.2",
            "Token ratios, and no gradient where the policy has gone far enough.",
            functools.partial(surrogate, loss_sum=losses.ppo_clip_sum),
        ),
        (
            "DAPO's clip-higher, 0.2 and 0.28",
            "The same, with more room above.",
            functools.partial(surrogate, loss_sum=losses.ppo_clip_sum, clip=0.2, clip_high=0.28),
        ),
        (
            "CISPO, cap 1.5",
            "Its gradient is that of TIS: token ratios as weights, cut.",
            functools.partial(surrogate, loss_sum=losses.cispo_sum, cap=1.5),
        ),
        (
            "GSPO's ratio, no clip",
            "The geometric mean stands for a product; its clip of 4e-4 would cut nearly all of "
            "such a step.",
            functools.partial(gspo, clip=inf, clip_high=inf),
        ),
    ):
        add(f"Off policy: {name}", goal, case, loss, words)


def _with(weights: Callable[..., Tensor], **keywords: Any) -> Loss:
    return functools.partial(corrected, weights=weights, **keywords)
