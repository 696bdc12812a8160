"""Processes that end with the one that started them, and all that they have started.

This module imports nothing heavy. Where the system is not Linux, the kernel offers less: a child
then learns of its parent's end a moment later, and grandchildren that leave their group are missed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from .stopping import SIGNALS

LINUX = sys.platform == "linux"
_DEATH_SIGNAL, _SUBREAPER = 1, 36
"""Numbers of prctl(2)."""
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, whatever ended it.

    Args:
        parent: the pid of the parent, which may have ended before this call.
    """
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_with_parent() -> None:
    """In a process of multiprocessing: end when the parent ends, whatever ended it."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    assert parent is not None and parent.pid is not None, "this process was not started by another"
    die_with(parent.pid)
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    # for systems without the kernel's help
    threading.Thread(target=watch, name="parent", daemon=True).start()


def ignore_interrupts() -> None:
    """Live through the signals by which a run is asked to stop, which its children may get too: the
    run needs them until its step has ended. Processes that are forked from here act as usual.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    os.register_at_fork(after_in_child=_as_usual)


def adopt_orphans() -> None:
    """Make this process the parent of all descendants whose own parents end."""
    _prctl(_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """The pids of the children of a process, their children, and so on; [] if it is not known."""
    found: list[int] = []
    todo = [pid]
    while todo:
        new = list(_children(todo.pop()))
        found += new
        todo += new
    return found


def memory(pids: Sequence[int], limit: float) -> int:
    """The bytes of memory that processes use together; 0 if it is not known.

    Args:
        limit: memory that is shared between them is counted once only if the sum is above it,
            because to find that out takes long.
    """
    resident = sum(map(_resident, pids))
    return resident if resident <= limit else sum(map(_proportional, pids))


def machine_memory() -> int | None:
    """The bytes of memory of this machine, or of the container; None if it is not known."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * PAGE)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int(Path(path).read_text()))
    return min((n for n in found if n > 0), default=None)


def _as_usual() -> None:
    for number in SIGNALS:
        interrupt = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # a thread that has ended
                yield from map(int, _read(f"/proc/{pid}/task/{task}/children").split())


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(_read(f"/proc/{pid}/statm").split()[1]) * PAGE
    return 0


def _proportional(pid: int) -> int:
    """The memory of a process, where what n processes share counts 1/n."""
    with contextlib.suppress(OSError, StopIteration):
        lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()
        return int(next(x for x in lines if x.startswith(b"Pss:")).split()[1]) * 1024
    return _resident(pid)


def _read(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 1 << 20)
    finally:
        os.close(file)
