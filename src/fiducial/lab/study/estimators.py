"""What the shipped losses estimate, measured: their expected gradients against exact ones, and the
estimators of the KL against the KL.

Every row is the shipped function itself on a population (`fiducial.lab.kit`), or, for the KL, on
all responses of a world, differentiated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
from ..worlds import exact
from ..worlds.world import Array, World
from . import sequence

# ---- the losses as the methods put them together ----


def ppo_advantages(batch: Batch, *, lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N, W] as `fiducial ppo` makes them: k1 in every token's reward, the
    score at the last, GAE.
    """
    return gae(sequence.paid(batch), batch.old_values, batch.mask, gamma=1.0, lam=lam)


def ppo_loss(batch: Batch, *, lam: float = 1.0, whitened: bool = False) -> Tensor:
    """PPO's surrogate, a mean over tokens."""
    advantages, _ = ppo_advantages(batch, lam=lam)
    weight = whiten(advantages, batch.mask) if whitened else advantages
    return losses.ppo_clip(batch.logprobs, batch.old_logprobs, weight, batch.mask)[0]


def ppo_loss_by_response(batch: Batch) -> Tensor:
    """The same, a mean over responses of means over their tokens."""
    advantages, _ = ppo_advantages(batch)
    rows = zip(batch.logprobs, batch.old_logprobs, advantages, batch.mask, strict=True)
    return torch.stack([losses.ppo_clip(*(x[None] for x in row))[0] for row in rows]).mean()


def value_loss(batch: Batch, *, lam: float = 0.95) -> Tensor:
    """The critic's."""
    _, returns = ppo_advantages(batch, lam=lam)
    return losses.clipped_value(batch.values, batch.old_values, returns, batch.mask)[0]


def kl_penalty(batch: Batch, estimator: kl.Penalty) -> Tensor:
    """A KL penalty in the loss as the methods have it, a mean over responses."""
    return (
        kl.penalty(
            batch.logprobs, batch.ref_logprobs, batch.old_logprobs, batch.mask, estimator=estimator
        )
        .sum(1)
        .mean()
    )


def kl_loss(batch: Batch, estimator: Estimator) -> Tensor:
    """An estimator of the KL of the whole response as a loss; no method does this."""
    whole = (
        select(x, batch.mask).sum(1, keepdim=True) for x in (batch.logprobs, batch.ref_logprobs)
    )
    return kl.estimate(*whole, estimator=estimator).mean()


def kl_in_the_reward(batch: Batch, estimator: Estimator) -> Tensor:
    """An estimator of each token's KL as a price that is paid: the policy gradient of its sum."""
    price = kl.estimate(
        select(batch.logprobs.detach(), batch.mask),
        select(batch.ref_logprobs, batch.mask),
        estimator=estimator,
    )
    advantages, _ = gae(-price, torch.zeros_like(price), batch.mask, gamma=1.0, lam=1.0)
    return losses.ppo_clip(batch.logprobs, batch.old_logprobs, advantages, batch.mask)[0]


# ---- gradients ----


