"""Checkpoints that are whole or not there: written aside, synced, renamed, and refused by name when
a byte has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the manifest of what is in the folder, and sync all of it to the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        _sync(path)
    (folder / MANIFEST).write_text(
        json.dumps({str(p.relative_to(folder)): digest(p) for p in files}, indent=1)
    )
    _sync(folder / MANIFEST)
    _sync(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{folder.name} has no readable manifest"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if digest(path) != expected:
            return f"{folder.name}/{name} is damaged: its SHA-256 differs from the manifest"
    return None


def publish(aside: Path, final: Path, keep: int) -> None:
    """Rename the finished folder into place and remove all but the newest `keep`."""
    if final.exists():
        shutil.rmtree(final)
    os.rename(aside, final)
    _sync(final.parent)
    for old in numbered(final.parent)[:-keep]:
        shutil.rmtree(old)


def numbered(folder: Path) -> list[Path]:
    """`checkpoint-<step>` folders, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with the newer ones."""
    faults: list[str] = []
    for path in reversed(numbered(folder)):
        wrong = fault(path)
        if wrong is None:
            return path, faults
        faults.append(wrong)
    return None, faults


def write_text(path: Path, text: str) -> None:
    """Write the whole file or none of it."""
    aside = path.with_name(path.name + ".aside")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write the whole file or none of it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
