"""Rewards by their names on the command line: `file.py:function`, `module:function`, the folder of
a reward model, or one that comes with the package.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.prepare import messages_of
from ..data.render import Renderer, same_tokens
from ..data.rows import Content
from ..errors import InputError, RunError
from ..models.load import load_renderer, load_scorer
from ..models.roles import Scorer
from ..rollout.trajectory import Trajectory
from ..settings import LoraSettings, RowSettings, RunSettings
from ..train.processes import Processes
from .process import ProcessReward
from .verifiable import VERIFIABLE, ColumnFault


@dataclass(frozen=True)
class Responses:
    """Sampled responses with what a judge may look at: texts, the other columns of the prompt's
    row, and the tokens themselves.
    """

    prompts: list[Content]
    completions: list[str]
    columns: list[dict[str, Any]]
    trajectory: Trajectory
    renderer: Renderer
    where: list[str] = field(default_factory=list)
    """file:line of each prompt's row, if it came from one."""

    @staticmethod
    def of(rows: Sequence[Any], trajectory: Trajectory, renderer: Renderer) -> Responses:
        """`rows` are the prompt rows, one a response."""
        texts = [renderer.decode(ids) for ids in trajectory.responses()]
        return Responses(
            [r.prompt for r in rows],
            texts,
            [getattr(r, "columns", {}) for r in rows],
            trajectory,
            renderer,
            [r.where for r in rows],
        )

    def take(self, rows: Sequence[int]) -> Responses:
        """Only these responses, in this order."""
        prompts, completions, columns, where = (
            [x[i] for i in rows] if x else []
            for x in (self.prompts, self.completions, self.columns, self.where)
        )
        return Responses(
            prompts, completions, columns, self.trajectory.take(rows), self.renderer, where
        )  # type: ignore[arg-type]


class FunctionReward:
    """TRL's signature: `def reward(prompts, completions, **columns) -> list[float]`. Called once a
    batch, on the main process.
    """

    def __init__(self, name: str, function: Callable[..., Any], processes: Processes) -> None:
        self.name, self.function, self.processes = name, function, processes
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}

    def __call__(self, batch: Responses) -> list[float]:
        mine = self._call(batch) if self.processes.main else []
        return self.processes.gather(mine)

    def _call(self, batch: Responses) -> list[float]:
        chats = [not isinstance(p, str) for p in batch.prompts]
        completions = [
            [{"role": "assistant", "content": c}] if chat else c
            for c, chat in zip(batch.completions, chats, strict=True)
        ]
        columns = self._columns(batch.columns)
        if "completion_ids" in self.takes:
            columns["completion_ids"] = batch.trajectory.responses(ending=True)
        try:
            out = self.function(
                prompts=[messages_of(p) for p in batch.prompts], completions=completions, **columns
            )
        except ColumnFault as fault:
            raise RunError(
                f"{batch.where[fault.row] if batch.where else f'response {fault.row}'}: "
                f"{fault.sentence}"
            ) from fault
        except Exception as error:
            raise RunError(
                f"the reward function {self.name} raised {type(error).__name__}: "
                f"{error}{_line_of(error, self.function)}"
            ) from error
        return self.check(out, len(completions))

    def _columns(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        names = {n for row in rows for n in row if self.takes_all or n in self.takes} - {
            "prompts",
            "completions",
        }
        return {n: [row.get(n) for row in rows] for n in sorted(names)}

    def check_rows(self, rows: Sequence[Any]) -> None:
        """That a function of the package finds in each prompt row the columns that it needs; users'
        functions are not called for this.

        Raises:
            InputError: names the row's file:line, the function and the column.
        """
        if self.name not in VERIFIABLE:
            return
        try:
            self.function(
                prompts=[""] * len(rows),
                completions=[""] * len(rows),
                **self._columns([r.columns for r in rows]),
            )
        except ColumnFault as fault:
            raise InputError(f"{rows[fault.row].where}: {fault.sentence}") from fault

    def check(self, out: Any, expected: int) -> list[float]:
        """Exactly one finite number a response."""
        if not isinstance(out, (list, tuple)) and not hasattr(out, "tolist"):
            raise RunError(
                f"the reward function {self.name} returned a {type(out).__name__} where a list of "
                f"{expected} numbers is expected"
            )
        values = out.tolist() if hasattr(out, "tolist") else list(out)
        if not isinstance(values, list) or len(values) != expected:
            raise RunError(
                f"the reward function {self.name} returned "
                f"{len(values) if isinstance(values, list) else 1} numbers for {expected} responses"
            )
        for i, value in enumerate(values):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
            ):
                if isinstance(value, bool):
                    continue
                raise RunError(
                    f"the reward function {self.name} returned {value!r} for response {i}: a "
                    "finite number is expected"
                )
        return [float(v) for v in values]


