"""Files and folders that commands write to, and the records that a resumed run cuts back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from ..errors import InputError
from ..names import shortened
from .checkpoint import write_bytes

NOTHING = {".lock", "config.yaml.aside"}
"""What a run leaves that was killed before it had begun."""


def open_folder(out: str | None, default: str, resume: bool) -> Path:
    """The folder of a command that makes several runs.

    It is `out`, or else the first of default, default-2, ... that does not exist.

    Raises:
        InputError: it holds something and `resume` is false, or it cannot be made.
    """
    number, path = 1, Path(out or default)
    while out is None and path.exists():
        number += 1
        path = Path(f"{default}-{number}")
    if not is_free(path) and not (path.is_dir() and resume):
        raise InputError(
            f"--out: {path} exists already: choose another folder, or go on with --resume"
        )
    make_folder(path)
    return path


def refuse_links(folder: Path) -> None:
    """Refuse a run folder in which a link leads out of it, where the run would write.

    Raises:
        InputError: names the link.
    """
    home = folder.resolve()
    for path in [*folder.iterdir(), *folder.glob("checkpoints/*")]:
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise InputError(
                f"--resume: {path} is a link to {path.resolve()}, out of the run folder, and the "
                "run would write there: put what it leads to in its place"
            )


def make_folder(path: Path) -> None:
    """The folder that --out names, with those above it.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"--out: {shortened(path)} cannot be made: {error.strerror}") from error


def is_free(path: Path) -> bool:
    """Whether a folder that --out names holds nothing yet.

    Raises:
        InputError: it cannot be looked at.
    """
    try:
        return not path.exists() or (path.is_dir() and {p.name for p in path.iterdir()} <= NOTHING)
    except OSError as error:
        raise InputError(f"--out: {shortened(path)} cannot be made: {error.strerror}") from error


def next_folder(method: str) -> Path:
    """The first of runs/<method>-1, runs/<method>-2, ... that does not exist."""
    number = 1
    while Path(f"runs/{method}-{number}").exists():
        number += 1
    return Path(f"runs/{method}-{number}")


def cut_after(path: Path, step: int, lines: int | None = None) -> tuple[int, int]:
    """Removes the lines that an interrupted run wrote after `step`, and lines that are torn or are
    no record of a step. The file is replaced as a whole, so a kill leaves one or the other.

    Args:
        lines: the most lines that stay, where more of that very step followed a checkpoint.

    Returns:
        the number of lines that stay, and of those that were no records.
    """
    if not path.is_file():
        return 0, 0
    kept, foreign = [], 0
    # bytes: a kill can tear a line within a character, and U+2028 ends no line
    for line in path.read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            at = json.loads(line)["step"]
            if at <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            foreign += 1
    if lines is not None:
        del kept[lines:]
    write_bytes(path, b"".join(line + b"\n" for line in kept))
    return len(kept), foreign


def new_file(out: str, suffix: str = "") -> Path:
    """The path of the file that a command will write.

    Raises:
        InputError: it exists already, or does not end in `suffix`.
    """
    path = Path(out)
    if not path.name.endswith(suffix):
        raise InputError(f"--out: {path} should end in {suffix}: rows are written as JSON lines")
    if path.exists():
        raise InputError(f"--out: {path} exists already: choose another file, or remove it")
    return path
