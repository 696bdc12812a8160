"""Reads a run's folder without ever failing on it: what is missing or damaged becomes a note that
the page shows.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from .. import verbs
from ..metrics import EVAL, finite, lookup
from .numbers import Estimate

Point = tuple[float, float]


@dataclass(frozen=True)
class RunRecord:
    """The folder of a run, read into memory. `series` maps a metric's name to its (step, value)
    points; `notes` say what is missing or could not be read.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, list[Point]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method's name, as config.yaml says; "run" where it says none."""
        value = self.config.get("method")
        return value if isinstance(value, str) else "run"

    @property
    def kind(self) -> verbs.Kind | None:
        """The question that the run answers, from the table of methods; None for a method that the
        table does not know.
        """
        row = verbs.method(self.method)
        return row.kind if row else None

    @property
    def decides(self) -> tuple[str, ...]:
        """The metrics that decide, from the table of methods; for a method that the table does not
        know, the first six that it wrote, those about learning before the others.
        """
        row = verbs.method(self.method)
        if row:
            return row.decides
        own = [name for name in self.series if not name.startswith(EVAL) and name != "seconds"]
        return tuple(sorted(own, key=lambda name: lookup(name).group != "learning")[:6])

    @property
    def silent(self) -> bool:
        """Whether a model of this kind writes no responses that could be shown."""
        return self.kind in ("reward", "process")

    @property
    def evaluation(self) -> dict[str, Estimate]:
        """The held-out estimates of the summary, each with its interval."""
        raw = self.summary.get("evaluation")
        return (
            {str(name): e for name, entry in raw.items() if (e := estimate(entry)) is not None}
            if isinstance(raw, dict)
            else {}
        )

    def values(self, name: str) -> list[float]:
        """The values of one metric in the order of steps."""
        return [value for _, value in self.series.get(name, [])]


def estimate(entry: Any) -> Estimate | None:
    """An evaluation entry: `{"value", "low", "high", "n"}`. The interval is unknown where a bound
    is not finite, as it is when all rows share one prompt.
    """
    if not isinstance(entry, dict) or not finite(entry.get("value")):
        return None
    low, high, n = entry.get("low"), entry.get("high"), entry.get("n")
    rows = int(n) if finite(n) else None
    if not (finite(low) and finite(high)):
        return Estimate(float(entry["value"]), n=rows)
    return Estimate(float(entry["value"]), float(low), float(high), rows)


def read_run(path: Path) -> RunRecord:
    """Reads whatever the folder holds."""
    notes: list[str] = []
    config, summary = _config(path / "config.yaml", notes), _summary(path / "summary.json", notes)
    history = [
        row
        for row in _lines(path / "metrics.jsonl", notes, "there are no curves")
        if finite(row.get("step"))
    ]
    record = RunRecord(path, config, history, _series(history), [], summary, notes)
    if record.silent:
        return record
    samples = [
        row
        for row in _lines(path / "samples.jsonl", notes, "no prompt and response can be shown")
        if isinstance(row.get("prompt"), str)
        and isinstance(row.get("completion"), str)
        and finite(row.get("step"))
    ]
    return replace(record, samples=pair(samples))


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("config.yaml is missing: the settings of this run are not known.")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(
            f"config.yaml could not be read ({type(error).__name__}): the settings of this run are "
            "not known."
        )
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(
            "summary.json is missing: the run has not ended, so time, memory, versions and "
            "held-out intervals are not known."
        )
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(
            f"summary.json could not be read ({type(error).__name__}): time, memory and versions "
            "are not known."
        )
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _lines(path: Path, notes: list[str], without: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A half-written last line is dropped silently; other bad lines
    are counted.
    """
    if not path.is_file():
        notes.append(f"{path.name} is missing: {without}.")
        return []
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    last = 0
    for last, line in _numbered(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(last)
    if bad and bad[-1] == last:
        bad.pop()
    if bad:
        notes.append(
            f"{path.name}: {len(bad)} of {last} lines could not be read (the first is line "
            f"{bad[0]}) and were left out."
        )
    if not rows:
        notes.append(f"{path.name} holds no rows: {without}.")
    return rows


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    # only \n ends a row: U+2028 may stand inside one
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for i, line in enumerate(file, 1):
            if line.strip():
                yield i, line


def _series(history: list[dict[str, Any]]) -> dict[str, list[Point]]:
    series: dict[str, dict[float, float]] = {}
    for row in history:
        for name, value in row.items():
            if name != "step" and finite(value):
                # of a step that was written twice, the later row counts
                series.setdefault(name, {})[row["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in series.items()}


def pair(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first and the last response to each prompt, side by side: `{"p": prompt, "a": before or
    None, "b": after}` in the order of the file.

    If a prompt occurs several times at one step, its first response is paired with its first, its
    second with its second, and so on.
    """
    seen: dict[tuple[str, float], int] = {}
    steps: dict[tuple[str, int], dict[float, dict[str, Any]]] = {}
    for row in samples:
        turn = seen.get((row["prompt"], row["step"]), 0)
        seen[row["prompt"], row["step"]] = turn + 1
        steps.setdefault((row["prompt"], turn), {})[row["step"]] = row
    pairs = []
    for (prompt, _), rows in steps.items():
        first, last = min(rows), max(rows)
        pairs.append(
            {
                "p": prompt,
                "a": _side(rows[first]) if first != last else None,
                "b": _side(rows[last]),
            }
        )
    return pairs


def _side(row: dict[str, Any]) -> dict[str, Any]:
    score, tokens, finished = row.get("score"), row.get("tokens"), row.get("finished")
    return {
        "step": row["step"],
        "t": row["completion"],
        "score": score if finite(score) else None,
        "n": tokens if finite(tokens) else None,
        "end": finished if isinstance(finished, bool) else None,
    }