class ModelReward:
    """The score of a reward model at the last token, less the mean score of its reference
    completions (`reward_mean` in its config).
    """

    def __init__(
        self, name: str, scorer: Scorer, renderer: Renderer, tokens: int, processes: Processes
    ) -> None:
        self.name, self.scorer, self.renderer, self.tokens, self.processes = (
            name,
            scorer,
            renderer,
            tokens,
            processes,
        )
        self.mean = float(getattr(scorer.model.config, "reward_mean", 0.0))
        self._compared: tuple[Renderer, bool] | None = None

    def same_tokens(self, renderer: Renderer) -> bool:
        """The policy's tokens are this model's: nothing needs to be decoded and encoded again. A
        pad token of this model's own is no difference.
        """
        if self._compared is None or self._compared[0] is not renderer:
            self._compared = renderer, same_tokens(self.renderer, renderer)
        return self._compared[1]

    def __call__(self, batch: Responses) -> list[float]:
        if self.same_tokens(batch.renderer):
            rows = [
                r[:n]
                for r, n in zip(
                    batch.trajectory.ids.tolist(), batch.trajectory.lengths.tolist(), strict=True
                )
            ]
        else:
            both = zip(batch.prompts, batch.completions, strict=True)
            rows = [self.renderer.completion(p, c or " ", "response").ids for p, c in both]
        return [s - self.mean for s in self.score_ids(rows)]

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of token sequences."""
        lengths = [len(r) for r in rows]

        def compute(chosen: list[int]) -> tuple[torch.Tensor, ...]:
            width = max(lengths[i] for i in chosen)
            ids = torch.tensor(
                [[*rows[i], *[0] * (width - lengths[i])] for i in chosen],
                device=self.processes.device,
            )
            return (
                self.scorer(
                    ids, torch.tensor([lengths[i] for i in chosen], device=self.processes.device)
                ),
            )

        (scores,) = self.processes.map_rows([[n] for n in lengths], self.tokens, None, compute)
        return [float(s) for s in scores]


@dataclass(frozen=True)
class Scored:
    """What a batch of N responses is worth.

    scores: the weighted total of each response.
    parts: each reward's own scores, by its name.
    steps: [N, T] the part of the total that is earned at single tokens (by process rewards,
    weighted), at those tokens; None: all of it comes at the end.
    """

    scores: list[float]
    parts: dict[str, list[float]]
    steps: torch.Tensor | None = None

    def take(self, rows: Sequence[int]) -> Scored:
        """Only these responses, in this order."""
        parts = {name: [part[i] for i in rows] for name, part in self.parts.items()}
        return Scored(
            [self.scores[i] for i in rows],
            parts,
            None if self.steps is None else self.steps[list(rows)],
        )

    @staticmethod
    def join(several: Sequence[Scored]) -> Scored:
        """The responses of all of them, one after the other."""
        parts = {name: [x for s in several for x in s.parts[name]] for name in several[0].parts}
        steps = [s.steps for s in several if s.steps is not None]
        width = max((x.shape[1] for x in steps), default=0)
        wide = (
            torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in steps])
            if steps
            else None
        )
        return Scored([x for s in several for x in s.scores], parts, wide)

    def metrics(self) -> dict[str, float]:
        """The mean of each part, where there are several."""
        if len(self.parts) < 2:
            return {}
        return {
            f"reward/{Path(n.rpartition(':')[2]).name}": sum(s) / len(s)
            for n, s in self.parts.items()
        }


@dataclass(frozen=True)
class Reward:
    """A weighted sum of rewards."""

    parts: list[FunctionReward | ModelReward | ProcessReward]
    weights: list[float]

    def __call__(self, batch: Responses) -> Scored:
        """The worth of each response; what a process reward gives is earned step by step.

        Raises:
            RunError: a part failed; it names the part and the response.
        """
        scores: dict[str, list[float]] = {}
        steps: torch.Tensor | None = None
        for weight, part in zip(self.weights, self.parts, strict=True):
            if isinstance(part, ProcessReward):
                scores[part.name], earned = part.earned(batch)
                steps = weight * earned if steps is None else steps + weight * earned
            else:
                scores[part.name] = part(batch)
        total = [
            sum(w * scores[p.name][i] for w, p in zip(self.weights, self.parts, strict=True))
            for i in range(len(batch.completions))
        ]
        return Scored(total, scores, steps)

    def check_rows(self, rows: Sequence[Any]) -> None:
        """Before any work: an InputError if a prompt row lacks what a reward of the package reads."""
        for part in self.parts:
            if isinstance(part, FunctionReward):
                part.check_rows(rows)

    @property
    def models(self) -> list[ModelReward]:
        return [p for p in self.parts if isinstance(p, ModelReward)]


def load_rewards(
    names: Sequence[str], weights: Sequence[float] | None, run: RunSettings, processes: Processes
) -> Reward:
    """
    Raises:
        InputError: a name leads nowhere, a folder is no reward model, or there are not as many
            weights as rewards.
    """
    if not names:
        raise InputError(
            "--reward is required: the folder of a reward model, file.py:function, or one of "
            f"{', '.join(VERIFIABLE)}"
        )
    if weights is not None and len(weights) != len(names):
        raise InputError(f"--reward-weights: {len(weights)} weights for {len(names)} rewards")
    return Reward(
        [load_reward(n, run, processes) for n in names],
        list(weights) if weights is not None else [1.0] * len(names),
    )


def load_reward(
    name: str, run: RunSettings, processes: Processes, flag: str = "--reward"
) -> FunctionReward | ModelReward | ProcessReward:
    """One reward by its name. A folder that `fiducial prm` has written says so in its config, and
    is a process reward.
    """
    if ":" in name and not Path(name).is_dir():
        return FunctionReward(name, load_function(name, flag), processes)
    if not Path(name).is_dir():
        if name in VERIFIABLE:
            return FunctionReward(name, VERIFIABLE[name], processes)
        if near := difflib.get_close_matches(name.lower().replace("-", "_"), VERIFIABLE, n=1):
            known = ", ".join(VERIFIABLE)
            raise InputError(
                f"{flag}: there is no {name!r}: did you mean {near[0]} (of {known}), or else the "
                "folder of a reward model, or file.py:function"
            )
    scorer = (
        load_scorer(name, LoraSettings(), run, head="saved")
        .requires_grad_(False)
        .to(processes.device)
    )
    kind = ProcessReward if getattr(scorer.model.config, "process_reward", None) else ModelReward
    return kind(name, scorer, load_renderer(name, RowSettings()), run.tokens, processes)


def load_function(name: str, flag: str) -> Callable[..., Any]:
    """`file.py:function` or `module:function`."""
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise InputError(f"{flag}: there is no file {where}")
        spec = importlib.util.spec_from_file_location(f"fiducial_user_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.resolve().parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(
                f"{flag}: {where} cannot be run: {type(error).__name__}: {error}"
            ) from error
        finally:
            sys.path.pop(0)
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise InputError(
                f"{flag}: {where} is neither a file that ends in .py nor a module: {error}"
            ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        raise InputError(
            f"{flag}: {where} has no function {attribute}"
            + (f"; it has {', '.join(there)}" if there else "")
        )
    return function


def _line_of(error: Exception, function: Callable[..., Any]) -> str:
    trace, line = error.__traceback__, None
    file = inspect.getsourcefile(function)
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" ({Path(file).name}:{line})" if file and line else ""
