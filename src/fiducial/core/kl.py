r"""KL to the reference: its estimators, where each may act, and how beta adapts.

With y sampled from the policy, :math:`l_t = \log\pi(y_t) - \log\pi_{ref}(y_t)` and :math:`r =
\pi_{ref}/\pi = e^{-l}`: k1 = l, k2 = l²/2, k3 = r - 1 - log r (Schulman 2020, "Approximating KL
divergence"). As *values*, k1 and k3 are unbiased for KL(π‖π_ref), k2 is not. As *losses* they
differ: the gradient of a sampled k1 is zero in expectation, that of k2 is the gradient of
KL(π‖π_ref) (at sequence level, on policy), that of k3 is the gradient of the *forward* KL(π_ref‖π).
As a detached reward k1 is exact, and k2 and k3 are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kl_choice import REFUSED, Estimator, Penalty, Placement, adapt, check, resolve
from .reductions import same_shape, select

__all__ = [
    "REFUSED",
    "Estimator",
    "Penalty",
    "Placement",
    "adapt",
    "check",
    "estimate",
    "exact",
    "penalty",
    "resolve",
]


def estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Estimator = "k1") -> Tensor:
    """Per-token estimate in nats of KL(policy ‖ reference) at tokens drawn from the policy.

    Args:
        logprobs, ref_logprobs: [B, T] log-probabilities of the sampled tokens, both at the sampling
            temperature.
        estimator: "k1" (unbiased, signed), "k2" (biased, non-negative), "k3" (unbiased,
            non-negative; heavy-tailed where the two are far apart).

    Returns:
        [B, T]. Mask it before it is summed: the sum over a response's tokens estimates the KL of
        the response.

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


def exact(logits: Tensor, other: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""KL(p || q) of each two distributions over a vocabulary, :math:`\sum_v p_v (\log p_v - \log
    q_v)`, exactly: nothing is sampled.

    Args:
        logits: [..., V] of p. other: [..., V] of q. temperature: divides both.

    Returns:
        [...] in nats, with the gradients of both. A token that p cannot choose (logit -inf) costs
        nothing; one that q alone cannot makes it infinite.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(logits=logits, other=other)
    if temperature != 1.0:
        logits, other = logits / temperature, other / temperature
    logp, logq = logits.log_softmax(-1), other.log_softmax(-1)
    p = logp.exp()
    return (
        p * torch.where(p > 0, logp - logq, torch.zeros((), dtype=logp.dtype, device=logp.device))
    ).sum(-1)


def penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: Penalty,
) -> Tensor:
    r"""A KL penalty that is differentiated as a term of the loss, on responses of the policy.

    Each estimator is a sum over tokens, with this expected gradient on policy:

    - k2, :math:`\tfrac12 (\sum_t l_t)^2`: exactly :math:`\nabla KL(\pi\|\pi_{ref})`, with the
      variance of a whole response.
    - k2_tokens, :math:`\sum_t \tfrac12 l_t^2`: the gradient of each state's KL, with the states
      taken as given, so that early tokens do not pay for later ones.
    - weighted_k3, :math:`\sum_t \rho_t\,k3_t`: the same as k2_tokens (DeepSeek-V3.2, arXiv
      2512.02556).
    - forward_k3, :math:`\sum_t k3_t`: the gradient of the forward
      :math:`KL(\pi_{ref}\|\pi)` of each state, with the states taken as given (GRPO, arXiv
      2402.03300, eq. 4). It has another optimum.

    In the lab's mild world, at a policy one standard normal deviation from its reference, the
    gradient of k2_tokens and weighted_k3 is 19% off that of KL(policy, ref) (relative error, exact
    by enumeration), that of forward_k3 29% (`fiducial lab`). All four vanish where the policy is
    the reference. In further epochs over the same responses none is exact.

    Args:
        logprobs: [B, T] of the policy, with gradient. ref_logprobs: [B, T]. old_logprobs: [B, T] of
            the policy that sampled, for weighted_k3.
        mask: [B, T] true at the policy's tokens.

    Returns:
        [B, T] in nats, 0 outside the mask; k2, which belongs to the whole response, stands at its
        last token.

    Raises:
        ValueError: shapes differ, or the estimator is no loss.
    """
    check("loss", estimator)
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, old_logprobs=old_logprobs, mask=mask)
    mask = mask.bool()
    log_ratio = select(logprobs, mask) - select(ref_logprobs, mask)
    if estimator == "k2":
        after = mask.flip(1).cumsum(1).flip(1)  # tokens from here on, this one included
        return select(
            0.5 * log_ratio.sum(1, keepdim=True).expand_as(log_ratio) ** 2, mask & (after == 1)
        )
    if estimator == "k2_tokens":
        return 0.5 * log_ratio**2
    k3 = (-log_ratio).expm1() + log_ratio
    if estimator == "forward_k3":
        return k3
    if estimator == "weighted_k3":
        return torch.exp(select(logprobs, mask) - select(old_logprobs, mask).detach()) * k3
    raise ValueError(
        "a KL penalty in the loss must be k2, k2_tokens, weighted_k3 or forward_k3, not "
        f"{estimator!r}"
    )
