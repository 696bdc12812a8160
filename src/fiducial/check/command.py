"""`fiducial check VERB`: the verb is prepared as it would be, and nothing is opened or written."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .. import verbs
from ..data.findings import Finding, NothingToLearn
from ..data.judged import row_findings
from ..errors import InputError
from ..methods.distill import Ready
from ..methods.setup import Prepared, PreparedOnline
from ..train import machine
from ..train.launch import alone
from ..train.processes import Processes
from ..train.resume import with_budget
from .memory import measured, predicted
from .model import Step, chance, model_findings, offline_step, online_step, weights
from .plan import plan_findings, sizes, slow
from .report import Report
from .reward import GROUP, reward_findings, sample, sample_findings
from .timing import offline_time, online_time, time_lines
from .view import row_lines, row_numbers, share_lines


def check(verb: str, settings: Any) -> Report:
    """Whether a run of a verb that trains can learn, and how long it will take.

    Args:
        verb: the name of a method. settings: of that method.

    Returns:
        all that was found; a run that the verb would refuse is a report too.

    Raises:
        InputError: there is no such method, or it cannot be prepared without being run.
    """
    alone("check")
    method = verbs.method(verb)
    page: Any = None if method is None else sys.modules[verbs.resolve(method.run).__module__]
    if not hasattr(page, "prepare"):
        raise InputError(f"check: {verb} is no verb that can be checked")
    torch.manual_seed(settings.seed)
    processes = Processes()
    report = Report(verb)
    try:
        prepared = page.prepare(settings, processes)
    except NothingToLearn as error:
        report.findings, report.refused = error.findings, True
        return report
    except InputError as error:
        report.findings, report.refused = [Finding("error", "refused", str(error))], True
        return report
    except torch.OutOfMemoryError as error:
        report.findings = [_too_large("the models do", error)]
        return report
    ready = prepared[0] if isinstance(prepared, tuple) else prepared
    _rows(report, ready)
    report.findings += plan_findings(ready, settings)
    if not predicted(report, ready.needs):
        return report
    settings = with_budget(settings, ready.needs.budget)
    machine.reset_peak_memory()
    try:
        step, times = _tried(report, ready, settings, processes)
    except InputError as error:
        report.findings.append(Finding("error", "refused", str(error)))
        report.refused = True
        return report
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        report.findings.append(_too_large("one step on the longest rows does", error))
        return report
    measured(report, machine.peak_memory(processes.device))
    report.findings += model_findings(ready.note, ready.roles)
    report.findings += slow(step, settings, sizes(ready, settings)[2])
    about = weights(ready.roles)
    report.sections["model"] = {"roles": about, "loss": step.loss, "grad_norm": step.grad_norm}
    report.about["weights that train"] = _weight_lines(about)
    report.sections["time"] = times
    report.about["time (estimated from one step on the longest rows)"] = time_lines(times)
    return report


def _rows(report: Report, ready: Prepared[Any] | PreparedOnline | Ready) -> None:
    survey = ready.survey
    report.findings += row_findings(survey)
    report.shown = row_lines(survey, False), row_lines(survey, True)
    report.about["all rows"] = share_lines(survey, ready)
    report.sections["rows"] = row_numbers(survey)


def _tried(
    report: Report,
    ready: Prepared[Any] | PreparedOnline | Ready,
    settings: Any,
    processes: Processes,
) -> tuple[Step, dict[str, Any]]:
    """One step of the run, with samples and rewards where it has them; the times of its parts."""
    if isinstance(ready, Prepared):
        step, found = offline_step(ready, settings, processes)
        report.findings += found
        if report.verb == "sft":
            report.findings += chance(step, ready.roles.policy)
        return step, offline_time(ready, settings, step)
    group = min(GROUP, getattr(settings, "group_size", 4))
    sampled = sample(ready, settings, processes, group)
    report.findings += sample_findings(sampled, settings.max_new_tokens)
    scoring = 0.0
    if isinstance(ready, PreparedOnline):
        found, numbers = reward_findings(ready, settings, sampled)
        report.findings += found
        report.sections["rewards"] = numbers
        scoring = numbers["seconds"]
    step, found = online_step(sampled.trajectory, ready, settings, processes)
    report.findings += found
    return step, online_time(ready, settings, sampled, scoring, step, processes)


def _weight_lines(about: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for role, numbers in about.items():
        kinds = list(numbers["kinds"].items())
        some = ", ".join(f"{name} {count:,}" for name, count in kinds[:6])
        more = f", and {len(kinds) - 6} kinds more" if len(kinds) > 6 else ""
        lines.append(f"{role}: {numbers['trained']:,} of {numbers['weights']:,} ({some}{more})")
    return lines


def _too_large(what: str, error: Exception) -> Finding:
    return Finding(
        "error",
        "out-of-memory",
        f"{what} not fit into memory ({str(error).splitlines()[0]})",
        "lower --run.tokens or --rows.max-length, or use --run.gradient-checkpointing or --lora.r",
    )
