"""Scorers by their names on the command line.

A name is `file.py:function`, `module:function`, the folder of a reward model or of a process reward
model, or one of the verifiable rewards of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..errors import InputError
from ..models.load import exists, load_scorer
from ..names import check_name
from ..settings import LoraSettings, RowSettings, RunSettings
from ..train.processes import Processes
from ..train.renderer import load_renderer
from .function import FunctionReward, load_function
from .model import ModelReward
from .process import Aggregate, ProcessReward
from .types import Responses, Scored, Scorer
from .verifiable import VERIFIABLE

FORMS = f"the folder of a reward model, file.py:function, or one of {', '.join(VERIFIABLE)}"


@dataclass(frozen=True)
class Rewards:
    """A weighted sum of scorers; itself a scorer.

    models: those of them that are reward models, from which a critic may start.
    """

    parts: list[Scorer]
    weights: list[float]
    models: list[ModelReward]
    name: str = "reward"

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Refuse, before any work, rows that lack what one of the scorers reads."""
        for part in self.parts:
            part.check_rows(rows)

    def score(self, responses: Responses) -> Scored:
        """The weighted total of each response; process rewards are earned step by step."""
        parts: dict[str, list[float]] = {}
        total = [0.0] * len(responses.completions)
        steps: Tensor | None = None
        for weight, scorer in zip(self.weights, self.parts, strict=True):
            one = scorer.score(responses)
            parts[scorer.name] = one.scores
            total = [t + weight * s for t, s in zip(total, one.scores, strict=True)]
            if one.steps is not None:
                steps = weight * one.steps if steps is None else steps + weight * one.steps
        return Scored(total, parts, steps)

    def critic_start(self, renderer: Renderer) -> tuple[str | None, bool]:
        """The folder of a reward model that reads the policy's tokens, or None; and whether it is
        all that counts, so that its scores are on the scale of the returns.
        """
        fitting = [m.name for m in self.models if m.same_tokens(renderer)]
        return (fitting[0] if fitting else None), sum(w != 0 for w in self.weights) == 1


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float] | None,
    run: RunSettings,
    processes: Processes,
) -> Rewards:
    """All scorers of --reward, with the weights of --reward-weights.

    Raises:
        InputError: a name leads nowhere, a folder is no reward model, or the number of weights is
            not the number of rewards.
    """
    check_names(names, weights)
    parts = [load_reward(n, run, processes) for n in names]
    models = [p for p in parts if isinstance(p, ModelReward)]
    return Rewards(list(parts), [1.0] * len(names) if weights is None else list(weights), models)


def check_names(names: Sequence[str], weights: Sequence[float] | None) -> None:
    """Look at names alone: nothing is imported or loaded.

    Raises:
        InputError: a name leads nowhere, or the number of weights is not the number of rewards.
    """
    if not names:
        raise InputError(f"--reward is required: {FORMS}")
    if weights is not None and len(weights) != len(names):
        raise InputError(f"--reward-weights: {len(weights)} weights for {len(names)} rewards")
    for name in names:
        if _is_function(name):
            check_name("scorer", name, "--reward")
        elif name not in VERIFIABLE:
            _check_folder(name, "--reward")


def load_reward(
    name: str,
    run: RunSettings,
    processes: Processes,
    flag: str = "--reward",
    aggregate: Aggregate | None = None,
) -> FunctionReward | ModelReward | ProcessReward:
    """One scorer by its name.

    Args:
        flag: the setting that messages name.
        aggregate: how a process reward model makes one score of those of the steps, where it is not
            as its folder says.

    Raises:
        InputError: the name leads nowhere, the function compares two responses instead of scoring
            each, or `aggregate` is given for something other than a process reward model.
    """
    scorer = _load(name, run, processes, flag)
    if isinstance(scorer, FunctionReward) and scorer.compares:
        raise InputError(
            f"{flag}: {name} compares two responses where each needs a score: give a function with "
            "TRL's signature, (prompts, completions)"
        )
    if aggregate is not None:
        if not isinstance(scorer, ProcessReward):
            raise InputError(
                f"--aggregate {aggregate} combines the scores of steps, and {flag} {name} is no "
                "process reward model"
            )
        scorer.how = aggregate
    return scorer


def load_reward_model(folder: str, run: RunSettings, processes: Processes) -> ModelReward:
    """The reward model in a folder, for whoever needs its raw scores.

    Raises:
        InputError: the folder holds something else.
    """
    scorer = load_reward(folder, run, processes)
    if not isinstance(scorer, ModelReward):
        raise InputError(f"--reward: {folder} is not the folder of a reward model of responses")
    return scorer


def _load(
    name: str, run: RunSettings, processes: Processes, flag: str
) -> FunctionReward | ModelReward | ProcessReward:
    if _is_function(name):
        return FunctionReward(name, load_function(name, flag), processes)
    if not Path(name).is_dir():
        if name in VERIFIABLE:
            return FunctionReward(name, VERIFIABLE[name], processes)
        _check_folder(name, flag)
    model = load_scorer(name, LoraSettings(), run, head="saved", flag=flag)
    model = model.requires_grad_(False).to(processes.device)
    renderer = load_renderer(name, RowSettings(), flag=flag)
    kind = ProcessReward if model.facts.steps else ModelReward
    return kind(name, model, renderer, run.tokens, processes)


def _is_function(name: str) -> bool:
    """Whether a name is that of a user's function: `file.py:function` or `module:function`."""
    return ":" in name and not Path(name).is_dir()


def _check_folder(name: str, flag: str) -> None:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), VERIFIABLE, n=1)
    if near and not Path(name).is_dir():
        raise InputError(f"{flag}: there is no {name!r}: did you mean {near[0]}? Give {FORMS}")
    exists(name, flag)
