"""How long a run takes, and where the time goes, estimated from one measured step."""

from __future__ import annotations

import time
from typing import Any

from ..methods.distill import Ready
from ..methods.setup import Prepared, PreparedOnline
from ..rollout.forward import forward
from ..train.processes import Processes
from .model import Step
from .plan import sizes
from .reward import Sampled


def offline_time(ready: Prepared[Any], settings: Any, step: Step) -> dict[str, Any]:
    """Seconds of each part of a step, and of the run, for rows of mean length."""
    tokens = step.usual * min(settings.batch_size, len(ready.train))
    parts = {
        "forward": step.forward / step.tokens * tokens,
        "backward": step.backward / step.tokens * tokens,
        "update": step.update,
    }
    return _whole(parts, ready.total, step)


def online_time(
    ready: PreparedOnline | Ready,
    settings: Any,
    sampled: Sampled,
    scoring: float,
    step: Step,
    processes: Processes,
) -> dict[str, Any]:
    """The same for a method that samples; samples and scores are taken to cost the same each."""
    trajectory, count = sampled.trajectory, len(sampled.texts)
    start = time.monotonic()
    if isinstance(ready, PreparedOnline):
        forward(trajectory, ready.roles, processes, settings.run.tokens)
    looking = time.monotonic() - start
    many = settings.batch_size / count
    tokens = step.usual * settings.batch_size
    _, steps, updates = sizes(ready, settings)
    parts = {
        "sampling": sampled.seconds * many,
        "scoring": scoring * many,
        "log-probabilities": looking * many,
        "learning": step.per_token * tokens * getattr(settings, "epochs", 1),
        "updates": step.update * updates / steps,
    }
    return _whole(parts, steps, step)


def _whole(parts: dict[str, float], steps: int, step: Step) -> dict[str, Any]:
    each = sum(parts.values())
    return {
        "seconds_per_step": each,
        "steps": steps,
        "seconds": each * steps,
        "parts": parts,
        "measured": {"sequences": step.sequences, "tokens": step.tokens},
    }


def time_lines(times: dict[str, Any]) -> list[str]:
    """The times in two lines."""
    each = times["seconds_per_step"]
    parts = ", ".join(
        f"{name} {seconds / each:.0%}" for name, seconds in times["parts"].items() if seconds
    )
    whole = readable(times["seconds"])
    return [f"about {readable(each)} per step, {whole} for {times['steps']:,} steps", parts]


def readable(seconds: float) -> str:
    """A length of time in a unit that suits it."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
