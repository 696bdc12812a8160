"""The description of one known mistake."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A known mistake in a loss.

    name: as a verdict carries it. explanation: what the mistake is. remedy: what to do about it.
    seen_in: where it has occurred: project#number of an issue or change, a paper, or a method that
    does it on purpose.
    """

    name: str
    explanation: str
    remedy: str
    seen_in: str = ""
