"""What policy, reference and critic say of sampled tokens, before anything is learned from them.

Shapes: N rows, T columns; column t is about token t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.roles import Roles
from ..settings import Tokens
from ..train.processes import Processes
from .trajectory import Trajectory


@dataclass(frozen=True)
class RolloutLogprobs:
    """[N, T] each, 0 outside the mask.

    logprobs, ref_logprobs: of the policy as it sampled and of the reference, in nats; without a
    reference None.
    entropy: of the policy's distribution at each token, in nats.
    values: of the state before each token, in units of the reward; 0 without a critic.
    """

    logprobs: Tensor
    ref_logprobs: Tensor | None
    entropy: Tensor
    values: Tensor


def forward(
    trajectory: Trajectory, roles: Roles, processes: Processes, tokens: Tokens
) -> RolloutLogprobs:
    """Log-probabilities, entropies and values of all rows, without gradients. The reference is read
    if the run has one.

    The policy's log-probabilities are computed again by the trainer, not taken from the sampler, so
    that the probability ratio of the first step is 1.

    Args:
        tokens: padded tokens per micro-batch.
    """

    def compute(rows: list[int]) -> tuple[Tensor, ...]:
        ids, mask = trajectory.slice_rows(rows, processes.device)
        policy = roles.outputs(ids, mask, trajectory.temperature, entropy=True)
        assert policy.entropy is not None
        values = torch.zeros_like(policy.logprobs) if policy.values is None else policy.values
        out = policy.logprobs, policy.entropy, values
        if not roles.has_reference:
            return out
        return *out, roles.reference(ids, mask, trajectory.temperature)

    costs = [[int(n)] for n in trajectory.lengths]
    width = trajectory.ids.shape[1]
    logprobs, entropy, values, *reference = processes.map_rows(costs, tokens, width, compute)
    return RolloutLogprobs(logprobs, reference[0] if reference else None, entropy, values)
