"""What users' functions are given, return and log, as plain numbers. Nothing heavy is imported."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ..errors import RunError
from ..metrics import known


@dataclass(frozen=True)
class TrainerState:
    """Where a run is when it asks for rewards, as in TRL's `trainer_state`.

    global_step: iterations that are done. max_steps: iterations of the whole run. epoch: prompts
    drawn so far over the number of prompts.
    """

    global_step: int
    max_steps: int
    epoch: float

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer_state has global_step, max_steps and epoch here, and no {name}"
        )


NUMBERS = "a list of {} numbers is expected"


def scores_of(out: Any, who: str, expected: int, where: Sequence[str] = ()) -> list[float | None]:
    """The returned value as one finite number per response, or None where the function does not
    judge a response.

    A list, tuple, array, tensor, series or iterator of real numbers is taken: numbers of Python,
    NumPy and torch, booleans, tensors and arrays with one element.

    Args:
        who: names the function in messages. where: file:line of the row of each response.

    Raises:
        RunError: the function returned something else.
    """
    rows = among(where)
    values = _listed(out, rows + who, expected)
    if len(values) != expected:
        raise RunError(f"{rows}{who} returned {len(values)} numbers for {expected} responses")
    found = [None if v is None else real(v) for v in values]
    for i, (value, number) in enumerate(zip(values, found, strict=True)):
        if value is not None and (number is None or not math.isfinite(number)):
            row = f" ({where[i]})" if where else ""
            raise RunError(
                f"{who} returned {shown(value)} for response {i}{row}: a finite number is "
                "expected, or None where the reward does not apply"
            )
    return found


def among(where: Sequence[str]) -> str:
    """The beginning of a message about a call: the rows that it was about."""
    if not where:
        return ""
    more = len(where) - 1
    rows = f" and {more:,} more {'row' if more == 1 else 'rows'}" if more else ""
    return f"{where[0]}{rows}: "


def real(value: Any) -> float | None:
    """A real number as a float (infinite if it is beyond all floats); None for anything else."""
    try:
        if callable(getattr(value, "item", None)):  # scalars of NumPy and torch, on any device
            value = value.item()
        if isinstance(value, (numbers.Real, Decimal)) or hasattr(value, "__float__"):
            return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None
    return None


def shown(value: Any) -> str:
    """A value in at most 60 characters."""
    try:
        text = repr(value)
    except Exception:
        # Python does not write integers of more than 4,300 digits; a user's object may do anything
        large = type(value) is int
        text = (
            f"an integer of {value.bit_length():,} bits" if large else f"a {type(value).__name__}"
        )
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class Log:
    """What a function logs in one call, by TRL's `log_metric` and `log_extra`.

    metrics: values by name. columns: one value per response, by name.
    """

    responses: int
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: Any) -> None:
        """A number for metrics.jsonl.

        Raises:
            ValueError: the name is one of the run's own, or the value is no finite number.
        """
        number = real(value)
        if not isinstance(name, str) or known(name):
            raise ValueError(
                f"log_metric: {shown(name)} is a metric of the run itself: choose another name"
            )
        if number is None or not math.isfinite(number):
            raise ValueError(f"log_metric: {name} is {shown(value)} where a finite number belongs")
        self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """A column for samples.jsonl, one value per response.

        Raises:
            ValueError: the name is one of the file's own, or there is not one value per response.
        """
        plain = [_plain(v) for v in values]
        if not isinstance(column, str) or column in SAMPLE_COLUMNS:
            raise ValueError(
                f"log_extra: {shown(column)} is a column of samples.jsonl itself: choose another "
                "name"
            )
        if len(plain) != self.responses:
            raise ValueError(
                f"log_extra: column {column} has {len(plain)} values for {self.responses} responses"
            )
        self.columns[column] = plain


SAMPLE_COLUMNS = ("step", "prompt", "completion", "score", "tokens", "finished")
"""The columns that samples.jsonl has without a function's own."""


def _listed(out: Any, who: str, expected: int) -> list[Any]:
    """The items of what a function returned; an array may have further dimensions of size 1."""
    shape = getattr(out, "shape", None)
    if shape is not None and len(shape) != 1:
        if len(shape) == 0 or any(n != 1 for n in shape[1:]) or not hasattr(out, "reshape"):
            raise RunError(
                f"{who} returned a {type(out).__name__} of shape {list(shape)} where "
                f"{NUMBERS.format(expected)}"
            )
        out = out.reshape(-1)
    if isinstance(out, (str, bytes, Mapping, set, frozenset)) or not isinstance(out, Iterable):
        raise RunError(f"{who} returned a {type(out).__name__} where {NUMBERS.format(expected)}")
    return list(out.tolist() if hasattr(out, "tolist") else out)


def _plain(value: Any) -> Any:
    """The value if JSON can hold it, or else its text."""
    if callable(getattr(value, "item", None)) and (number := real(value)) is not None:
        value = number
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
