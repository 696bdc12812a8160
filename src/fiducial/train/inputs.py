"""SHA-256 of what a run starts from: its models, tokenizer, data and reward functions. They are
recorded, and compared when the run is resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .checkpoint import digest, write_json
from .progress import Progress, say

NAME = "inputs.json"
MODELS = ("model", "teacher")
FILES = ("data", "reference_data", "rows.eval_data", "rows.chat_template", "ptx.data")
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
"""Files of a model folder that belong to its tokenizer."""
SLOW = 2**30
"""Bytes from which on hashing takes so long that progress is shown."""


def inputs(settings: dict[str, Any]) -> dict[str, Any]:
    """The hashes of all files and folders that a run's settings name, for its summary.

    Args:
        settings: the settings as plain values.

    Returns:
        "model": {"name", "sha256"}, "tokenizer": its SHA-256, and "data": {flag: {"source",
        "sha256"}} for every other setting that names a local file or folder. The SHA-256 of a name
        that is not on this disk is None.
    """
    name = str(settings.get("model", ""))
    given = [("--model", name), *_named(settings)]
    every = dict(_with_bases(given)).items()
    named = {f: (s, path) for f, s in every if f != "--model" and (path := _local(s)) is not None}
    found = _local(name)
    paths = [path for _, path in named.values()] + ([found] if found else [])
    total = sum(f.stat().st_size for path in paths for f in _files(path))
    with Progress("hashing what the run starts from", total, show=total > SLOW) as bar:
        data = {
            flag: {"source": source, "sha256": sha256(path, bar)}
            for flag, (source, path) in named.items()
        }
        return {
            "model": {"name": name, "sha256": sha256(found, bar) if found else None},
            "tokenizer": _of_tokenizer(found) if found else None,
            "data": data,
        }


def record_inputs(folder: Path, settings: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a run; they are written into its folder.

    Args:
        known: those of a run that goes on, if it has any.
    """
    found = known or inputs(settings)
    write_json(folder / NAME, found)
    return found


def unchanged_inputs(
    folder: Path, settings: dict[str, Any], *, accept: bool = False
) -> dict[str, Any]:
    """The inputs of a run that goes on.

    Args:
        accept: go on with what has changed, and say it.

    Raises:
        InputError: one of them is not what the run began with.
    """
    now = inputs(settings)
    try:
        before = _flat(json.loads((folder / NAME).read_text(encoding="utf-8")))
    except FileNotFoundError:  # it was stopped before it began
        return now
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--resume: {folder / NAME} is damaged, so it is not known what the run began with: "
            "start a new run"
        ) from error
    here = _flat(now)
    for name in {**before, **here}:
        source, value = here.get(name, (before.get(name, ("", None))[0], None))
        old = before.get(name, (source, None))[1]
        if old == value:
            continue
        changed = f"{name} {source} is not what the run began with"
        if not accept:
            raise InputError(
                f"--resume: {changed} (SHA-256 {_short(value)}, before {_short(old)}): put the old "
                "one back, start a new run, or go on with --run.changed-inputs accept"
            )
        say(f"{changed}, and is accepted: the run is no longer that of one input")
    return now


def _flat(found: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    """What is compared, by name; the tokenizer before the model whose folder it is in."""
    model = found["model"]
    return {
        "the tokenizer of --model": (model["name"], found["tokenizer"]),
        "--model": (model["name"], model["sha256"]),
        **{flag: (one["source"], one["sha256"]) for flag, one in found["data"].items()},
    }


def hashes(names: Mapping[str, str | None]) -> dict[str, str | None]:
    """SHA-256 by flag of the local files and folders that settings name, and of the base models of
    adapters among them; None for what is on the Hub or has a name of its own.
    """
    given = [(flag, name) for flag, name in names.items() if name is not None]
    found = {flag: _local(name) for flag, name in _with_bases(given)}
    return {flag: None if path is None else sha256(path) for flag, path in found.items()}


def _short(value: str | None) -> str:
    return "none" if value is None else f"{value[:12]}..."


def sha256(path: Path, bar: Progress | None = None) -> str:
    """SHA-256 of a file's bytes, or of the names and digests of the files in a folder that are
    loaded: a README and hidden files are not.
    """
    state = hashlib.sha256()
    for file in _files(path):
        one = digest(file)
        if bar is not None:
            bar.advance(by=file.stat().st_size)
        if path.is_file():
            return one
        state.update(f"{file.relative_to(path)}\0{one}\n".encode())
    return state.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    every = ((p, p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    return sorted(
        p for p, r in every if p.suffix != ".md" and not any(x.startswith(".") for x in r.parts)
    )


def _of_tokenizer(folder: Path) -> str:
    files = sorted({p for pattern in TOKENIZER for p in folder.glob(pattern) if p.is_file()})
    return hashlib.sha256("".join(f"{p.name}\0{digest(p)}\n" for p in files).encode()).hexdigest()


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


def _with_bases(named: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same flags and values, and the base models of those that are adapters."""
    for flag, name in named:
        yield flag, name
        if base := _base_of(Path(name)):
            yield f"the base model of {flag}", base


def _base_of(folder: Path) -> str | None:
    """The model that the adapters in a folder belong to."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return base if isinstance(base, str) else None


def _local(source: str) -> Path | None:
    """The file or folder that a setting names (for file.py:function the file), or None."""
    module = source.rpartition(":")[0]
    for candidate in (source, module, module and module.replace(".", "/") + ".py"):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    return None
