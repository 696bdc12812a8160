"""Which counts of a survey are findings."""

from __future__ import annotations

from . import judged_texts, judged_tokens
from .findings import Finding, Level, refuse_errors
from .survey import Survey


def row_findings(survey: Survey) -> list[Finding]:
    """All findings of the rows, the worst first."""
    looks = (*judged_texts.LOOKS, *judged_tokens.LOOKS)
    found = [f for look in looks if (f := look(survey)) is not None]
    order: tuple[Level, ...] = ("error", "warning", "note")
    return sorted(found, key=lambda f: order.index(f.level))


def judged(survey: Survey) -> list[Finding]:
    """The same, for a run that is about to begin.

    Raises:
        NothingToLearn: an InputError with all findings, where one of them is an error.
    """
    found = row_findings(survey)
    refuse_errors(found)
    return found
