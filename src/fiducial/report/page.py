"""The page of a run: `write_report(folder)` reads what the folder holds and writes `report.html`,
with plotly's script once beside it.

No method is known here. What is shown is decided from the names of the metrics that were written;
`method` in config.yaml gives the title alone.
"""

import shlex
from pathlib import Path
from typing import Any

import yaml

from ..metrics import EVAL, alarms, finite, known, lookup
from .answer import answer, kind, role
from .figures import (
    COLOURS,
    GREEN,
    Figure,
    both_figure,
    change,
    metric_figure,
    other_curves,
    points_figure,
    was_thinned,
    window,
)
from .folder import Run, read_run
from .numbers import UNKNOWN, Estimate, count, duration, number, percent, size, with_interval
from .render import write_page

NAMES = {
    "sft": "SFT",
    "reward": "Reward model",
    "prm": "Process reward model",
    "ppo": "PPO",
    "reinforce": "REINFORCE",
    "grpo": "GRPO",
    "dpo": "DPO",
    "distill": "Distillation",
}
DECIDE = {
    "policy": (
        "reward",
        "objective/score",
        "objective/kl",
        "kl",
        "entropy",
        "completions/mean_length",
        "completions/finished",
    ),
    "preference": (
        "rewards/accuracies",
        "rewards/margins",
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
    ),
    "reward": ("accuracy", "margin", "loss", "reward_mean"),
    "process": ("steps/accuracy", "steps/probability", "steps/right", "loss"),
    "distillation": (
        "kl_teacher",
        "objective/kl_teacher",
        "nll/student",
        "nll/teacher",
        "entropy",
        "completions/mean_length",
        "completions/finished",
    ),
    "loss": ("loss", "perplexity", "mean_token_accuracy", "entropy"),
}
CHANCE = (0.5, "coin flip")
TITLES = {
    "win_rate": "Win rate over the model it started from",
    "gold_win_rate": "Win rate by the true value over the model it started from",
    "length_only": "Accuracy of choosing by length alone",
    "length_only_accuracy": "Accuracy of choosing by length alone",
}


def write_report(run: Path) -> Path:
    """Writes `report.html` into the run's folder and returns its path. Whatever the folder lacks,
    the page says so instead of failing.
    """
    folder = read_run(Path(run))
    colour = COLOURS.get(folder.method, GREEN)
    figures, deciding, shown = _deciding(folder, colour)
    groups, constant = other_curves(folder, shown, colour)
    for i, cell in enumerate(cell for group in groups for cell in group["cells"]):
        cell["key"] = f"other{i}"
        figures[cell["key"]] = cell["figure"]
    numbers = _numbers(folder)
    summary = folder.summary
    facts, found = _facts(summary), alarms(folder.history)
    longest = max((len(points) for points in folder.series.values()), default=0)
    return write_page(
        folder.path,
        "report.html",
        "report.html.j2",
        {"figures": figures, "samples": folder.samples},
        title=f"{NAMES.get(folder.method, folder.method)} run {folder.path.resolve().name}".removeprefix(
            "run "
        ),
        sentences=answer(folder),
        alarms=found,
        quiet=_quiet(folder, found),
        notes=folder.notes,
        evaluation=[_evaluation(name, e) for name, e in folder.evaluation.items()],
        numbers=numbers,
        any_held=any(row["held"] for row in numbers),
        deciding=deciding,
        banded=any("band" in f for f in figures.values()),
        smoothed=longest >= 40,
        thinned=was_thinned(folder),
        sample_count=len(folder.samples),
        sample_words=_sample_words(folder.samples),
        groups=groups,
        constant=constant,
        command=_command(summary.get("command", folder.config.get("command"))),
        facts=[fact for fact in facts if fact[1] != UNKNOWN],
        unknown=[name for name, value in facts if value == UNKNOWN],
        settings=yaml.safe_dump(folder.config, sort_keys=False, allow_unicode=True)
        if folder.config
        else "",
    )


def _quiet(run: Run, found: list[str]) -> str:
    if found:
        return ""
    return (
        "No alarm fired: none of the heuristics found a number out of its range."
        if run.history
        else "Alarms could not be judged without metrics."
    )


