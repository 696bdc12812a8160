"""Which settings a resumed run may change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import InputError
from .checkpoint import write_text
from .folders import refuse_links
from .processes import Processes

FREE = {"steps", "epochs", "resume", "out", "run", "worker", "trust_remote_code"}
"""Settings that may differ when a run is resumed, because no result depends on them. The exception
is `run.precision`, which may not differ.
"""
OF_COMMAND = {"resume", "out"}
"""Settings that belong to one command and not to the run."""


S = TypeVar("S", bound=Any)


def settled(settings: S, processes: Processes, config: Path) -> S:
    """The settings with the number that `--run.tokens auto` has found, which is written into
    config.yaml. A run that is resumed keeps the number that stands there.
    """
    if settings.run.tokens != "auto":
        return settings
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    kept = re.search(r"^  tokens: ([0-9]+)$", text, re.MULTILINE)
    if processes.budget is None and kept is not None:
        processes.budget = int(kept[1])
    if processes.budget is None:
        return settings
    if processes.main and kept is None and text:
        number = f"\n  tokens: {processes.budget}\n"
        write_text(config, text.replace("\n  tokens: auto\n", number))
    return with_budget(settings, processes.budget)


def with_budget(settings: S, tokens: int) -> S:
    """The settings with a number of padded tokens per micro-batch."""
    run = settings.run.model_copy(update={"tokens": tokens})
    out: S = settings.model_copy(update={"run": run})
    return out


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
