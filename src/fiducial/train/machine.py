"""The machine that a run is on, and the command that started it."""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Largest memory since `reset_peak_memory`, in bytes.

    It is the accelerator's where there is one, else that of this process.
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
    """Measure from here, so that several runs in one process each get a peak of their own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def describe(device: torch.device) -> str:
    """Processor, threads and device in one line."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a result."""
    packages = ("fiducial", "torch", "transformers")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def command_line() -> str:
    """The command as it was typed."""
    if Path(sys.argv[0]).name.startswith(("fiducial", "__main__")):
        return shlex.join(["fiducial", *sys.argv[1:]])
    return shlex.join(sys.argv)
