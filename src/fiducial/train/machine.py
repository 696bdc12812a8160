"""The machine that a run is on, and the command that started it."""

from __future__ import annotations

import contextlib
import platform
import random
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


def peak_memory(device: torch.device) -> int:
    """The largest amount of memory in use since `reset_peak_memory`, in bytes.

    It is the memory of the accelerator, or of this process if there is no accelerator.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak_memory() -> None:
    """Begins a new measurement, so that each of several runs in one process has its own peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; Linux only


def tokens_in_a_minute(module: torch.nn.Module) -> int:
    """About how many tokens a model reads or samples in a minute, at least.

    Two operations per weight and token, and 5e10 of them per second on a processor, 3e13 on an
    accelerator: our estimate. It is not measured, so that work that is cut by it is cut in the same
    places whenever it is done.
    """
    device = next(module.parameters()).device
    weights = sum(p.numel() for p in module.parameters())
    return max(1, int(60 * (5e10 if device.type == "cpu" else 3e13) / (2 * max(1, weights))))


def describe(device: torch.device) -> str:
    """Processor, threads and device in one line."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    packages = ("fiducial", "torch", "transformers")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def command_line() -> str:
    """The command as it was typed."""
    if Path(sys.argv[0]).name.startswith(("fiducial", "__main__")):
        return shlex.join(["fiducial", *sys.argv[1:]])
    return shlex.join(sys.argv)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
