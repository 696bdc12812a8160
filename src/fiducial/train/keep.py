"""Saving and restoring the state of a run, by all of its processes together."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load
from torch import nn

from ..errors import InputError, RunError
from ..models.weights import is_finite
from . import checkpoint
from .disk import is_of_disk, told
from .processes import Processes
from .progress import say


class Clock:
    """Says when a checkpoint is due by time, the same on every process."""

    def __init__(self, minutes: float, processes: Processes) -> None:
        """minutes: between checkpoints; 0: never by time."""
        self.seconds, self.processes = minutes * 60, processes
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether so much time has passed since the last checkpoint."""
        late = self.processes.main and time.monotonic() - self.saved >= self.seconds > 0
        return self.processes.any(late)


def save(
    folder: Path, step: int, counters: Callable[[], dict[str, Any]], keep: int, run: Processes
) -> None:
    """A checkpoint of everything that was prepared and of `counters`, whole or not at all.

    Args:
        folder: of the checkpoints. counters: plain values; only the main process's are kept.
        keep: number of recent checkpoints that stay.

    Raises:
        RunError: weights or an optimizer's state are not finite, or the disk refuses; on every
            process. The older checkpoints stay.
    """
    aside, final = folder / f".aside-{step}", folder / f"checkpoint-{step}"
    refuse_nonfinite(step, run)

    def begin() -> None:
        if run.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> None:
        run.accelerator.save_state(str(aside))

    def publish() -> None:
        if run.main:
            checkpoint.write_json(aside / checkpoint.COUNTERS, counters())
            checkpoint.seal(aside)
            checkpoint.publish(aside, final, keep)

    try:
        for part in (begin, write, publish):
            together(run, part, final)
    except RunError:
        if run.main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def together(run: Processes, part: Callable[[], None], path: Path) -> None:
    """Do what writes to a path; where one process cannot, none goes on.

    Raises:
        RunError: the disk refuses; on every process.
    """
    fault = ""
    try:
        part()
    except Exception as error:
        if not is_of_disk(error):
            raise
        fault = told(error, path)
    if faults := [text for text in run.gather([fault]) if text]:
        raise RunError(faults[0])


def newest(folder: Path) -> str:
    """Which checkpoint is safe, in words."""
    there = checkpoint.numbered(folder)
    return f"{there[-1]} is safe" if there else "there is no checkpoint yet"


def refuse_nonfinite(step: int, run: Processes) -> None:
    """Nothing that is not finite is saved.

    Raises:
        RunError: names the first tensor; on every process.
    """
    bad = ""
    for number, module in enumerate(run.accelerator._models):
        bad = bad or _first_bad(module) or ""
        state = run.accelerator._optimizers[number].state if not bad else {}
        if any(not _finite(x) for one in state.values() for x in one.values()):
            bad = "the optimizer's state"
    found = [text for text in run.gather([bad]) if text]
    if found:
        raise RunError(
            f"step {step}: {found[0]} is no longer finite, so nothing of it is saved: lower "
            "--learning-rate"
        )


def _first_bad(module: nn.Module) -> str | None:
    for name, weight in module.named_parameters():
        if weight.requires_grad and not is_finite(weight):
            return f"the weight {name.removeprefix('module.')}"
    return None


@torch.no_grad()
def _finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).all())


def restore(run_folder: Path, run: Processes) -> dict[str, Any] | None:
    """Load the newest good checkpoint.

    Returns:
        its counters; None where there is none yet, and the run starts from the beginning.

    Raises:
        InputError: every checkpoint is damaged, or the run is finished and kept none.
    """
    folder = run_folder / "checkpoints"
    good, faults = checkpoint.newest_good(folder)
    if run.main:
        for line in faults:
            say(f"passed over: {line}")
    if good is None:
        if faults:
            raise InputError(f"--resume: no whole checkpoint in {folder}: {faults[0]}")
        if (run_folder / "model").exists():
            raise InputError(
                f"--resume: {run_folder} is finished and kept no checkpoint to go on from: start "
                f"a new run with --model {run_folder / 'model'}"
            )
        if run.main:
            say(f"{run_folder} has no checkpoint yet: starting from the beginning")
        return None
    load_state(good, run)
    counters: dict[str, Any] = json.loads((good / checkpoint.COUNTERS).read_text())
    if run.main:
        say(f"resumed from {good}")
    return counters


def load_state(folder: Path, run: Processes) -> None:
    """Load what `Accelerator.save_state` wrote: modules, optimizers and random states. Of the
    pickles among these files only tensors and plain values are read, so no file can run code.

    Raises:
        InputError: a file holds something else, or a random state cannot be restored.
    """
    states = folder / f"random_states_{run.index}.pkl"
    try:
        run.accelerator.load_state(str(folder))
        # Accelerate passes over random states that it cannot load
        known = load(states) if states.exists() else None  # more processes than there were
    except pickle.UnpicklingError as error:
        raise InputError(
            f"--resume: a file of {folder} holds something other than tensors and plain values, "
            f"and reading it could run code ({str(error).split(chr(10))[0][:120]}): remove this "
            "checkpoint if you do not know where it comes from"
        ) from error
    if known is not None and not torch.equal(known["torch_manual_seed"], torch.get_rng_state()):
        raise InputError(
            f"--resume: the random state in {states} cannot be restored: remove this checkpoint, "
            "and the one before it is used"
        )
