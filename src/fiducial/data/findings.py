"""What was found wrong or remarkable before a run: one sentence, its numbers, what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InputError

Level = Literal["error", "warning", "note"]
MOST_LINES = 4
"""Lines of findings at the start of a run; `fiducial check` shows all of them."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    level: error where nothing can be learned, warning where a run would likely be wasted or its
        result misread, note for what is good to know.
    name: the same for the same kind of finding in every run.
    sentence: what was found, with its number, and why it matters.
    change: what to change, usually a setting; "" for a note that needs no change.
    numbers: the numbers behind the sentence.
    """

    level: Level
    name: str
    sentence: str
    change: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> str:
        """The finding in one line, without its level."""
        return f"{self.sentence}: {self.change}" if self.change else self.sentence


class NothingToLearn(InputError):
    """The rows can be read, and nothing could be learned from them. `findings` has all of them."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__(next(f.told() for f in findings if f.level == "error"))
        self.findings = findings


def refuse_errors(findings: list[Finding]) -> None:
    """Refuse rows from which nothing could be learned.

    Raises:
        NothingToLearn: one of the findings is an error.
    """
    if any(f.level == "error" for f in findings):
        raise NothingToLearn(findings)


def warned(findings: Iterable[Finding]) -> list[str]:
    """The warnings as lines for the start of a run, at most `MOST_LINES`."""
    lines = [f"warning ({f.name}): {f.told()}" for f in findings if f.level == "warning"]
    if len(lines) > MOST_LINES:
        more = len(lines) - MOST_LINES + 1
        lines[MOST_LINES - 1 :] = [f"{more} more warnings: `fiducial check` shows them"]
    return lines
