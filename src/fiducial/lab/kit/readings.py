"""How a loss reads log-probabilities, and which tokens it trains on, shown by its gradient."""

from __future__ import annotations

import numpy as np
import torch

from ..worlds import exact
from ..worlds.world import Array
from .batch import Batch
from .measure import LossGradient

READINGS = (  # name, shift of the labels, at the sampling temperature, through log-softmax
    ("", 1, True, True),
    ("labels not shifted", 0, True, True),
    ("labels shifted twice", 2, True, True),
    ("temperature missing", 1, False, True),
    ("log-softmax missing", 1, True, False),
    ("log-softmax missing", 1, False, False),
)


def misreading(seen: LossGradient, tolerance: float) -> str | None:
    """The mistake with which log-probabilities were read from logits. The gradient of
    log softmax(z / tau)_y is (one-hot_y - softmax(z / tau)) / tau.

    Returns:
        None if they were read as they should be, or not by looking up tokens.
    """
    for name, shift, tempered, normalized in READINGS:
        left = total = 0.0
        for side, g in zip(seen.sides, seen.rows, strict=True):
            raw, ids = side.raw.detach().numpy(), side.ids.numpy()
            w = ids.shape[1] - shift
            form = np.eye(raw.shape[-1])[ids[:, shift : shift + w]]
            if normalized:
                temperature = side.temperature if tempered else 1.0
                form = form - np.exp(exact.log_softmax(raw[:, :w] / temperature))
            share = (g[:, :w] * form).sum(-1, keepdims=True) / (form**2).sum(-1, keepdims=True)
            left += float(((g[:, :w] - share * form) ** 2).sum() + (g[:, w:] ** 2).sum())
            total += float((g**2).sum())
        if left < tolerance**2 * total:
            return name or None
    return None


def _coefficients(side: Batch, g: Array) -> Array:
    """[N, W] the derivative of the loss by the log-probability of each token, for a loss that looks
    up tokens.
    """
    ids, raw = side.ids.numpy(), side.raw.detach().numpy()
    p = np.exp(exact.log_softmax(raw[:, :-1] / side.temperature))
    form = np.eye(raw.shape[-1])[ids[:, 1:]] - p
    found = (g[:, :-1] * form).sum(-1) / (form**2).sum(-1)
    return np.concatenate([np.zeros((len(ids), 1)), found], 1) * side.temperature


def constant_within_rows(seen: LossGradient) -> bool:
    """Whether all tokens of a response have the same weight, as in a mean of response means."""
    for side, g in zip(seen.sides, seen.rows, strict=True):
        c, mask = _coefficients(side, g), side.mask.numpy()
        high, low = np.where(mask, c, -np.inf).max(1), np.where(mask, c, np.inf).min(1)
        if (high - low > 1e-9 * np.abs(c).max()).any():
            return False
    return True


def uncovered(seen: LossGradient) -> list[str]:
    """Sentences about the policy's tokens that never have a gradient."""
    out = []
    for name, sentence in {
        "first": "The first token of a response never has a gradient.",
        "last": "The last token of a response never has a gradient.",
        "EOS": "EOS never has a gradient.",
    }.items():
        reached = False
        for side, g in zip(seen.sides, seen.rows, strict=True):
            if g.ndim < 3:
                return []
            t, columns = side.trajectory, torch.arange(side.ids.shape[1])[None]
            last = t.last & t.finished[:, None] if name == "EOS" else t.last
            at = (columns == t.prompt_lengths[:, None]) if name == "first" else last
            size = np.abs(_coefficients(side, g))[at.numpy()]
            reached |= bool((size > 1e-12 * np.abs(g).max()).any())
        if not reached:
            out.append(sentence)
    return out
