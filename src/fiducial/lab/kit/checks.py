r"""Check a loss: pass a function from a batch to a scalar, and learn its bias, its cost, and the
name of the mistake.

    from fiducial.lab import check_policy_loss

    def mine(batch):  # REINFORCE, with the KL penalty in the reward
        penalty = batch.beta * (batch.logprobs - batch.ref_logprobs).detach()
        returns = batch.rewards - (penalty * batch.mask).sum(1)
        return -(returns[:, None] * batch.logprobs * batch.mask).sum() / batch.mask.sum()

    print(check_policy_loss(mine))

The batch is a population (`fiducial.lab.kit.population`): its mean is an expectation, so the
gradient of the loss is compared with the exact one up to rounding. Only the direction is judged: a
sum, a mean over tokens and a mean over responses are one loss at three learning rates.

What is wrong is then searched for in this order: no gradient, or one that is not finite;
log-probabilities read at the wrong place or temperature; the mistakes of `fiducial.lab.kit.faults`,
by their gradients in closed form; gradients where none should be; changes of the batch that should
change nothing (more padding, other prompts, another order, every row twice); and what must be
removed for the bias to disappear. A clip is measured by trying ratios, or distances of a value from
its old one. A loss that leaves most of the way to the optimum after a short training is never
called correct.

Statistics of small batches need `unbiased`. What a loss cannot show is not checked: tokenization,
sampling, dropout at other times, accumulation over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable

from . import cases
from .batch import Batch, PairBatch
from .cases import Objective
from .diagnosis import judge
from .population import Critic
from .verdict import Verdict


def check_policy_loss(
    loss: Callable[[Batch], object],
    objective: Objective = "J",
    *,
    group: int = 1,
    critic: Critic = "exact",
    clip: float = 0.2,
    clip_high: float | None = None,
    cap: float = 1.5,
    train: bool = True,
) -> Verdict:
    """Check whether minus the expected gradient of a policy loss is the gradient of the objective.

    Args:
        loss: from a Batch to a scalar. It uses what it needs of `logits()` or `logprobs`,
            `old_logprobs`, `ref_logprobs`, `rewards`, `beta`, `mask`, `old_values`, `advantages`
            (exact ones) and `group`.
        objective: with the policy that sampled the responses: "J", E[r] - beta KL(pi, ref);
            "reward", E[r] (the batch's beta is 0); "kl" and "forward_kl", the loss is KL(pi, ref)
            or KL(ref, pi). With a policy that has moved away from the one that sampled: "clip",
            PPO's surrogate of the batch's `advantages`; "gspo", GSPO's surrogate with `rewards` as
            advantages; "cispo", CISPO's gradient of the `advantages`; "moved", E[r], which only
            the ratio of the whole response gives (for corrections between sampler and trainer).
        group: 2: rows 2i and 2i + 1 are two responses to one prompt, and `batch.group` says so; for
            RLOO, GRPO and similar methods. 1: all 64 responses to a prompt have the same number.
        critic: `old_values` are those of the policy ("exact"), wrong ones ("arbitrary"), or 0
            ("none"). With lambda below 1, only "exact" gives the exact gradient.
        clip: epsilon of "clip" and "gspo". The clip of the loss is measured, for ratios from
            1/1000 to 1000, and must agree to 1%.
        clip_high: epsilon above 1, if it differs.
        cap: the cap of "cispo", measured too.
        train: also train a table of logits with the loss (about a second).

    Raises:
        ValueError: the loss did not return a scalar, or the objective or group does not exist.
    """
    if objective not in cases.TITLES:
        raise ValueError(f"objective must be one of {', '.join(cases.TITLES)}, not {objective!r}")
    if group not in (1, 2):
        raise ValueError(f"group must be 1 or 2, not {group}")
    case = cases.policy_case(
        objective, group=group, critic=critic, clip=clip, clip_high=clip_high, cap=cap
    )
    return judge(loss, case, train=train)


def check_likelihood(loss: Callable[[Batch], object], *, train: bool = True) -> Verdict:
    """Check whether a loss for supervised fine-tuning has the gradient of the negative
    log-likelihood, with the same weight for every token.

    Args:
        loss: from a Batch of demonstrations (`logits()` or `logprobs`, `ids`, `mask`; the
            temperature is 1) to a scalar.
        train: also train a table of logits with the loss.
    """
    return judge(loss, cases.likelihood_case(), train=train)


def check_preference_loss(
    loss: Callable[[PairBatch], object], beta: float = 0.4, *, train: bool = True
) -> Verdict:
    """Check whether a preference loss has the expected gradient of DPO, at a policy that is not the
    optimum, where beta inside the sigmoid matters.

    Args:
        loss: from a PairBatch to a scalar, of `policy_chosen`, ..., `ref_rejected` [B] or of the
            tokens of `chosen` and `rejected`.
        beta: the beta that the loss should have; the batch's `beta` is the same.
        train: also minimize the loss from the reference (L-BFGS on the population) and report the
            gap to pi* that is left.
    """
    return judge(loss, cases.preference_case(beta), train=train)


def check_reward_loss(loss: Callable[[PairBatch], object], *, train: bool = True) -> Verdict:
    """Check whether a reward model's loss is the Bradley-Terry likelihood of the scores at each
    response's last token.

    Args:
        loss: from a PairBatch to a scalar, of `score_chosen` and `score_rejected` [B] or of
            `chosen.scores` and `rejected.scores` [B, W], whose columns are the head's output at
            each token.
        train: also minimize the loss from scores of 0, and report the gap to pi* of the policy that
            is optimal for the learned scores.
    """
    return judge(loss, cases.reward_case(), train=train)


def check_value_loss(loss: Callable[[Batch], object], *, train: bool = True) -> Verdict:
    """Check whether the fixed point of a critic's loss is V^pi: the rewards and penalties to come,
    from each state.

    First the values are within 0.1 of those of the policy, inside the range to which PPO clips
    them, and `old_values` are exact, so every lambda has the same fixed point. Then the old values
    are wrong, which shows what the target is made of, and the values are far from the old ones,
    which shows where they are clipped. The remarks say what was measured.

    Args:
        loss: from a Batch to a scalar, of `values` (with gradient), `old_values`, `rewards`,
            `beta`, `logprobs`, `ref_logprobs` and `mask`.
        train: also fit a table of values with the loss, and report the error that is left.
    """
    return judge(loss, cases.value_case(), train=train)
