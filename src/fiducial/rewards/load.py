"""Scorers by their names on the command line.

A name is `file.py:function`, `module:function`, the folder of a reward model or of a process reward
model, or one of the verifiable rewards of the package.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..errors import InputError, RunError
from ..models.load import exists, load_scorer
from ..models.scores import CriticStart
from ..names import check_name
from ..settings import LoraSettings, RowSettings, RunSettings, WorkerSettings
from ..train.processes import Processes
from ..train.renderer import load_renderer
from .apart import FunctionApart
from .calling import load_function
from .function import FunctionReward, score_together
from .model import ModelReward
from .process import Aggregate, ProcessReward
from .types import Responses, Scored, Scorer, all_logged
from .verifiable import VERIFIABLE

FORMS = f"the folder of a reward model, file.py:function, or one of {', '.join(VERIFIABLE)}"


@dataclass(frozen=True)
class Rewards:
    """A weighted sum of scorers; itself a scorer.

    A scorer that does not judge a response leaves its weight to those that do.

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
        """The weighted total of each response; process rewards are earned step by step.

        Raises:
            RunError: a scorer failed, or a total is beyond all numbers.
        """
        scored = score_together(self.parts, responses)
        parts = {s.name: one.scores for s, one in zip(self.parts, scored, strict=True)}
        total = [
            weighted_sum(row, self.weights) for row in zip(*(s.scores for s in scored), strict=True)
        ]
        if far := [i for i, (value, _) in enumerate(total) if value and not math.isfinite(value)]:
            where = responses.where[far[0]] if responses.where else f"response {far[0]}"
            raise RunError(
                f"{where}: the weighted sum of the rewards is {total[far[0]][0]}: scale the "
                "rewards down, or lower --reward-weights"
            )
        steps: Tensor | None = None
        for weight, one in zip(self.weights, scored, strict=True):
            if one.steps is not None:
                steps = weight * one.steps if steps is None else steps + weight * one.steps
        if steps is not None:
            steps = steps * torch.tensor([f for _, f in total], dtype=steps.dtype)[:, None]
        names = [name for one in scored for name in one.columns]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RunError(
                f"two rewards log the column {twice[0]} with log_extra: rename it in one of them"
            )
        columns = {name: column for one in scored for name, column in one.columns.items()}
        return Scored([value for value, _ in total], parts, steps, all_logged(scored), columns)

    def critic_start(self, renderer: Renderer) -> tuple[CriticStart | None, bool]:
        """A reward model that reads the policy's tokens, or None; and whether it is all that
        counts, so that its scores, scaled and shifted, are the rewards.
        """
        both = zip(self.parts, self.weights, strict=True)
        fitting = [
            (m, w) for p, w in both for m in self.models if p is m and w and m.same_tokens(renderer)
        ]
        if not fitting:
            return None, False
        model, weight = fitting[0]
        start = CriticStart(model.name, weight, -weight * model.mean)
        return start, sum(w != 0 for w in self.weights) == 1


def weighted_sum(
    scores: Sequence[float | None], weights: Sequence[float]
) -> tuple[float | None, float]:
    """The weighted sum of the scores that there are, times the factor by which the (absolute)
    weights of all scores exceed theirs; and that factor.

    The sum is None where no score of a weight other than 0 is there.
    """
    there = [(w, s) for w, s in zip(weights, scores, strict=True) if s is not None]
    total = 0.0
    for weight, score in there:
        total += weight * score
    if len(there) == len(scores):
        return total, 1.0
    everything, mine = sum(map(abs, weights)), sum(abs(w) for w, _ in there)
    if not mine:
        return None, 1.0
    return total * (everything / mine), everything / mine


def load_rewards(
    names: Sequence[str],
    weights: Sequence[float] | None,
    run: RunSettings,
    processes: Processes,
    worker: WorkerSettings | None = None,
    *,
    trust: bool = False,
) -> Rewards:
    """All scorers of --reward, with the weights of --reward-weights.

    Args:
        worker: where functions of Python files run; None: as by default, in processes of their own.

    Raises:
        InputError: a name leads nowhere, a folder is no reward model, or the number of weights is
            not the number of rewards.
    """
    check_names(names, weights)
    parts = [
        load_reward(n, run, processes, training=True, worker=worker, trust=trust) for n in names
    ]
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
    if far := [w for w in weights or () if not math.isfinite(w)]:
        raise InputError(f"--reward-weights: {far[0]} is no finite number")
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
    *,
    training: bool = False,
    worker: WorkerSettings | None = None,
    trust: bool = False,
) -> FunctionReward | ModelReward | ProcessReward:
    """One scorer by its name.

    Args:
        flag: the setting that messages name.
        training: whether functions are offered what only exists in training.
        trust: whether Python code of a model's folder may run.
        aggregate: how a process reward model makes one score of those of the steps, where it is not
            as its folder says.
        worker: where a function of a Python file runs; None: as by default.

    Raises:
        InputError: the name leads nowhere, the function compares two responses instead of scoring
            each, or `aggregate` is given for something other than a process reward model.
    """
    scorer = load_any(name, run, processes, flag, training=training, worker=worker, trust=trust)
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


def load_any(
    name: str,
    run: RunSettings,
    processes: Processes,
    flag: str,
    *,
    training: bool = False,
    worker: WorkerSettings | None = None,
    trust: bool = False,
) -> FunctionReward | ModelReward | ProcessReward:
    """What a name leads to, whether it scores responses or compares two.

    Raises:
        InputError: the name leads nowhere.
    """
    if _is_function(name):
        worker = worker or WorkerSettings()
        function: Callable[..., Any] | FunctionApart
        if worker.in_process:
            function = load_function(name, flag)
        else:
            function = FunctionApart(name, flag, worker, processes)
        return FunctionReward(name, function, processes, flag=flag, training=training)
    if not Path(name).is_dir():
        if name in VERIFIABLE:
            return FunctionReward(name, VERIFIABLE[name], processes, flag=flag)
        _check_folder(name, flag)
    model = load_scorer(name, LoraSettings(), run, head="saved", flag=flag, trust=trust)
    model = model.requires_grad_(False).to(processes.device)
    renderer = load_renderer(name, RowSettings(), flag=flag, trust=trust)
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
