"""Will the run fit into memory? The plan that was made when it was prepared, beside a real step."""

from __future__ import annotations

from typing import Any

from ..data.findings import Finding, Level
from ..errors import InputError
from ..methods.memory import Needs
from ..models.memory import in_words
from .report import Report

TITLE = "memory (planned before the models were loaded)"


def predicted(report: Report, needs: Needs) -> bool:
    """Add what the run needs at its peak, and what is there.

    Returns:
        whether a step of the run can be tried.
    """
    limit = needs.limit
    section: dict[str, Any] = {"available": limit}
    report.sections["memory"] = section
    try:
        plan = needs.plan()
    except InputError as error:
        report.findings.append(Finding("note", "memory-unknown", str(error)))
        return True
    section |= {"tokens": plan.tokens, "peak": plan.peak, "busiest": plan.busiest}
    section |= {"process": plan.process, "phases": plan.phases}
    report.about[TITLE] = [*plan.lines(), f"available: {in_words(limit)}"]
    level: Level = "note"
    if not plan.fits(limit):
        level = "error" if plan.peak > limit else "warning"
    name = {"note": "memory-fits", "warning": "memory-tight", "error": "memory-short"}[level]
    sentence = (
        f"the run needs {in_words(plan.peak)} at its peak, in {plan.busiest}, and "
        f"{in_words(limit)} are there"
    )
    change = "" if level == "note" else needs.instead(plan)
    numbers = {"peak": plan.peak, "available": limit}
    report.findings.append(Finding(level, name, sentence, change, numbers))
    return level != "error"


def measured(report: Report, peak: int) -> None:
    """Add the peak of one real step in bytes.

    It lacks what the run holds only at other times, such as the copy that is loaded after saving.
    """
    report.sections["memory"]["measured"] = peak
    line = f"measured in one step on the longest rows: {in_words(peak)}"
    report.about.setdefault(TITLE, []).append(line)
