"""Files and folders that commands write to, and the records that a resumed run cuts back."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError


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
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not resume)):
        raise InputError(
            f"--out: {path} exists already: choose another folder, or go on with --resume"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {path} cannot be made: {error.strerror}") from error
    return path


def next_folder(method: str) -> Path:
    """The first of runs/<method>-1, runs/<method>-2, ... that does not exist."""
    number = 1
    while Path(f"runs/{method}-{number}").exists():
        number += 1
    return Path(f"runs/{method}-{number}")


def cut_after(path: Path, step: int) -> None:
    """Removes the lines that an interrupted run wrote after `step`, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    # splitlines() would also split at U+2028, which samples may contain
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


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
