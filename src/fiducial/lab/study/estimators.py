"""What the package's losses estimate, measured: the expectation of each gradient against the exact
one.

Every row is the package's own function on a population (`fiducial.lab.kit`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ... import losses
from ...core import kl
from ...core.advantages import gae, reward_to_go
from ...core.kl import Estimator
from ...core.reductions import select, whiten
from ..kit import cases as kit
from ..kit.batch import Batch, build
from ..kit.case import Case
from ..kit.measure import Loss, Measured, loss_gradient, measure
from ..kit.population import draw
from ..worlds.world import Array
from . import sequence
from .results import GradientEstimator

# ---- the losses as the methods put them together ----


def ppo_advantages(batch: Batch, *, lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N, W] as `fiducial ppo` computes them: k1 in the reward of every
    token, the score at the last one, GAE.
    """
    return gae(sequence.paid(batch), batch.old_values, batch.mask, gamma=1.0, lam=lam)


def ppo_loss(batch: Batch, *, lam: float = 1.0, whitened: bool = False) -> Tensor:
    """PPO's surrogate, a mean over tokens."""
    advantages, _ = ppo_advantages(batch, lam=lam)
    weight = whiten(advantages, batch.mask) if whitened else advantages
    return losses.ppo_clip(batch.logprobs, batch.old_logprobs, weight, batch.mask)[0]


def ppo_loss_by_response(batch: Batch) -> Tensor:
    """PPO's surrogate, a mean over responses of means over their tokens."""
    advantages, _ = ppo_advantages(batch)
    rows = zip(batch.logprobs, batch.old_logprobs, advantages, batch.mask, strict=True)
    return torch.stack([losses.ppo_clip(*(x[None] for x in row))[0] for row in rows]).mean()


def value_loss(batch: Batch, *, lam: float = 0.95) -> Tensor:
    """The critic's clipped loss."""
    _, returns = ppo_advantages(batch, lam=lam)
    return losses.clipped_value(batch.values, batch.old_values, returns, batch.mask)[0]


def kl_penalty(batch: Batch, estimator: kl.Penalty) -> Tensor:
    """A KL penalty in the loss, as the methods add it: a mean over responses."""
    return (
        kl.penalty(
            batch.logprobs, batch.ref_logprobs, batch.old_logprobs, batch.mask, estimator=estimator
        )
        .sum(1)
        .mean()
    )


def kl_loss(batch: Batch, estimator: Estimator) -> Tensor:
    """An estimator of the KL of a whole response as a loss; no method does this."""
    sequences = (
        select(x, batch.mask).sum(1, keepdim=True) for x in (batch.logprobs, batch.ref_logprobs)
    )
    return kl.estimate(*sequences, estimator=estimator).mean()


def kl_in_the_reward(batch: Batch, estimator: Estimator) -> Tensor:
    """An estimator of each token's KL in the reward: the policy gradient of its sum."""
    penalty = kl.estimate(
        select(batch.logprobs.detach(), batch.mask),
        select(batch.ref_logprobs, batch.mask),
        estimator=estimator,
    )
    advantages, _ = gae(-penalty, torch.zeros_like(penalty), batch.mask, gamma=1.0, lam=1.0)
    return losses.ppo_clip(batch.logprobs, batch.old_logprobs, advantages, batch.mask)[0]


# ---- gradients ----


