"""One row of tokens that holds a common beginning once and several continuations of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Labelled(Protocol):
    """Token ids with the mask of those that are labels, of equal length."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def mask(self) -> list[bool]: ...

    def __len__(self) -> int: ...


class SharedPrefix(NamedTuple):
    """How the columns of a row belong together.

    The row holds a common beginning once, and several continuations of it one after the other.

    positions: [B, T] place of a token in its own sequence.
    branch: [B, T] 0 for the common beginning, k for the k-th continuation, -1 for padding.
    previous: [B, T] the column in front of a token: the one whose state predicts it.
    """

    positions: Tensor
    branch: Tensor
    previous: Tensor

    def attention(self) -> Tensor:
        """[B, 1, T, T], true where a query (third) may see a key (fourth): what stands before it in
        its own sequence, and itself.
        """
        own, key = self.branch[:, :, None], self.branch[:, None, :]
        width = self.branch.shape[1]
        causal = torch.ones((width, width), dtype=torch.bool, device=self.branch.device).tril()
        return (((key == 0) | (key == own)) & causal)[:, None]


def common_length(rows: Sequence[Labelled]) -> int:
    """Tokens that the rows begin with alike and that are no labels."""
    shortest = min(row.mask.index(True) if True in row.mask else len(row) for row in rows)
    first = rows[0].ids
    return next(
        (i for i in range(shortest) if any(row.ids[i] != first[i] for row in rows[1:])), shortest
    )


def shared_prefix(groups: Sequence[Sequence[Labelled]]) -> tuple[Tensor, Tensor, SharedPrefix]:
    """One row for each group of sequences with a common beginning, which is read once.

    Returns:
        ids and mask [B, T], and the layout of the rows.
    """
    shared = [common_length(rows) for rows in groups]
    lengths = [
        start + sum(len(r) - start for r in rows)
        for start, rows in zip(shared, groups, strict=True)
    ]
    shape = (len(groups), max(lengths))
    ids, positions, previous = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    mask, branch = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    for i, (start, rows) in enumerate(zip(shared, groups, strict=True)):
        ids[i, :start] = torch.tensor(rows[0].ids[:start], dtype=torch.long)
        positions[i, :start] = torch.arange(start)
        branch[i, :start] = 0
        at = start
        for number, row in enumerate(rows, start=1):
            end = at + len(row) - start
            ids[i, at:end] = torch.tensor(row.ids[start:])
            mask[i, at:end] = torch.tensor(row.mask[start:])
            positions[i, at:end] = torch.arange(start, len(row))
            branch[i, at:end] = number
            previous[i, at:end] = torch.arange(at - 1, end - 1)
            previous[i, at : min(at + 1, end)] = max(0, start - 1)
            at = end
    return ids, mask, SharedPrefix(positions, branch, previous)
