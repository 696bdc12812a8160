"""A worker process as the run sees it: started, asked, watched, and ended."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..settings import WorkerSettings
from ..train.children import machine_memory
from .keeper import BYE, GRACE, KILL, PROCESSES, End
from .worker import receive, send

SHOWN = 64 * 1024
"""Bytes that a function may print in one call; the rest is dropped. Our choice."""
BEGINNING = 60.0
"""Seconds within which a worker is ready to load a function, on a busy machine too."""
REPLY = 1 << 30
"""Bytes of a reply, far more than scores and columns need; more is no reply."""
MAIN = "from fiducial.rewards.keeper import main; main(*a)"
START = f"import sys; a = eval(sys.argv.pop()); sys.path[:] = a.pop(); {MAIN}"
"""Nothing is imported before the path is set: the folder may hold a file json.py."""
_FRAME = re.compile(r'^  File "(.*)", line (\d+)', re.MULTILINE)


class Stopped(Exception):
    """A worker is gone: it ended, or was stopped."""

    def __init__(self, end: End | None, settings: WorkerSettings, trace: str, limit: float) -> None:
        """end: None where the time was up."""
        self.end, self.settings, self.trace, self.limit = end, settings, trace, limit

    @property
    def kind(self) -> str:
        """Equal for workers that ended in the same way."""
        if self.end is None:
            return "time"
        return f"{self.end.status} {self.end.memory is None} {self.end.processes is None}"

    def sentence(self, file: str | None) -> str:
        """What happened, with the line of the function's file where it happened, and the remedy."""
        at = self._place(file)
        if self.end is None:
            return (
                f"did not return within {self.settings.seconds:g} s and was stopped{at}: mend it, "
                "or raise --worker.seconds"
            )
        if self.end.memory is not None:
            return (
                f"used {self.end.memory / 1e9:.3g} GB of memory, more than the "
                f"{self.limit / 1e9:.3g} GB that it may, and was stopped{at}: mend it, or raise "
                "--worker.gigabytes"
            )
        if self.end.processes is not None:
            return (
                f"had {self.end.processes:,} processes at once and was stopped{at}: at most "
                f"{PROCESSES:,} are allowed"
            )
        if self.end.status is None:
            return (
                "broke the connection to its own process: it must leave alone its parent, its "
                "process group, and file descriptors that it did not open"
            )
        if os.WIFEXITED(self.end.status):
            code = os.WEXITSTATUS(self.end.status)
            return f"ended its own process with exit code {code}{at}: it must return instead"
        number = os.WTERMSIG(self.end.status)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"crashed: its process was ended by the signal {name}{hint}{at}"

    def _place(self, file: str | None) -> str:
        """The deepest line of the function's file, of the frames that were written at the end."""
        if file is None:
            return ""
        written = file.encode("ascii", "backslashreplace").decode()
        lines = [n for name, n in _FRAME.findall(self.trace) if name == written]
        return f" ({Path(file).name}:{lines[0]})" if lines else ""


