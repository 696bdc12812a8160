"""Which rows make a step, and how a step is cut into micro-batches. Three knobs that never
constrain each other:

- batch size: rows for one optimizer step, over all processes;
- tokens: padded tokens of a micro-batch, the memory knob;
- processes: how many share the micro-batches.

The order depends on the seed alone, so a step number is the whole cursor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .render import Rendered


@dataclass(frozen=True)
class Batches:
    """The rows of every step: `batches[step]` gives row numbers, a fresh permutation each epoch.

    Where an epoch is no whole number of batches they are all a little smaller: a last batch of a
    few rows would move the weights as far as a whole one.
    """

    num_rows: int
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return -(-self.num_rows // self.size)

    def __getitem__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        start, end = (k * self.num_rows // self.per_epoch for k in (place, place + 1))
        return [int(i) for i in order[start:end]]

    def epochs(self, first: int, count: int) -> Iterator[list[int]]:
        """The batches of `count` epochs from epoch `first` on."""
        for step in range(first * self.per_epoch, (first + count) * self.per_epoch):
            yield self[step]


def stream(num_rows: int, start: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Items `start` to `start + count` of an endless walk over the rows, each epoch in a fresh
    order: (row, epoch).
    """
    out = []
    orders: dict[int, np.ndarray] = {}
    for i in range(start, start + count):
        epoch, place = divmod(i, num_rows)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(num_rows)
        out.append((int(orders[epoch][place]), epoch))
    return out


SIMILAR, ENOUGH = 0.85, 1024
"""A row under this share of a micro-batch's width begins a new one, once that has so many tokens:
computing on padding costs more than one more call.
"""


def micro_batches(
    costs: Sequence[Sequence[int]], tokens: int, processes: int = 1
) -> list[list[list[int]]]:
    """Cut elements into micro-batches of similar length under a budget of padded tokens.

    Args:
        costs: for each element the lengths of its sequences (one for a row, two for a pair, K for a
            ranking); an element is never split.
        tokens: sequences times the longest of them stays at or under this, except for a single
            element that is larger by itself.
        processes: every process gets the same number of micro-batches, for the gradient's
            collectives must match; an empty list is one that takes part with no element.

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
    """Sequences side by side, padded right: `ids` [B, T], label `mask` [B, T], `lengths` [B]."""

    ids: Tensor
    mask: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> Padded:
        return Padded(self.ids.to(device), self.mask.to(device), self.lengths.to(device))

    def __len__(self) -> int:
        return self.ids.shape[0]


def pad(rows: Sequence[Rendered], *, pad_id: int = 0) -> Padded:
    """The rows as one right-padded batch. `pad_id` is arbitrary: the mask is carried, never inferred."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row.ids)
        mask[i, : len(row)] = torch.tensor(row.mask)
    return Padded(ids, mask, torch.tensor([len(r) for r in rows]))
