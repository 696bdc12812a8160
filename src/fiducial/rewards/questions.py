"""A call of a user's function, wherever it runs: what it is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RunError
from .calling import Call, Takes, finished, told
from .values import Log, among, scores_of


@dataclass(frozen=True)
class Question:
    """What a function is asked.

    who: names the function in messages. offered: the keywords of which it gets those that it
    takes. rows: number of responses. where: file:line of the row of each, if they are known.
    logs: whether it is also offered log_metric and log_extra.
    """

    who: str
    offered: dict[str, Any]
    rows: int
    where: Sequence[str] = ()
    logs: bool = False

    def take(self, row: int) -> Question:
        """The question about one response alone."""
        one = {k: v[row : row + 1] if isinstance(v, list) else v for k, v in self.offered.items()}
        return Question(self.who, one, 1, self.where[row : row + 1], self.logs)


@dataclass(frozen=True)
class Asked:
    """A call that has begun, and what the function has logged."""

    call: Call
    log: Log


@dataclass(frozen=True)
class Answer:
    """One score per response, and what the function logged: metrics, and columns per response."""

    scores: list[float | None]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)


def begin(function: Callable[..., Any], takes: Takes, question: Question) -> Asked:
    """Call the function; what it raises is kept until `read`."""
    log = Log(question.rows)
    offered = question.offered
    if question.logs:
        offered = offered | {"log_metric": log.log_metric, "log_extra": log.log_extra}
    return Asked(Call.begin(function, takes.chosen(offered)), log)


def ended(several: Sequence[Asked]) -> list[Asked]:
    """The calls after all of them have ended; those that are awaitables are awaited together."""
    calls = finished([asked.call for asked in several])
    return [Asked(call, asked.log) for call, asked in zip(calls, several, strict=True)]


def read(function: Callable[..., Any], question: Question, asked: Asked) -> Answer:
    """What a call that has ended answers.

    Raises:
        RunError: the function failed, or returned something other than a number or None for each
            response. The message names the function and the rows.
    """
    if (error := asked.call.failed) is not None:
        text = f"{question.who} raised {told(error, function)}"
        raise RunError(among(question.where) + text) from error
    scores = scores_of(asked.call.out, question.who, question.rows, question.where)
    return Answer(scores, asked.log.metrics, asked.log.columns)
