"""`fiducial lab`: run every method of the package on worlds small enough to enumerate, compare it
with the exactly known optimum, and write the page.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter

from ..errors import RunError
from ..report.numbers import number
from ..train.folders import open_folder
from ..train.launch import alone
from ..train.machine import command_line
from ..train.progress import say
from .page.page import write_lab_page
from .runs import rows
from .runs.folders import WORLDS, describe, make_worlds
from .runs.jobs import Form, jobs
from .runs.results import LabResults, Studies
from .runs.workers import Workers
from .settings import Lab
from .study import (
    decision_process,
    derivation,
    estimators,
    frontier,
    kl_estimators,
    labels,
    overoptimization,
)
from .worlds.world import World


@dataclass(frozen=True)
class Finished:
    """A finished lab: the path of its page, and everything that is on it."""

    page: Path
    results: LabResults


def lab(settings: Lab) -> Finished:
    """Run the lab: write its page, and `lab.json` with all numbers beside it.

    Raises:
        InputError: the folder is in use.
        RunError: a run failed or was stopped. Finished runs are kept for --resume.
    """
    alone("lab")
    folder = open_folder(settings.out, "lab-run", settings.resume)
    form: Form = "full" if settings.full else "quick"
    times: dict[str, float] = {}
    with timed(times, "making the worlds"):
        minutes = 19 if settings.full else 5
        say(f"lab: making the worlds ({form} form: about {minutes} minutes on two cores)")
        worlds = make_worlds(folder, settings.seed)
    with Workers(folder, settings.processes, settings.resume) as workers:
        began = time.monotonic()
        pending = workers.start(jobs(form, settings.seed))
        found = studies(worlds["mild", settings.seed], form, times)
        try:
            done = workers.collect(pending)
        except KeyboardInterrupt:
            raise RunError(
                f"stopped. The finished runs are kept; continue with --out {folder} --resume"
            ) from None
        times["running the methods"] = time.monotonic() - began
    proxies = [rows.with_path(curve, done) for curve in found.overoptimisation or []]
    results = LabResults(
        form=form,
        seed=settings.seed,
        command=command_line(),
        machine=(
            f"{platform.machine()}, {os.cpu_count()} cores, {workers.count} runs side by side"
        ),
        versions={
            "python": platform.python_version(),
            **{p: version(p) for p in ("fiducial", "torch", "transformers", "numpy")},
        },
        timings={k: round(v, 1) for k, v in times.items()},
        worlds=[describe(name, worlds[name, settings.seed]) for name in WORLDS],
        methods=rows.methods(done, worlds),
        parts=rows.changes("parts", done, worlds),
        lengths=rows.changes("lengths", done, worlds),
        credit=next((run.credit for _, run in done if run.credit), None),
        sensitivity=rows.sensitivity(done),
        **vars(replace(found, overoptimisation=proxies)),
    )
    (folder / "lab.json").write_bytes(TypeAdapter(LabResults).dump_json(results, indent=1))
    return Finished(write_lab_page(folder, results), results)


def studies(world: World, form: Form, times: dict[str, float]) -> Studies:
    """Compute the sections that need no run."""
    with timed(times, "the derivation, side by side"):
        process, answers = (
            decision_process.decision_process(world),
            decision_process.sparse_answers(world),
        )
        curve, (steps, recovered) = frontier.frontier(world), derivation.derive(world)
    with timed(times, "what labels do"):
        missing, annotators = labels.missing(world), labels.annotators(world)
    with timed(times, "estimators against exact gradients"):
        kl, gradients = kl_estimators.kl_table(world), estimators.estimator_table()
    with timed(times, "best-of-n and over-optimization"):
        best = frontier.best_of_n(world, [1, 2, 4, 8, 16, 32, 64, 256, 1024])
        proxies = overoptimization.curves(form)
    return Studies(
        setting=process,
        frontier=curve,
        sparse=answers,
        derivation=steps,
        recovered=recovered,
        missing=missing,
        labels=annotators,
        kl=kl,
        estimators=gradients,
        best_of_n=best,
        overoptimisation=proxies,
    )


def as_lines(finished: Finished) -> list[str]:
    """The last lines in the terminal: one per method, and the path of the page."""
    lines = []
    for row in finished.results.methods or []:
        gaps = ", ".join(f"{100 * rows.gap_of(run):.2g}%" for run in row.runs)
        apart = ", ".join(number(run.total_variation) for run in row.runs)
        lines.append(
            f"{row.world:<8} {row.name:<21} {row.policy:<12} short of the optimum by "
            f"{gaps}; total variation {apart}"
        )
    return [*lines, str(finished.page)]


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Store the seconds of the block in `times`."""
    start = time.monotonic()
    yield
    times[name] = time.monotonic() - start
