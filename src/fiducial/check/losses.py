"""The loss of a few elements, as a step of their method computes it, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..data.batches import pad
from ..data.pairs import Pair
from ..data.render import Rendered
from ..methods.distill import divergence
from ..methods.dpo import costs_of, pair_logprobs
from ..methods.prm import Solution, tensors
from ..methods.reward_model import Ranking, pair_tensors, score
from ..models.roles import Roles
from ..rollout.trajectory import Trajectory


def costs(element: Any, roles: Roles) -> list[int]:
    """The lengths of the sequences that an element takes."""
    if isinstance(element, Pair):
        return costs_of(element, roles.policy.supports_shared_prefix)
    return element.lengths if isinstance(element, Ranking) else [len(element)]


def offline_loss(
    elements: Sequence[Any], roles: Roles, settings: Any, device: torch.device
) -> Tensor:
    """The mean loss of elements of one kind, with a gradient.

    Raises:
        TypeError: no method here trains on such elements.
    """
    some, first = list(elements), elements[0]
    if isinstance(first, Rendered):
        batch = pad(some).to(device)
        loss, _ = losses.nll_sum(roles.policy(batch.ids, batch.mask).logprobs, batch.mask)
        return loss / batch.mask.sum()
    if isinstance(first, Pair):
        chosen, rejected = pair_logprobs(roles.policy, some, device)
        reference = chosen.detach(), rejected.detach()  # the policy before the first step
        loss, _ = losses.dpo_sum(
            chosen,
            rejected,
            *reference,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )
        return loss / len(some)
    if isinstance(first, Ranking):
        scores = score(roles.scorer, [r for ranking in some for r in ranking.responses], device)
        pairs = pair_tensors(some, scores)
        loss, _ = losses.ranking_sum(scores, *pairs, centering=settings.centering)
        return loss / len(some)
    if isinstance(first, Solution):
        ids, labels, mask = (x.to(device) for x in tensors(some))
        loss, _ = losses.process_reward_sum(roles.scorer(ids, after=mask), labels, mask)
        return loss / mask.sum()
    raise TypeError(f"elements of {type(first).__name__}")


def sampled_loss(
    trajectory: Trajectory, rows: Sequence[int], roles: Roles, settings: Any, device: torch.device
) -> Tensor:
    """The loss of sampled responses, with a gradient: to a teacher if there is one, and otherwise
    that of a policy whose responses all have advantage 1, with a critic that is off by 1.
    """
    ids, mask = trajectory.slice_rows(rows, device)
    count = mask.sum()
    if roles.has_teacher:
        loss, _, _ = divergence(roles.policy, roles, ids, mask, settings)
        return loss / count
    now = roles.outputs(ids, mask, trajectory.temperature)
    loss, _ = losses.reinforce_sum(now.logprobs, mask.to(now.logprobs.dtype), mask)
    if now.values is not None:
        old = now.values.detach()
        value_loss, _ = losses.clipped_value_sum(now.values, old, old + 1.0, mask, clip=None)
        loss = loss + value_loss
    return loss / count
