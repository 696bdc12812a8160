"""Judges decide between two responses to one prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.prepare import messages_of
from ..data.row_types import PromptRow
from ..errors import RunError
from ..settings import RunSettings
from ..train.processes import Processes
from .function import load_function
from .load import load_reward
from .types import Responses, Scorer


@dataclass(frozen=True)
class Judge:
    """Decides by scores, or by comparing two responses directly.

    scorer: a reward model or a function with TRL's signature; equal scores are a tie.
    compare: a function `(prompts, first, second) -> list[bool]`, true where the first response is
        the better one. Exactly one of the two is given.
    """

    name: str
    scorer: Scorer | None = None
    compare: Callable[..., Any] | None = None

    @staticmethod
    def open(name: str, run: RunSettings, processes: Processes) -> Judge:
        """A judge by its name on the command line.

        Raises:
            InputError: the name leads nowhere.
        """
        if ":" in name and not Path(name).is_dir():
            function = load_function(name, "--judge")
            if {"first", "second"} <= set(inspect.signature(function).parameters):
                return Judge(name, compare=function)
        return Judge(name, scorer=load_reward(name, run, processes, "--judge"))

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Refuse, before any work, rows that lack what the judge reads."""
        if self.scorer is not None:
            self.scorer.check_rows(rows)

    def scores(self, responses: Responses) -> list[float] | None:
        """One score per response, or None for a judge that only compares."""
        return None if self.scorer is None else self.scorer.score(responses).scores

    def prefers_first(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]
    ) -> list[bool]:
        """True where the first response is preferred, by a judge that compares.

        Raises:
            RunError: the function failed, or did not return one truth value per comparison.
        """
        assert self.compare is not None
        asked = [messages_of(p) for p in prompts]
        try:
            out = list(self.compare(prompts=asked, first=list(first), second=list(second)))
        except Exception as error:
            raise RunError(
                f"the judge {self.name} raised {type(error).__name__}: {error}"
            ) from error
        if len(out) != len(first) or any(not isinstance(x, (bool, int)) for x in out):
            raise RunError(
                f"the judge {self.name} must return one true or false for each of {len(first)} "
                "comparisons"
            )
        return [bool(x) for x in out]