def estimator_table(*, batches: int = 1_000) -> list[dict[str, Any]]:
    """One row for each estimator: cosine and relative bias of its expectation, its length over the
    exact one's, the variance of one response.

    Args:
        batches: sampled batches of eight behind the two rows that are not exact.
    """
    j = "grad J"
    out: list[dict[str, Any]] = []

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
        "The critic is a baseline: it takes nothing from the direction.",
    )
    add(
        "PPO's surrogate, lambda 1, a wrong critic",
        j,
        critics["arbitrary"],
        ppo_loss,
        "However wrong the critic, a baseline has no bias, but variance.",
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
        "With V of the policy every lambda is exact.",
    )
    add(
        "PPO's surrogate, lambda 0.95, a wrong critic",
        j,
        critics["arbitrary"],
        _with(ppo_loss, lam=0.95),
        "Lambda below 1 passes the critic's error on.",
    )
    add(
        "PPO's surrogate, lambda 0.95, no critic",
        j,
        critics["none"],
        _with(ppo_loss, lam=0.95),
        "Without a critic lambda is a discount on the final reward.",
    )
    add(
        "PPO's surrogate, lambda 0.95, exact critic, whitened",
        j,
        critics["exact"],
        _with(ppo_loss, lam=0.95, whitened=True),
        "Over the whole population whitening only changes the length.",
    )
    small = _in_small_batches(critics["exact"], batches)
    out.append(small["PPO's surrogate, lambda 0.95, exact critic, whitened over 8 responses"])
    add(
        "PPO's surrogate, lambda 1, exact critic, a mean within each response",
        j,
        critics["exact"],
        ppo_loss_by_response,
        "Dividing by each response's length weighs short responses up: another direction.",
    )
    add(
        "PPO's surrogate at a policy that has moved",
        "grad of the clipped objective",
        kit.policy_case("clip"),
        lambda b: losses.ppo_clip(b.logprobs, b.old_logprobs, b.advantages, b.mask),
        "Ratios of 1/2, 1 and 2; the clip cuts where it is meant to.",
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
        "Its gradient is a score: zero on average. Refused.",
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
        "Forgets that early tokens choose later states.",
    )
    add(
        "weighted_k3 in the loss",
        of_kl,
        k,
        _with(kl_penalty, estimator="weighted_k3"),
        "The same in expectation: the ratio's gradient makes up for k3's.",
    )
    add(
        "forward_k3 in the loss",
        of_kl,
        k,
        _with(kl_penalty, estimator="forward_k3"),
        "GRPO's penalty: the forward KL, and states taken as given.",
    )
    add(
        "k3 of the response as a loss",
        of_kl,
        k,
        _with(kl_loss, estimator="k3"),
        "The gradient of the forward KL(ref, pi). Refused.",
    )
    add(
        "k3 of the response as a loss, for the forward KL",
        "grad KL(ref, pi)",
        kit.policy_case("forward_kl"),
        _with(kl_loss, estimator="k3"),
        "Against the forward KL it is exact.",
    )
    add(
        "k1 in the reward",
        of_kl,
        k,
        _with(kl_in_the_reward, estimator="k1"),
        "What the methods do unless told otherwise.",
    )
    add(
        "k2 in the reward",
        of_kl,
        k,
        _with(kl_in_the_reward, estimator="k2"),
        "A biased value is a biased reward.",
    )
    add(
        "k3 in the reward",
        of_kl,
        k,
        _with(kl_in_the_reward, estimator="k3"),
        "An unbiased value, but its own gradient is missing.",
    )

    add(
        "DPO's loss",
        "grad of its population loss",
        kit.preference_case(),
        lambda b: losses.dpo(
            b.policy_chosen, b.policy_rejected, b.ref_chosen, b.ref_rejected, beta=b.beta
        ),
        "Which vanishes at pi*.",
    )
    add(
        "Bradley-Terry loss",
        "grad of its population loss",
        kit.reward_case(),
        lambda b: losses.bradley_terry(b.score_chosen, b.score_rejected),
        "By the score of every response.",
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
        "Near V, where most of a return is noise.",
    )
    return out


def _with(function: Callable[..., Tensor], **keywords: Any) -> Loss:
    return lambda batch: function(batch, **keywords)


def _row(
    name: str, estimates: str, found: Measured, variance: float | None, known: bool, words: str
) -> dict[str, Any]:
    numbers = {
        "cosine": found.cosine,
        "relative_bias": found.relative_bias,
        "scale": found.scale,
        "variance": variance,
    }
    return {"name": name, "estimates": estimates, **numbers, "exact": known, "words": words}


