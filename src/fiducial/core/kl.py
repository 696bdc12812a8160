r"""KL to the reference: estimators per token, and the controller of its coefficient.

With y sampled from the policy, :math:`l_t = \log\pi(y_t) - \log\pi_{ref}(y_t)` and :math:`r = \pi_{ref}/\pi = e^{-l}`:
k1 = l, k2 = l²/2, k3 = r - 1 - log r (Schulman 2020, "Approximating KL divergence"). As *values*, k1 and k3 are unbiased for KL(π‖π_ref), k2 is not.
As *losses* they differ: the gradient of a sampled k1 is zero in expectation, that of k2 is the gradient of KL(π‖π_ref) (at sequence level, on
policy), that of k3 is the gradient of the *forward* KL(π_ref‖π). PPO here puts k1 into the reward, where its policy gradient is exact.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .reductions import same_shape

Estimator = Literal["k1", "k2", "k3"]


def estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimate in nats of KL(policy ‖ reference) at tokens drawn from the policy.

    Args:
        logprobs, ref_logprobs: [B, T] log-probabilities of the sampled tokens, both at the sampling temperature.
        estimator: "k1" (unbiased, signed), "k2" (biased, non-negative), "k3" (unbiased, non-negative; heavy-tailed where the two are far apart).

    Returns:
        [B, T]. Mask it before it is summed: the sum over a response's tokens estimates the KL of the response.

    Raises:
        ValueError: shapes differ, or the estimator is none of the three.
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return (-log_ratio).expm1() + log_ratio
    raise ValueError(f"estimator must be k1, k2 or k3, not {estimator!r}")


def adapt(beta: float, kl: float, *, target: float, episodes: int, horizon: int = 10_000) -> float:
    """The next KL coefficient: a proportional controller on the *sequence* KL. Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        beta: the coefficient now.
        kl: mean over responses of the KL summed over their tokens, in nats.
        target: where that mean should be, in nats a response.
        episodes: responses sampled since the last call.
        horizon: responses in which an error of 20% or more changes beta by a factor of about 1.2; the paper's code: 10,000.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * episodes / horizon)
