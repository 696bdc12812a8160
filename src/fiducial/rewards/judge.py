"""Judges decide between two responses to one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.prepare import messages_of
from ..data.row_types import PromptRow
from ..errors import InputError, RunError
from ..settings import RunSettings, WorkerSettings
from ..train.processes import Processes
from .apart import FunctionApart
from .calling import Takes
from .function import FunctionReward
from .load import load_any
from .questions import Question, begin, ended, read
from .types import Responses, Scorer
from .values import among, shown


@dataclass(frozen=True)
class Judge:
    """Decides by scores, or by comparing two responses directly.

    scorer: a reward model or a function with TRL's signature; equal scores are a tie.
    compare: a function `(prompts, first, second) -> list[bool]`, true where the first response is
        the better one, None where it does not judge the two. Exactly one of the two is given.
    """

    name: str
    scorer: Scorer | None = None
    compare: Callable[..., Any] | FunctionApart | None = None

    @staticmethod
    def open(
        name: str,
        run: RunSettings,
        processes: Processes,
        worker: WorkerSettings | None = None,
        *,
        trust: bool = False,
    ) -> Judge:
        """A judge by its name on the command line.

        Args:
            worker: where a function of a Python file runs; None: as by default.

        Raises:
            InputError: the name leads nowhere, or a function that compares needs more than it is
                given.
        """
        scorer = load_any(name, run, processes, "--judge", worker=worker, trust=trust)
        if not isinstance(scorer, FunctionReward) or not scorer.compares:
            return Judge(name, scorer=scorer)
        if more := [n for n in scorer.takes.required if n not in COMPARED]:
            raise InputError(
                f"--judge: {name} compares two responses and needs {more[0]}, which is none of "
                f"{', '.join(COMPARED)}: give the parameter a default"
            )
        return Judge(name, compare=scorer.function)

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Refuse, before any work, rows that lack what the judge reads."""
        if self.scorer is not None:
            self.scorer.check_rows(rows)

    def scores(self, responses: Responses) -> Sequence[float | None] | None:
        """One score per response (None where the judge does not judge it), or None for a judge that
        only compares.
        """
        return None if self.scorer is None else self.scorer.score(responses).scores

    def prefers_first(
        self,
        prompts: Sequence[Any],
        first: Sequence[str],
        second: Sequence[str],
        where: Sequence[str] = (),
    ) -> list[bool | None]:
        """True where the first response is preferred, by a judge that compares; None where the
        judge does not say.

        Args:
            where: file:line of the row of each prompt.

        Raises:
            RunError: the function failed, or did not return one truth value per comparison.
        """
        assert self.compare is not None
        asked = [messages_of(p) for p in prompts]
        given = dict(zip(COMPARED, (asked, list(first), list(second)), strict=True))
        question = Question(f"the judge {self.name}", given, len(first), where)
        found = self._compared(question)
        if wrong := [x for x in found if x not in (0, 1, None)]:
            raise RunError(
                f"{among(where)}{question.who} returned {shown(wrong[0])}: it must return one true "
                f"or false for each of {len(first)} comparisons, or None where it does not say"
            )
        return [None if x is None else bool(x) for x in found]

    def _compared(self, question: Question) -> list[float | None]:
        assert self.compare is not None
        if isinstance(self.compare, FunctionApart):
            self.compare.ask(question)
            return self.compare.answer().scores
        takes = Takes.of(self.compare, self.name, "--judge")
        (call,) = ended([begin(self.compare, takes, question)])
        return read(self.compare, question, call).scores


COMPARED = ("prompts", "first", "second")
"""What a function that compares is given."""
