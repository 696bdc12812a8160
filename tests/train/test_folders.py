"""Folders that commands make, and what processes share."""

from pathlib import Path

import torch

from fiducial.train.folders import next_folder, open_folder
from fiducial.train.processes import Processes


def test_the_next_name_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("demo-run", "demo-run-2", "demo-run-3"):
        assert open_folder(None, "demo-run", resume=False) == Path(expected)
        assert Path(expected).is_dir()
    for expected in ("runs/ppo-1", "runs/ppo-2"):
        assert next_folder("ppo") == Path(expected)
        Path(expected).mkdir(parents=True)


def test_a_pass_over_rows_shows_a_bar_only_under_a_title(monkeypatch):
    shown = []

    class Bar:
        def __init__(self, title, total, *, show):
            shown.append((title, total, show))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, by):
            shown.append(by)

    monkeypatch.setattr("fiducial.train.processes.Progress", Bar)
    costs = [[3], [1], [2]]

    def compute(rows):
        return (torch.tensor([10.0 * r for r in rows]),)

    for title in (None, "scores"):
        (found,) = Processes().map_rows(costs, 3, None, compute, title=title)
        assert found.tolist() == [0.0, 10.0, 20.0]
    assert [s for s in shown if isinstance(s, tuple)] == [("", 3, False), ("scores", 3, True)]
    assert sum(s for s in shown if isinstance(s, int)) == 2 * 3
