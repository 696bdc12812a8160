"""Sequences that stand several times in a batch, so that each needs to be computed only once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor


def distinct(keys: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """Which keys are equal.

    Returns:
        the number of the first of each kind, in their order, and for every key the place of its
        kind in that list.
    """
    kinds: dict[Hashable, int] = {}
    first: list[int] = []
    places = []
    for number, key in enumerate(keys):
        place = kinds.setdefault(key, len(first))
        if place == len(first):
            first.append(number)
        places.append(place)
    return first, places


def equal_rows(ids: Tensor, mask: Tensor) -> tuple[list[int], list[int]]:
    """`distinct` for the rows of `ids` [B, T] with their labels, `mask` [B, T]."""
    both = torch.cat([ids, mask.to(ids.dtype)], 1).cpu().numpy()
    return distinct(row.tobytes() for row in both)
