"""Alarms: what in a run's numbers asks for attention, one sentence each, with the number, the
likely cause and the setting to change.

Most are raised while the run goes on, by `rules.py`; a few are told only when it has ended, by
`endings.py`. The run itself, a run that is resumed and the page of a run all judge the rows of
metrics.jsonl with what is here, so they find the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics import finite, known
from ..train.checkpoint import write_bytes
from ..train.disk import explained
from ..train.progress import say
from .endings import ENDINGS, History
from .rules import Rule
from .rules_responses import RESPONSES
from .rules_updates import UPDATES
from .tracks import Setup, Track

RULES = (*UPDATES, *RESPONSES)
QUIET = 100
"""Records without its cause after which an alarm is raised again."""


@dataclass(frozen=True)
class Alarm:
    """One alarm. step: at which it was raised; None for one that is told at the end. values: of the
    metrics that it is about, the one that matters most first.
    """

    name: str
    step: int | None
    values: Mapping[str, float]
    text: str

    @property
    def sentence(self) -> str:
        """The text, with the step."""
        return self.text if self.step is None else f"Step {self.step:,}: {self.text}"

    def line(self) -> str:
        """The line of alarms.jsonl."""
        (metric, value), *others = self.values.items()
        row = {"step": self.step, "alarm": self.name, "metric": metric, "value": value}
        also = {"also": dict(others)} if others else {}
        return json.dumps(row | also | {"text": self.text}) + "\n"


class Alarms:
    """The alarms of a run, as its rows come in. What is kept does not grow with the run.

    Args:
        config: the settings as config.yaml has them; empty if they are not known.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.setup = Setup(config)
        self.tracks: dict[str, Track] = {}
        self._rules: dict[str, list[Rule]] = {}
        for rule in RULES:
            for name in rule.metrics:
                self._rules.setdefault(name, []).append(rule)
        self._watched = {*self._rules, "reward"}
        self._quiet: dict[str, int] = {}

    def see(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that this row of metrics.jsonl raises."""
        step = row.get("step", 0)
        found = [] if (broken := self._not_finite(row)) is None else [broken]
        due: dict[str, Rule] = {}
        for name, value in row.items():
            if name in self._watched and finite(value):
                self.tracks.setdefault(name, Track()).add(float(value))
                due |= {rule.name: rule for rule in self._rules.get(name, ())}
        for rule in due.values():
            what = rule.find(self.tracks, self.setup)
            if self._news(rule.name, what is not None) and what is not None:
                found.append(Alarm(rule.name, int(step), what.values, what.text))
        return found

    def _not_finite(self, row: Mapping[str, Any]) -> Alarm | None:
        bad = [
            (name, value)
            for name, value in row.items()
            if isinstance(value, float) and not math.isfinite(value) and known(name)
        ]
        if not self._news("not-finite", bool(bad)) or not bad:
            return None
        name, value = bad[0]
        advice = self.setup.sentence("lower --learning-rate", "look at the rows of this step")
        text = f"{name} is {value}: something overflowed or was divided by 0. {advice}"
        return Alarm("not-finite", int(row.get("step", 0)), {name: value}, text)

    def _news(self, name: str, true: bool) -> bool:
        """Whether an alarm that is now true was not so for long."""
        quiet = self._quiet.get(name, QUIET)
        self._quiet[name] = 0 if true else quiet + 1
        return true and quiet >= QUIET


def alarms(history: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> list[Alarm]:
    """All alarms of a finished run: those that its rows raised, and those of its end.

    Args:
        history: the rows of metrics.jsonl.
        config: what config.yaml says, or {}.
    """
    rows = list(history)
    if off(config):
        return []
    stream = Alarms(config)
    found = [alarm for row in rows for alarm in stream.see(row)]
    raised = {alarm.name for alarm in found}
    for ending in ENDINGS:
        if ending.name not in raised and (what := ending.find(History(rows), stream.setup)):
            found.append(Alarm(ending.name, None, what.values, what.text))
    return found


def off(config: Mapping[str, Any]) -> bool:
    """Whether the run was to raise no alarms."""
    return bool(Setup(config).value("run.on-alarm") == "off")


class Watch:
    """What a run does with its alarms: a line in alarms.jsonl, a word in the terminal, and perhaps
    the end of the run. Processes that do not write have none.

    stopped: the alarm that ends the run; None if it goes on.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, writes: bool) -> None:
        self.stopped: Alarm | None = None
        self._path = folder / "alarms.jsonl"
        self._alarms = Alarms(config)
        self._action = Setup(config).value("run.on-alarm")
        self._writes = writes

    @property
    def why_stopped(self) -> str:
        """What follows the command that goes on with the run, if an alarm ended it."""
        if self.stopped is None:
            return ""
        return f" --run.on-alarm warn. The alarm ({self.stopped.name}): {self.stopped.text}"

    def begin(self) -> None:
        """Take in the rows that metrics.jsonl has, and let alarms.jsonl hold what they raised.

        Raises:
            RunError: it cannot be written.
        """
        if not self._writes:
            return
        with explained(self._path):
            if self._action == "off":
                self._path.unlink(missing_ok=True)  # of a run that raised some before
                return
            metrics, lines = self._path.with_name("metrics.jsonl"), list[str]()
            if metrics.exists():
                with metrics.open(encoding="utf-8", newline="\n") as file:
                    lines = [a.line() for row in file for a in self._alarms.see(json.loads(row))]
            write_bytes(self._path, "".join(lines).encode())

    def see(self, row: Mapping[str, Any]) -> None:
        """Judge a row that was recorded.

        Raises:
            RunError: alarms.jsonl cannot be written.
        """
        if not self._writes or self._action == "off":
            return
        for alarm in self._alarms.see(row):
            with explained(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(alarm.line())
            say(f"alarm ({alarm.name}) at step {alarm.step}: {alarm.text}")
            if self._action == "stop" and self.stopped is None:
                self.stopped = alarm
