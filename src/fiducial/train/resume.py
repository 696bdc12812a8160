"""Which settings a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from .checkpoint import write_text
from .folders import refuse_links

FREE = {"steps", "epochs", "resume", "out", "run", "worker", "trust_remote_code"}
"""Settings that may differ when a run is resumed, because no result depends on them. The exception
is `run.precision`, which may not differ.
"""
OF_COMMAND = {"resume", "out"}
"""Settings that belong to one command and not to the run."""


def changed_settings(folder: Path, method: str, config: str) -> dict[str, Any]:
    """The settings that differ from those of the run in `folder`, with their old and new values.

    Args:
        config: the present settings, as text of a config.yaml.

    Raises:
        InputError: the folder holds no run or a run of another method, settings differ that may
            not, or a link leads out of the folder.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"--resume: {folder} holds no run to go on with (config.yaml is missing)")
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict) or not isinstance(before.get("run", {}), dict):
        raise InputError(
            f"--resume: {path} is empty or damaged, so it is not known how the run was started: "
            "start a new run"
        )
    now = yaml.safe_load(config)
    if before.get("method") != method:
        raise InputError(f"--resume: {folder} is a run of {before.get('method')}, not of {method}")
    refuse_links(folder)
    differ = [k for k in now if before.get(k) != now[k]]
    fixed = [k for k in differ if k not in FREE]
    if before.get("run", {}).get("precision") != now["run"]["precision"]:
        fixed.append("run.precision")
    if fixed:
        raise InputError(
            f"--resume: {', '.join(fixed)} differ from {path}: a resumed run keeps its settings, "
            "so leave these flags out"
        )
    return {k: {"was": before.get(k), "is": now[k]} for k in differ if k not in OF_COMMAND}


def note_changes(config: Path, text: str, step: int, changed: dict[str, Any]) -> None:
    """Let config.yaml say what is run from here on, and what was changed at which step.

    Args:
        text: the present settings, as text of a config.yaml.
    """
    before = yaml.safe_load(config.read_text(encoding="utf-8"))
    history = [*before.get("resumed", []), {"step": step, "changed": changed}]
    resumed = yaml.safe_dump({"resumed": history}, sort_keys=False, allow_unicode=True)
    write_text(config, text + resumed)
