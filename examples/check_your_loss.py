"""Check a loss of your own: does its expected gradient have the right direction, and if not, what
is wrong with it?

    python examples/check_your_loss.py

The kit gives your function a batch in which each response occurs in proportion to its probability,
so that the gradient on the batch is an expectation and can be compared with the exact one. Of the
losses below, one is right, and three have a mistake that has been released more than once. None of
the three fails a test that only looks whether parameters change, and all of them train.
"""

from __future__ import annotations

import torch

from fiducial.lab import Batch, check_likelihood, check_policy_loss


def reinforce(batch: Batch) -> torch.Tensor:
    """Right: REINFORCE with reward-to-go, the KL penalty in each token's reward, and
    log-probabilities from raw logits.
    """
    # position t predicts token t + 1; the temperature is that of sampling
    logits = batch.logits()[:, :-1] / batch.temperature
    logprobs = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    mask, last = batch.mask[:, 1:], batch.trajectory.last[:, 1:]
    penalty = batch.beta * (logprobs.detach() - batch.ref_logprobs[:, 1:])
    rewards = torch.where(mask, last * batch.rewards[:, None] - penalty, 0.0)
    returns = rewards.flip(1).cumsum(1).flip(1)
    return -torch.where(mask, returns * logprobs, 0.0).sum() / mask.sum()


def mask_not_shifted(batch: Batch) -> torch.Tensor:
    """Wrong: the labels are shifted against the logits, but the mask is not shifted with them."""
    logprobs = batch.logits()[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    mask = batch.mask[:, :-1]  # should be batch.mask[:, 1:]
    return -(logprobs * mask).sum() / mask.sum()


def k3_as_reverse_kl(batch: Batch) -> torch.Tensor:
    """Wrong: k3 is a good estimate of KL(pi, ref), but its gradient is that of KL(ref, pi)."""
    log_ratio = torch.where(batch.mask, batch.ref_logprobs - batch.logprobs, 0.0).sum(1)
    return (log_ratio.exp() - 1 - log_ratio).mean()


def mean_of_response_means(batch: Batch) -> torch.Tensor:
    """Wrong: every response is divided by its own length."""
    each = torch.where(batch.mask, batch.logprobs, 0.0).sum(1) / batch.mask.sum(1)
    return -each.mean()


def main() -> None:
    print(check_policy_loss(reinforce), "\n")
    print(check_likelihood(mask_not_shifted), "\n")
    print(check_policy_loss(k3_as_reverse_kl, "kl"), "\n")
    print(check_likelihood(mean_of_response_means))


if __name__ == "__main__":
    main()
