"""Log-probabilities of the reference, computed once and kept on disk under a hash of the model, the
data and the rendering. They are kept as they are made, a part at a time, so that an interrupted
pass goes on where it stopped. What no run has read for a while is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models.roles import Policy
from ..models.trunk import plain
from .progress import Progress, say

if TYPE_CHECKING:
    from .processes import Processes

LARGEST, OLDEST = 2**30, 30 * 24 * 3600.0
"""Bytes that the folder may hold, and seconds after which a file that was not read is removed."""


def folder() -> Path:
    """The folder named by FIDUCIAL_CACHE, or else `fiducial` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FIDUCIAL_CACHE") or Path(base) / "fiducial")


@torch.no_grad()
def fingerprint(policy: Policy, rows: Iterable[Any]) -> str:
    """SHA-256 of the model's configuration and weights, and of the token ids and masks in `rows`.

    The weights of adapters are left out, because a reference is computed without them.
    """
    config = plain(policy.lm).config.to_dict()
    settings = {
        k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")
    }
    state = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(policy.lm.named_parameters()):
        if "lora_" not in name:
            state.update(
                f"{name.replace('base_layer.', '')}{tuple(weight.shape)}{weight.dtype}".encode()
            )
            state.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    state.update(str(policy.precision).encode())
    state.update(b"[")
    for number, row in enumerate(rows):  # one at a time: there may be many
        state.update(b"," if number else b"")
        state.update(json.dumps(row, separators=(",", ":")).encode())
    state.update(b"]")
    return state.hexdigest()


def parts(costs: Sequence[Sequence[int]], tokens: int) -> list[range]:
    """The numbers of all rows in runs of at most `tokens` tokens, or of one row.

    Args:
        costs: the lengths of each row's sequences.
    """
    found, first, total = [], 0, 0
    for i, row in enumerate(costs):
        if i > first and total + sum(row) > tokens:
            found.append(range(first, i))
            first, total = i, 0
        total += sum(row)
    return [*found, range(first, len(costs))]


def cached(
    key: str,
    rows: Sequence[range],
    compute: Callable[[range], Tensor],
    processes: Processes,
    title: str,
) -> Tensor:
    """The tensor stored under `key`, or else computed part by part and stored.

    A part that is stored already and whole is read, so a pass that was interrupted goes on where it
    stopped. If the folder cannot be written, nothing is stored and the run goes on.

    Args:
        rows: the row numbers of each part, in order; see `parts`.
        compute: the rows of one part, [rows, ...]. title: of the progress bar.
    """
    path = folder() / f"reference-{key}.safetensors"
    stored = _read(path)
    if not processes.any(stored is None):
        assert stored is not None
        return stored
    names = [path.with_suffix(f".{r.start}-{r.stop}.safetensors") for r in rows]
    values: list[Tensor] = []
    kept = 0
    try:
        with Progress(title, rows[-1].stop, show=processes.main) as bar:
            for some, name in zip(rows, names, strict=True):
                value = _read(name)
                there = value is not None
                if processes.any(not there):
                    value = compute(some)
                    there = processes.main and len(rows) > 1 and _write(name, value)
                assert value is not None
                values.append(value)
                kept += len(some) * there
                bar.advance(by=len(some))
    except KeyboardInterrupt:
        if processes.main and kept:
            say(f"{title}: those of {kept:,} of {rows[-1].stop:,} pairs are kept")
        raise
    whole = torch.cat(values)
    processes.wait()  # every process has read the parts
    if processes.main and _write(path, whole):
        with contextlib.suppress(OSError):
            for name in path.parent.glob(f"{path.stem}.*-*.safetensors"):
                name.unlink(missing_ok=True)
            prune(path.parent, keep=path)
    return whole


def _write(path: Path, value: Tensor) -> bool:
    """Stores the tensor completely or not at all; returns whether it could."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        told = {"sha256": _digest(path, value)}
        save_file({"logprobs": value.contiguous()}, aside, metadata=told)
        os.replace(aside, path)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        return False
    return True


def prune(folder: Path, *, keep: Path, largest: int = LARGEST, oldest: float = OLDEST) -> None:
    """Remove stored references that were not read for long, and then those that were not read for
    longest, until they fit; also what an interrupted run left half-written. `keep` stays.
    """
    left, now, dated = largest - keep.stat().st_size, time.time(), []
    for path in folder.glob("*reference-*"):
        with contextlib.suppress(FileNotFoundError):  # another run removed it
            dated.append((now - path.stat().st_mtime, path.stat().st_size, path))
    for unread, size, path in sorted(dated):
        if path == keep:
            continue
        if path.name.startswith("."):  # another run may be writing it now
            gone = unread > 3600
        else:
            left -= size
            gone = left < 0 or unread > oldest
        if gone:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Tensor | None:
    """The stored tensor, or None if there is none, a byte has changed, or the file was renamed."""
    try:
        with safe_open(path, "pt") as file:
            value: Tensor = file.get_tensor("logprobs")
            if (file.metadata() or {}).get("sha256") != _digest(path, value):
                return None
    except (OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):  # a folder that cannot be written
        os.utime(path)  # the time of the last use
    return value


def _digest(path: Path, value: Tensor) -> str:
    """SHA-256 of the tensor and of the name that it is stored under."""
    state = hashlib.sha256(path.name.encode())
    state.update(value.contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()
