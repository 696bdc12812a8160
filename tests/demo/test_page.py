"""The demo's page: sentences no stronger than their intervals, any run in the comparison."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fiducial import verbs
from fiducial.demo.page import demo_alarms, demo_answer, write_demo_page
from fiducial.demo.results import (
    Answer,
    Circumstances,
    Comparison,
    Measured,
    MethodResult,
    PathPoint,
    Reliability,
    RewardModelResult,
    Sample,
)
from fiducial.report.figures import PALETTE
from pages import EVIL, HOSTILE, check_that_nothing_is_fetched, page_data

HOW = Circumstances(
    seed=0,
    command="fiducial demo",
    machine="2 cores",
    versions={"torch": "2.6"},
    timings={"SFT": 10.0},
)


def m(value: float, half: float = 0.05, n: int = 400) -> Measured:
    return Measured(value, value - half, value + half, n)


def method(key: str, win: float | None, proxy: float, **changes: Any) -> MethodResult:
    values: dict[str, Any] = {
        "key": key,
        "method": key,
        "gold": m(0.5),
        "proxy": m(proxy),
        "win_rate": None if win is None else m(win),
        "kl": None if win is None else m(2.4, 0.1),
        "kl_token": None if win is None else 0.1,
        "length": 14.0,
        "models_held": ("policy",),
        "train_seconds": 60.0,
        "responses_sampled": 0,
        "online": False,
        "peak_memory_bytes": 2**30,
        "distinct": 0.5,
        "entropy": 1.0,
        "sensitivity": (),
        "report": f"{key}/report.html",
    }
    return MethodResult(**values | changes)


REWARD_MODEL = RewardModelResult(
    accuracy=m(0.71, 0.02),
    bayes=0.75,
    length_only=m(0.58, 0.02),
    comparisons=4000,
    reliability=(Reliability(0.6, 0.62, 0.55, 0.7, 90),),
    report="reward/report.html",
)


def comparison(*methods: MethodResult) -> Comparison:
    return Comparison(
        methods=methods
        or (
            method("sft", None, 0.0),
            method("ppo", 0.81, 1.2),
            method("dpo", 0.7, 1.0),
            method("ppo_no_kl", 0.24, 2.3),
        ),
        reward_model=REWARD_MODEL,
        paths={"ppo": (PathPoint(0, -0.01, 0.0, 0.0), PathPoint(10, 2.4, 1.2, 1.0))},
        samples=(Sample(HOSTILE, (Answer("sft", EVIL, 0.1, 0.2),)),),
        score_unit="points",
        task="Write.",
        notes=("A note.",),
    )


def with_free(win: float, proxy: float, ppo: float = 0.81) -> str:
    demo = comparison(
        method("sft", None, 0.0),
        method("ppo", ppo, 1.2),
        method("dpo", 0.7, 1.0),
        method("ppo_no_kl", win, proxy),
    )
    return " ".join(demo_answer(demo)).replace("\u00a0", " ")


def test_it_says_hacked_only_when_the_intervals_do() -> None:
    told = with_free(0.24, 2.3)
    assert told.startswith(
        "PPO beats SFT on 81% [76, 86] of held-out prompts at 2.40 nats, DPO 70% [65, 75] at "
        "2.40 nats. Without"
    )  # 0.76 > 0.75: told apart
    assert (
        "rose further (1.20 to 2.30) and the true value fell: it beats SFT on only 24% [19, 29] of "
        "held-out prompts. The reward was hacked." in told
    )
    assert "over-optimized" in with_free(0.6, 2.3) and "still beats SFT" in with_free(0.6, 2.3)
    assert "not shown to beat SFT (47% [42, 52]" in with_free(0.47, 2.3)
    assert "was hacked" not in with_free(0.47, 2.3)
    assert "does not show that the reward was hacked" in with_free(0.8, 2.3)
    assert "no hacking was seen" in with_free(0.24, 1.25)
    unsure = with_free(0.24, 2.3, ppo=0.53)
    assert unsure.startswith(
        "PPO is not shown to beat SFT (one half is not excluded): 53% [48, 58] of held-out prompts "
        "at 2.40 nats. DPO beats SFT on 70% [65, 75]"
    )
    close = with_free(0.24, 2.3, ppo=0.79)
    assert "overlap" not in unsure and "These intervals overlap: neither method is shown" in close
    assert "DPO loses to SFT, winning on only 70%" not in unsure
    assert "PPO loses to SFT, winning on only 30% [25, 35]" in with_free(0.24, 2.3, ppo=0.3)
    assert "overlap" in with_free(0.24, 2.3, ppo=0.75) and "overlap" not in with_free(0.24, 2.3)


def test_the_page_escapes_and_fetches_nothing(tmp_path: Path) -> None:
    page = write_demo_page(tmp_path, comparison(), HOW)
    check_that_nothing_is_fetched(page)
    html = page.read_text(encoding="utf-8")
    assert "<svg" not in html and "<img" not in html and "&lt;svg/onload=alert(2)&gt;" in html
    # a KL estimate below 0 has no root
    assert page_data(html)["figures"]["paths"]["series"][0]["x"][0] == 0
    assert "SFT, PPO and DPO on one task, with and without the KL term" in html


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("report", "https://example.org/x"),
        ("report", "//example.org"),
        ("report", "javascript:alert(1)"),
        ("color", "red"),
        ("length", None),
    ],
)
def test_a_result_that_does_not_fit_is_refused(name: str, bad: object) -> None:
    with pytest.raises(ValidationError, match=name):
        method("ppo", 0.8, 1.0, **{name: bad})


def test_it_alarms_on_a_reward_model_that_knows_only_length() -> None:
    demo = comparison()
    assert demo_alarms(demo) == []
    longer = (*demo.methods[:3], method("ppo_no_kl", 0.24, 2.3, length=40.0))
    short_sighted = replace(REWARD_MODEL, length_only=m(0.69, 0.02))
    told = demo_alarms(replace(demo, methods=longer, reward_model=short_sighted))
    assert len(told) == 2 and "not shown to know more than length" in told[0]
    assert "PPO without KL answers in 40.0 tokens where SFT takes 14.0" in told[1]


def test_a_new_row_of_the_table_stands_in_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = verbs.Variant("nudge", "reinforce", "Nudging", "purple")
    monkeypatch.setattr(verbs, "VARIANTS", [*verbs.VARIANTS, row])
    demo = comparison(method("sft", None, 0.0), method("third", 0.9, 1.0, method="nudge"))
    demo = replace(
        demo, paths={"third": (PathPoint(0, 0.0, 0.0, 0.5), PathPoint(3, 1.0, 1.0, 1.0))}
    )
    html = write_demo_page(tmp_path, demo, HOW).read_text(encoding="utf-8")
    assert "SFT and Nudging on one task" in html and "with and without" not in html
    assert "Nudging beats SFT on 90%" in html and '<a href="third/report.html">Nudging</a>' in html
    curve = page_data(html)["figures"]["paths"]["series"][-1]
    assert (curve["name"], curve["color"]) == ("Nudging", PALETTE["purple"])
