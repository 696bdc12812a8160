"""Bounds on the time and the memory of code that came with a model, such as its chat template.

Such code is sandboxed by whoever runs it, but a sandbox bounds neither loops nor sizes. The bounds
cost a few microseconds a call: one timer of CPU time serves all calls that follow each other.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 10.0
"""Longest that a call may take, checked about every second of CPU time. A chat template takes less
than a thousandth of it.
"""
MEMORY = 2**31
"""Bytes that a call may allocate."""
TICK = 1.0
"""Seconds of CPU time between two looks at the clock, while calls are made."""
FRESH = 0.2
"""Seconds for which the size of the process is not read again."""


class TimeUp(BaseException):
    """Raised in a call that takes too long. No handler of ordinary errors may keep it."""


def bounded(call: Callable[[], T]) -> T:
    """The result of a call.

    The time is bounded where the system has timers of CPU time, the memory on Linux.

    Raises:
        TimeUp: it took longer than SECONDS.
        MemoryError: it needed more than MEMORY.
    """
    main = threading.current_thread() is threading.main_thread()
    with _clock.running() if main and hasattr(signal, "setitimer") else _alarm():
        if _limit is None:
            return call()
        try:
            return _limit.apply(call)
        except MemoryError:
            if _limit.fresh:
                raise
        # the process has grown since its size was read
        return _limit.apply(call, again=True)


class _Clock:
    """The time of a call in the main thread, where a signal can interrupt it."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._used = self._armed = False
        self._before: Any = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._disarm)  # the signal ends a process that no longer handles it

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if not self._armed:
            self._arm()
        self._used = True
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def _arm(self) -> None:
        self._before = signal.signal(signal.SIGVTALRM, self._tick)
        signal.siginterrupt(signal.SIGVTALRM, False)
        signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
        self._armed = True

    def _tick(self, number: int, frame: FrameType | None) -> None:
        if self._began is not None:
            if time.monotonic() - self._began > SECONDS:
                raise TimeUp
        elif not self._used:  # no call since the last tick: nobody needs the timer
            self._disarm()
        self._used = False

    def _disarm(self) -> None:
        if self._armed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
            signal.signal(signal.SIGVTALRM, self._before or signal.SIG_DFL)
            self._armed = False

    def _forget(self) -> None:
        self._armed, self._began = False, None  # a forked process has no timer


class _Limit:
    """The memory of a call: a limit of the whole process while it runs."""

    def __init__(self) -> None:
        import resource

        self._resource = resource
        self._size, self._read = 0, float("-inf")
        self.fresh = False

    def apply(self, call: Callable[[], T], *, again: bool = False) -> T:
        now, resource = time.monotonic(), self._resource
        self.fresh = again or now - self._read > FRESH
        if self.fresh:
            self._size, self._read = _size_of_process(), now
        soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
        wanted = self._size + MEMORY
        if soft != resource.RLIM_INFINITY:
            wanted = min(wanted, soft)
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        try:
            return call()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """The time of a call in another thread, which is interrupted between two steps of Python."""
    me, lock, done = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(me, ctypes.py_object(TimeUp))

    timer = threading.Timer(SECONDS, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()


def _size_of_process() -> int:
    """The bytes of address space of this process."""
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(file)


_clock = _Clock()
_limit = _Limit() if os.path.exists("/proc/self/statm") else None
