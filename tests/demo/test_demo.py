"""The pipeline over the embedded world, small: every stage runs, the page is made from its numbers,
and nothing of it needs a network.
"""

import json
import socket

import pytest

from fiducial.demo.compare import Answers, Scale, distinct, reliability
from fiducial.demo.page import read_demo
from fiducial.demo.pipeline import Demo, demo
from fiducial.errors import InputError

SMALL = {
    "documents": 320,
    "sft_steps": 4,
    "samples": 3,
    "ppo_steps": 2,
    "prompts": 24,
    "eval_samples": 1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    patch = pytest.MonkeyPatch()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the demo opened a socket to another machine")

    patch.setattr(socket.socket, "connect", refuse)
    try:
        page = demo(Demo(out=str(folder), **SMALL))
    finally:
        patch.undo()
    return folder, page


def test_the_page_and_every_runs_own_page_are_written(made):
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
        assert (folder / name / "report.html").is_file() and (
            folder / name / "model" / "model.safetensors"
        ).is_file()
        assert json.loads((folder / name / "summary.json").read_text())["status"] == "done"


def test_the_table_is_counted_from_the_answers(made):
    folder, _ = made
    data = read_demo(json.loads((folder / "comparison.json").read_text()))
    assert [m.key for m in data.methods] == ["sft", "ppo", "rloo", "grpo", "dpo", "ppo_no_kl"]
    ppo = data.methods[1]
    for critic_free in data.methods[2:4]:
        assert (
            critic_free.responses_sampled == 2 * 64
            and not critic_free.critic
            and critic_free.online
            and critic_free.reward_model
        )
        assert len(data.paths[critic_free.key]) == 2 and data.paths[critic_free.key][
            0
        ].kl == pytest.approx(0, abs=1e-4)
    assert (
        ppo.responses_sampled == 2 * 64
        and ppo.gold.n == 96
        and ppo.win_rate is not None
        and 0 <= ppo.win_rate.value <= 1
    )
    sft, other = data.methods[0], data.methods[4]
    assert sft.win_rate is None and other.responses_sampled == 0 and other.models_held == ["policy"]
    assert sft.proxy.value == pytest.approx(sft.gold.value, abs=1e-9)  # the scale is set so
    assert ppo.critic and ppo.sensitivity and other.sensitivity and not sft.sensitivity
    assert len(data.samples) == 5 and len(data.samples[0].answers) == 6
    assert data.paths["ppo"][0].kl == pytest.approx(0, abs=1e-4)


def test_a_finished_demo_is_not_run_again_but_resumed(made):
    folder, page = made
    with pytest.raises(InputError, match="exists already"):
        demo(Demo(out=str(folder), **SMALL))
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/model/model.safetensors")}
    assert demo(Demo(out=str(folder), resume=True, **SMALL)) == page
    assert stamps == {p: p.stat().st_mtime_ns for p in folder.glob("*/model/model.safetensors")}


def test_the_scale_matches_mean_and_deviation():
    sft = Answers([], [], [], gold=[0.0, 1.0], proxy=[-3.0, 5.0], lengths=[], kl=[], entropy=0.0)
    scale = Scale.between(sft)
    assert (scale(-3.0), scale(5.0)) == pytest.approx((0.0, 1.0))


def test_reliability_by_hand():
    rows = reliability([2.0, -2.0, 2.0, 2.0, 0.1], bins=2)
    assert [r["n"] for r in rows] == [1, 4]
    assert rows[1]["observed"] == pytest.approx(0.75) and rows[1]["predicted"] == pytest.approx(
        0.8807970779778823
    )


def test_distinct_by_hand():
    assert distinct(["a b a b"]) == pytest.approx(2 / 3)
