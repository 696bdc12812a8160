"""Losses on preference pairs.

Shapes: B pairs. A log-probability is the sum over a response's tokens, in nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.reductions import same_shape

Metrics = dict[str, Tensor]


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    r"""Direct preference optimization: eq. 7 of Rafailov et al. 2023, arXiv 2305.18290.

    .. math:: L = -\mathbb{E}\,\log\sigma(\beta h), \qquad
              h = \log\frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log\frac{\pi(y_l)}{\pi_{ref}(y_l)}

    With ``label_smoothing`` = e it is conservative DPO (Mitchell 2023): a label is taken to be
    wrong with probability e, and the loss is least at ``beta * h = log((1 - e) / e)`` instead of at
    infinity.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: [B] log-probabilities in nats.
        beta: strength of the pull to the reference; the implicit reward is ``beta * log(pi /
            pi_ref)``.
        label_smoothing: in [0, 0.5).

    Returns:
        The mean loss over the B pairs, and the metrics that TRL's users know:
        ``rewards/{chosen,rejected,margins,accuracies}`` and ``logps/{chosen,rejected}``. A tie
        counts one half in the accuracy, so that an untrained policy scores 0.5 and not 0.

    Raises:
        ValueError: shapes differ (nothing is broadcast), or ``label_smoothing`` is outside its
            range.
    """
    loss, metrics = dpo_sum(
        policy_chosen,
        policy_rejected,
        ref_chosen,
        ref_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    return loss / policy_chosen.shape[0], {
        k: v / policy_chosen.shape[0] for k, v in metrics.items()
    }


def dpo_sum(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """:func:`dpo` summed over pairs, metrics too."""
    same_shape(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), not {label_smoothing}: at 0.5 a label says "
            "nothing"
        )

    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    margin = reward_chosen - reward_rejected
    loss = (
        -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    ).sum()

    with torch.no_grad():
        metrics = {
            "loss": loss.detach(),
            "rewards/chosen": reward_chosen.sum(),
            "rewards/rejected": reward_rejected.sum(),
            "rewards/margins": margin.sum(),
            "rewards/accuracies": (margin > 0).to(margin.dtype).sum()
            + 0.5 * (margin == 0).to(margin.dtype).sum(),
            "logps/chosen": policy_chosen.sum(),
            "logps/rejected": policy_rejected.sum(),
        }
    return loss, metrics
