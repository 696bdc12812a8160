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
    if all(row.ids[:shortest] == first[:shortest] for row in rows[1:]):
        return shortest
    return next(i for i in range(shortest) if any(row.ids[i] != first[i] for row in rows[1:]))


class _Columns(NamedTuple):
    """One row of the batch, column by column."""

    ids: list[int]
    mask: list[bool]
    positions: list[int]
    branch: list[int]
    previous: list[int]


def _columns(rows: Sequence[Labelled]) -> _Columns:
    """The row that holds one group."""
    start = common_length(rows)
    out = _Columns(
        rows[0].ids[:start], [False] * start, list(range(start)), [0] * start, [0] * start
    )
    for number, row in enumerate(rows, start=1):
        at, count = len(out.ids), len(row) - start
        out.ids.extend(row.ids[start:])
        out.mask.extend(row.mask[start:])
        out.positions.extend(range(start, len(row)))
        out.branch.extend([number] * count)
        out.previous.extend([max(0, start - 1), *range(at, at + count - 1)][:count])
    return out


def shared_prefix(groups: Sequence[Sequence[Labelled]]) -> tuple[Tensor, Tensor, SharedPrefix]:
    """One row for each group of sequences with a common beginning, which is read once.

    Returns:
        ids and mask [B, T], and the layout of the rows.
    """
    rows = [_columns(group) for group in groups]
    width = max(len(row.ids) for row in rows)
    # one tensor of a whole field: one for each row would cost more than a small model's pass
    ids, positions, previous, branch = (
        torch.tensor([x + [fill] * (width - len(x)) for x in field], dtype=torch.long)
        for field, fill in (
            ([row.ids for row in rows], 0),
            ([row.positions for row in rows], 0),
            ([row.previous for row in rows], 0),
            ([row.branch for row in rows], -1),
        )
    )
    masks = [row.mask + [False] * (width - len(row.mask)) for row in rows]
    mask = torch.tensor(masks, dtype=torch.bool)
    return ids, mask, SharedPrefix(positions, branch, previous)
