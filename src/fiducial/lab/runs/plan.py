"""What the lab runs: the methods by their names in the table of methods, and the plan of one
run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...verbs import VARIANTS

Kind = Literal["table", "transformer"]

METHODS = (
    "dpo",
    "ppo",
    "reinforce_none",
    "reinforce_mean",
    "remax",
    "rloo",
    "reinforce_pp",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
)
OWN: dict[str, dict[str, Any]] = {"ppo": {"critic": {"start": "policy"}}}
"""Settings that the lab adds to those of the table: the critic of a world has no model of its own
to start from.
"""


@dataclass(frozen=True)
class Plan:
    """One run of a method of the package.

    method: one of METHODS.
    beta: of the run, and of the optimum that it is compared with. None: the world's.
    points: how many times the policy is measured during training.
    reward: what is optimized, and what the gap is measured in. "steps" is the true reward, plus
        what the world's process reward model gives for each step.
    settings: further settings of the method.
    credit: for PPO with a table: also compare the credit that methods give to each token, at the
        policy that has closed half of the gap.
    """

    method: str
    policy: Kind
    learning_rate: float
    steps: int
    seed: int = 0
    batch_size: int = 256
    beta: float | None = None
    points: int = 25
    reward: Literal["reward", "proxy", "steps"] = "reward"
    settings: dict[str, Any] = field(default_factory=dict)
    credit: bool = False

    @property
    def verb(self) -> str:
        """The verb that runs the method."""
        return verb_of(self.method)

    @property
    def method_settings(self) -> dict[str, Any]:
        """The settings that make the verb this method, and those of this run."""
        variant = next((v.settings for v in VARIANTS if v.name == self.method), {})
        return {**variant, **OWN.get(self.method, {}), **self.settings}


def verb_of(method: str) -> str:
    """The verb that runs a method: its own name, or for a variant that of the table."""
    return next((v.verb for v in VARIANTS if v.name == method), method)
