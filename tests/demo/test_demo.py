"""The pipeline over the embedded world, small: every stage runs, the page is made from its numbers,
and nothing of it needs a network.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fiducial.demo import pipeline
from fiducial.demo.compare import Answers, Scale, distinct, name_of, reliability
from fiducial.demo.pipeline import _is_done, demo
from fiducial.demo.settings import Demo
from fiducial.errors import InputError

SMALL: dict[str, Any] = {
    "documents": 320,
    "sft_steps": 4,
    "samples": 3,
    "ppo_steps": 2,
    "prompts": 24,
    "eval_samples": 1,
}
TINY = pipeline.SHAPE | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder and the page of a small demo."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    patch = pytest.MonkeyPatch()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the demo opened a socket to another machine")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(pipeline, "SHAPE", TINY)
    try:
        page = demo(Demo(out=str(folder), **SMALL))
    finally:
        patch.undo()
    return folder, page


def test_the_page_and_every_runs_own_page_are_written(made: Made) -> None:
    folder, page = made
    assert page == folder / "index.html" and (folder / "plotly.min.js").is_file()
    for name in (
        "pretrain",
        "sft",
        "reward",
        "ppo",
        "rloo",
        "grpo",
        "ppo_no_kl",
        "dpo",
        "ppo_fast",
        "dpo_fast",
    ):
        assert (folder / name / "report.html").is_file()
        assert (folder / name / "model" / "model.safetensors").is_file()
        assert json.loads((folder / name / "summary.json").read_text())["status"] == "done"


def test_the_table_is_counted_from_the_answers(made: Made) -> None:
    folder, _ = made
    data = json.loads((folder / "comparison.json").read_text())
    sft, ppo, rloo, grpo, dpo, free = data["methods"]
    keys = ["sft", "ppo", "rloo", "grpo", "dpo", "ppo_no_kl"]
    assert [row["key"] for row in data["methods"]] == keys
    assert [row["method"] for row in data["methods"]] == keys
    for row in (ppo, rloo, grpo, free):
        assert row["responses_sampled"] == 2 * 64 and row["online"]
        assert "reward model" in row["models_held"]
        assert len(data["paths"][row["key"]]) == 2
        assert data["paths"][row["key"]][0]["kl"] == pytest.approx(0, abs=1e-4)
    assert [row["key"] for row in data["methods"] if "critic" in row["models_held"]] == [
        "ppo",
        "ppo_no_kl",
    ]
    assert ppo["gold"]["n"] == 96 and 0 <= ppo["win_rate"]["value"] <= 1
    assert sft["win_rate"] is None and sft["kl"] is None
    assert dpo["responses_sampled"] == 0 and dpo["models_held"] == ["policy"] and not dpo["online"]
    assert data["paths"]["dpo"][0]["step"] == 0 and "sft" not in data["paths"]
    # the scale is set so
    assert sft["proxy"]["value"] == pytest.approx(sft["gold"]["value"], abs=1e-9)
    assert ppo["sensitivity"] and dpo["sensitivity"] and not sft["sensitivity"]
    assert len(data["samples"]) == 5 and len(data["samples"][0]["answers"]) == 6


def test_a_finished_demo_is_not_run_again_but_resumed(made: Made) -> None:
    folder, page = made
    with pytest.raises(InputError, match="exists already"):
        demo(Demo(out=str(folder), **SMALL))
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/model/model.safetensors")}
    assert demo(Demo(out=str(folder), resume=True, **SMALL)) == page
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.glob("*/model/model.safetensors")}


def test_the_name_of_a_run_is_that_of_its_folder_or_of_its_method(made: Made) -> None:
    folder, _ = made
    assert [name_of(folder / key) for key in ("rloo", "ppo_no_kl", "ppo_fast", "pretrain")] == [
        "rloo",
        "ppo_no_kl",
        "ppo",
        "sft",
    ]


def test_the_scale_matches_mean_and_standard_deviation() -> None:
    sft = Answers([], [], [], gold=[0.0, 1.0], proxy=[-3.0, 5.0], lengths=[], kl=[], entropy=0.0)
    scale = Scale.between(sft)
    assert (scale(-3.0), scale(5.0)) == pytest.approx((0.0, 1.0))


def test_reliability_by_hand() -> None:
    first, second = reliability([2.0, -2.0, 2.0, 2.0, 0.1], bins=2)
    assert [first.n, second.n] == [1, 4]
    assert second.observed == pytest.approx(0.75)
    assert second.predicted == pytest.approx(0.8807970779778823)


def test_distinct_by_hand() -> None:
    assert distinct(["a b a b"]) == pytest.approx(2 / 3)


def test_the_settings_are_read_without_torch() -> None:
    code = "import sys, fiducial.demo.settings; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_stage_that_failed_or_was_stopped_is_not_taken_for_done(tmp_path: Path) -> None:
    done = tmp_path / "summary.json"
    assert not _is_done(done)
    for status, expected in (("done", True), ("failed", False), ("interrupted", False)):
        done.write_text(json.dumps({"status": status}))
        assert _is_done(done) is expected
    done.write_text("{")  # torn
    assert not _is_done(done)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    assert _is_done(tmp_path / "pairs.jsonl")
