"""One token after another from a random stream of its own.

A token is the inverse of the cumulative distribution at the next number of the response's stream,
so what is sampled does not depend on the rest of the batch, up to rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .sampling import Keys


def stream(keys: Keys, row: int, length: int) -> np.ndarray:
    """[length] numbers in [0, 1) for one response."""
    seed = np.random.SeedSequence([keys.seed, keys.step, keys.prompt[row], keys.sample[row]])
    return np.random.Generator(np.random.Philox(seed)).random(length)


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
