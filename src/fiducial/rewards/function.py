"""Rewards from Python functions: `file.py:function`, `module:function`, or a verifiable reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.prepare import messages_of
from ..data.row_types import PromptRow
from ..errors import InputError, RunError
from ..train.processes import Processes
from .apart import FunctionApart
from .calling import Takes
from .questions import Answer, Asked, Question, begin, ended, read
from .types import Responses, Scored, Scorer
from .verifiable import VERIFIABLE, ColumnFault

KEYWORDS = ("prompts", "completions", "prompt_ids", "completion_ids")
"""What every function is offered beside the columns of the rows."""
TRAINING = ("trainer_state", "log_metric", "log_extra")
"""What a function is offered in training alone."""


@dataclass(frozen=True)
class _Begun:
    """A function's call on the main process: what it is asked, and the call, if it is made here."""

    question: Question
    asked: Asked | None


class FunctionReward:
    """A function with TRL's signature, called once per batch, on the main process.

    The signature is `def reward(prompts, completions, **columns) -> list[float | None]`. It may be
    any callable, also an asynchronous one. Of the keywords and columns it is given those that its
    signature names, or all where it ends in `**columns`.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any] | FunctionApart,
        processes: Processes,
        *,
        flag: str = "--reward",
        training: bool = False,
    ) -> None:
        """
        Args:
            function: it may run in a process of its own.
            training: whether it is offered what only exists in training.

        Raises:
            InputError: the function cannot be called by keyword.
        """
        self.name, self.function, self.processes = name, function, processes
        self.flag, self.training = flag, training
        if isinstance(function, FunctionApart):
            self.takes = function.takes
        else:
            self.takes = Takes.of(function, name, flag)
        self.columns: frozenset[str] = frozenset()  # of all rows, known from `check_rows` on

    @property
    def compares(self) -> bool:
        """Whether the function compares two responses instead of scoring each."""
        return self.takes.names >= {"first", "second"}

    def score(self, responses: Responses) -> Scored:
        """The scores that the function returns, on every process."""
        return score_together([self], responses)[0]

    def begin(self, batch: Responses) -> _Begun | None:
        """Call the function; on the main process alone."""
        if not self.processes.main:
            return None
        question = Question(
            f"the reward function {self.name}",
            self._offered(batch),
            len(batch.completions),
            batch.where,
            self.training,
        )
        if isinstance(self.function, FunctionApart):
            self.function.ask(question)
            return _Begun(question, None)
        return _Begun(question, begin(self.function, self.takes, question))

    def finish(self, begun: _Begun | None, batch: Responses) -> Scored:
        """The scores of a call that has ended, on every process.

        Raises:
            RunError: the function failed, or returned something other than a number or None for
                each response.
        """
        mine = []
        if begun is not None:
            answer = self._answer(begun, batch)
            mine = [(answer.scores, answer.metrics, answer.columns)]
        (found, logged, columns), *_ = self.processes.gather(mine)
        return Scored(found, {self.name: found}, logged=logged, columns=columns)

    def _answer(self, begun: _Begun, batch: Responses) -> Answer:
        if isinstance(self.function, FunctionApart):
            return self.function.answer()
        assert begun.asked is not None
        if isinstance(fault := begun.asked.call.failed, ColumnFault):
            where = batch.where[fault.row] if batch.where else f"response {fault.row}"
            raise RunError(f"{where}: {fault.sentence}") from fault
        return read(self.function, begun.question, begun.asked)

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Checks that the function can be given what it needs, and that each row has the columns
        that a verifiable reward reads.

        Users' functions are not called for this.

        Raises:
            InputError: names the function and the parameter, or the row's file:line and the column.
        """
        self.columns = frozenset(n for r in rows for n in r.columns)
        if self.name not in VERIFIABLE:
            self._check_parameters(rows)
            return
        assert not isinstance(self.function, FunctionApart)
        try:
            self.function(
                prompts=[""] * len(rows),
                completions=[""] * len(rows),
                **self.takes.chosen(self._columns([r.columns for r in rows])),
            )
        except ColumnFault as fault:
            raise InputError(f"{rows[fault.row].where}: {fault.sentence}") from fault

    def _check_parameters(self, rows: Sequence[PromptRow]) -> None:
        given = {*KEYWORDS, *(TRAINING if self.training else ())}
        missing = [n for n in self.takes.required if n not in given | self.columns]
        if not missing:
            if not self.takes.everything and not self.takes.names & {
                "completions",
                "completion_ids",
            }:
                raise InputError(
                    f"{self.flag}: {self.name} takes no completions, so it cannot score them: name "
                    "a parameter completions"
                )
            return
        name, source = missing[0], rows[0].where.rpartition(":")[0] if rows else "the data"
        if name in TRAINING:
            raise InputError(
                f"{self.flag}: {self.name} needs {name}, which is given in training only: give the "
                f"parameter a default, such as {name}=None"
            )
        raise InputError(
            f"{self.flag}: {self.name} needs {name}, which is neither a column of {source} nor one "
            f"of {', '.join(sorted(given))}: add the column, or give the parameter a default"
        )

    def _offered(self, batch: Responses) -> dict[str, Any]:
        chats = [not isinstance(p, str) for p in batch.prompts]
        trajectory = batch.trajectory
        offered: dict[str, Any] = self._columns(batch.columns)
        offered["prompts"] = [messages_of(p) for p in batch.prompts]
        offered["completions"] = [
            [{"role": "assistant", "content": c}] if chat else c
            for c, chat in zip(batch.completions, chats, strict=True)
        ]
        if self.name in VERIFIABLE:  # they read text
            return offered
        ids = zip(trajectory.ids.tolist(), trajectory.prompt_lengths.tolist(), strict=True)
        offered["prompt_ids"] = [row[:n] for row, n in ids]
        offered["completion_ids"] = trajectory.responses(ending=True)
        if self.training and batch.state is not None:
            offered["trainer_state"] = batch.state
        return offered

    def _columns(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """One value per row; None where a row does not have a column that others have."""
        names = self.columns | {n for row in rows for n in row}
        reserved = {*KEYWORDS, *TRAINING}
        return {n: [row.get(n) for row in rows] for n in sorted(names - reserved)}


def score_together(scorers: Sequence[Scorer], responses: Responses) -> list[Scored]:
    """The scores of several scorers, in their order. Asynchronous functions wait for their answers
    at the same time.

    Raises:
        RunError: as the scorers.
    """
    begun = {
        i: started
        for i, scorer in enumerate(scorers)
        if isinstance(scorer, FunctionReward) and (started := scorer.begin(responses)) is not None
    }
    here = {i: b.asked for i, b in begun.items() if b.asked is not None}
    for i, asked in zip(here, ended(list(here.values())), strict=True):
        begun[i] = _Begun(begun[i].question, asked)
    return [
        scorer.finish(begun.get(i), responses)
        if isinstance(scorer, FunctionReward)
        else scorer.score(responses)
        for i, scorer in enumerate(scorers)
    ]
