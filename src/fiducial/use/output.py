"""Files of rows that are written block by block, and gone on with where they stopped.

Beside an unfinished file stands `<file>.progress.jsonl`. Its first line holds the settings and the
SHA-256 of what they name. Every further line follows a block of prompts whose rows are on the disk:
the number of prompts that are done, the length and SHA-256 of the file so far, and the counts.
Whatever stops a command, the last whole line is true: what stands in the file after it is cut off,
and the work goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ..errors import InputError, RunError
from ..names import printable, progress_file, shortened
from ..train.folders import make_folder, new_file
from ..train.inputs import hashes
from ..train.lock import Lock
from ..train.processes import Processes
from ..train.progress import say
from ..train.stopping import Stopping
from .answering import Model

FREE = {"out", "resume", "worker", "trust_remote_code"}
"""Settings that may differ when a file is gone on with, because no row depends on them."""


class WritingSettings(Protocol):
    """What the settings of every verb that writes rows have."""

    @property
    def out(self) -> str | None: ...

    @property
    def resume(self) -> bool: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class Output:
    """Where the rows of one command go: a new file, an unfinished one, or the terminal.

    Use it as a context around everything that the command does.

    prompts: number of prompts whose rows are written. counts: the command's own counts so far.
    added: what each block that was written before gave to `add` as `more`.
    """

    def __init__(
        self, verb: str, settings: WritingSettings, processes: Processes, suffix: str = ".jsonl"
    ) -> None:
        self.verb, self.settings, self.processes, self.suffix = verb, settings, processes, suffix
        self.path = None if settings.out is None else Path(settings.out)
        self.prompts = self.total = 0
        self.counts: dict[str, int] = {}
        self.added: list[Any] = []
        self._head: dict[str, Any] = {}
        self._begun, self._bytes, self._told = False, 0, 0
        self._lock: Lock | None = None
        self._digest = hashlib.sha256()
        self._stopping = Stopping(
            say if processes.main else lambda text: None,
            "this block of prompts",
            "what came after the last one",
        )

    def __enter__(self) -> Output:
        """Raises: InputError: the file exists already, is unfinished and shall not be gone on with,
        or cannot be gone on with; or another process writes it.
        """
        state: tuple[Any, ...] | None = None
        refused: str | None = None
        if self.processes.main:
            try:
                state = self._opened()
            except InputError as error:
                refused = str(error)
        ((state, refused), *_) = self.processes.gather([(state, refused)])
        if refused is not None:
            self._release()
            raise InputError(refused)
        if state is not None:
            self._head, self.prompts, self.counts, self.added = state
        return self

    def _opened(self) -> tuple[Any, ...] | None:
        """What is known of an unfinished file; None for a new one, or for the terminal."""
        if self.path is None:
            if self.settings.resume:
                raise InputError("--resume needs --out: what was printed cannot be gone on with")
            return None
        progress = progress_file(self.path)
        if not self.settings.resume:
            if progress.exists():
                raise InputError(
                    f"--out: {self.path} is unfinished: go on with --resume, or choose another "
                    f"file, or remove it and {progress.name}"
                )
            new_file(str(self.path), self.suffix)
        elif not progress.exists():
            what = "is finished" if self.path.exists() else "does not exist"
            raise InputError(
                f"--resume: {self.path} {what} (there is no {progress.name} beside it): leave "
                "--resume out, and choose a new file"
            )
        make_folder(self.path.parent)
        self._lock = Lock(self.path)
        return self._read(self.path, progress) if self.settings.resume else None

    def _read(self, path: Path, progress: Path) -> tuple[Any, ...]:
        """The settings and counts of an unfinished file, as the newest line tells that is true."""
        try:
            lines = progress.read_bytes().splitlines(keepends=True)
            blocks = [json.loads(line) for line in lines if line.endswith(b"\n")]
            head, before = blocks[0], blocks[0]["settings"]
            there = path.stat().st_size if path.exists() else 0
            blocks = [b for b in blocks[1:] if b["bytes"] <= there]
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(
                f"--resume: {progress} cannot be read or is damaged, so it is not known how far "
                f"{path.name} is: remove both, or choose another --out"
            ) from error
        now = self.settings.model_dump(mode="json")
        differ = [k for k in now if k not in FREE and before.get(k) != now[k]]
        if differ:
            raise InputError(
                f"--resume: {', '.join(differ)} differ from what {path} was begun with: leave "
                "these flags out, or choose another --out"
            )
        nothing: dict[str, Any] = {"bytes": 0, "prompts": 0, "counts": {}}
        last = blocks[-1] if blocks else nothing
        self._bytes = last["bytes"]
        self._told = sum(map(len, lines[: 1 + len(blocks)]))
        if self._bytes:
            with open(path, "rb") as file:
                while part := file.read(min(2**20, self._bytes - file.tell())):
                    self._digest.update(part)
            if self._digest.hexdigest() != last["sha256"]:
                raise InputError(
                    f"--resume: the rows in {path} were changed since they were written: put the "
                    "file back as it was, or choose another --out"
                )
        return head, last["prompts"], last["counts"], [b["more"] for b in blocks]

    def begin(self, model: Model, names: Mapping[str, str | None]) -> None:
        """Everything is loaded: from here on a signal ends the block that is being made.

        Args:
            names: what is read from other files, by the flag that names it.

        Raises:
            InputError: something that the rows depend on has changed since the file was begun.
        """
        self.total = len(model.rows)
        refused = None
        if self.processes.main and self.path is not None:
            try:
                self._begin(self.path, model, names)
            except InputError as error:
                refused = str(error)
            except OSError as error:
                refused = f"--out: {self.path} cannot be written: {error.strerror}"
        if said := self.processes.gather([refused])[0]:
            raise InputError(said)
        self._begun = True
        self._stopping.__enter__()

    def _begin(self, path: Path, model: Model, names: Mapping[str, str | None]) -> None:
        found: dict[str, str | None] = hashes(names)
        tokens = hashlib.sha256(json.dumps(model.ids).encode()).hexdigest()
        found |= {"the tokens of --prompts": tokens}
        progress = progress_file(path)
        if not self.settings.resume:
            self._head = {
                "verb": self.verb,
                "settings": self.settings.model_dump(mode="json"),
                "inputs": found,
            }
            progress.touch()  # first: a file without it counts as finished
            path.touch()
            self._append(progress, _line(self._head))
            return
        changed = [name for name in found if self._head["inputs"].get(name) != found[name]]
        if changed:
            raise InputError(
                f"--resume: {changed[0]} is not what {path} was begun with, its content has "
                "changed: put it back as it was, or choose another --out"
            )
        path.touch()
        os.truncate(path, self._bytes)
        os.truncate(progress, self._told)
        say(f"going on with {path} after {self.prompts:,} of {self.total:,} prompts")

    def add(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: int,
        counts: Mapping[str, int],
        more: Any = None,
    ) -> None:
        """Write the rows of a block.

        Args:
            prompts: number of prompts that are done now. counts: of all blocks until now.
            more: what the command wants to find again in `added`.

        Raises:
            RunError: the file cannot be written, or a signal asked to stop.
        """
        data = b"".join(_line(row) for row in rows)
        if self.processes.main and self.path is None:
            print(printable(data.decode()), end="", file=sys.stdout)  # still JSON, and the same
        elif self.processes.main and self.path is not None:
            self._bytes += len(data)
            self._digest.update(data)
            told = {"prompts": prompts, "bytes": self._bytes, "sha256": self._digest.hexdigest()}
            try:
                self._append(self.path, data)
                self._append(
                    progress_file(self.path), _line(told | {"counts": dict(counts), "more": more})
                )
            except OSError as error:
                raise RunError(
                    f"{shortened(self.path)} cannot be written: {error.strerror}"
                ) from error
        self.prompts = prompts
        if self.processes.any(self._stopping.wanted) and prompts < self.total:
            raise RunError("stopped")

    @staticmethod
    def _append(path: Path, data: bytes) -> None:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._begun:
            self._stopping.__exit__()
        try:
            self._close(error)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _close(self, error: BaseException | None) -> None:
        """Say what a failed command has written; leave nothing where it has written nothing."""
        if self.path is None or not self._begun:
            return
        nothing = not self.prompts or (isinstance(error, InputError) and not self._bytes)
        if error is None or nothing:
            if self.processes.main:
                with contextlib.suppress(OSError):  # then it can be gone on with, and ends at once
                    if error is not None:
                        self.path.unlink(missing_ok=True)
                    progress_file(self.path).unlink(missing_ok=True)
            return
        kept = (
            f"the rows of the first {self.prompts:,} of {self.total:,} prompts are safe in "
            f"{self.path}; go on with: fiducial {self.verb} --out {self.path} --resume"
        )
        if isinstance(error, RunError):
            raise RunError(f"{error}; {kept}") from error
        if self.processes.main:
            say(kept)


def read_from(settings: Any) -> dict[str, str | None]:
    """What a verb reads beside its judge, by flag: the model, the prompts, and a chat template."""
    return {
        "--model": settings.model,
        "--prompts": settings.prompts,
        "--rows.chat-template": settings.rows.chat_template,
    }


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
