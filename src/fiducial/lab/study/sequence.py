"""The sequence-level losses as the methods put them together, on the batches of the kit, and their
rows in the table of gradient estimators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ... import losses
from ...core import advantages, corrections, kl
from ...core.loss_aggregation import constant, sequence_mean, token_mean
from ...rewards.shaping import shape
from ...rewards.types import Scored
from ...rollout.forward import RolloutLogprobs
from ...settings import ScoreSettings
from ..kit import cases as kit
from ..kit.batch import Batch
from ..kit.case import Case
from ..kit.measure import Loss
from ..kit.population import Population
from ..worlds import exact

# ---- the losses ----


@functools.lru_cache(maxsize=1)
def paid(batch: Batch) -> Tensor:
    """Rewards of tokens [N, W] as the methods shape them: k1 at every token, the score at the last
    one. Those of the last batch are kept, because several losses are asked about each batch.
    """
    logprobs = RolloutLogprobs(
        batch.logprobs.detach(),
        batch.ref_logprobs,
        torch.zeros_like(batch.ref_logprobs),
        batch.old_values,
    )
    scored = Scored(batch.rewards.tolist(), {})
    return shape(batch.trajectory, scored, logprobs, ScoreSettings(), beta=batch.beta)[0]


def returns(batch: Batch) -> Tensor:
    """[N] the return of each response."""
    return advantages.sequence_return(paid(batch), batch.mask)


def reinforce(batch: Batch, advantage: Tensor) -> Tensor:
    """The policy gradient with advantages [N] or [N, W]: a mean over responses of sums over their
    tokens.
    """
    each = advantage if advantage.dim() == 2 else advantage[:, None].expand(batch.mask.shape)
    return losses.reinforce_sum(batch.logprobs, each, batch.mask)[0] / len(batch)


def reinforce_plus_plus(batch: Batch) -> Tensor:
    """REINFORCE++: the reward-to-go, whitened over the batch."""
    return reinforce(
        batch, advantages.whitened(advantages.reward_to_go(paid(batch), batch.mask), batch.mask)
    )


def grouped(
    batch: Batch, advantage: Callable[[Tensor, Tensor], Tensor], weights: Callable[[Tensor], Tensor]
) -> Tensor:
    """A method of the GRPO family: PPO's clip with

    advantage: from returns [N] and groups [N] to advantages [N].
    weights: from a mask [N, W] to the weight of each token.
    """
    each = advantage(returns(batch), batch.group)[:, None] * weights(batch.mask)
    return losses.ppo_clip_sum(batch.logprobs, batch.old_logprobs, each, batch.mask)[0]


def grpo(batch: Batch) -> Tensor:
    """GRPO as in its paper: divided by the standard deviation and by each response's length, with
    k3 of each token in the loss.
    """
    weights = sequence_mean(batch.mask)
    each = advantages.group_normalised(batch.rewards, batch.group)[:, None] * weights
    penalty = kl.penalty(
        batch.logprobs, batch.ref_logprobs, batch.old_logprobs, batch.mask, estimator="forward_k3"
    )
    return (
        losses.ppo_clip_sum(batch.logprobs, batch.old_logprobs, each, batch.mask)[0]
        + batch.beta * (weights * penalty).sum()
    )


def by_group(mask: Tensor, size: int = 2) -> Tensor:
    """DAPO's weights if one step is one group; rows of a group are adjacent."""
    return torch.cat([token_mean(m) for m in torch.split(mask, size)]) * size / len(mask)


def centered(batch: Batch) -> Tensor:
    """[N, W] the scores minus their mean, to which a running mean converges, at every token."""
    return (batch.rewards - batch.rewards.mean())[:, None].expand(batch.mask.shape)


def corrected(
    batch: Batch, weights: Callable[..., Tensor] | None = None, **keywords: float
) -> Tensor:
    """The policy gradient at the current policy, on responses that another policy sampled.

    weights: the correction; None: no correction.
    """
    w = (
        batch.mask.double()
        if weights is None
        else weights(batch.logprobs, batch.old_logprobs, batch.mask, **keywords)
    )
    return reinforce(batch, w * centered(batch))


def surrogate(
    batch: Batch, loss_sum: Callable[..., tuple[Tensor, object]], **keywords: float
) -> Tensor:
    """A surrogate loss for several steps on the same responses: a mean over responses of sums over
    their tokens.
    """
    return loss_sum(batch.logprobs, batch.old_logprobs, centered(batch), batch.mask, **keywords)[
        0
    ] / len(batch)


def gspo(batch: Batch, **keywords: float) -> Tensor:
    """GSPO: every response counts once."""
    return losses.gspo_sum(
        batch.logprobs,
        batch.old_logprobs,
        centered(batch) * sequence_mean(batch.mask),
        batch.mask,
        **keywords,
    )[0]


