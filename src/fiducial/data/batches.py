"""Which rows make a step, and how a step is cut into micro-batches.

Three numbers are independent of each other:

- batch size: rows per optimizer step, over all processes;
- tokens: padded tokens per micro-batch, which bounds the memory;
- processes: how many processes share the micro-batches.

The order of the rows depends on the seed alone, so a resumed run needs only the step number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .render import Rendered


@dataclass(frozen=True)
class Batches:
    """The rows of every step: `batches[step]` gives row numbers, in a new order for each epoch.

    If the rows do not divide evenly, all batches of an epoch are slightly smaller than `size`: a
    last batch of a few rows would move the weights as far as a full one.

    parts: the number of batches in an epoch; None: as many as batches of `size` rows need.
    """

    num_rows: int
    size: int
    seed: int
    parts: int | None = None

    @classmethod
    def cut(cls, num_rows: int, parts: int, seed: int) -> Batches:
        """Exactly `parts` batches in an epoch, whose sizes differ by at most one row."""
        return cls(num_rows, -(-num_rows // parts), seed, parts)

    @property
    def per_epoch(self) -> int:
        return self.parts or -(-self.num_rows // self.size)

    def rows(self, steps: int) -> list[int]:
        """The rows that the first `steps` steps read, in ascending order."""
        if steps >= self.per_epoch:
            return list(range(self.num_rows))
        order = _order(self.num_rows, self.seed, 0)
        return sorted(int(i) for i in order[: steps * self.num_rows // self.per_epoch])

    def __getitem__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        order = _order(self.num_rows, self.seed, epoch)
        start, end = (k * self.num_rows // self.per_epoch for k in (place, place + 1))
        return [int(i) for i in order[start:end]]

    def epochs(self, first: int, count: int) -> Iterator[list[int]]:
        """The batches of `count` epochs, beginning with epoch `first`."""
        for step in range(first * self.per_epoch, (first + count) * self.per_epoch):
            yield self[step]


@functools.lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch. The last two are kept: a step asks for one of them."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def stream(num_rows: int, start: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Items `start` to `start + count` of an endless walk over the rows, as (row, epoch).

    Each epoch has an order of its own.
    """
    out = []
    for i in range(start, start + count):
        epoch, place = divmod(i, num_rows)
        out.append((int(_order(num_rows, seed, epoch)[place]), epoch))
    return out


SIMILAR, ENOUGH = 0.85, 1024
"""A row shorter than `SIMILAR` times the width of its micro-batch begins a new one, once that one
has `ENOUGH` tokens: computing on padding then costs more than one more call of the model.
"""


def micro_batches(
    costs: Sequence[Sequence[int]], tokens: int, processes: int = 1
) -> list[list[list[int]]]:
    """Cut elements into micro-batches of similar length under a budget of padded tokens.

    Args:
        costs: for each element the lengths of its sequences (one for a row, two for a pair); an
            element is never split.
        tokens: the limit for the number of sequences times the longest of them. A single element
            may exceed it.
        processes: number of processes. Each gets the same number of micro-batches, because the
            gradient's collectives must match; an empty micro-batch has no elements.

    Returns:
        [process][micro-batch][element numbers].
    """
    order = sorted(range(len(costs)), key=lambda i: (-max(costs[i]), i))
    cuts: list[list[int]] = []
    width = sequences = 0
    for i in order:
        much_shorter = max(costs[i]) < SIMILAR * width and width * sequences >= ENOUGH
        if cuts and not much_shorter and width * (sequences + len(costs[i])) <= tokens:
            cuts[-1].append(i)
            sequences += len(costs[i])
        else:
            cuts.append([i])
            width, sequences = max(costs[i]), len(costs[i])
    while len(cuts) % processes:
        largest = max(range(len(cuts)), key=lambda c: len(cuts[c]))
        if len(cuts[largest]) < 2:
            cuts.append([])
        else:
            whole = cuts[largest]
            cuts[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return [cuts[p::processes] for p in range(processes)]


@dataclass(frozen=True)
class Padded:
    """A batch of right-padded sequences: `ids` [B, T], label `mask` [B, T], `lengths` [B]."""

    ids: Tensor
    mask: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> Padded:
        return Padded(self.ids.to(device), self.mask.to(device), self.lengths.to(device))


def pad(rows: Sequence[Rendered]) -> Padded:
    """The rows as one batch, padded with token 0.

    It does not matter that 0 is also a token: the mask is carried and never inferred from the ids.
    """
    width = max(len(r) for r in rows)
    ids = torch.tensor([r.ids + [0] * (width - len(r)) for r in rows], dtype=torch.long)
    mask = torch.tensor([r.mask + [False] * (width - len(r)) for r in rows], dtype=torch.bool)
    return Padded(ids, mask, torch.tensor([len(r) for r in rows]))
