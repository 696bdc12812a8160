"""A share of a survey as a finding. Thresholds are heuristics, unless all rows are concerned."""

from __future__ import annotations

from .findings import Finding, Level

FEW = 0.01
"""Share of rows from which on a fault that no row should have is a warning."""
MANY = 0.1
"""The same for what a few rows may well have."""
MOST = 0.5
"""The same for what a good file may have in many rows, and not in most."""
NEVER = 2.0
"""The same for what is only a note."""


def counted(
    name: str,
    part: int,
    whole: int,
    limit: float,
    what: str,
    change: str,
    *,
    shown: float = 0.0,
    unit: str = "rows",
) -> Finding | None:
    """A warning where the share reaches the limit, a note above `shown`, or nothing."""
    found = part / whole if whole else 0.0
    if not part or found < shown:
        return None
    level: Level = "warning" if found >= limit else "note"
    about = {"count": part, "of": whole, "share": found}
    return Finding(level, name, f"{part:,} of {whole:,} {unit} ({found:.1%}) {what}", change, about)
