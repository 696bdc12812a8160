r"""On-policy distillation: the reverse KL to a teacher on the student's own samples.

Agarwal et al. 2023 (GKD), arXiv 2306.13649; Gu et al. 2023 (MiniLLM), arXiv 2306.08543.

With y sampled from the student, the KL of whole responses is the sum over tokens of the KL in the
states they visit, :math:`KL(\pi\|\pi_T) = E_y\sum_t KL_t`, :math:`KL_t = \sum_v
\pi(v|s_t)\log\frac{\pi(v|s_t)}{\pi_T(v|s_t)}`. Its gradient has two parts (MiniLLM, section 2.2):
that of each :math:`KL_t` itself, and that of how likely its state is,

.. math:: \nabla KL = E_y\sum_t\Big[\nabla KL_t + \nabla\log\pi(y_t)\sum_{k>t} KL_k\Big]

`discount` weights the second part: a token pays :math:`d^{k-t}` of the KL that is found k - t
tokens later. At 1 the expected gradient is exactly that of the responses' KL. At 0, as in GKD and
in Thinking Machines 2025 ("On-policy distillation"), each state pays for itself alone and the
states are taken as given. That is not the gradient of the responses' KL: it is 19% off in the lab's
mild world, one standard normal deviation from the reference (cosine 0.984, exact by enumeration).
But it vanishes where the student equals the teacher, so a student that can represent the teacher
has the same optimum, and it has far less variance.

Shapes: [B, T]; column t is about token t. Everything is in nats, at the sampling
temperature. In the sum forms the caller divides by the count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import advantages, kl
from ..core.reductions import same_shape, select
from .policy import reinforce_sum

Metrics = dict[str, Tensor]


def reverse_kl(
    logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Metrics]:
    r"""The exact KL(student || teacher) at each state over the whole vocabulary (`discount` 0).

    It is meant for a loop of your own. It holds the [B, T, V] logits several times; the package's
    own loop goes through hidden states in chunks instead (`Policy(ids, mask, teacher=...)`) and
    passes the result to :func:`reverse_kl_states`.

    Args:
        logits: [B, T, V] of the student, with gradient; column t is the distribution from which
            token t is drawn: `model(ids).logits[:, :-1]` with `mask[:, 1:]`. Log-probabilities do
            as well.
        teacher_logits: [B, T, V], no gradient.
        mask: [B, T] true at the student's tokens.
        temperature: of sampling; it divides both.

    Returns:
        The mean over real tokens, and ``kl_teacher``, the same value without a gradient, in nats
        per token.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = _count(mask)
    loss, metrics = reverse_kl_sum(logits, teacher_logits, mask, temperature)
    return loss / count, {k: v / count for k, v in metrics.items()}


def reverse_kl_sum(
    logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Metrics]:
    """:func:`reverse_kl` summed over real tokens."""
    same_shape(logits=logits, teacher_logits=teacher_logits)
    same_shape(logits=logits[..., 0], mask=mask)
    mask = mask.bool()
    loss = kl.exact(logits[mask], teacher_logits[mask].detach(), temperature=temperature).sum()
    return loss, {"kl_teacher": loss.detach()}


def reverse_kl_states(
    state_kl: Tensor, logprobs: Tensor, mask: Tensor, *, discount: float = 0.0
) -> tuple[Tensor, Metrics]:
    r"""The exact KL at each visited state, and by `discount` the cost of the states after it.

    .. math:: L_t = KL_t + \mathrm{sg}\Big[\sum_{k>t} d^{k-t} KL_k\Big] \log\pi(y_t)

    Args:
        state_kl: [B, T] exact KL of the state of each token, with gradient.
        logprobs: [B, T] of the sampled tokens, with gradient where `discount` is not 0.
        mask: [B, T] true at the student's tokens.
        discount: 0 takes the states as given; 1 is exactly the gradient of the responses' KL.

    Returns:
        The mean over real tokens (of value KL_t only where `discount` is 0), and ``kl_teacher`` in
        nats per token.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = _count(mask)
    loss, metrics = reverse_kl_states_sum(state_kl, logprobs, mask, discount=discount)
    return loss / count, {k: v / count for k, v in metrics.items()}


def reverse_kl_states_sum(
    state_kl: Tensor, logprobs: Tensor, mask: Tensor, *, discount: float = 0.0
) -> tuple[Tensor, Metrics]:
    """:func:`reverse_kl_states` summed over real tokens."""
    same_shape(state_kl=state_kl, logprobs=logprobs, mask=mask)
    state_kl = select(state_kl, mask)
    loss, here = state_kl.sum(), state_kl.detach()
    if discount:
        later = _to_go(-here, mask, discount) + here
        loss = loss + reinforce_sum(logprobs, later, mask)[0]
    return loss, {"kl_teacher": here.sum()}


def reverse_kl_sampled(
    logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor, *, discount: float = 0.0
) -> tuple[Tensor, Metrics]:
    r"""The reverse KL from the sampled tokens alone: the teacher's log-probability is a reward.

    Thinking Machines 2025, "On-policy distillation".

    .. math:: L_t = -A_t \log\pi(y_t), \qquad
              A_t = -\mathrm{sg}\Big[\sum_{k\ge t} d^{k-t}
              \big(\log\pi(y_k) - \log\pi_T(y_k)\big)\Big]

    In expectation over the tokens its gradient is that of :func:`reverse_kl_states` at the same
    `discount`. It needs one number per token from the teacher instead of its distribution, and has
    more variance.

    Args:
        logprobs: [B, T] of the student that sampled, with gradient.
        teacher_logprobs: [B, T] of the same tokens.
        mask: [B, T] true at the student's tokens.
        discount: 0, each token alone, in the source; 1 is exactly the gradient of the responses'
            KL.

    Returns:
        The mean over the student's tokens, whose value means nothing, and ``kl_teacher``, an
        unbiased estimate (k1) in nats per token.

    Raises:
        ValueError: shapes differ, or the mask is empty.
    """
    count = _count(mask)
    loss, metrics = reverse_kl_sampled_sum(logprobs, teacher_logprobs, mask, discount=discount)
    return loss / count, {k: v / count for k, v in metrics.items()}


def reverse_kl_sampled_sum(
    logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor, *, discount: float = 0.0
) -> tuple[Tensor, Metrics]:
    """:func:`reverse_kl_sampled` summed over real tokens."""
    same_shape(logprobs=logprobs, teacher_logprobs=teacher_logprobs, mask=mask)
    cost = select(kl.estimate(logprobs, teacher_logprobs, estimator="k1"), mask).detach()
    loss, _ = reinforce_sum(logprobs, _to_go(-cost, mask, discount), mask)
    return loss, {"kl_teacher": cost.sum()}


def _to_go(rewards: Tensor, mask: Tensor, discount: float) -> Tensor:
    """[B, T] the discounted rewards from each token on: GAE without a critic."""
    return advantages.gae(rewards, torch.zeros_like(rewards), mask, gamma=discount, lam=1.0)[0]


def _count(mask: Tensor) -> Tensor:
    count = mask.bool().sum()
    if count == 0:
        raise ValueError("the mask selects nothing: a mean over no token is undefined")
    return count
