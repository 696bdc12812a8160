"""Errors of a disk in one sentence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import RunError
from .progress import say

REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space of your quota",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "give yourself the right to write there",
    errno.EPERM: "give yourself the right to write there",
}
WRITERS = ("PytorchStreamWriter", "inline_container", "File too large", "No space left")
"""What torch's own writer says of a disk, in errors that are of no kind."""


def is_of_disk(error: BaseException) -> bool:
    """Whether an error is the disk's: of the system, of safetensors, or of torch's writer."""
    return isinstance(error, OSError | SafetensorError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in WRITERS)
    )


def told(error: BaseException, path: Path) -> str:
    """What happened to a path, and the remedy where one is known."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    remedy = REMEDY.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    return f"{path} cannot be written: {why}" + (remedy and f": {remedy}")


@contextlib.contextmanager
def explained(path: Path, safe: str = "") -> Iterator[None]:
    """Errors of the disk in the block become a RunError.

    Args:
        safe: what is not lost, and how to go on.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RunError) or not is_of_disk(error):
            raise
        raise RunError(told(error, path) + (safe and f"; {safe}")) from error


@contextlib.contextmanager
def unimportant(what: str, folder: Path) -> Iterator[None]:
    """What fails in the block is said, and fails no run: all that was trained is saved."""
    try:
        yield
    except Exception as error:
        say(
            f"{what} of {folder} could not be written: {error}; the run itself is whole, and "
            f"fiducial report {folder} writes its page again"
        )
