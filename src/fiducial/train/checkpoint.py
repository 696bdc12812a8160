"""Checkpoints that are complete or absent. A checkpoint is written beside its final place, synced
and renamed, and it is refused if a byte of it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
COUNTERS = "run.json"
"""What a run knows beside modules, optimizers and random states."""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Writes a manifest of all files in the folder, and syncs everything to the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        _sync(path)
    (folder / MANIFEST).write_text(
        json.dumps({str(p.relative_to(folder)): digest(p) for p in files}, indent=1)
    )
    _sync(folder / MANIFEST)
    _sync(folder)


def fault(folder: Path) -> str | None:
    """One sentence on what is wrong with a checkpoint, or None."""
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text())
        pairs = list(manifest.items())
    except (OSError, ValueError, AttributeError):
        return f"{folder.name} has no readable manifest"
    if not pairs:
        return f"{folder.name} has an empty manifest"
    for name, expected in pairs:
        path = folder / name
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if digest(path) != expected:
            return f"{folder.name}/{name} is damaged: its SHA-256 differs from the manifest"
    return None


def publish(aside: Path, final: Path, keep: int) -> None:
    """Renames the finished folder to its final name, and removes all others but the `keep` newest
    and the best.
    """
    if final.exists():
        shutil.rmtree(final)
    os.rename(aside, final)
    _sync(final.parent)
    every = numbered(final.parent)
    best = best_of(every)
    for old in every[:-keep]:
        if old != best:
            shutil.rmtree(old)


def best_of(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss of those whose step was evaluated; of equals the
    first.
    """
    losses = [(loss, i) for i, p in enumerate(checkpoints) if (loss := _held_out(p)) is not None]
    return checkpoints[min(losses)[1]] if losses else None


def _held_out(folder: Path) -> float | None:
    try:
        loss = json.loads((folder / COUNTERS).read_text())["evaluated"]
        return float(loss) if loss is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def numbered(folder: Path) -> list[Path]:
    """The `checkpoint-<step>` folders, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without a fault, and the faults of the newer ones."""
    faults: list[str] = []
    for path in reversed(numbered(folder)):
        wrong = fault(path)
        if wrong is None:
            return path, faults
        faults.append(wrong)
    return None, faults


def write_bytes(path: Path, data: bytes) -> None:
    """Writes the file completely or not at all.

    Raises:
        OSError: with the name of the file, which a write that fails does not know.
    """
    aside = path.with_name(path.name + ".aside")
    try:
        aside.unlink(missing_ok=True)  # whatever a link there leads to is not written to
        aside.write_bytes(data)
        _sync(aside)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes the file completely or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes the file completely or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
