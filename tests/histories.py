"""Histories of runs as metrics.jsonl has them: healthy ones, and with some metrics replaced."""

import random
from collections.abc import Callable, Mapping
from typing import Any

Rows = list[dict[str, Any]]
Curve = Callable[[float], float]
Change = Mapping[str, Curve]
"""Metrics by their name, as functions of the share of the run that is done."""


def ppo_history(change: Change | None = None, steps: int = 40) -> Rows:
    """A healthy PPO run; `change` replaces a metric by a function of the share of the run done."""
    noise = random.Random(0)
    healthy: dict[str, Curve] = {
        "reward": lambda t: t,
        "objective/kl": lambda t: 2 * t,
        "kl": lambda t: 0.1 * t,
        "entropy": lambda t: 2 - t,
        "clip_ratio": lambda t: 0.05,
        "approx_kl": lambda t: 0.01,
        "ratio/first": lambda t: 1.0,
        "explained_variance": lambda t: t - 0.2,
        "completions/finished": lambda t: 0.97,
        "completions/mean_length": lambda t: 20 + t,
        "sampler_gap": lambda t: 1e-4,
        "epochs_done": lambda t: 4,
        "loss": lambda t: 0.0,
    }
    rows = []
    for i in range(1, steps + 1):
        row: dict[str, Any] = {"step": i, "seconds": float(i)}
        for name, value in (healthy | dict(change or {})).items():
            noisy = name in ("reward", "objective/kl", "kl", "explained_variance", "entropy")
            row[name] = value(i / steps) + (0.001 * noise.gauss(0, 1) if noisy else 0)
        rows.append(row)
    return rows


def group_history(loss: str = "ppo_clip", change: Change | None = None) -> Rows:
    """A healthy run without a critic: of grpo with one update a batch, gspo or cispo with several,
    or reinforce.
    """
    groups: Change = {"groups/no_spread": lambda t: 0.2 + 0.2 * t, "groups/sampled": lambda t: 8}
    rows = ppo_history({**groups, **(change or {})})
    own: dict[str, dict[str, float]] = {
        "ppo_clip": {"clip_ratio": 0.0, "approx_kl": 0.0, "ratio": 1.0, "ratio/max": 1.0},
        "gspo": {"clip_ratio/responses": 0.24, "approx_kl": 1e-4},
        "cispo": {"clip_ratio/capped": 0.0, "approx_kl": 1e-3},
        "reinforce": {},
    }
    gone = {"explained_variance", "epochs_done", "loss", "clip_ratio", "approx_kl"} | (
        {"ratio/first"} if loss == "reinforce" else set()
    )
    return [{k: v for k, v in row.items() if k not in gone} | own[loss] for row in rows]


def dpo_history(
    steps: int = 40, chosen: float = -1.0, accuracy: float = 0.7, margin: float = 1.0
) -> Rows:
    return [
        {
            "step": i,
            "loss": 0.69 - 0.2 * i / steps,
            "rewards/accuracies": 0.5 + (accuracy - 0.5) * min(1, 10 * i / steps),
            "rewards/margins": margin * i / steps,
            "logps/chosen": -40 + chosen * i / steps,
            "logps/rejected": -42 - 9 * i / steps,
        }
        for i in range(1, steps + 1)
    ]
