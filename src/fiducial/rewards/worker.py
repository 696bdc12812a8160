"""The process in which a user's function runs. It imports nothing heavy that the user's file does
not import.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import pickle
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from ..train.children import ignore_interrupts
from .calling import Takes, file_of, load_function, told
from .questions import Question, begin, ended, read
from .values import among

HEAD = struct.Struct("!QQ")
"""In front of every message: its number, and its length in bytes."""
TRACE = 20_000
"""Characters of a traceback that the run is told."""


def serve(channel: int, trace: int) -> None:
    """Answer the run's requests until it closes the channel.

    Args:
        channel: the socket. Requests are pickled: the name of a function and its flag, or a
            Question. Replies are JSON, because nothing that a function returns is to be run.
        trace: a pipe for the line at which the process crashes or is killed.
    """
    me = os.getpid()
    with contextlib.suppress(OSError):  # where memory runs out, this process ends before the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    ignore_interrupts()
    faulthandler.enable(file=trace)
    faulthandler.register(signal.SIGUSR1, file=trace, all_threads=True)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    connection = socket.socket(fileno=channel)
    answer = _Function().answer
    send(connection, 0, b"{}")  # ready: from here on it is the function that takes time
    while (frame := receive(connection)) is not None:
        number, body = frame
        reply = answer(body)
        if os.getpid() != me:
            os._exit(0)  # a process that the function forked and that came back here
        send(connection, number, json.dumps(reply).encode())
    atexit._run_exitfuncs()
    _flush()
    os._exit(0)  # threads that never end are not waited for


def send(connection: socket.socket, number: int, body: bytes) -> None:
    """Write a message."""
    connection.sendall(HEAD.pack(number, len(body)))
    connection.sendall(body)


def receive(
    connection: socket.socket, until: float | None = None, longest: int = 1 << 62
) -> tuple[int, bytes] | None:
    """Read a message with its number; None where the other side has closed.

    Args:
        until: by time.monotonic, when to stop waiting; None waits for ever. longest: bytes.

    Raises:
        TimeoutError: the message was not there in time.
        ValueError: it would be longer.
    """
    head = _exactly(connection, HEAD.size, until)
    if head is None:
        return None
    number, length = HEAD.unpack(head)
    if length > longest:
        raise ValueError(f"a message of {length} bytes")
    body = _exactly(connection, length, until)
    return None if body is None else (number, body)


def _exactly(connection: socket.socket, size: int, until: float | None) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        if until is not None:
            connection.settimeout(max(until - time.monotonic(), 0.001))
        piece = connection.recv(min(size - len(found), 1 << 20))
        if not piece:
            return None
        found += piece
    return bytes(found)


class _Function:
    """The function, once it is loaded."""

    def __init__(self) -> None:
        self.function: Callable[..., Any] | None = None
        self.takes: Takes | None = None

    def answer(self, body: bytes) -> dict[str, Any]:
        who = "the question"
        try:
            request: tuple[str, str] | Question = pickle.loads(body)
            if isinstance(request, Question):
                who = among(request.where) + request.who
            else:
                who = f"{request[1]}: {request[0]}"
            if isinstance(request, tuple):
                return self._load(*request)
            assert self.function is not None and self.takes is not None
            (asked,) = ended([begin(self.function, self.takes, request)])
            return asdict(read(self.function, request, asked))
        except (InputError, RunError) as error:
            return {"failed": str(error), "trace": _trace(error.__cause__)}
        except BaseException as error:  # of an object that was given or returned
            failed = f"{who} raised {told(error, self.function)}"
            return {"failed": failed, "trace": _trace(error)}
        finally:
            _flush()

    def _load(self, name: str, flag: str) -> dict[str, Any]:
        self.function = load_function(name, flag)
        self.takes = Takes.of(self.function, name, flag)
        parts = self.takes
        return {
            "names": sorted(parts.names),
            "required": parts.required,
            "everything": parts.everything,
            "file": file_of(self.function),
        }


def _trace(error: BaseException | None) -> str:
    """The traceback of the user's error, for --debug."""
    lines = traceback.format_exception(error) if error is not None else []
    return "".join(lines)[-TRACE:]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user's code may have closed or replaced it
            stream.flush()
