"""The process between a run and a user's function: it starts the worker and ends it.

The keeper imports nothing of the user's. It adopts whatever the worker leaves behind, and kills the
whole family when the run has ended, when the run says so, or when the family uses too much. A
function that kills its parent kills the keeper, and the run goes on to tell it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from dataclasses import asdict, dataclass

from ..train import children

PROCESSES = 1000
"""Processes that a function may have at once; more are taken for a fork bomb. Our choice."""
GRACE = 2.0
"""Seconds that a worker has for its own exit handlers when a run has ended."""
TICK = 0.1
"""Seconds between two looks at the memory of the family."""
BYE, KILL = b"b", b"k"
"""What the run says to the keeper: the worker may end by itself, or is killed at once."""


@dataclass(frozen=True)
class End:
    """How a worker ended.

    status: as of os.waitpid, where it ended by itself. memory: bytes, where it used too much.
    processes: their number, where there were too many.
    """

    status: int | None = None
    memory: int | None = None
    processes: int | None = None


def main(channel: int, control: int, trace: int, limit: float) -> None:
    """Start the worker and keep it until it has ended; then end the whole family, itself included.

    Args:
        channel, control, trace: file descriptors: the run's requests to the worker, its words to
            this process, and the pipe for the lines at which the worker is killed.
        limit: bytes of memory of all processes of the family.
    """
    run, keeper = os.getppid(), os.getpid()
    for fd in (channel, control, trace):
        os.set_inheritable(fd, False)
    children.ignore_interrupts()
    children.adopt_orphans()
    pid = os.fork()
    if pid == 0:
        os.close(control)
        children.die_with(keeper)
        from .worker import serve

        serve(channel, trace)
    os.close(channel)
    os.close(trace)
    words = socket.socket(fileno=control)
    end = _Keeper(pid, run, words, limit).keep()
    with contextlib.suppress(OSError):  # the run has ended
        words.sendall(json.dumps(asdict(end)).encode())
    os.killpg(0, signal.SIGKILL)  # this process too; where descendants are not known, all of them


class _Keeper:
    def __init__(self, pid: int, run: int, control: socket.socket, limit: float) -> None:
        self.pid, self.run, self.control, self.limit = pid, run, control, limit
        self.status: int | None = None

    def keep(self) -> End:
        """Wait until the worker ends or has to end, and end all that is left."""
        woken, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        until = float("inf")
        excess = None
        while self.status is None and time.monotonic() < until:
            ready, _, _ = select.select([self.control, woken], [], [], TICK)
            if woken in ready:
                woken.recv(4096)
            self._reap()
            word = self.control.recv(1) if self.control in ready else None
            if word == BYE:
                until = time.monotonic() + GRACE
            elif word is not None or os.getppid() != self.run:
                until = 0.0
                self._trace(0.2 if word == KILL else 0.0)
            elif excess := self._excess():
                until = 0.0
                self._trace(0.05)
        if excess is not None:
            self.status = None
        self._kill()
        return excess or End(self.status)

    def _excess(self) -> End | None:
        family = children.descendants(os.getpid())
        if len(family) > PROCESSES:
            return End(processes=len(family))
        used = children.memory(family, self.limit)
        return End(memory=used) if used > self.limit else None

    def _trace(self, seconds: float) -> None:
        """Let the worker write down where it is."""
        if seconds and self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)
            time.sleep(seconds)

    def _kill(self) -> None:
        """Kill the family until nothing of it is left; what is born meanwhile is found too."""
        until = time.monotonic() + 10.0
        while (family := children.descendants(os.getpid())) and time.monotonic() < until:
            for pid in family:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            time.sleep(0.001)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.pid:
                    self.status = status
