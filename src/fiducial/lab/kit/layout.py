"""The layout of the rows in a batch: which tokens stand where, and what each position is about.

Shapes: P prompts, S states of a prompt, Y responses; rows of W columns. Column t is about token t.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..worlds.world import EOS, Array, Tokens, tree

Rows = NDArray[np.int64]
Filler = Literal["nonsense", "other", "nan"]
"""What stands where the mask is false: finite numbers, other finite numbers, or NaN."""
Kind = Literal[
    "logits", "reference", "values", "old values", "inner scores", "scores", "advantages"
]


@dataclass(frozen=True, eq=False)
class Layout:
    """Templates of the rows, one per prompt and response, and the meaning of the rows of a table.

    ids, mask, node: [P, Y, W]; node is the row of a table that belongs to a position. A table has
    one row per state [0, states), per complete response [states, ends), per position inside a
    prompt [ends, prompts) and per column after the end [prompts, rows).
    """

    ids: Tensor
    mask: Tensor
    node: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    finished: Tensor
    states: int
    ends: int
    prompts: int
    rows: int


@functools.cache
def layout(
    prompts: tuple[Tokens, ...], horizon: int, widen: int = 0, garbled: bool = False
) -> Layout:
    """The layout of all responses of at most `horizon` tokens.

    Args:
        widen: number of padding columns beyond what the longest row needs. They hold tokens of all
            kinds.
        garbled: replace the prompts by other tokens of the same number.
    """
    shape = tree(3, horizon)
    rng = np.random.default_rng([7, widen])
    states, responses = len(prompts) * len(shape.states), len(shape.responses)
    longest = max(map(len, prompts))
    width = longest + horizon + widen
    ends, insides = states + len(prompts) * responses, states + len(prompts) * (responses + longest)
    size = (len(prompts), responses, width)
    ids = rng.integers(0, 3, size=size) if widen else np.full(size, EOS)
    mask = np.zeros(size, dtype=bool)
    node = np.broadcast_to(insides + np.arange(width), size).copy()
    for p, prompt in enumerate(prompts):
        start = len(prompt)
        ids[p, :, :start] = rng.integers(0, 3, size=start) if garbled else prompt
        node[p, :, :start] = ends + p * longest + np.arange(start)
        for y, response in enumerate(shape.responses):
            stop = start + len(response)
            ids[p, y, start:stop], mask[p, y, start:stop] = response, True
            path = shape.path[y, : len(response)]
            node[p, y, start - 1 : stop - 1] = p * len(shape.states) + path
            node[p, y, stop - 1] = states + p * responses + y
    return Layout(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.from_numpy(node),
        torch.tensor([len(p) for p in prompts]),
        torch.from_numpy(shape.lengths),
        torch.from_numpy(shape.finished),
        states,
        ends,
        insides,
        insides + width,
    )


@functools.cache
def filler(fill: Filler, rows: int, kind: Kind, *trailing: int) -> Array:
    """[rows, ...] numbers for the rows of a table that belong to no token of the policy. They are
    kept: a caller copies them."""
    if fill == "nan":
        return np.full((rows, *trailing), np.nan)
    seed = [get_args(Kind).index(kind), int(fill == "other"), 13]
    return np.random.default_rng(seed).normal(size=(rows, *trailing))
