"""What a batch of sampled responses is like, whatever it is scored with."""

from __future__ import annotations

import torch
from torch import Tensor

from .trajectory import Trajectory

GRAM = 4
"""Tokens in a row that count as a repetition. 4: Welleck et al. 2020 (arXiv 1908.04319), seq-rep-4.
"""


def completion_metrics(trajectory: Trajectory) -> dict[str, float]:
    """Length in tokens, share that ended by itself, and share of what repeats itself."""
    return {
        "completions/mean_length": float(trajectory.response_lengths.float().mean()),
        "completions/finished": float(trajectory.finished.float().mean()),
        "completions/repetition": repetition(trajectory.ids, trajectory.mask),
    }


def repetition(ids: Tensor, mask: Tensor) -> float:
    """Mean share of the sequences of four tokens of a response that stood in it before.

    A response of fewer than four tokens repeats nothing, and without a longer one the result is 0.

    Args:
        ids: [N, T] tokens.
        mask: [N, T] true at the tokens of the response.
    """
    if ids.shape[1] < GRAM:
        return 0.0
    row, start = mask.unfold(1, GRAM, 1).all(2).nonzero(as_tuple=True)
    if not len(row):
        return 0.0
    # exact whatever the vocabulary: what was seen so far and the next token get a number together
    seen = row
    for k in range(GRAM):
        token = ids[row, start + k]
        seen = torch.unique(seen * (int(ids.max()) + 1) + token, return_inverse=True)[1]
    rows = torch.empty(int(seen.max()) + 1, dtype=torch.long)
    rows[seen] = row  # of each distinct sequence
    total, distinct = (torch.bincount(r, minlength=len(ids)).double() for r in (row, rows))
    long = total > 0
    return float((1 - distinct[long] / total[long]).mean())
