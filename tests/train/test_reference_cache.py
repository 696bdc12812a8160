"""The stored log-probabilities of a reference: how many stay, and for how long."""

import os
import time

import torch

from fiducial.train import reference_cache
from fiducial.train.processes import Processes

DAY = 24 * 3600.0


def store(folder, name, size, days):
    path = folder / name
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_not_read_for_long_and_what_does_not_fit_is_removed(tmp_path):
    keep = store(tmp_path, "reference-new.safetensors", 40, 0)
    store(tmp_path, "reference-a.safetensors", 30, 1)
    store(tmp_path, "reference-b.safetensors", 30, 2)
    store(tmp_path, "reference-c.safetensors", 10, 3)
    store(tmp_path, "reference-old.safetensors", 0, 31)
    store(tmp_path, ".reference-x.safetensors.12", 0, 0.5)  # half-written, long ago
    store(tmp_path, ".reference-y.safetensors.13", 0, 0)  # half-written just now
    store(tmp_path, "notes.txt", 1000, 400)  # somebody else's
    reference_cache.prune(tmp_path, keep=keep, largest=100, oldest=30 * DAY)
    kept = ["reference-a.safetensors", "reference-b.safetensors", "reference-new.safetensors"]
    assert left(tmp_path) == [".reference-y.safetensors.13", "notes.txt", *kept]
    reference_cache.prune(tmp_path, keep=keep, largest=80, oldest=30 * DAY)
    assert left(tmp_path) == [".reference-y.safetensors.13", "notes.txt", kept[0], kept[2]]
    reference_cache.prune(tmp_path, keep=keep, largest=0, oldest=30 * DAY)
    assert left(tmp_path) == [".reference-y.safetensors.13", "notes.txt", kept[2]]


def test_reading_counts_as_use_and_storing_removes(tmp_path, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path))
    processes, calls = Processes(), []

    def get(key):
        return reference_cache.cached(key, lambda: calls.append(key) or torch.ones(3), processes)

    get("a"), get("b")
    for key in "ab":
        os.utime(tmp_path / f"reference-{key}.safetensors", (time.time() - 31 * DAY,) * 2)
    assert get("a").tolist() == [1, 1, 1] and calls == ["a", "b"]
    get("c")
    assert left(tmp_path) == ["reference-a.safetensors", "reference-c.safetensors"]