def estimator_table(*, batches: int = 1_000) -> list[GradientEstimator]:
    """One row per estimator: cosine and relative bias of its expectation, its length over that of
    the exact gradient, and the variance of one response (pair). All rows that estimate grad J are
    measured on one population.

    Args:
        batches: number of sampled batches of eight responses for the two rows that are not exact.
    """
    j = "grad J"
    out: list[GradientEstimator] = []

    def add(name: str, estimates: str, case: Case, loss: Loss, words: str) -> None:
        seen = case.gradient(loss)
        found = measure(-case.parameters(seen.table), case.exact(case.population))
        out.append(
            _row(name, estimates, found, case.variance(seen) if found.scale else None, True, words)
        )

    critics = {c: kit.policy_case(critic=c) for c in ("exact", "arbitrary", "none")}
    add(
        "PPO's surrogate, lambda 1, exact critic",
        j,
        critics["exact"],
        ppo_loss,
        "The critic is a baseline, so it does not change the direction.",
    )
    add(
        "PPO's surrogate, lambda 1, a wrong critic",
        j,
        critics["arbitrary"],
        ppo_loss,
        "However wrong the critic, a baseline adds variance but no bias.",
    )
    add(
        "PPO's surrogate, lambda 1, no critic",
        j,
        critics["none"],
        ppo_loss,
        "REINFORCE with reward-to-go.",
    )
    add(
        "PPO's surrogate, lambda 0.95, exact critic",
        j,
        critics["exact"],
        _with(ppo_loss, lam=0.95),
        "With the policy's own V, every lambda is exact.",
    )
    add(
        "PPO's surrogate, lambda 0.95, a wrong critic",
        j,
        critics["arbitrary"],
        _with(ppo_loss, lam=0.95),
        "A lambda below 1 lets the critic's error into the gradient.",
    )
    add(
        "PPO's surrogate, lambda 0.95, no critic",
        j,
        critics["none"],
        _with(ppo_loss, lam=0.95),
        "Without a critic, lambda is a discount on the final reward.",
    )
    add(
        "PPO's surrogate, lambda 0.95, exact critic, whitened",
        j,
        critics["exact"],
        _with(ppo_loss, lam=0.95, whitened=True),
        "Over the whole population, whitening only changes the length.",
    )
    small = _in_small_batches(critics["exact"], batches)
    out.append(small["PPO's surrogate, lambda 0.95, exact critic, whitened over 8 responses"])
    add(
        "PPO's surrogate, lambda 1, exact critic, a mean within each response",
        j,
        critics["exact"],
        ppo_loss_by_response,
        "Dividing by each response's length gives short responses more weight: another direction.",
    )
    add(
        "PPO's surrogate at a policy that has moved",
        "grad of the clipped objective",
        kit.policy_case("clip"),
        lambda b: losses.ppo_clip(b.logprobs, b.old_logprobs, b.advantages, b.mask),
        "Ratios of 1/2, 1 and 2; the clip removes the gradient where it should.",
    )

    sequence.rows(add)
    out.append(small["REINFORCE, whitened over 8 responses (REINFORCE++)"])
    sequence.off_policy_rows(add)

    k, of_kl = kit.policy_case("kl"), "grad KL(pi, ref)"
    add(
        "k1 as a loss",
        of_kl,
        k,
        _with(kl_loss, estimator="k1"),
        "Its gradient is the score function, which is zero on average. The package refuses it.",
    )
    add(
        "k2 of the response in the loss",
        of_kl,
        k,
        _with(kl_penalty, estimator="k2"),
        "Biased as a value, exact as a loss.",
    )
    add(
        "k2_tokens in the loss",
        of_kl,
        k,
        _with(kl_penalty, estimator="k2_tokens"),
        "It ignores that early tokens decide which states come later.",
    )
    add(
        "weighted_k3 in the loss",
        of_kl,
        k,
        _with(kl_penalty, estimator="weighted_k3"),
        "The same in expectation: the gradient of the ratio corrects that of k3.",
    )
    add(
        "forward_k3 in the loss",
        of_kl,
        k,
        _with(kl_penalty, estimator="forward_k3"),
        "GRPO's penalty: the forward KL of each token, with the states taken as given.",
    )
    add(
        "k3 of the response as a loss",
        of_kl,
        k,
        _with(kl_loss, estimator="k3"),
        "Its gradient is that of the forward KL(ref, pi). The package refuses it.",
    )
    add(
        "k3 of the response as a loss, for the forward KL",
        "grad KL(ref, pi)",
        kit.policy_case("forward_kl"),
        _with(kl_loss, estimator="k3"),
        "As an estimator of the forward KL's gradient it is exact.",
    )
    add(
        "k1 in the reward",
        of_kl,
        k,
        _with(kl_in_the_reward, estimator="k1"),
        "The default of the methods.",
    )
    add(
        "k2 in the reward",
        of_kl,
        k,
        _with(kl_in_the_reward, estimator="k2"),
        "It is biased as a value, so the reward is biased.",
    )
    add(
        "k3 in the reward",
        of_kl,
        k,
        _with(kl_in_the_reward, estimator="k3"),
        "It is unbiased as a value, but the gradient of the estimator itself is missing.",
    )

    add(
        "DPO's loss",
        "grad of its population loss",
        kit.preference_case(),
        lambda b: losses.dpo(
            b.policy_chosen, b.policy_rejected, b.ref_chosen, b.ref_rejected, beta=b.beta
        ),
        "This gradient is zero at pi*.",
    )
    add(
        "Bradley-Terry loss",
        "grad of its population loss",
        kit.reward_case(),
        lambda b: losses.bradley_terry(b.score_chosen, b.score_rejected),
        "With respect to the score of every response.",
    )
    add(
        "negative log-likelihood",
        "grad of the token-summed NLL",
        kit.likelihood_case(),
        lambda b: losses.nll(b.logprobs, b.mask),
        "A mean over all tokens of the batch.",
    )
    add(
        "critic's clipped loss, lambda 0.95",
        "grad of half the squared error to V",
        kit.value_case(),
        value_loss,
        "Close to V, where most of a return is noise.",
    )
    return out


