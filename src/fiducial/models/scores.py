"""What the config.json of a saved scorer says about its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepScores:
    """How a process reward model reads a solution.

    separator: the text that ends a step. aggregate: how the scores of the steps become one.
    """

    separator: str
    aggregate: str = "last"


@dataclass(frozen=True)
class ScoreFacts:
    """The zero and the scale of a reward model's scores, or the steps of a process reward model.

    mean, std: of the scores of the reference completions. None: not measured.
    """

    mean: float | None = None
    std: float | None = None
    steps: StepScores | None = None

    @staticmethod
    def of(config: Any) -> ScoreFacts:
        """What a Hugging Face config holds."""
        steps = getattr(config, "process_reward", None)
        return ScoreFacts(
            getattr(config, "reward_mean", None),
            getattr(config, "reward_std", None),
            StepScores(steps["separator"], steps.get("aggregate", "last")) if steps else None,
        )

    def write(self, config: Any) -> None:
        """Put the facts into a Hugging Face config, and remove those of an earlier model."""
        steps = self.steps and {
            "separator": self.steps.separator,
            "aggregate": self.steps.aggregate,
        }
        facts = {"reward_mean": self.mean, "reward_std": self.std, "process_reward": steps}
        for name, value in facts.items():
            vars(config).pop(name, None)
            if value is not None:
                setattr(config, name, value)
