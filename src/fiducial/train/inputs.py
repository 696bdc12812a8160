"""SHA-256 of what a run starts from: its models, data and reward functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import digest

MODELS = ("model", "teacher")
FILES = ("data", "reference_data", "rows.eval_data", "ptx.data")


def inputs(settings: dict[str, Any]) -> dict[str, Any]:
    """The hashes of all files and folders that a run's settings name, for its summary.

    Args:
        settings: the settings as plain values.

    Returns:
        "model": {"name", "sha256"}, and "data": {flag: {"source", "sha256"}} for every other
        setting that names a local file or folder.
    """
    data = {}
    for flag, source in _named(settings):
        path = _local(source)
        if path is not None:
            data[flag] = {"source": source, "sha256": sha256(path)}
    name = str(settings.get("model", ""))
    found = _local(name)
    return {
        "model": {"name": name, "sha256": sha256(found) if found is not None else None},
        "data": data,
    }


def hashes(names: Mapping[str, str | None]) -> dict[str, str | None]:
    """SHA-256 by flag of the local files and folders that settings name; None for what is on the
    Hub or has a name of its own.
    """
    found = {flag: _local(name) for flag, name in names.items() if name is not None}
    return {flag: None if path is None else sha256(path) for flag, path in found.items()}


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, or of the names and digests of all files in a folder; for that
    of an adapter also of its base model, if that is a folder.
    """
    if path.is_file():
        return digest(path)
    state = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        state.update(f"{file.relative_to(path)}\0{digest(file)}\n".encode())
    if (base := _base(path)) is not None:
        state.update(sha256(base).encode())
    return state.hexdigest()


def _base(folder: Path) -> Path | None:
    """The folder of the model that an adapter belongs to; None if it is none, or on the Hub."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return base if base.is_dir() and not (base / "adapter_config.json").exists() else None


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every flag that names an input other than the model, with its value."""
    for name in (*MODELS[1:], *FILES):
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str):
            yield f"--{name.replace('_', '-')}", value
    rewards = settings.get("reward") or []
    for number, value in enumerate(rewards, start=1):
        yield "--reward" if len(rewards) == 1 else f"--reward {number}", str(value)


def _local(source: str) -> Path | None:
    """The file or folder that a setting names (for file.py:function the file), or None."""
    for candidate in (source, source.rpartition(":")[0]):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    return None
