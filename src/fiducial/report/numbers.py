"""How a page writes numbers: three significant digits, separated thousands, a real minus sign, and
both ends of a 95% interval, which need not lie evenly around the number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

MINUS = "\u2212"
UNKNOWN = "not known"
SPACE = "\u00a0"
"""A space at which no line is broken."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; `low` and `high` are None where the interval is not known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def above(self, bar: float) -> bool:
        """Whether the whole interval lies above the bar. False without an interval: a bare number
        decides nothing.
        """
        return self.low is not None and self.low > bar

    def below(self, bar: float) -> bool:
        """Whether the whole interval lies below the bar."""
        return self.high is not None and self.high < bar


def mean_of(values: Sequence[float]) -> Estimate:
    """Mean with Student's 95% interval, values taken as independent; no interval below three."""
    n = len(values)
    if n < 3:
        return Estimate(fmean(values), n=n)
    half = _student(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(fmean(values), fmean(values) - half, fmean(values) + half, n)


def _student(df: int) -> float:
    """The 97.5% quantile of Student's t: from a table for two small cases, else from the
    Cornish-Fisher series (within 2% from df = 4).
    """
    table = {2: 4.303, 3: 3.182}
    z = 1.959964
    return table.get(df) or z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (
        96 * df**2
    )


def number(x: float | None) -> str:
    """Three significant digits: 1,230,000; 12.3; 0.00123; 1.20e−5."""
    if x is None:
        return UNKNOWN
    if not math.isfinite(x):
        return "not finite"
    if x == 0:
        return "0"
    if abs(x) < 1e-3 or abs(x) >= 1e15:
        return (
            f"{x:.2e}".replace("e-0", "e-")
            .replace("e+0", "e")
            .replace("e+", "e")
            .replace("-", MINUS)
        )
    rounded = float(f"{x:.2e}")  # 9.999 becomes 10.0 before the decimals are chosen
    return f"{rounded:,.{_decimals(rounded)}f}".replace("-", MINUS)


def _decimals(x: float, digits: int = 3) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(x)))) if x else digits - 1


def count(n: int | float | None) -> str:
    """A count is exact: 12,345."""
    return UNKNOWN if n is None else f"{round(n):,}".replace("-", MINUS)


def with_interval(e: Estimate | None) -> str:
    """`1.35 [1.31, 1.39]`: at most three digits of the value and two of the interval's width, with
    the same number of decimals. Without an interval, the number alone.
    """
    if e is None:
        return "not measured"
    half = e.half
    if not half or not math.isfinite(e.value) or not math.isfinite(half):
        return number(e.value)
    assert e.low is not None and e.high is not None
    size = max(abs(e.value), half)
    if size < 1e-3:
        return _bracketed(number(e.value), number(e.low), number(e.high))
    unit = max(_power(size) - 2, min(_power(half) - 1, 0))
    # an interval too narrow for three digits of the value gets decimals of its own
    fine = _power(half) if half < 0.5 * 10**unit else unit
    return _bracketed(*(_to(x, u) for x, u in ((e.value, unit), (e.low, fine), (e.high, fine))))


def _bracketed(value: str, low: str, high: str) -> str:
    return f"{value}{SPACE}[{low},{SPACE}{high}]"


def _power(x: float) -> int:
    """The power of ten of the first digit: 2 for 345, -2 for 0.012."""
    return math.floor(math.log10(x))


def _to(x: float, power: int) -> str:
    """`x` rounded to a multiple of a power of ten."""
    rounded = round(x, -power) + 0.0  # no minus in front of 0
    return f"{rounded:,.{max(0, -power)}f}".replace("-", MINUS)


def percent(e: Estimate | float, digits: int | None = None) -> str:
    """`81% [76, 86]`; with one decimal if half the interval's width is below one point or `digits`
    asks for it.
    """
    if not isinstance(e, Estimate):
        return f"{100 * e:.{1 if digits is None else digits}f}%".replace("-", MINUS)
    half = e.half
    if half is None:
        return f"{100 * e.value:.{1 if digits is None else digits}f}%"
    assert e.low is not None and e.high is not None
    digits = digits if digits is not None else (0 if half >= 0.01 else 1)
    value, low, high = (_to(100 * x, -digits) for x in (e.value, e.low, e.high))
    return _bracketed(f"{value}%", low, high)


def duration(seconds: float | None) -> str:
    """`12.3 s`, `3 min 20 s`, `1 h 02 min`, `2 d 03 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 99.95:
        return f"{number(seconds)}\u00a0s"
    total = round(seconds)
    minutes, s = divmod(total, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}\u00a0d {h:02d}\u00a0h"
    return f"{hours}\u00a0h {m:02d}\u00a0min" if hours else f"{m}\u00a0min {s:02d}\u00a0s"


def size(n: float | None) -> str:
    """`3.21 GiB`."""
    if n is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 999.5:
            return f"{number(n)}\u00a0{unit}"
        n /= 1024
    return f"{number(n)}\u00a0TiB"
