"""Rewards from Python functions: `file.py:function`, `module:function`, or a verifiable reward."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.prepare import messages_of
from ..data.row_types import PromptRow
from ..errors import InputError, RunError
from ..train.processes import Processes
from .types import Responses, Scored
from .verifiable import VERIFIABLE, ColumnFault


class FunctionReward:
    """A function with TRL's signature, called once per batch, on the main process.

    The signature is `def reward(prompts, completions, **columns) -> list[float]`.
    """

    def __init__(self, name: str, function: Callable[..., Any], processes: Processes) -> None:
        self.name, self.function, self.processes = name, function, processes
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}

    @property
    def compares(self) -> bool:
        """Whether the function compares two responses instead of scoring each."""
        return {"first", "second"} <= self.takes

    def score(self, responses: Responses) -> Scored:
        """The scores that the function returns, on every process."""
        mine = self._call(responses) if self.processes.main else []
        scores = self.processes.gather(mine)
        return Scored(scores, {self.name: scores})

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

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Checks that each row has the columns that a verifiable reward needs.

        Users' functions are not called for this.

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
        """The returned value as a list with one finite number per response.

        Raises:
            RunError: the function returned something else.
        """
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
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RunError(
                    f"the reward function {self.name} returned {value!r} for response {i}: a "
                    "finite number is expected"
                )
        return [float(v) for v in values]


def load_function(name: str, flag: str) -> Callable[..., Any]:
    """The function that `file.py:function` or `module:function` names.

    Raises:
        InputError: there is no such file, module or function, or the file cannot be run.
    """
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
        if not where or where.startswith("."):
            raise InputError(
                f"{flag}: {name} names neither a file that ends in .py nor a module: give "
                "file.py:function or module:function"
            )
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
    found: Callable[..., Any] = function
    return found


def _line_of(error: Exception, function: Callable[..., Any]) -> str:
    """The line of the function's file where the error arose, in parentheses, or nothing."""
    trace, line = error.__traceback__, None
    file = inspect.getsourcefile(function)
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" ({Path(file).name}:{line})" if file and line else ""
