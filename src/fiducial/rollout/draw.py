"""One token after another from a random stream of its own.

A token is the inverse of the cumulative distribution at the next number of the response's stream,
so what is sampled does not depend on the rest of the batch, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sampling import Keys


def streams(keys: Keys, rows: Sequence[int], length: int) -> np.ndarray:
    """[rows, length] the first numbers of each row's stream: Philox with a counter of 0 and the key
    that NumPy derives from the row's four numbers. One generator is set to each key in turn: making
    one takes longer than a token of a small model.
    """
    philox = np.random.Philox(0)
    fresh: Any = philox.state
    generator = np.random.Generator(philox)
    out = np.empty((len(rows), length))
    numbers = [[keys.seed, keys.step, keys.prompt[row], keys.sample[row]] for row in rows]
    # the very words that NumPy makes of such numbers, without a search of each for its length
    words = np.array(numbers, np.uint32) if max(map(max, numbers)) < 2**32 else numbers
    for k, each in enumerate(words):
        seed = np.random.SeedSequence(each)
        fresh["state"]["key"] = seed.generate_state(2, np.uint64)
        philox.state = fresh
        generator.random(out=out[k])
    return out


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token for each row of `logits` [n, V] and its log-probability in nats, [n] each.

    Args:
        uniform: [n] numbers in [0, 1).
        temperature: divides the logits; 0 takes the most likely token, with log-probability 0.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    logp = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
    cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
    # scaled to the sum as rounded, so that no number lies beyond the last token with any
    # probability
    chosen = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    chosen = chosen[:, 0].clamp(max=logp.shape[-1] - 1)
    return chosen, logp.gather(-1, chosen[:, None])[:, 0]
