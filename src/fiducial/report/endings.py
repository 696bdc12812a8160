"""The alarms that only make sense when a run has ended: they look at the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..metrics import METRICS, finite
from .rules import Found, bounds
from .rules_updates import more_critic
from .tracks import FIRST, Setup


class History:
    """The rows of metrics.jsonl as columns of finite values."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows = list(rows)

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each record of a metric."""
        rows = ((row.get("step", i), row.get(name)) for i, row in enumerate(self.rows))
        return [(int(step), float(value)) for step, value in rows if finite(step) and finite(value)]

    def values(self, name: str) -> list[float]:
        """The values of a metric."""
        return [value for _, value in self.points(name)]

    def late(self, name: str) -> float | None:
        """Mean of the last quarter; None if there are too few points to judge."""
        values = self.values(name)
        return fmean(values[-max(3, len(values) // 4) :]) if len(values) >= FIRST else None


@dataclass(frozen=True)
class Ending:
    """An alarm that is told at the end of a run, unless one of its name was raised before."""

    name: str
    find: Callable[[History, Setup], Found | None]


def _critic(history: History, setup: Setup) -> Found | None:
    late, low = history.late("explained_variance"), bounds("explained_variance")[0]
    if late is None or late >= low:
        return None
    return Found(
        {"explained_variance": late},
        "Late in the run the critic explains less than a constant would (explained variance "
        f"{late:.3g}; heuristic: above 0.3), so its advantages are noise. {more_critic(setup)}",
    )


def _unclipped(history: History, setup: Setup) -> Found | None:
    late, epochs = history.late("clip_ratio"), history.values("epochs_done")
    # with one pass over the batch the ratio is 1 and nothing can be clipped
    if late is None or late >= 0.001 or not epochs or fmean(epochs) <= 1:
        return None
    return Found(
        {"clip_ratio": late},
        f"Only {100 * late:.2g}% of tokens are clipped although every batch is used for several "
        "epochs (heuristic: 1 to 10%): the steps are too small, and a higher --learning-rate may "
        "be safe.",
    )


def _unfinished(history: History, setup: Setup) -> Found | None:
    low = (METRICS["completions/finished"].healthy or (None,))[0]
    late = history.late("completions/finished")
    if late is None or low is None or late >= low:
        return None
    return Found(
        {"completions/finished": late},
        f"Only {100 * late:.3g}% of responses end by themselves late in the run (heuristic: above "
        f"{100 * low:g}%): the others are cut. "
        + setup.sentence(
            "Raise --max-new-tokens",
            "make cut responses cost something with --score.missing-eos-penalty 1",
            "train the end token with sft",
        ),
    )


def _too_easy(history: History, setup: Setup) -> Found | None:
    values = history.values("rewards/accuracies")
    early = values[max(1, len(values) // 10) : max(4, len(values) // 3)]
    if len(values) < 3 * FIRST or len(early) < 3 or fmean(early) < 0.98:
        return None
    return Found(
        {"rewards/accuracies": fmean(early)},
        f"Preference accuracy is {fmean(early):.3g} already in the first third of the run "
        "(heuristic: 0.6 to 0.8 on labels by people): something trivial such as length or format "
        "tells the pairs apart; look at them.",
    )


def _memorized(history: History, setup: Setup) -> Found | None:
    high = (METRICS["accuracy"].healthy or (None, None))[1]
    late, held = history.late("accuracy"), history.values("eval/accuracy")
    if late is None or high is None or late <= high or (held and held[-1] >= late - 0.05):
        return None
    other = f"{held[-1]:.3g} on held-out pairs" if held else "held-out pairs were not measured"
    return Found(
        {"accuracy": late} | ({"eval/accuracy": held[-1]} if held else {}),
        f"Training accuracy is {late:.3g} ({other}; heuristic: at most {high:g}): the model "
        "memorizes pairs or tells them apart by something trivial; use fewer --epochs or more "
        "pairs.",
    )


def _overfit(history: History, setup: Setup) -> Found | None:
    points = history.points("eval/loss")
    if len(points) < 3:
        return None
    step, lowest = min(points, key=lambda point: point[1])
    last = points[-1]
    if last[1] <= lowest + max(0.02 * abs(lowest), 1e-9) or step == last[0]:
        return None
    return Found(
        {"eval/loss": last[1]},
        f"Held-out loss rose from {lowest:.4g} at step {step} to {last[1]:.4g} at the end "
        f"(heuristic: by less than 2%): stop near step {step}, with --steps or fewer --epochs, "
        "and judge by samples too.",
    )


ENDINGS = (
    Ending("critic", _critic),
    Ending("unclipped", _unclipped),
    Ending("ends", _unfinished),
    Ending("too-easy", _too_easy),
    Ending("memorized", _memorized),
    Ending("overfit", _overfit),
)
"""In the order in which they are told."""
