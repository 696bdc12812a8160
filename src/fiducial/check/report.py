"""What a check found, as lines for people and as one JSON object for programs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.findings import Finding, Level
from .view import LEGEND, paint

_LEVELS: dict[Level, tuple[str, str]] = {
    "error": ("red", "errors"),
    "warning": ("yellow", "warnings"),
    "note": ("dim", "notes"),
}


@dataclass
class Report:
    """What a check found.

    refused: the verb itself would not start. shown: rows as they are trained on, first with marks
    and then in colour. about: lines on rows, weights and time. sections: their numbers.
    """

    verb: str
    findings: list[Finding] = field(default_factory=list)
    refused: bool = False
    shown: tuple[list[str], list[str]] = ((), ())  # type: ignore[assignment]
    about: dict[str, list[str]] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)

    def of(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [f for f in self.findings if f.level == level]

    @property
    def exit_code(self) -> int:
        """2 where the verb would refuse to start, 1 where an error was found, else 0."""
        return 2 if self.refused else int(bool(self.of("error")))

    def as_json(self) -> str:
        """One JSON object: verb, ok, refused, findings, and the numbers of each section."""
        found = [
            {
                "level": f.level,
                "name": f.name,
                "sentence": f.sentence,
                "change": f.change,
                "numbers": dict(f.numbers),
            }
            for f in self.findings
        ]
        whole = {
            "verb": self.verb,
            "ok": self.exit_code == 0,
            "refused": self.refused,
            "findings": found,
            **self.sections,
        }
        return json.dumps(_plain(whole), ensure_ascii=False, allow_nan=False)

    def as_lines(self, colour: bool | None = None) -> list[str]:
        """The report for a terminal.

        Args:
            colour: None: in colour if it goes to a terminal and NO_COLOR is not set.
        """
        if colour is None:
            colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        lines = []
        if rows := self.shown[colour]:
            lines += [paint(f"rows ({LEGEND[colour]})", "bold", colour), *_indented(rows)]
        for title, body in self.about.items():
            lines += ["", paint(title, "bold", colour), *_indented(body)]
        for level, (how, title) in _LEVELS.items():
            if found := self.of(level):
                lines += ["", paint(title, "bold", colour)]
                lines += [f"  {paint(f.name, how, colour)}: {f.told()}" for f in found]
        return [*lines, "", _verdict(self)]


def _verdict(report: Report) -> str:
    errors, warnings = (len(report.of(level)) for level in ("error", "warning"))
    counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    if report.refused:
        return f"{report.verb} would refuse to start"
    if report.of("error"):
        return f"{report.verb} would start, and fail or learn nothing ({counts})"
    return f"nothing forbids this run of {report.verb} ({counts})"


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _plain(value: Any) -> Any:
    """What JSON can hold: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
