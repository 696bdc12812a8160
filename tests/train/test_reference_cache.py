"""The stored log-probabilities of a reference: how many stay, and for how long; an interrupted pass
goes on where it stopped.
"""

import os
import time

import pytest
import torch

from fiducial.train import reference_cache
from fiducial.train.processes import Processes
from fiducial.train.progress import Progress

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
        made = lambda rows: calls.append(key) or torch.ones(len(rows))  # noqa: E731
        return reference_cache.cached(key, [range(3)], made, processes, "")

    get("a"), get("b")
    for key in "ab":
        os.utime(tmp_path / f"reference-{key}.safetensors", (time.time() - 31 * DAY,) * 2)
    assert get("a").tolist() == [1, 1, 1] and calls == ["a", "b"]
    get("c")
    assert left(tmp_path) == ["reference-a.safetensors", "reference-c.safetensors"]


def test_parts_hold_every_row_once_and_no_more_tokens_than_they_may():
    costs = [[3], [2, 2], [9], [1], [1, 1], [4]]
    parts = reference_cache.parts(costs, 7)
    assert parts == [range(2), range(2, 3), range(3, 6)]
    assert reference_cache.parts(costs, 1) == [range(i, i + 1) for i in range(6)]
    assert reference_cache.parts(costs, 100) == [range(6)]


class Pass:
    """A pass over 10 rows in four parts, by a function that counts what it is asked for."""

    rows = (range(3), range(3, 5), range(5, 9), range(9, 10))

    def __init__(self):
        torch.manual_seed(0)
        self.values, self.asked = torch.randn(10, 2), []

    def __call__(self, key="k", fail_at=None):
        self.asked = []

        def compute(some):
            self.asked.append(some)
            if some.start == fail_at:
                raise KeyboardInterrupt
            return self.values[some.start : some.stop].clone()

        return reference_cache.cached(key, self.rows, compute, Processes(), "pass")


@pytest.fixture
def whole(tmp_path, monkeypatch):
    monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path))
    return Pass()


def test_an_interrupted_pass_computes_only_the_rest(whole, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        whole(fail_at=0)
    assert "kept" not in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        whole(fail_at=5)
    assert "pass: those of 5 of 10 pairs are kept" in capsys.readouterr().err
    assert left(tmp_path) == ["reference-k.0-3.safetensors", "reference-k.3-5.safetensors"]
    assert torch.equal(whole(), whole.values)
    assert whole.asked == [range(5, 9), range(9, 10)]
    assert left(tmp_path) == ["reference-k.safetensors"]  # the parts are joined
    assert torch.equal(whole(), whole.values) and not whole.asked
    assert whole("other") is not None and len(whole.asked) == 4


@pytest.mark.parametrize("damage", ["torn", "a bit", "another tensor"])
def test_a_part_that_is_not_whole_is_computed_again(whole, tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        whole(fail_at=9)
    part = tmp_path / "reference-k.3-5.safetensors"
    data = bytearray(part.read_bytes())
    if damage == "torn":
        part.write_bytes(data[: len(data) // 2])
    elif damage == "a bit":
        data[-1] ^= 1
        part.write_bytes(data)
    else:
        part.write_bytes((tmp_path / "reference-k.0-3.safetensors").read_bytes())
    assert torch.equal(whole(), whole.values)
    assert whole.asked == [range(3, 5), range(9, 10)]


def test_the_bar_moves_with_every_part_computed_or_read(whole, monkeypatch):
    moved = []

    class Bar(Progress):
        def __init__(self, *given, show):
            moved.append((*given, show))
            super().__init__(*given, show=show)

        def advance(self, *, by):
            moved.append(by)

    monkeypatch.setattr(reference_cache, "Progress", Bar)
    with pytest.raises(KeyboardInterrupt):
        whole(fail_at=5)
    whole()
    assert moved == [("pass", 10, True), 3, 2, ("pass", 10, True), 3, 2, 4, 1]


def test_a_folder_that_cannot_be_written_stops_no_pass(whole, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_cache, "save_file", full)
    assert torch.equal(whole(), whole.values) and len(whole.asked) == 4
    with pytest.raises(KeyboardInterrupt):
        whole(fail_at=9)
    assert "kept" not in capsys.readouterr().err
