"""The page of a run: `write_report(folder)` reads what the folder holds and writes `report.html`,
with plotly's script once beside it.

The page knows no method: title, color, kind and deciding metrics come from the table in `verbs.py`,
by the `method` in config.yaml. A method that the table does not know gets a general page.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import verbs
from ..metrics import EVAL, finite, known, lookup
from .alarms import Alarm, alarms, off
from .answer import answer, is_share
from .figures import (
    Figure,
    both_figure,
    change,
    mark,
    method_colour,
    metric_figure,
    other_curves,
    was_thinned,
    window,
)
from .folder import RunRecord, read_run
from .numbers import UNKNOWN, Estimate, count, duration, number, percent, size, with_interval
from .render import write_page

CHANCE = (0.5, "coin flip")
LEVELS = {"accuracy": CHANCE, "rewards/accuracies": CHANCE}
"""Levels to compare a curve with."""
PICTURES: dict[verbs.Kind, tuple[str, ...]] = {
    "loss": ("loss",),
    "reward": ("accuracy", "margin"),
    "process": ("steps/accuracy",),
    "preference": ("rewards/accuracies", "rewards/margins"),
    "policy": ("reward", "objective/kl"),
    "distillation": ("kl_teacher",),
}
"""The metrics that get a picture of their own above the others, by the kind of method."""
PAIRS: dict[verbs.Kind, tuple[str, str]] = {
    "preference": ("logps/chosen", "logps/rejected"),
    "distillation": ("nll/student", "nll/teacher"),
}
"""Two metrics that share a picture."""


def write_report(run: Path) -> Path:
    """Writes `report.html` into the run's folder and returns its path. If the folder lacks
    something, the page says so instead of failing.
    """
    record = read_run(Path(run))
    colour = method_colour(record.method)
    found = alarms(record.history, record.config)
    pictures, shown = _deciding(record, colour, found)
    deciding = {f"decide{i}": picture for i, picture in enumerate(pictures)}
    groups, constant = other_curves(record, shown, colour)
    others: dict[str, Figure] = {}
    for i, cell in enumerate(cell for group in groups for cell in group["cells"]):
        cell["key"] = f"other{i}"
        others[cell["key"]] = mark(cell["figure"], record, [cell["name"]], found)
    figures = deciding | others
    numbers = _numbers(record)
    facts = _facts(record.summary)
    longest = max((len(points) for points in record.series.values()), default=0)
    title = f"{verbs.title(record.method)} run: {record.path.resolve().name}"
    return write_page(
        record.path,
        "report.html",
        "report.html.j2",
        {"figures": figures, "samples": record.samples},
        title=title.removeprefix("run "),
        sentences=answer(record),
        alarms=[alarm.sentence for alarm in found],
        quiet=_quiet(record, found),
        notes=record.notes,
        evaluation=[_evaluation(name, e) for name, e in record.evaluation.items()],
        numbers=numbers,
        any_held=any(row["held"] for row in numbers),
        deciding=[(key, picture["title"]) for key, picture in deciding.items()],
        banded=any("band" in f for f in figures.values()),
        marked=any("marks" in f for f in figures.values()),
        smoothed=longest >= 40,
        thinned=was_thinned(record),
        silent=record.silent,
        sample_count=len(record.samples),
        sample_words=_sample_words(record.samples),
        groups=groups,
        constant=constant,
        command=_text(record.summary.get("command")),
        facts=[fact for fact in facts if fact[1] != UNKNOWN],
        unknown=[name for name, value in facts if value == UNKNOWN],
        settings=yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
        if record.config
        else "",
    )


def _quiet(run: RunRecord, found: list[Alarm]) -> str:
    if found:
        return ""
    if off(run.config):
        return "Nothing was judged: this run has --run.on-alarm off."
    return (
        "No alarm fired: none of the heuristics found a number out of its range."
        if run.history
        else "Alarms could not be judged without metrics."
    )


def _deciding(run: RunRecord, colour: str, found: list[Alarm]) -> tuple[list[Figure], set[str]]:
    """The pictures that decide, with the marks of alarms, and the metrics that they show: those of
    the run's kind, or else the first two deciding metrics that have a curve.
    """
    names = PICTURES[run.kind] if run.kind else ()
    drawn = [n for n in names if n in run.series or EVAL + n in run.series]
    shown = drawn or [n for n in run.decides if len(run.values(n)) > 1][:2]
    pictures = [
        mark(metric_figure(run, name, colour, level=LEVELS.get(name)), run, [name], found)
        for name in shown
    ]
    pair = PAIRS.get(run.kind) if run.kind else None
    if pair and all(name in run.series for name in pair):
        title = (
            _logps_title(run)
            if run.kind == "preference"
            else "Loss of the student and of the teacher on the student's samples"
        )
        pictures.append(mark(both_figure(run, pair, colour, title), run, pair, found))
        shown = [*shown, *pair]
    return pictures, set(shown)


def _logps_title(run: RunRecord) -> str:
    ways = {1: "rise", 0: "show no clear change", -1: "fall"}
    chosen, rejected = change(run.values("logps/chosen")), change(run.values("logps/rejected"))
    if chosen == rejected:
        return f"Chosen and rejected log-probabilities both {ways[chosen]}"
    return f"Chosen log-probabilities {ways[chosen]}, rejected ones {ways[rejected]}"


def _numbers(run: RunRecord) -> list[dict[str, str]]:
    last = run.summary.get("metrics")
    last = last if isinstance(last, dict) else {}
    rows = []
    for name in run.decides:
        values, held, metric = run.values(name), run.values(EVAL + name), lookup(name)
        final, final_held = last.get(name), held[-1] if held else last.get(EVAL + name)
        if not (values or finite(final) or finite(final_held)):
            continue
        rows.append(
            {
                "name": name,
                "title": metric.title,
                "sentence": metric.sentence,
                "unit": metric.unit,
                "first": with_interval(window(values, False)) if len(values) > 1 else "",
                "last": with_interval(window(values, True))
                if values
                else number(final)
                if finite(final)
                else "",
                "held": number(final_held) if finite(final_held) else "",
            }
        )
    return rows


def _evaluation(name: str, e: Estimate) -> dict[str, str]:
    title = lookup(name).title if known(name) else name[:1].upper() + name[1:]
    bare = "" if e.half is not None else " (no interval recorded)"
    return {
        "title": title,
        "value": (percent(e, 1) if is_share(name) else with_interval(e)) + bare,
        "n": count(e.n) if e.n is not None else "not recorded",
    }


def _sample_words(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return (
            "No samples were recorded, so there is nothing to read: look at responses before you "
            "trust a number."
        )
    gains = [
        s["b"]["score"] - s["a"]["score"]
        for s in samples
        if s["a"] and None not in (s["a"]["score"], s["b"]["score"])
    ]
    words = f"{count(len(samples))} prompts. " if len(samples) > 1 else "One prompt. "
    if all(s["a"] is None for s in samples):
        return (
            words
            + "Each was answered at one step only, so there is no before and after to compare."
        )
    words += (
        "Each shows the response before and after training; words that occur on one side only are "
        "marked. "
    )
    if gains:
        fell, rose = sum(g < 0 for g in gains), sum(g > 0 for g in gains)
        same = len(gains) - rose - fell
        words += (
            f"The score rose on {count(rose)}, fell on {count(fell)} and stayed the same on "
            f"{count(same)}."
        )
    return words


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    def num(key: str) -> float | None:
        value = summary.get(key)
        return value if finite(value) else None

    def text(key: str) -> str:
        value = summary.get(key)
        return UNKNOWN if value in (None, "") else str(value)

    model, data, versions = (summary.get(key) for key in ("model", "data", "versions"))
    inputs = data if isinstance(data, dict) else {"Data": None}
    return [
        ("Status", text("status")),
        ("Model", _source(model, "name")),
        *((str(flag), _source(one, "source")) for flag, one in inputs.items()),
        ("Seed", text("seed")),
        ("Steps", count(num("steps"))),
        ("Training rows", count(num("rows"))),
        ("Tokens", count(num("tokens"))),
        ("Tokens per second", number(num("tokens_per_second"))),
        ("Training time", duration(num("train_seconds"))),
        ("Peak memory", size(num("peak_memory_bytes"))),
        ("Machine", text("machine")),
        (
            "Versions",
            ", ".join(f"{k} {v}" for k, v in versions.items())
            if isinstance(versions, dict)
            else UNKNOWN,
        ),
    ]


def _source(entry: Any, key: str) -> str:
    """Where the model or the rows came from, and the SHA-256 of what was read there."""
    if not isinstance(entry, Mapping) or not _text(entry.get(key)):
        return UNKNOWN
    digest = _text(entry.get("sha256"))
    return f"{entry[key]}, SHA-256 {digest}" if digest else str(entry[key])
