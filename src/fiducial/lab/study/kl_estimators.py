"""The estimators of KL(pi, ref) as values, as losses and in the reward, against the exact KL: by
enumeration of all responses of a world, differentiated in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...core import kl
from ...core.kl import Estimator
from ...core.reductions import select
from ..worlds import exact, policies
from ..worlds.world import Array, World
from .results import KLEstimator, KLTable, KLValue, Schulman

NAMES: tuple[Estimator, ...] = ("k1", "k2", "k3")


def kl_table(world: World | None = None, policy: Array | None = None, *, seed: int = 0) -> KLTable:
    """The estimators of KL(pi, ref): one row each, all numbers exact.

    Args:
        world: the world, whose reference is ref. Default: the lab's mild one.
        policy: [P, S, V] logits of pi. Default: those of the reference plus standard normal noise.
        seed: random seed of that noise.
    """
    if world is None:
        world, _ = policies.mild()
    reference = exact.log_softmax(world.reference)
    if policy is None:
        policy = reference + np.random.default_rng([seed, 23]).normal(size=reference.shape)
    tree, prompts = world.tree, len(world.prompts)
    theta = torch.from_numpy(policy.copy()).requires_grad_()
    path, token, known = (torch.from_numpy(x) for x in (tree.path, tree.token, tree.path >= 0))
    ref_table = torch.from_numpy(reference)

    def tokens(table: Tensor) -> Tensor:
        return select(table.log_softmax(-1)[:, path.clamp(min=0), token.clamp(min=0)], known[None])

    logp, ref = tokens(theta), tokens(ref_table)
    sequence, sequence_ref = logp.sum(-1), ref.sum(-1)
    likely = sequence.detach().exp() / prompts

    def gradient(value: Tensor) -> Array:
        return np.asarray(torch.autograd.grad(value, theta, retain_graph=True)[0].numpy())

    reverse = gradient((sequence.exp() * (sequence - sequence_ref)).sum() / prompts)
    forward = gradient((sequence_ref.exp() * (sequence_ref - sequence)).sum() / prompts)
    true = exact.kl(exact.logprobs(tree, policy), exact.reference(world))
    here = theta.log_softmax(-1)
    in_state = (here.exp() * (here - ref_table)).sum(-1)[:, path.clamp(min=0)]
    each: dict[str, Tensor] = {n: kl.estimate(sequence, sequence_ref, estimator=n) for n in NAMES}
    each |= {f"{n}, summed over tokens": kl.estimate(logp, ref, estimator=n).sum(-1) for n in NAMES}
    each["exact KL per token"] = select(in_state, known[None]).sum(-1)

    rows = []
    for name, value in each.items():
        as_loss, as_reward = (
            gradient((likely * value).sum()),
            gradient((likely * value.detach() * sequence).sum()),
        )
        mean = float((likely * value.detach()).sum())
        row = KLEstimator(
            name=name,
            mean=mean,
            bias=mean - true,
            std=math.sqrt(float((likely * (value.detach() - mean) ** 2).sum())),
            loss_gradient=_which(as_loss, reverse, forward),
            cosine_loss=_cosine(as_loss, reverse),
            relative_error_loss=_error(as_loss, reverse),
            cosine_reward=_cosine(as_reward, reverse),
            relative_error_reward=_error(as_reward, reverse),
        )
        rows.append(row)
        if name == "exact KL per token":
            both = as_loss + as_reward
            rows.append(
                replace(
                    row,
                    name="exact KL per token, as a loss and in the reward",
                    loss_gradient=_which(both, reverse, forward),
                    cosine_loss=_cosine(both, reverse),
                    relative_error_loss=_error(both, reverse),
                    cosine_reward=None,
                    relative_error_reward=None,
                )
            )
    return KLTable(
        value=KLValue(true, exact.kl(exact.reference(world), exact.logprobs(tree, policy))),
        estimators=rows,
        schulman=[schulman(shift) for shift in (0.1, 1.0)],
        per_position=exact.kl_by_position(tree, policy, reference).tolist(),
    )


def _which(found: Array, reverse: Array, forward: Array) -> str:
    """Which of the known gradients it is."""
    if np.linalg.norm(found) < 1e-10 * np.linalg.norm(reverse):
        return "0"
    if _error(found, reverse) < 1e-8:
        return "KL(pi||ref)"
    return "KL(ref||pi)" if _error(found, forward) < 1e-8 else "none of the two"


def _cosine(a: Array, b: Array) -> float | None:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / lengths if np.linalg.norm(a) > 1e-10 * np.linalg.norm(b) else None


def _error(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def schulman(shift: float) -> Schulman:
    """N(shift, 1) sampled against N(0, 1), by quadrature: the standard deviations of k1, k2 and k3
    and the bias of k2, relative to the true KL.

    Schulman 2020, "Approximating KL divergence": standard deviations of 20, 1.42 and 1.42 at a
    shift of 0.1; 2, 1.73 and 1.7 at a shift of 1, where k2 is biased by a quarter.
    """
    x = torch.linspace(shift - 12, shift + 12, 200_001, dtype=torch.float64)
    logq, logp = -((x - shift) ** 2) / 2, -(x**2) / 2
    weight, true = logq.softmax(0), shift**2 / 2
    mean: dict[str, float] = {}
    std: dict[str, float] = {}
    for name in NAMES:
        value = kl.estimate(logq, logp, estimator=name)
        mean[name] = float((weight * value).sum())
        std[name] = math.sqrt(float((weight * (value - mean[name]) ** 2).sum())) / true
    return Schulman(shift, std["k1"], std["k2"], std["k3"], bias_k2=mean["k2"] / true - 1)
