"""What a saved scorer says about its scores: in its config.json, or in its adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import nn

from ..errors import InputError
from ..settings import Aggregate


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

    mean, std: of the scores of the reference completions. low, high: the range that holds 98% of
    the scores of responses that were not trained on; beyond it no pair has told what a score
    means. Each is None where it was not measured.
    """

    mean: float | None = None
    std: float | None = None
    steps: StepScores | None = None
    low: float | None = None
    high: float | None = None

    @staticmethod
    def of(config: Any, where: str = "config.json") -> ScoreFacts:
        """What a Hugging Face config holds.

        Args:
            where: the name of the config in messages.

        Raises:
            InputError: the config has one of the keys with a value that means nothing.
        """
        return ScoreFacts(
            _number(config, "reward_mean", where),
            _number(config, "reward_std", where),
            _steps(config, where),
            *_range(config, where),
        )

    def write(self, config: Any) -> None:
        """Put the facts into a Hugging Face config, and remove those of an earlier model."""
        steps = self.steps and {
            "separator": self.steps.separator,
            "aggregate": self.steps.aggregate,
        }
        facts = {
            "reward_mean": self.mean,
            "reward_std": self.std,
            "reward_low": self.low,
            "reward_high": self.high,
            "process_reward": steps,
        }
        for name, value in facts.items():
            vars(config).pop(name, None)
            if value is not None:
                setattr(config, name, value)


@dataclass(frozen=True)
class CriticStart:
    """A reward model that a critic may start from.

    folder: of the reward model. scale, shift: the reward is scale * score + shift.
    """

    folder: str
    scale: float = 1.0
    shift: float = 0.0


def rescaled(head: nn.Linear, scale: float, shift: float) -> nn.Linear:
    """A linear head whose output is scale * head(x) + shift."""
    out = nn.Linear(head.in_features, head.out_features).to(head.weight)
    with torch.no_grad():
        out.weight.copy_(head.weight * scale)
        out.bias.fill_(shift)
        if head.bias is not None:
            out.bias.add_(head.bias * scale)
    return out


def adapter_scores(folder: Path) -> int | None:
    """The number of scores of the `score` head that an adapter folder holds; None without one.

    The base model of a reward adapter is usually a language model, whose config says nothing of a
    head: peft saves the head beside the adapter (`modules_to_save`).
    """
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file() or not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        heads = [k for k in tensors.keys() if k.endswith(".score.weight")]  # noqa: SIM118
        return int(tensors.get_slice(heads[0]).get_shape()[0]) if heads else None


def _number(config: Any, key: str, where: str) -> float | None:
    if not hasattr(config, key):
        return None
    value = getattr(config, key)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if plain else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(
            f"{where}: {key!r} is {_shown(value)} where a finite number belongs, the mean, the "
            "standard deviation or an end of the range of the model's scores: write the number, or "
            "remove the key"
        )
    return number


def _range(config: Any, where: str) -> tuple[float | None, float | None]:
    low, high = _number(config, "reward_low", where), _number(config, "reward_high", where)
    if low is not None and high is not None and low > high:
        raise InputError(
            f"{where}: 'reward_low' is {low:g} and 'reward_high' {high:g}, but the range of the "
            "model's scores begins with the lower end: exchange them, or remove both"
        )
    return low, high


def _steps(config: Any, where: str) -> StepScores | None:
    if not hasattr(config, "process_reward"):
        return None
    value, ways = config.process_reward, get_args(Aggregate)
    if not isinstance(value, dict) or not isinstance(value.get("separator"), str):
        raise InputError(
            f"{where}: 'process_reward' is {_shown(value)} where an object with the text "
            "'separator' belongs, which says how the steps of a solution end: write it, or remove "
            "the key from the config of a model that is no process reward model"
        )
    if (how := value.get("aggregate", "last")) not in ways:
        raise InputError(
            f"{where}: 'aggregate' of 'process_reward' is {_shown(how)}: write one of "
            f"{', '.join(ways)}"
        )
    return StepScores(value["separator"], how)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
