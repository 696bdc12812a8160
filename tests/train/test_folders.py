"""Folders that commands make."""

from pathlib import Path

from fiducial.train.folders import next_folder, open_folder


def test_the_next_name_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("demo-run", "demo-run-2", "demo-run-3"):
        assert open_folder(None, "demo-run", resume=False) == Path(expected)
        assert Path(expected).is_dir()
    for expected in ("runs/ppo-1", "runs/ppo-2"):
        assert next_folder("ppo") == Path(expected)
        Path(expected).mkdir(parents=True)
