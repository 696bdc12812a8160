"""Python code that a model's folder brings: named, and run only where that was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

FILES = ("config.json", "tokenizer_config.json")
"""The files whose `auto_map` names classes in Python files."""


def brought(name: str) -> list[str]:
    """The Python files that the configs in a local folder name, each with the config's name."""
    found = []
    for file in FILES:
        try:
            config = json.loads((Path(name) / file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        auto_map = config.get("auto_map") if isinstance(config, dict) else None
        for value in _texts(auto_map):
            module = value.rpartition(".")[0] or value
            repository, _, module = module.rpartition("--")
            where = f" of {repository}" if repository else ""
            found.append(f"{module}.py{where} (auto_map in {file})")
    return list(dict.fromkeys(found))


def needed(name: str, flag: str, error: Exception) -> InputError | None:
    """The refusal of a model that cannot be loaded without its own code; None if `error`, with
    which transformers refused it, says something else.
    """
    if "trust_remote_code" not in str(error):
        return None
    files = ", ".join(brought(name)) or "the files that its configs name in auto_map"
    return InputError(
        f"{flag}: {name} needs Python code of its own, {files}, which was not run: read it, and "
        "give --trust-remote-code if you trust its author"
    )


def not_run(name: str) -> str:
    """A sentence for a model that was loaded without the code that it brings; else ""."""
    if not (files := brought(name)):
        return ""
    return (
        f"{name} brings Python code of its own, {', '.join(files)}, which is not run: the classes "
        "of transformers are used (--trust-remote-code runs it)"
    )


def is_remote(thing: Any) -> bool:
    """Whether the class of a model or config came from such code, which then was run already."""
    return type(thing).__module__.startswith("transformers_modules")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