def _deciding(
    run: Run, colour: str
) -> tuple[dict[str, Figure], list[tuple[str, str, str]], set[str]]:
    """The pictures that decide: by key for the script, as (key, title, note) for the template, and
    the metrics they show.
    """
    single: dict[str, tuple[str, ...]] = {
        "policy": ("reward", "objective/kl"),
        "preference": ("rewards/accuracies", "rewards/margins"),
        "reward": ("accuracy", "margin"),
        "loss": ("loss",),
        "process": ("steps/accuracy",),
        "distillation": ("kl_teacher",),
    }
    which = kind(run)
    pictures: list[Figure] = []
    shown: set[str] = set()
    for name in single.get(which, ()):
        if name in run.series or EVAL + name in run.series:
            pictures.append(
                metric_figure(
                    run,
                    name,
                    colour,
                    level=CHANCE if name in ("rewards/accuracies", "accuracy") else None,
                )
            )
            shown.add(name)
    pair = ("logps/chosen", "logps/rejected")
    if which == "preference" and all(name in run.series for name in pair):
        pictures.append(both_figure(run, pair, colour, _logps_title(run)))
        shown.update(pair)
    pair = ("nll/student", "nll/teacher")
    if which == "distillation" and all(name in run.series for name in pair):
        pictures.append(
            both_figure(
                run, pair, colour, "Loss of the student and of the teacher on the student's samples"
            )
        )
        shown.update(pair)
    pictures += _measured(run, colour)
    keys = [f"decide{i}" for i in range(len(pictures))]
    return (
        dict(zip(keys, pictures, strict=True)),
        [(key, p["title"], p["note"]) for key, p in zip(keys, pictures, strict=True)],
        shown,
    )


def _logps_title(run: Run) -> str:
    ways = {1: "rise", 0: "show no clear change", -1: "fall"}
    chosen, rejected = change(run.values("logps/chosen")), change(run.values("logps/rejected"))
    if chosen == rejected:
        return f"Chosen and rejected log-probabilities both {ways[chosen]}"
    return f"Chosen log-probabilities {ways[chosen]}, rejected ones {ways[rejected]}"


def _measured(run: Run, colour: str) -> list[Figure]:
    """Reliability and accuracy by difference in length, for summaries that carry them."""
    figures = []
    for key, x_key, y_key, x, title in (
        (
            "reliability",
            "predicted",
            "observed",
            "predicted probability that chosen is better",
            "Predicted against observed preference",
        ),
        (
            "accuracy_by_length",
            "difference",
            "value",
            "chosen minus rejected length (tokens)",
            "Accuracy by difference in length",
        ),
    ):
        raw = run.summary.get(key)
        rows = (
            [
                row
                for row in raw
                if isinstance(row, dict) and finite(row.get(x_key)) and finite(row.get(y_key))
            ]
            if isinstance(raw, list)
            else []
        )
        if rows:
            clean = [{k: v if finite(v) else None for k, v in row.items()} for row in rows]
            figures.append(
                points_figure(
                    title,
                    x,
                    "share of held-out pairs",
                    clean,
                    (x_key, y_key),
                    colour,
                    diagonal=key == "reliability",
                )
            )
    return figures


def _numbers(run: Run) -> list[dict[str, str]]:
    last = run.summary.get("metrics")
    last = last if isinstance(last, dict) else {}
    names = (
        DECIDE.get(kind(run))
        or tuple(name for name in run.series if not name.startswith(EVAL) and name != "seconds")[:6]
    )
    rows = []
    for name in names:
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
    is_share = (
        role(name) != "" or name.endswith(("rate", "share", "finished"))
    ) and 0 <= e.value <= 1
    value = percent(e, 1) if is_share else with_interval(e)
    title = TITLES.get(name) or (lookup(name).title if known(name) else name[:1].upper() + name[1:])
    bare = "" if e.half is not None else " (no interval recorded)"
    return {
        "title": title,
        "value": value + bare,
        "n": count(e.n) if e.n is not None else "not recorded",
    }


def _sample_words(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return "No samples were written, so there is nothing to read: look at responses before trusting a number."
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
    words += "The same prompt before and after; words that stand on one side only are marked. "
    if gains:
        fell, rose = sum(g < 0 for g in gains), sum(g > 0 for g in gains)
        words += f"The score rose on {count(rose)}, fell on {count(fell)} and stayed on {count(len(gains) - rose - fell)}."
    return words


def _command(command: Any) -> str:
    if isinstance(command, list):
        return shlex.join(str(part) for part in command)
    return command if isinstance(command, str) else ""


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    def num(key: str) -> float | None:
        value = summary.get(key)
        return value if finite(value) else None

    def text(key: str) -> str:
        value = summary.get(key)
        return UNKNOWN if value in (None, "") else str(value)

    versions = summary.get("versions")
    return [
        ("Status", text("status")),
        ("Model", text("model")),
        ("Seed", text("seed")),
        ("Steps", count(num("steps"))),
        ("Training rows", count(num("rows"))),
        ("Tokens", count(num("tokens"))),
        ("Tokens a second", number(num("tokens_per_second"))),
        ("Training time", duration(num("train_seconds"))),
        ("Peak memory", size(num("peak_memory_bytes"))),
        ("Machine", text("machine")),
        ("SHA-256 of the data", text("data_sha256")),
        (
            "Versions",
            ", ".join(f"{k} {v}" for k, v in versions.items())
            if isinstance(versions, dict)
            else UNKNOWN,
        ),
    ]