class Worker:
    """A worker process with its keeper. It is gone when this object is."""

    def __init__(self, settings: WorkerSettings, title: str) -> None:
        """
        Args:
            title: names the function, where it prints too much.

        Raises:
            Stopped: the process did not begin to work.
        """
        self.settings = settings
        memory = machine_memory() or float("inf")
        given = settings.gigabytes
        self.limit = memory / 2 if given is None else given * 1e9
        self._number, self._until = 0, 0.0
        self._channel, channel = socket.socketpair()
        self._control, control = socket.socketpair()
        self._trace, trace = os.pipe()
        out, printed = os.pipe()
        fds = channel.fileno(), control.fileno(), trace
        path = [p for p in sys.path if isinstance(p, str)]
        words = [*fds, min(self.limit, 2.0**62), path]
        keeper = subprocess.Popen(
            [sys.executable, "-c", START, ascii(words)],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            pass_fds=fds,
            start_new_session=True,
        )
        channel.close()
        control.close()
        os.close(trace)
        os.close(printed)
        self._output = Output(out, title)
        self.close = weakref.finalize(
            self,
            _close,
            keeper,
            self._channel,
            self._control,
            self._trace,
            self._output,
            os.getpid(),
        )
        self._until = time.monotonic() + BEGINNING
        self.reply()

    def request(self, message: object, seconds: float) -> None:
        """Send a question, or the name and the flag of a function to load.

        Args:
            seconds: within which `reply` expects the answer.

        Raises:
            RunError: the rows hold objects that no other process can be given.
        """
        try:
            body = pickle.dumps(message)
        except Exception as error:
            raise RunError(
                f"the rows cannot be given to a function in a process of its own ({error}): give "
                "--worker.in-process"
            ) from error
        self._output.left = SHOWN
        self._number += 1
        self._until = time.monotonic() + seconds
        self._channel.settimeout(max(seconds, 0.01))
        with contextlib.suppress(OSError):  # it is gone, or does not read: `reply` says which
            send(self._channel, self._number, body)

    def reply(self) -> dict[str, Any]:
        """The reply to the last request.

        Raises:
            Stopped: there is none, and the worker is gone.
        """
        # a second wait behind that for another function: what has come by then is read
        until = max(self._until, time.monotonic() + 0.1)
        late = False
        try:
            while (frame := receive(self._channel, until, REPLY)) is not None:
                if frame[0] == self._number:
                    self._output.settle()
                    found: dict[str, Any] = json.loads(frame[1])
                    return found
        except TimeoutError:
            late = True
        except (OSError, ValueError):
            pass
        end, trace = self._stop(late), self._read_trace()
        self.kill()
        late = late and end.memory is None and end.processes is None
        raise Stopped(None if late else end, self.settings, trace, self.limit)

    def kill(self) -> None:
        """End the worker and all its processes at once."""
        with contextlib.suppress(OSError):
            self._control.sendall(KILL)
        self.close()

    def _stop(self, late: bool) -> End:
        """How the worker ended; if it is there still, it is killed."""
        if late:
            with contextlib.suppress(OSError):
                self._control.sendall(KILL)
        self._control.settimeout(15.0 if late else 1.0)
        with contextlib.suppress(OSError, ValueError, TypeError):
            return End(**json.loads(self._control.recv(4096)))
        return End()

    def _read_trace(self) -> str:
        os.set_blocking(self._trace, False)
        with contextlib.suppress(BlockingIOError):
            return os.read(self._trace, 1 << 16).decode("ascii", "replace")
        return ""


class Output:
    """Shows what a worker prints, up to a number of bytes, so that no flood of it fills anything.

    left: bytes that are still shown.
    """

    def __init__(self, fd: int, title: str) -> None:
        self.left, self._title, self._fd, self._open = SHOWN, title, fd, True
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="output", daemon=True)
        self.thread.start()

    def settle(self) -> None:
        """Wait until all that was printed so far is shown; for a short time at most."""
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            with self._lock:
                if not self._open or not _readable(self._fd, 0):
                    return
            time.sleep(0.0005)

    def _run(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while self._open:
            _readable(self._fd, None)
            with self._lock:
                piece = os.read(self._fd, 1 << 16)
                if not piece:
                    self._open = False
                    os.close(self._fd)
                elif self.left > 0:
                    self._show(decoder.decode(piece[: self.left]))
                    self.left -= len(piece)
                    if self.left <= 0:
                        self._show(
                            f"\n{self._title} printed more than {SHOWN:,} bytes in one call: the "
                            "rest is not shown\n"
                        )

    def _show(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            sys.stderr.write(text)
            sys.stderr.flush()


def _readable(fd: int, milliseconds: int | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(milliseconds))


def _close(
    keeper: subprocess.Popen[bytes],
    channel: socket.socket,
    control: socket.socket,
    trace: int,
    output: Output,
    owner: int,
) -> None:
    """End a worker: it may run its exit handlers; whatever is left of its group is killed."""
    if os.getpid() != owner:  # a process that was forked from the run: the worker is not its own
        return
    with contextlib.suppress(OSError):
        control.sendall(BYE)
    channel.close()
    try:
        keeper.wait(GRACE + 2.0)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
    with contextlib.suppress(OSError):
        os.killpg(keeper.pid, signal.SIGKILL)
    control.close()
    os.close(trace)
    with contextlib.suppress(RuntimeError):
        output.thread.join(1.0)