def greedy_returns(population: Population) -> Tensor:
    """[P] the return of the greedy response to each prompt: ReMax's baseline."""
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
    """On policy: baselines and groups of two, all on the population of the rows of PPO."""
    j, one = "grad J", kit.policy_case()
    two = kit.policy_case(group=2, horizon=one.population.world.horizon)
    greedy = greedy_returns(one.population)
    add(
        "REINFORCE, no baseline",
        j,
        one,
        lambda b: reinforce(b, returns(b)),
        "Every token is credited with the return of the response. The rewards here have a mean "
        "near 0, so a baseline has little to remove.",
    )
    add(
        "REINFORCE, no baseline, every reward 3 higher",
        j,
        one,
        lambda b: reinforce(b, returns(b) + 3.0),
        "The same objective. Without a baseline, the mean of the rewards is noise; with any "
        "baseline of this table the variance stays as it is.",
    )
    add(
        "REINFORCE, running mean",
        j,
        one,
        lambda b: reinforce(b, returns(b) - returns(b).mean()),
        "A constant does not depend on the response, so it adds no bias.",
    )
    add(
        "REINFORCE, greedy response's score (ReMax)",
        j,
        one,
        lambda b: reinforce(b, advantages.remax(returns(b), greedy[b.group])),
        "The baseline does not depend on any sampled response.",
    )
    add(
        "REINFORCE, leave-one-out of 2 (RLOO)",
        j,
        two,
        lambda b: reinforce(b, advantages.leave_one_out(returns(b), b.group)),
        "The other responses of the group do not depend on this one. The mean of G - 1 responses "
        "is a noisy baseline: it adds about 1 / (G - 1) of the variance that an exact mean leaves.",
    )

    plain: Callable[[Tensor], Tensor] = functools.partial(constant, length=1)
    by_length = functools.partial(constant, length=two.population.world.horizon)
    variants: dict[
        str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], str]
    ] = {
        "group mean, groups of 2": (
            advantages.group_mean,
            plain,
            "The mean includes the response itself: the right direction, shorter by (G - 1) / G.",
        ),
        "Dr. GRPO, groups of 2": (
            advantages.group_mean,
            by_length,
            "The group's mean and a constant length: the right direction with another length.",
        ),
        "GRPO's standard deviation alone, groups of 2": (
            advantages.group_normalised,
            plain,
            "Groups whose rewards hardly differ get as much weight as the others.",
        ),
        "GRPO's mean within each response alone, groups of 2": (
            advantages.group_mean,
            sequence_mean,
            "A token of a short response gets more weight.",
        ),
        "GRPO, groups of 2, k1 in the reward": (
            advantages.group_normalised,
            sequence_mean,
            "Divided by standard deviation and length; here responses of one token have a return "
            "of zero, so the second division changes only the length.",
        ),
        "DAPO's mean over tokens, steps of one group": (
            advantages.group_mean,
            by_group,
            "The denominator depends on the responses; in a large step it is nearly constant.",
        ),
    }
    for name, (advantage, weights, words) in variants.items():
        add(name, j, two, functools.partial(grouped, advantage=advantage, weights=weights), words)
    add(
        "GRPO, groups of 2, k3 in the loss",
        j,
        two,
        grpo,
        "The form of its paper: both divisions, and the forward KL.",
    )


def off_policy_rows(add: Add) -> None:
    """Off policy: responses that another policy sampled, against the exact policy gradient at the
    current policy, which has moved.
    """
    goal, case = "grad E[r] at the policy that has moved", kit.policy_case("moved")
    inf = math.inf
    cases: tuple[tuple[str, str, Loss], ...] = (
        (
            "not corrected",
            "The responses are taken as if the current policy had sampled them.",
            corrected,
        ),
        (
            "token ratios, no cap",
            "The ratio of each token alone: tokens before and after it are not corrected.",
            _with(corrections.tis, cap=inf),
        ),
        ("TIS, cap 1.5", "Token ratios, truncated.", _with(corrections.tis, cap=1.5)),
        (
            "IcePop, 0.5 to 2",
            "Token ratios; tokens outside the bounds are dropped.",
            _with(corrections.icepop, cap=2.0, floor=0.5),
        ),
        (
            "sequence ratio, no cap",
            "The ratio of the whole response is the exact correction.",
            _with(corrections.sequence_tis, cap=inf),
        ),
        (
            "sequence TIS, cap 2",
            "Truncated, it keeps part of the bias.",
            _with(corrections.sequence_tis, cap=2.0),
        ),
        (
            "sequence MIS, cap 2",
            "Responses beyond the cap are dropped.",
            _with(corrections.sequence_mis, cap=2.0),
        ),
        (
            "PPO's clip, 0.2",
            "Token ratios; no gradient where the ratio has passed the clip.",
            functools.partial(surrogate, loss_sum=losses.ppo_clip_sum),
        ),
        (
            "DAPO's clip-higher, 0.2 and 0.28",
            "The same with a higher upper clip.",
            functools.partial(surrogate, loss_sum=losses.ppo_clip_sum, clip=0.2, clip_high=0.28),
        ),
        (
            "CISPO, cap 1.5",
            "Its gradient is that of TIS: truncated token ratios as weights.",
            functools.partial(surrogate, loss_sum=losses.cispo_sum, cap=1.5),
        ),
        (
            "GSPO's ratio, no clip",
            "The geometric mean of the token ratios in place of their product; its usual clip of "
            "4e-4 would remove nearly all of such a step.",
            functools.partial(gspo, clip=inf, clip_high=inf),
        ),
    )
    for name, words, loss in cases:
        add(f"Off policy: {name}", goal, case, loss, words)


def _with(weights: Callable[..., Tensor], **keywords: float) -> Loss:
    return lambda batch: corrected(batch, weights, **keywords)
