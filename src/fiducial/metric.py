"""What the registry of metrics says of one number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Group = Literal["learning", "stability", "honesty", "speed"]
Range = tuple[float | None, float | None]
GROUPS: tuple[Group, ...] = ("learning", "stability", "honesty", "speed")


@dataclass(frozen=True)
class Metric:
    """One number that a run records.

    unit: empty where the title says it all. sentence: what the number is, where it is healthy, and
    what to do when it leaves that range. healthy: None where no range is healthy in itself.
    alarm: the range outside of which a run raises an alarm, where it is not the healthy one.
    change: the lowest and the highest multiple of its usual value that raises none. The usual value
    is that of the run's start; for gradient norms their running median, for the KL its target.
    """

    title: str
    unit: str
    sentence: str
    healthy: Range | None
    group: Group
    alarm: Range | None = None
    change: Range | None = None


def metric(
    group: Group,
    title: str,
    unit: str,
    healthy: Range | None = None,
    *,
    alarm: Range | None = None,
    change: Range | None = None,
) -> Callable[[str], Metric]:
    """The entry but for its sentence, which follows in brackets of its own to be readable below."""
    return lambda sentence: Metric(title, unit, sentence, healthy, group, alarm, change)
