"""How the lab's page writes numbers and names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...report.numbers import MINUS, number
from ..runs.results import MethodResult, Sensitivity
from ..study.results import Num

DASH = "\u2014"


def share(x: Num) -> str:
    """A share of the gap in percent, with two digits: 35%, 2.1%, 0.043%."""
    if x is None:
        return "not measured"
    p = 100 * x
    if not math.isfinite(p):
        return "not finite"
    if 0 < abs(p) < 0.001:
        return "under 0.001%" if p > 0 else f"{number(p)}%"
    digits = 0 if abs(p) >= 10 or p == 0 else 1 if abs(p) >= 1 else 2 if abs(p) >= 0.1 else 3
    return f"{p:,.{digits}f}%".replace("-", MINUS)


def off(x: Num) -> str:
    """The difference between two sides of a formula, with one digit."""
    if x is None:
        return "not known"
    if x == 0:
        return "0"
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)


def known(x: Num) -> str:
    """A number, or a dash. Below a billionth of its unit it is rounding error: one digit is
    enough.
    """
    return DASH if x is None else off(x) if abs(x) < 1e-9 else number(x)


def side(x: Num) -> str:
    """One side of an identity, with six digits so that the two can be compared."""
    if x is None:
        return DASH
    if not math.isfinite(x):
        return "not finite"
    if x == 0:
        return "0"
    small = abs(x) < 1e-4
    digits = f"{x:.2e}".replace("e-0", "e-") if small else f"{x:#.6g}".rstrip(".")
    return digits.replace("-", MINUS)


def as_typed(x: float) -> str:
    """A setting as a user types it: 0.003, 1e−5."""
    return f"{x:g}".replace("e-0", "e-").replace("-", MINUS)


def seeds(values: Sequence[float]) -> str:
    """The range over seeds: `3 seeds: 0.4% to 0.7%`."""
    if len(values) == 1:
        return "one seed"
    return f"{len(values)} seeds: {share(min(values))} to {share(max(values))}"


def label(m: MethodResult) -> str:
    """`PPO, table`."""
    return f"{m.name}, {m.policy}"


def with_policy(one: MethodResult | Sensitivity) -> str:
    """`PPO with a table`."""
    return f"{one.name} with a {one.policy}"
