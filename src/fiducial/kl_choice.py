"""The KL penalty as a choice: which estimator may stand where, and how its coefficient adapts.

Settings are checked against this table before torch is loaded; `core.kl` computes what is chosen.
"""

from __future__ import annotations

from typing import Literal

Estimator = Literal["k1", "k2", "k3"]
"""A value of the KL, estimated from sampled tokens."""
Placement = Literal["reward", "loss"]
"""Where the penalty acts: in the reward of each token, or as a term of the loss."""
Penalty = Literal["k1", "k2", "k3", "k2_tokens", "weighted_k3", "forward_k3"]
"""An estimator that is asked for as a penalty; some are right in one place only."""

_IS_A_LOSS = "is differentiated, so it belongs in the loss. Use k1 in the reward"

REFUSED: dict[tuple[Placement, Penalty], str] = {
    ("loss", "k1"): (
        "k1 as a loss has an expected gradient of zero, so it holds nothing. Use k1 in the reward, "
        "or k2 as a loss"
    ),
    ("loss", "k3"): (
        "k3 as a loss has the gradient of the forward KL(ref, policy), not of KL(policy, ref). If "
        "that is meant, as in GRPO's paper, ask for it by its name, forward_k3; otherwise use k1 "
        "in the reward, or k2 as a loss"
    ),
    ("reward", "k2"): (
        "k2 is biased as a value, and so is a reward with it. Use k1 in the reward, or k2 as a loss"
    ),
    ("reward", "k3"): (
        "k3 in the reward has the gradient of KL(policy, ref) - KL(ref, policy). Use k1 in the "
        "reward"
    ),
    ("reward", "k2_tokens"): f"k2_tokens {_IS_A_LOSS}",
    ("reward", "weighted_k3"): f"weighted_k3 {_IS_A_LOSS}",
    ("reward", "forward_k3"): f"forward_k3 {_IS_A_LOSS}",
}
"""Combinations whose gradient is known to be wrong, with the reason (Tang and Munos 2025, arXiv
2506.09477; Liu et al. 2025, arXiv 2510.01555).
"""


def check(placement: Placement | None, estimator: Penalty | None) -> None:
    """Refuse a penalty whose gradient is known to be wrong; None fits whatever the other is.

    Raises:
        ValueError: with the reason and what to use.
    """
    if placement is not None and estimator is not None:
        if reason := REFUSED.get((placement, estimator)):
            raise ValueError(
                f"--kl.placement {placement} with --kl.estimator {estimator}: {reason}"
            )
    elif estimator == "k3":
        raise ValueError(f"--kl.estimator k3: it is right as a value, but {REFUSED['loss', 'k3']}")


def resolve(
    placement: Placement | None, estimator: Penalty | None, default: Penalty = "k1"
) -> tuple[Placement, Penalty]:
    """Both of them: what is not given follows from the other, or from the method's own `default`.

    Raises:
        ValueError: as :func:`check`.
    """
    check(placement, estimator)
    if estimator is None:
        fits = placement is None or (placement, default) not in REFUSED
        estimator = default if fits else "k1" if placement == "reward" else "k2"
    return placement or ("reward" if estimator == "k1" else "loss"), estimator


def adapt(beta: float, kl: float, *, target: float, episodes: int, horizon: int = 10_000) -> float:
    """The next KL coefficient: a proportional controller on the *sequence* KL. Ziegler et al. 2019
    (arXiv 1909.08593), section 2.2.

    Args:
        beta: the coefficient now.
        kl: mean over responses of the KL summed over their tokens, in nats.
        target: where that mean should be, in nats per response.
        episodes: responses sampled since the last call.
        horizon: responses over which an error of 20% or more changes beta by a factor of about 1.2;
            the paper's code: 10,000.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * episodes / horizon)