def _in_small_batches(case: Case, batches: int, size: int = 8) -> dict[str, dict[str, Any]]:
    """Whitened over eight responses. Sampled; the plain gradient of the same draws, whose mean is
    known, takes most of the noise away.
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
            f"{batches:,} sampled batches; 95% of resamplings have a relative bias of {low:.3f} to "
            f"{high:.3f}: a small batch is divided by its own deviation.",
        )
    return out


# ---- KL ----


def kl_table(
    world: World | None = None, policy: Array | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """The estimators of KL(pi, ref) as values, as losses and in the reward, exactly, by enumeration.

    Args:
        world: default: the lab's mild one. Its reference is the reference.
        policy: [P, S, V] logits; default: the reference with normal noise of deviation 1.
    """
    if world is None:
        from ..worlds import policies

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
    whole, whole_ref = logp.sum(-1), ref.sum(-1)
    likely = whole.detach().exp() / prompts

    def gradient(value: Tensor) -> Array:
        return np.asarray(torch.autograd.grad(value, theta, retain_graph=True)[0].numpy())

    reverse = gradient((whole.exp() * (whole - whole_ref)).sum() / prompts)
    forward = gradient((whole_ref.exp() * (whole_ref - whole)).sum() / prompts)
    true = exact.kl(exact.logprobs(tree, policy), exact.reference(world))
    here = theta.log_softmax(-1)
    in_state = (here.exp() * (here - ref_table)).sum(-1)[:, path.clamp(min=0)]
    names: tuple[Estimator, ...] = ("k1", "k2", "k3")
    each: dict[str, Tensor] = {n: kl.estimate(whole, whole_ref, estimator=n) for n in names}
    each |= {f"{n}, summed over tokens": kl.estimate(logp, ref, estimator=n).sum(-1) for n in names}
    each["exact KL per token"] = select(in_state, known[None]).sum(-1)

    rows = []
    for name, value in each.items():
        as_loss, as_reward = (
            gradient((likely * value).sum()),
            gradient((likely * value.detach() * whole).sum()),
        )
        mean = float((likely * value.detach()).sum())
        rows.append(
            {
                "name": name,
                "mean": mean,
                "bias": mean - true,
                "std": math.sqrt(float((likely * (value.detach() - mean) ** 2).sum())),
                "loss_gradient": _which(as_loss, reverse, forward),
                "cosine_loss": _cosine(as_loss, reverse),
                "relative_error_loss": _error(as_loss, reverse),
                "cosine_reward": _cosine(as_reward, reverse),
                "relative_error_reward": _error(as_reward, reverse),
            }
        )
        if name == "exact KL per token":
            both = as_loss + as_reward
            rows.append(
                rows[-1]
                | {
                    "name": "exact KL per token, as a loss and in the reward",
                    "loss_gradient": _which(both, reverse, forward),
                    "cosine_loss": _cosine(both, reverse),
                    "relative_error_loss": _error(both, reverse),
                    "cosine_reward": None,
                    "relative_error_reward": None,
                }
            )
    return {
        "value": {
            "kl": true,
            "forward": exact.kl(exact.reference(world), exact.logprobs(tree, policy)),
        },
        "estimators": rows,
        "schulman": [schulman(shift) for shift in (0.1, 1.0)],
        "per_position": exact.kl_by_position(tree, policy, reference).tolist(),
    }


def _which(found: Array, reverse: Array, forward: Array) -> str:
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


def schulman(shift: float) -> dict[str, float]:
    """N(shift, 1) sampled against N(0, 1): deviations of k1, k2, k3 and the bias of k2 over the
    true KL, by quadrature.

    Schulman 2020, "Approximating KL divergence": 20, 1.42, 1.42 at 0.1; 2, 1.73, 1.7 at 1, where k2
    is biased by a quarter.
    """
    x = torch.linspace(shift - 12, shift + 12, 200_001, dtype=torch.float64)
    logq, logp = -((x - shift) ** 2) / 2, -(x**2) / 2
    weight, true = logq.softmax(0), shift**2 / 2
    out = {"shift": shift}
    names: tuple[Estimator, ...] = ("k1", "k2", "k3")
    for name in names:
        value = kl.estimate(logq, logp, estimator=name)
        mean = float((weight * value).sum())
        out[name] = math.sqrt(float((weight * (value - mean) ** 2).sum())) / true
        if name == "k2":
            out["bias_k2"] = mean / true - 1
    return out
