"""A user's function in a process of its own, as the run sees it.

Whatever the function does there, the run goes on: it is stopped when its time or its memory is used
up, and how it ended is told with the function, its line, and the rows that it was given.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import NoReturn

from ..errors import InputError, RunError
from ..settings import WorkerSettings
from ..train.processes import Processes
from .calling import Takes
from .questions import Answer, Question
from .running import Stopped, Worker
from .values import among

SEARCH = 30.0
"""Seconds within which the row is looked for at which a function hangs or crashes. Our choice."""


@dataclass(frozen=True)
class Facts:
    """What is known of a function that was loaded. file: its own; seconds: that loading took."""

    takes: Takes
    file: str | None
    seconds: float


class Traceback(Exception):
    """What was raised in a worker, with its traceback as text, for --debug."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class FunctionApart:
    """A function that runs in a worker process, which is started once and keeps its state.

    With several processes of a run, the first has the worker, and all know what it takes.
    """

    def __init__(
        self, name: str, flag: str, settings: WorkerSettings, processes: Processes
    ) -> None:
        """Start the worker and load the function there.

        Raises:
            InputError: on every process, if the function cannot be loaded or called.
        """
        if os.name != "posix":
            raise InputError(
                f"{flag}: {name} cannot run in a process of its own on this system: give "
                "--worker.in-process"
            )
        self.name, self.flag, self.settings = name, flag, settings
        self._worker: Worker | None = None
        self._asked: Question | None = None
        loaded: list[Facts | str] = []
        cause: InputError | None = None
        if processes.main:
            try:
                loaded = [self._start()]
            except InputError as error:
                loaded, cause = [str(error)], error
        (found, *_) = processes.gather(loaded)
        if isinstance(found, str):
            raise InputError(found) from cause
        self.facts = found

    @property
    def takes(self) -> Takes:
        """What the function can be given by keyword."""
        return self.facts.takes

    def ask(self, question: Question) -> None:
        """Begin a call; `answer` waits for it, so that several functions work at the same time.

        Raises:
            RunError: the function cannot be loaded again after it had failed.
        """
        if self._worker is None:
            self._again()
        assert self._worker is not None
        self._asked = question
        self._worker.request(question, self.settings.seconds)

    def answer(self) -> Answer:
        """What the function answers to the question that it was asked.

        Raises:
            RunError: it failed, did not return in time, or ended its process. The message names
                the function and the rows.
        """
        question, worker = self._asked, self._worker
        assert question is not None and worker is not None, "nothing was asked"
        try:
            reply = worker.reply()
        except Stopped as stopped:
            self._worker = None
            self._fail(question, stopped)
        except BaseException:  # Ctrl-C: the reply would be taken for that of the next question
            self._worker = None
            worker.kill()
            raise
        if "failed" in reply:
            raise RunError(reply["failed"]) from Traceback(reply["trace"])
        return Answer(**reply)

    def _start(self) -> Facts:
        began = time.monotonic()
        try:
            worker = Worker(self.settings, f"{self.flag} {self.name}")
            worker.request((self.name, self.flag), self.settings.seconds)
            reply = worker.reply()
        except Stopped as stopped:
            raise InputError(
                f"{self.flag}: {self.name} cannot be loaded: its file {stopped.sentence(None)}"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.flag}: no process can be started for {self.name} ({error.strerror}): end "
                "some, or give --worker.in-process"
            ) from error
        if "failed" in reply:
            worker.close()
            raise InputError(reply["failed"]) from Traceback(reply["trace"])
        self._worker = worker
        takes = Takes(frozenset(reply["names"]), tuple(reply["required"]), reply["everything"])
        return Facts(takes, reply["file"], time.monotonic() - began)

    def _again(self) -> None:
        try:
            self._start()
        except InputError as error:
            raise RunError(str(error)) from error

    def _fail(self, question: Question, stopped: Stopped) -> NoReturn:
        row = self._guilty(question, stopped)
        rows = among(question.where) if row is None else among(question.where[row : row + 1])
        alone = "; it does so with this row alone" if row is not None and question.rows > 1 else ""
        raise RunError(f"{rows}{question.who} {stopped.sentence(self.facts.file)}{alone}") from None

    def _guilty(self, question: Question, stopped: Stopped) -> int | None:
        """The row with which alone the function ends in the same way, if it is found soon."""
        if question.rows == 1:
            return 0
        limit = min(SEARCH, self.settings.seconds)
        if self.facts.seconds > SEARCH / 3:
            return None
        with contextlib.suppress(InputError, RunError):
            self._again()
        if self._worker is None:
            return None
        until = time.monotonic() + limit
        for row in range(question.rows):
            if (left := until - time.monotonic()) <= 0:
                break
            try:
                self._worker.request(question.take(row), left)
                self._worker.reply()
            except Stopped as again:
                self._worker = None
                # a row that got only the rest of the time may just be slow
                same = again.kind == stopped.kind and (again.kind != "time" or left > limit / 2)
                return row if same else None
        self._worker.kill()
        self._worker = None
        return None
