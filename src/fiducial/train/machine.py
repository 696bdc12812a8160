"""The machine that a run is on, and the command that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

LATER = 40 * 2**20
"""Bytes of code and buffers of libraries that come with their first use. Measured on Linux."""
WORKSPACES = 64 * 2**20
"""Bytes that cuBLAS and its kin take from PyTorch's allocator for themselves."""
M_MMAP_THRESHOLD = -3
"""glibc's name of the size from which a block is mapped by itself (malloc.h)."""


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


def resident_memory(device: torch.device) -> int:
    """Bytes that are in use now: of the accelerator, with the work spaces of its libraries, or of
    this process.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device)) + WORKSPACES
    return int(psutil.Process().memory_info().rss) + LATER


def available_memory(device: torch.device) -> int:
    """Bytes that this process may use in all: what it uses now, and its share of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(torch.cuda.memory_reserved(device) + free)
    free = min(int(psutil.virtual_memory().available), _free_in_groups())
    return resident_memory(device) - LATER + free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_groups(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the control groups of this process (containers have them) leave it."""
    free = sys.maxsize
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = root / next(x for x in lines if x.startswith("0::")).removeprefix("0::").lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                free = min(free, free_in_group(folder))
    return free


def free_in_group(folder: Path) -> int:
    """Bytes that a control group (version 2) leaves; files it has cached can be dropped."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the root group has no limit
        return sys.maxsize
    if limit == "max":
        return sys.maxsize
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


def return_freed_memory() -> None:
    """From here on, large blocks that are freed go back to the system at once.

    The C library of Linux keeps them for later, and finds no place in them for blocks that are
    aligned as tensors are: a process then holds up to twice what its tensors need. Giving them back
    costs some time, because memory is cleared whenever it is taken anew.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 128 * 1024)
        library.malloc_trim(0)


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
