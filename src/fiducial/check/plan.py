"""Do the settings make a run that can move the model? The bound on how far the loss can fall is
exact to first order; the others are heuristics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..data.findings import Finding
from ..methods.distill import Ready
from ..methods.setup import Prepared, PreparedOnline
from ..models.roles import Roles
from ..train.step import learning_rate, warmup_steps
from .model import Step

Prepare = Prepared[Any] | PreparedOnline | Ready


def plan_findings(ready: Prepare, settings: Any) -> list[Finding]:
    """The findings about length, batches, learning rate and beta."""
    rows, steps, updates = sizes(ready, settings)
    found = [*_length(ready, settings, rows, steps), *_schedule(settings, updates)]
    found += [*_rate(ready.roles, settings, updates), *_beta(settings), *_unused(ready, settings)]
    return found


def sizes(ready: Prepare, settings: Any) -> tuple[int, int, int]:
    """Number of elements or prompts to train on, of steps, and of optimizer steps of the run."""
    if isinstance(ready, Prepared):
        return len(ready.train), ready.total, ready.total
    rows = len(ready.rows) if isinstance(ready, PreparedOnline) else len(ready.train)
    each = getattr(settings, "epochs", 1) * getattr(settings, "minibatches", 1)
    return rows, settings.steps, settings.steps * each


def _length(ready: Prepare, settings: Any, rows: int, steps: int) -> Iterator[Finding]:
    group = 1 if isinstance(ready, Prepared) else getattr(settings, "group_size", 1)
    batch = settings.batch_size // group
    read = min(batch, rows) if isinstance(ready, Prepared) else batch
    epochs = steps * read / rows
    what = "rows" if isinstance(ready, Prepared) else "prompts"
    numbers = {"rows": rows, "steps": steps, "epochs": epochs}
    told = f"{steps:,} steps of {read:,} {what}: {epochs:.3g} passes over {rows:,}"
    yield Finding("note", "length-of-run", told, numbers=numbers)
    if isinstance(ready, Prepared) and batch > rows:
        yield Finding(
            "warning",
            "batch-larger-than-data",
            f"--batch-size {batch} is more than the {rows} rows to train on: every step reads all "
            "of them",
            f"give a smaller batch, such as {max(1, rows // 8)}",
            numbers,
        )
    if isinstance(ready, Prepared) and epochs > 20:
        yield Finding(
            "warning",
            "many-epochs",
            f"the rows are read {epochs:.3g} times (heuristic: at most 20): they are learned by "
            "heart",
            "give fewer --steps or --epochs",
            numbers,
        )
    if isinstance(ready, Prepared) and not len(ready.held_out):
        change = "give --rows.held-out or --rows.eval-data to see overfitting"
        yield Finding("note", "nothing-held-out", "no row is kept for evaluation", change)


def _schedule(settings: Any, updates: int) -> Iterator[Finding]:
    warmup = warmup_steps(settings.optimizer, updates, 0)
    if warmup >= updates and warmup > 1:
        yield Finding(
            "warning",
            "warmup-outlasts-run",
            f"the learning rate rises over {warmup} steps and the run has {updates}: it never "
            f"reaches its peak, or only at the end",
            "lower --optimizer.warmup-steps",
            {"warmup": warmup, "updates": updates},
        )


def _rate(roles: Roles, settings: Any, updates: int) -> Iterator[Finding]:
    rate, lora = settings.learning_rate, settings.lora
    module = next(iter(roles.trained().values()))
    trained = [p for p in module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    numbers: dict[str, Any] = {"learning_rate": rate, "trained": count, "updates": updates}
    if not lora.r and (rate > 0.02 or (rate > 1e-3 and count > 2e7)):
        yield Finding(
            "warning",
            "learning-rate-high",
            f"--learning-rate {rate:g} for all {count:,} weights (heuristic: at most 0.001, and "
            "0.02 for models below 20 million): the model would be destroyed in a few steps",
            "give 1e-6 to 1e-4",
            numbers,
        )
    if lora.r and rate > 0.05:
        told = f"--learning-rate {rate:g} with adapters (heuristic: at most 0.05)"
        yield Finding("warning", "learning-rate-high", told, "give 1e-5 to 1e-3", numbers)
    if lora.r and rate <= 2e-6:
        yield Finding(
            "warning",
            "learning-rate-low",
            f"--learning-rate {rate:g} with --lora.r {lora.r} (heuristic: above 2e-6): adapters "
            "begin at 0 and need 10 to 100 times the rate of full fine-tuning",
            "give 1e-5 to 1e-3",
            numbers,
        )


def slow(step: Step, settings: Any, updates: int) -> list[Finding]:
    """Whether the loss could change at all within the run.

    AdamW moves a weight by about the learning rate in each step. So to first order the loss cannot
    fall by more than the sum of the learning rates times the sum of the gradient's absolute
    values; runs stay well below that.
    """
    o = settings.optimizer
    warmup = warmup_steps(o, updates, 0)
    some = range(0, updates, max(1, updates // 1000))
    rates = [learning_rate(i, updates, settings.learning_rate, o.schedule, warmup) for i in some]
    reach = sum(rates) * updates / len(some)
    most = reach * step.slope
    if most >= 0.01:
        return []
    return [
        Finding(
            "warning",
            "learning-rate-low",
            f"with --learning-rate {settings.learning_rate:g} the {updates:,} steps of the run "
            f"could lower the loss of the longest batch by {most:.2g} at most: nothing would be "
            "learned",
            "raise --learning-rate (small models and adapters need 10 to 1,000 times the papers' "
            "values), or give more steps",
            {"learning_rate": settings.learning_rate, "updates": updates, "most": most},
        )
    ]


def _beta(settings: Any) -> Iterator[Finding]:
    """A beta far from the usual ones, for methods that learn from rows: only theirs has a usual
    range.
    """
    beta = getattr(settings, "beta", None)
    if beta is None or (hasattr(settings, "max_new_tokens") and hasattr(settings, "reward")):
        return
    if not 0.005 <= beta <= 5:
        high = beta > 5
        yield Finding(
            "warning",
            "beta-unusual",
            f"--beta {beta:g} (heuristic: 0.01 to 1): the policy would "
            + ("hardly leave the reference" if high else "hardly be held to the reference"),
            "give 0.1 to begin with",
            {"beta": beta},
        )


def _unused(ready: Prepare, settings: Any) -> Iterator[Finding]:
    """Settings that are given and not read."""
    if isinstance(ready, PreparedOnline) and settings.rows.eval_data is not None:
        yield Finding(
            "warning",
            "eval-data-not-read",
            "--rows.eval-data is given, and this method evaluates on no rows",
            "leave it out, and measure the model with `fiducial eval`",
        )
    temperature = getattr(settings, "temperature", 1.0)
    if not 0.3 <= temperature <= 1.5:
        yield Finding(
            "warning" if temperature < 0.1 or temperature > 3 else "note",
            "temperature-unusual",
            f"--temperature {temperature:g} (heuristic: 0.3 to 1.5): responses "
            + ("hardly differ" if temperature < 1 else "are hardly the model's own"),
            "give 1",
            {"temperature": temperature},
        )
