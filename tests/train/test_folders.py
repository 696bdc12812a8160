"""Folders that commands make."""

from pathlib import Path

from fiducial.train.folders import cut_after, is_free, next_folder, open_folder


def test_the_next_name_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("demo-run", "demo-run-2", "demo-run-3"):
        assert open_folder(None, "demo-run", resume=False) == Path(expected)
        assert Path(expected).is_dir()
    for expected in ("runs/ppo-1", "runs/ppo-2"):
        assert next_folder("ppo") == Path(expected)
        Path(expected).mkdir(parents=True)


def test_what_a_run_leaves_that_was_killed_before_it_began_is_no_run(tmp_path):
    assert is_free(tmp_path / "nowhere") and is_free(tmp_path)
    (tmp_path / ".lock").write_text("12\n")
    (tmp_path / "config.yaml.aside").write_text("method: s")
    assert is_free(tmp_path)
    (tmp_path / "config.yaml").write_text("method: sft\n")
    assert not is_free(tmp_path)


def test_records_without_a_number_of_lines_are_cut_by_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for lines, left in ((None, 3), (3, 3), (2, 2), (0, 0)):
        file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 2, 3)))
        assert cut_after(file, 2, lines) == (left, 0)
        assert len(file.read_text().splitlines()) == left
