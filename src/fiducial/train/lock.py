"""One process at a time in a run folder, or at a file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import InputError
from .folders import make_folder
from .processes import Processes

with contextlib.suppress(ImportError):  # Windows has none, and no lock is taken there
    import fcntl

NAME = ".lock"


class Lock:
    """A lock on a run folder or on a file that is written. The system lets go of it when the
    process ends, however it ends.
    """

    def __init__(self, out: Path) -> None:
        """Raises: InputError: another process holds it; with its pid."""
        self.path = out / NAME if out.is_dir() else out.with_name(f".{out.name}{NAME}")
        self._file: int | None = None
        if "fcntl" not in globals():
            return
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 20).decode("ascii", "replace").strip()
                os.close(file)
                raise InputError(
                    f"--out: {out} is in use by process {holder or 'unknown'}: wait for it to "
                    f"end, or choose another {'folder' if out.is_dir() else 'file'}"
                ) from None
            except OSError:  # a file system without locks
                os.close(file)
                return
            if self._is_ours(file):
                break
            os.close(file)  # whoever held it has removed it in the meantime
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def _is_ours(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go, and leave nothing behind."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def lock_together(folder: Path, processes: Processes) -> Lock | None:
    """The lock on a run folder, which the main process makes and holds.

    Raises:
        InputError: the folder cannot be made, or another run holds it; on every process.
    """
    lock, refused = None, ""
    if processes.main:
        try:
            make_folder(folder)
            lock = Lock(folder)
        except InputError as error:
            refused = str(error)
    if said := [text for text in processes.gather([refused]) if text]:
        raise InputError(said[0])
    return lock