def _with(function: Callable[..., Tensor], **keywords: object) -> Loss:
    return lambda batch: function(batch, **keywords)


def _row(
    name: str, estimates: str, found: Measured, variance: float | None, exact: bool, words: str
) -> GradientEstimator:
    return GradientEstimator(
        name=name,
        estimates=estimates,
        cosine=found.cosine,
        relative_bias=found.relative_bias,
        scale=found.scale,
        variance=variance,
        exact=exact,
        words=words,
    )


def _in_small_batches(case: Case, batches: int, size: int = 8) -> dict[str, GradientEstimator]:
    """Advantages whitened over eight responses. The expectation is sampled; the gradient without
    whitening on the same draws, whose mean is known, is the control variate that removes most of
    the noise.
    """
    rng, target = np.random.default_rng(0), case.exact(case.population).ravel()

    def plain_ppo(batch: Batch) -> Tensor:
        advantages, _ = ppo_advantages(batch, lam=0.95)
        return (
            losses.ppo_clip_sum(batch.logprobs, batch.old_logprobs, advantages, batch.mask)[0]
            / size
        )

    def plain_reinforce(batch: Batch) -> Tensor:
        return sequence.reinforce(batch, reward_to_go(sequence.paid(batch), batch.mask))

    kinds: dict[str, tuple[Loss, Loss]] = {
        "PPO's surrogate, lambda 0.95, exact critic, whitened over 8 responses": (
            _with(ppo_loss, lam=0.95, whitened=True),
            plain_ppo,
        ),
        "REINFORCE, whitened over 8 responses (REINFORCE++)": (
            sequence.reinforce_plus_plus,
            plain_reinforce,
        ),
    }
    seen: dict[str, list[Array]] = {name: [] for name in kinds}
    for _ in range(batches):
        batch = build(case.population, *draw(case.population, size, rng))
        for name, pair in kinds.items():
            seen[name].append(
                np.stack(
                    [
                        -case.parameters(loss_gradient(loss, batch, case.learned).table).ravel()
                        for loss in pair
                    ]
                )
            )
    out = {}
    for name, both in seen.items():
        g, c = np.array(both)[:, 0], np.array(both)[:, 1] - target
        better = g - float((g * c).sum() / (c * c).sum()) * c
        again = [
            measure(better[rng.integers(0, batches, batches)].mean(0), target) for _ in range(200)
        ]
        low, high = np.quantile([m.relative_bias for m in again], [0.025, 0.975])
        mean = better.mean(0)
        variance = float(size * ((g - mean) ** 2).sum(1).mean() / (mean @ mean))
        out[name] = _row(
            name,
            "grad J",
            measure(mean, target),
            variance,
            False,
            f"{batches:,} sampled batches; 95% interval of the relative bias {low:.3f} to "
            f"{high:.3f}: a small batch is divided by its own standard deviation.",
        )
    return out
