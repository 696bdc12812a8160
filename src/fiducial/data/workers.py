"""Rows of a large source, rendered by several processes.

The result is the same for any number of them: a chunk of rows is rendered by one process as it
would be here, and chunks are taken in the order of the source.

A process is a new Python that reads work from its standard input and writes chunks to its standard
output. It is not forked, because this process may have threads (of torch, of the tokenizer) that do
not survive that, and the user's script is not imported again. It ends when its input does, and so
with the process that started it, whatever ended that one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from typing import IO, Any

from ..errors import InputError, RunError
from .chunks import Chunk, Work
from .record import Record

FEW = 16_000
"""Rows that are rendered here before other processes are started, which takes about a second."""
READY = b"ready"
MOST = 16
"""Processes; more of them would wait for this one, which reads the source."""


def processors() -> int:
    """Processors for each process of this run on this machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    together = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, here // max(1, int(together) if together.isdecimal() else 1))


def rendered(
    work: Work, chunks: Iterator[list[Record] | InputError], count: int | None = None
) -> Generator[Chunk, None, None]:
    """What becomes of the chunks, in their order.

    Args:
        count: number of processes that share the work; 1: this one alone. None: as many as there
            are processors.

    Raises:
        InputError: the source cannot be read further; after all chunks before the fault.
        RunError: one of the processes ended.
    """
    count = min(MOST, processors() if count is None else count)
    rows = 0
    for chunk in chunks:
        if isinstance(chunk, InputError):
            raise chunk
        yield work.chunk(chunk)
        rows += len(chunk)
        if rows >= FEW and count > 1:
            break
    else:
        return
    workers = _started(work, count)
    try:
        yield from _shared(workers, chunks) if workers else _alone(work, chunks)
    finally:
        for worker in workers:
            worker.end()


def _alone(work: Work, chunks: Iterator[list[Record] | InputError]) -> Iterator[Chunk]:
    for chunk in chunks:
        if isinstance(chunk, InputError):
            raise chunk
        yield work.chunk(chunk)


def _started(work: Work, count: int) -> list[_Worker]:
    """Processes that know the work; none if they cannot be started, or if a tokenizer or a function
    is not known elsewhere, as those of the user's own script are not.
    """
    workers, knowing = list[_Worker](), 0
    try:
        message = pickle.dumps(work, pickle.HIGHEST_PROTOCOL)
        workers += [_Worker() for _ in range(count)]
    except Exception:
        return []
    try:
        for worker in workers:
            worker.write(message)
        knowing = sum(worker.ready() for worker in workers)
    finally:
        if knowing < count:
            for worker in workers:
                worker.end()
    return workers if knowing == count else []


def _shared(workers: list[_Worker], chunks: Iterator[list[Record] | InputError]) -> Iterator[Chunk]:
    busy: deque[_Worker] = deque()
    fault: InputError | None = None
    for chunk in chunks:
        if isinstance(chunk, InputError):
            fault = chunk
            break
        # a worker is sent a chunk only after its last result was read: neither waits for ever
        # for the other to read
        if len(busy) == len(workers):
            worker = busy.popleft()
            yield worker.result()
        else:
            worker = workers[len(busy)]
        worker.send(chunk)
        busy.append(worker)
    for worker in busy:
        yield worker.result()
    if fault is not None:
        raise fault


class _Worker:
    """One of the processes."""

    def __init__(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def ready(self) -> bool:
        """Whether it knows the work."""
        message = _read(self._output)
        if message is None:
            raise self._ended()
        return message == READY

    def send(self, chunk: list[Record]) -> None:
        self.write(pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL))

    def result(self) -> Chunk:
        message = _read(self._output)
        if message is None:
            raise self._ended()
        found: Chunk | str = pickle.loads(message)
        if isinstance(found, str):
            raise RuntimeError(f"a process that renders rows failed:\n{found}")
        return found

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):
                pipe.close()

    def write(self, message: bytes) -> None:
        """Send bytes.

        Raises:
            RunError: it has ended.
        """
        try:
            _write(self._input, message)
        except OSError as error:
            raise self._ended() from error

    def _ended(self) -> RunError:
        return RunError(
            f"a process that renders rows ended (exit code {self._process.wait()}), perhaps for "
            "lack of memory; make memory free and run the command again"
        )


def serve() -> None:
    """The life of a worker: read the work and then chunks, until the input ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # for the process that started this one
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here does not get among the results
    try:
        work: Any = pickle.loads(_read(source) or b"")
        _write(sink, READY)
    except Exception:
        _write(sink, b"")
    while (message := _read(source)) is not None:
        try:
            found: Chunk | str = work.chunk(pickle.loads(message))
        except Exception:
            found = traceback.format_exc()
        try:
            _write(sink, pickle.dumps(found, pickle.HIGHEST_PROTOCOL))
        except OSError:  # nobody reads it any more
            break
    os._exit(0)  # the sink must not be flushed again


def _write(file: IO[bytes], message: bytes) -> None:
    file.write(len(message).to_bytes(8, "little"))
    file.write(message)
    file.flush()


def _read(file: IO[bytes]) -> bytes | None:
    """The next message; None at the end."""
    head = file.read(8)
    if len(head) < 8:
        return None
    message = file.read(int.from_bytes(head, "little"))
    return message if len(message) == int.from_bytes(head, "little") else None
