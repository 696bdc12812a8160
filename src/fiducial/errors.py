"""The errors that a command reports in one sentence. Any other is a bug, with its traceback."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """The user's input cannot be used, which is found before any work begins; exit code 2.

    The message is one sentence that names the place, the reason and the remedy.
    """


class LaunchError(InputError):
    """Several processes were asked for in a way that cannot be given; every process prints it."""


class RunError(RuntimeError):
    """A run failed after it started. What was computed is saved; exit code 1.

    The message is one sentence that names the step, the reason and how to go on.
    """


class Unscored(RunError):
    """Sampled responses could not be scored; `rows` holds them, for a file in the run folder."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows
