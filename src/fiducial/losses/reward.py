"""Losses of reward models: scores of responses in, from pairs or rankings.

Shapes: B pairs; K ranked responses of one prompt give up to K(K-1)/2 pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.reductions import same_shape

Metrics = dict[str, Tensor]


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> tuple[Tensor, Metrics]:
    r"""Bradley-Terry negative log-likelihood.

    Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1.

    .. math:: L = -\log\sigma(r_w - r_l - m) + \eta\,(r_w + r_l)^2

    Args:
        chosen, rejected: [B] scores.
        margin: [B] or None: by how much the chosen one should win. Touvron et al. 2023 (Llama 2,
            arXiv 2307.09288), eq. 2.
        centering: the weight eta of a pull of the scores to mean 0; 0.01 in Eisenstein et al. 2023
            (arXiv 2312.09244). The loss alone does not fix the zero of the scale.

    Returns:
        The mean over pairs, and ``accuracy`` (a tie counts one half), ``margin``, ``score/chosen``,
        ``score/rejected``.

    Raises:
        ValueError: shapes differ.
    """
    loss, metrics = bradley_terry_sum(chosen, rejected, margin, centering)
    return loss / chosen.shape[0], {k: v / chosen.shape[0] for k, v in metrics.items()}


def bradley_terry_sum(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    centering: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """:func:`bradley_terry` summed over pairs, each times its ``weight`` [B] (1 if None)."""
    same_shape(
        chosen=chosen,
        rejected=rejected,
        **({} if margin is None else {"margin": margin}),
        **({} if weight is None else {"weight": weight}),
    )
    weight = torch.ones_like(chosen) if weight is None else weight
    gap = chosen - rejected
    terms = -F.logsigmoid(gap if margin is None else gap - margin)
    if centering:
        terms = terms + centering * (chosen + rejected) ** 2
    loss = (terms * weight).sum()
    with torch.no_grad():
        right = (gap > 0).to(gap.dtype) + 0.5 * (gap == 0).to(gap.dtype)
        metrics = {
            "loss": loss.detach(),
            "accuracy": (right * weight).sum(),
            "margin": (gap * weight).sum(),
            "score/chosen": (chosen * weight).sum(),
            "score/rejected": (rejected * weight).sum(),
        }
    return loss, metrics


def ranking(
    scores: Tensor,
    pairs: Tensor,
    prompt: Tensor,
    margin: Tensor | None = None,
    centering: float = 0.0,
) -> tuple[Tensor, Metrics]:
    r"""K-wise Bradley-Terry: :math:`-\frac{1}{|P_x|}\sum_{(w,l)\in P_x}\log\sigma(r_w-r_l)`,
    averaged over prompts; eq. 1 of Ouyang et al. 2022.

    Each response is scored once and stands in all its pairs; a prompt counts once however many
    pairs it has.

    Args:
        scores: [R] one score per response.
        pairs: [P, 2] indices into scores: winner, loser.
        prompt: [P] id of the prompt of each pair.
        margin: [P] or None.

    Raises:
        ValueError: there is no pair.
    """
    if len(pairs) == 0:
        raise ValueError("no pair to compare")
    prompts = len(torch.unique(prompt))
    loss, metrics = ranking_sum(scores, pairs, prompt, margin, centering)
    return loss / prompts, {k: v / prompts for k, v in metrics.items()}


def ranking_sum(
    scores: Tensor,
    pairs: Tensor,
    prompt: Tensor,
    margin: Tensor | None = None,
    centering: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """:func:`ranking` summed over prompts."""
    _, index, count = torch.unique(prompt, return_inverse=True, return_counts=True)
    weight = 1.0 / count[index].to(scores.dtype)
    return bradley_terry_sum(scores[pairs[:, 0]], scores[pairs[:, 1]], margin, centering, weight)
