"""The page of a run: sentences no stronger than their intervals, hostile text kept as text, nothing
fetched, nothing failing on a torn folder. No browser.
"""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fiducial import verbs
from fiducial.report import numbers as fmt
from fiducial.report import render
from fiducial.report.answer import answer
from fiducial.report.figures import PALETTE, change, figure, line, method_colour, says, smooth, thin
from fiducial.report.folder import pair, read_run
from fiducial.report.numbers import Estimate
from fiducial.report.page import write_report
from fiducial.report.render import script_json
from histories import Rows, dpo_history, group_history, ppo_history
from pages import EVIL, HOSTILE, check_that_nothing_is_fetched, page_data


def folder(
    path: Path,
    history: Rows | None = None,
    samples: Rows | None = None,
    summary: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in (("metrics.jsonl", history), ("samples.jsonl", samples)):
        if rows is not None:
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Something small in place of plotly's four megabytes."""
    render.plotly_digest.cache_clear()
    monkeypatch.setattr(render, "plotly_script", lambda: b"// stands in for four megabytes")
    yield
    render.plotly_digest.cache_clear()


# ---- numbers


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (1.0, "1.00"),
        (2.4, "2.40"),
        (12.345, "12.3"),
        (123.4, "123"),
        (9.999, "10.0"),
        (1234.5, "1,230"),
        (1234567, "1,230,000"),
        (0.0123456, "0.0123"),
        (0.00123, "0.00123"),
        (0.0000123, "1.23e\u22125"),
        (-0.5, "\u22120.500"),
        (None, "not known"),
        (math.nan, "not finite"),
    ],
)
def test_numbers_carry_three_significant_digits(x: float | None, text: str) -> None:
    assert fmt.number(x) == text


@pytest.mark.parametrize(
    ("e", "text"),
    [
        (Estimate(1.3456, 1.3056, 1.3856), "1.35 [1.31, 1.39]"),
        (Estimate(0.0792, 0.0099, 0.1485), "0.079 [0.010, 0.148]"),
        (Estimate(-40.41, -40.61, -40.21), "\u221240.4 [\u221240.6, \u221240.2]"),
        (Estimate(12345, 12145, 12545), "12,300 [12,100, 12,500]"),
        (Estimate(2.0), "2.00"),
        (Estimate(2.0, 2.0, 2.0), "2.00"),
        (Estimate(0.999, 0.99896, 0.99904), "0.999 [0.99896, 0.99904]"),
        (Estimate(1.0, 0.2065, 1.0), "1.00 [0.21, 1.00]"),  # a share of 1 of 1, Wilson's
        (Estimate(0.0, 0.0, 0.0037), "0.0000 [0.0000, 0.0037]"),
        (Estimate(4e-4, 1e-5, 9e-4), "4.00e\u22124 [1.00e\u22125, 9.00e\u22124]"),
        (Estimate(0.2, -0.02, 0.4), "0.20 [\u22120.02, 0.40]"),
        (Estimate(2.0, -math.inf, math.inf), "2.00"),
        (None, "not measured"),
    ],
)
def test_estimates_are_written_with_both_ends_of_their_interval(
    e: Estimate | None, text: str
) -> None:
    assert fmt.with_interval(e).replace("\u00a0", " ") == text


def test_shares_counts_times_and_sizes() -> None:
    assert fmt.percent(Estimate(0.812, 0.762, 0.862)).replace("\u00a0", " ") == "81% [76, 86]"
    assert fmt.percent(Estimate(0.504, 0.498, 0.510)).replace("\u00a0", " ") == "50.4% [49.8, 51.0]"
    assert fmt.percent(Estimate(0.99, 0.9455, 0.9982)).replace("\u00a0", " ") == "99% [95, 100]"
    assert fmt.percent(0.752) == "75.2%"
    assert fmt.count(12345) == "12,345"
    assert [fmt.duration(s).replace("\u00a0", " ") for s in (12.34, 200, 3720, 97200)] == [
        "12.3 s",
        "3 min 20 s",
        "1 h 02 min",
        "1 d 03 h",
    ]
    assert fmt.size(3.21 * 2**30).replace("\u00a0", " ") == "3.21 GiB"


def test_the_mean_has_students_interval() -> None:
    e = fmt.mean_of([1.0, 2.0, 3.0, 4.0, 5.0])  # s = sqrt(2.5), t(4) = 2.776
    assert e.value == 3 and e.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=0.02)
    assert fmt.mean_of([1.0, 2.0]).half is None


# ---- the answer


@pytest.mark.parametrize(
    ("method", "title"), [("grpo", "GRPO run"), ("reinforce", "REINFORCE run")]
)
def test_a_run_without_value_model_is_told_by_its_reward_and_speaks_of_none(
    tmp_path: Path, method: str, title: str
) -> None:
    rows = group_history("ppo_clip" if method == "grpo" else "reinforce")
    path = folder(
        tmp_path / "run",
        rows,
        summary={"status": "done", "metrics": rows[-1]},
        config={"method": method},
    )
    told = answer(read_run(path))
    assert (
        told[0].startswith("Reward rose from")
        and "nats per response from the reference" in told[0]
        and len(told) == 2
    )
    html = write_report(path).read_text(encoding="utf-8")
    assert (
        title in html
        and "No alarm fired" in html
        and "critic" not in html.lower()
        and "no description of it" not in html
    )


def test_the_answer_weakens_when_one_half_is_inside_the_interval(tmp_path: Path) -> None:
    def told(low: float, high: float) -> str:
        held = {"value": (low + high) / 2, "low": low, "high": high, "n": 256}
        return tell(
            tmp_path,
            "reward",
            [{"step": i, "accuracy": 0.6} for i in range(1, 9)],
            **{"accuracy on held-out pairs": held},
        )

    assert told(0.76, 0.86) == (
        "The reward model scores the chosen answer higher on 81% [76, 86] of held-out pairs "
        "(n = 256)."
    )
    assert told(0.48, 0.58).startswith(
        "It is not shown to do better than a coin flip: 53% [48, 58]"
    )
    assert told(0.2, 0.3).startswith("It does worse than a coin flip: the reward model scores")
    assert "on only 25% [20, 30]" in told(0.2, 0.3)


def tell(tmp_path: Path, method: str, rows: Rows, **evaluation: Any) -> str:
    """The answer of a finished run of a method, in one line."""
    summary = {"status": "done", "evaluation": evaluation}
    path = folder(tmp_path, rows, summary=summary, config={"method": method})
    return " ".join(answer(read_run(path))).replace("\u00a0", " ")


def test_the_answer_for_preferences_and_rewards(tmp_path: Path) -> None:
    def told(rows: Rows, **evaluation: Any) -> str:
        method = "dpo" if "rewards/accuracies" in rows[0] else "reward"
        return tell(tmp_path, method, rows, **evaluation)

    def e(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half, "n": 400}

    implicit, held = "implicit reward accuracy on held-out pairs", "accuracy on held-out pairs"
    length = "length alone: the longer wins"
    rm = [{"step": i, "accuracy": 0.6, "margin": 0.3} for i in range(1, 20)]
    assert "prefers the chosen answer, relative to the reference, on 72% [68, 76]" in told(
        dpo_history(), **{implicit: e(0.72, 0.04)}
    )
    both = told(rm, **{length: e(0.6, 0.03), held: e(0.7, 0.03)})
    assert "on 70% [67, 73] of held-out pairs" in both
    assert "by length alone is right on 60% [57, 63]: it knows more than length." in both
    assert "not shown to do better than a coin flip" in told(
        dpo_history(), **{implicit: e(0.52, 0.04)}
    )
    assert "held-out pairs were not measured" in told(dpo_history())
    assert "not shown to know more than length" in told(
        rm, **{length: e(0.6, 0.03), held: e(0.64, 0.03)}
    )
    assert "no interval was recorded" in told([*rm, {"step": 20, "eval/accuracy": 0.7}])


def test_a_number_without_interval_never_beats_anything(tmp_path: Path) -> None:
    held = {"value": 0.9, "low": -math.inf, "high": math.inf, "n": 3}  # all rows of one prompt
    run = folder(
        tmp_path,
        [{"step": 1, "accuracy": 0.9}],
        summary={"status": "interrupted", "evaluation": {"accuracy on held-out pairs": held}},
        config={"method": "reward"},
    )
    told = answer(read_run(run))
    assert told[0].endswith("on 90.0% of held-out pairs; no interval was recorded.")
    assert "interrupted" in told[-1]
    assert "90.0% (no interval recorded)" in write_report(run).read_text(encoding="utf-8")


def test_trends_are_named_only_when_they_clear_the_noise() -> None:
    noise = random.Random(0)
    flat, up = (
        [noise.gauss(0, 1) for _ in range(200)],
        [i / 20 + noise.gauss(0, 1) for i in range(200)],
    )
    assert change(flat) == 0 and change(up) == 1 and change(up[::-1]) == -1
    assert (
        "no clear trend" in says("Reward", flat)
        and "rises from" in says("KL", up, "nats per token")
        and says("KL", up, "nats").endswith(" nats")
    )


# ---- the page


def test_hostile_text_is_never_markup(tmp_path: Path) -> None:
    samples = [
        {
            "step": s,
            "prompt": HOSTILE,
            "completion": EVIL + str(s),
            "score": 0.5,
            "tokens": 3,
            "finished": True,
        }
        for s in (0, 9)
    ]
    summary: dict[str, Any] = {
        "status": EVIL,
        "command": HOSTILE,
        "machine": EVIL,
        "versions": {EVIL: EVIL},
    }
    summary["evaluation"] = {EVIL: {"value": 1.0, "low": 0, "high": 2, "n": 3}}
    rows = [{"step": i, EVIL: i, "loss": 1.0 / i} for i in range(1, 9)]
    html = write_report(
        folder(tmp_path, rows, samples, summary, {"method": EVIL, "note": HOSTILE})
    ).read_text(encoding="utf-8")
    assert (
        "<img" not in html
        and "<svg" not in html
        and "\u2028" not in html.split('id="data">')[1]
        and "<!--" not in html
    )
    assert html.count("<script") == html.count("</script>") == 3  # plotly, the data, our own
    assert "{{ 7*7 }}" in html or "7*7" in html
    data = page_data(html)
    assert (
        data["samples"][0]["p"] == HOSTILE and data["samples"][0]["b"]["t"] == EVIL + "9"
    )  # kept as it was said


def test_script_json_is_ascii_and_has_no_markup() -> None:
    text = str(script_json({"a": HOSTILE, "b": [math.nan, 1.5], "&": math.inf}))
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": [None, 1.5], "&": None}


def test_nothing_is_fetched_and_only_our_script_runs(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", ppo_history(), summary={"status": "done"})
    page = write_report(run)
    check_that_nothing_is_fetched(page)


def test_plotly_is_written_once_and_again_where_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path, ppo_history())
    page, script = write_report(run), run / "plotly.min.js"
    assert script.read_text() == "// stands in for four megabytes"
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    assert f'<script src="plotly.min.js" data-sha256="{digest}" defer>' in page.read_text()
    os.utime(script, (0, 0))
    write_report(run)
    assert script.stat().st_mtime == 0
    outside = tmp_path / "outside.js"
    outside.write_text("mine")
    for harm in (
        lambda: script.write_text("fetch('http://example.org')"),
        lambda: (script.unlink(), script.symlink_to(outside)),
        lambda: (tmp_path / f".plotly.min.js.{os.getpid()}").symlink_to(outside),
        script.unlink,
    ):
        harm()
        write_report(run)
        assert hashlib.sha256(script.read_bytes()).hexdigest() == digest
        assert outside.read_text() == "mine" and not script.is_symlink()
    monkeypatch.undo()
    render.plotly_digest.cache_clear()
    write_report(run)
    assert script.stat().st_size > 1_000_000
    assert not list(run.glob(".plotly*"))  # nothing half-written is left


def test_missing_and_torn_files_are_said_not_fatal(tmp_path: Path) -> None:
    html = write_report(folder(tmp_path / "none")).read_text(encoding="utf-8")
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json"):
        assert f"{name} is missing" in html
    torn = folder(tmp_path / "torn", ppo_history(steps=10))
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "rew')
    (torn / "summary.json").write_text('{"status": ')
    (torn / "config.yaml").write_text("a: [1")
    (torn / "samples.jsonl").write_bytes(
        b'\xff\xfe\n["not an object"]\n{"step": 1, "prompt": 3, "completion": "x"}\n'
    )
    run = read_run(torn)
    assert len(run.history) == 10 and not [
        note for note in run.notes if "metrics" in note
    ]  # a half-written last line is ordinary
    html = write_report(torn).read_text(encoding="utf-8")
    assert (
        "summary.json could not be read" in html
        and "config.yaml could not be read" in html
        and "samples.jsonl: 2 of 3 lines" in html
    )
    odd = {
        "metrics": 3,
        "evaluation": [1],
        "versions": "x",
        "steps": "many",
        "model": "m",
        "data": {"--data": 3},
        "command": 7,
    }
    assert write_report(
        folder(tmp_path / "odd", [{"step": 1, "loss": None}], summary=odd)
    ).is_file()


def test_long_curves_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    rows = ppo_history(steps=3000)
    rows[1234]["reward"] = 99.0
    html = write_report(folder(tmp_path / "long", rows, config={"method": "ppo"})).read_text(
        encoding="utf-8"
    )
    assert "Curves are thinned for display: 3,000 points" in html
    drawn = page_data(html)["figures"]["decide0"]["series"]
    assert (
        all(len(s["x"]) <= 1000 for s in drawn)
        and max(drawn[0]["y"]) == 99.0
        and drawn[0]["x"][-1] == 3000
    )
    assert "thinned" not in write_report(
        folder(tmp_path / "short", ppo_history(steps=50))
    ).read_text(encoding="utf-8")


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [(float(i), math.sin(i / 7) + (50 if i == 777 else 0)) for i in range(5000)]
    kept = thin(points, 100)
    assert (
        len(kept) <= 100
        and kept[0] == points[0]
        and kept[-1] == points[-1]
        and points[777] in kept
        and kept == sorted(kept)
    )
    assert thin(points[:100], 100) == points[:100]


def test_smoothing_is_a_mean_of_neighbors() -> None:
    points = [(float(i), float(i % 2)) for i in range(80)]
    x, y = smooth(points)[40]
    # two neighbors on each side of an even place: 0 1 0 1 0
    assert x == 40.0 and y == pytest.approx(2 / 5)
    assert smooth(points[:39]) == []


def test_the_healthy_band_stays_inside_the_axis_and_shows_what_was_left() -> None:
    low, high = (
        inside := figure(
            "t", "y", line("a", [(0, 0.02), (1, 0.05)], "#000000"), healthy=(0.01, 0.1)
        )
    )["range"]
    assert high < 0.1 and inside["band"] == [low if low > 0.01 else 0.01, high]
    outside = figure("t", "y", line("a", [(0, 0.3), (1, 0.4)], "#000000"), healthy=(None, 0.02))
    assert outside["range"][0] < 0.02 and outside["band"][1] == 0.02


def test_samples_pair_the_first_with_the_last_and_hide_none() -> None:
    def row(step: int, text: str, prompt: str = "p") -> dict[str, Any]:
        return {
            "step": step,
            "prompt": prompt,
            "completion": text,
            "score": math.nan if text == "b" else 1.0,
            "tokens": 2,
            "finished": True,
        }

    pairs = pair(
        [
            row(0, "a"),
            row(0, "a2"),
            row(5, "b"),
            row(5, "b2"),
            row(9, "c"),
            row(9, "c2"),
            row(9, "alone", "q"),
        ]
    )
    assert [(s["p"], s["a"] and s["a"]["t"], s["b"]["t"]) for s in pairs] == [
        ("p", "a", "c"),
        ("p", "a2", "c2"),
        ("q", None, "alone"),
    ]
    assert pair([row(0, "b")])[0]["b"]["score"] is None


def test_ten_thousand_samples_are_paged_and_counted(tmp_path: Path) -> None:
    samples = [
        {
            "step": s,
            "prompt": f"p{i}",
            "completion": "x",
            "score": s * (i % 4 - 1),
            "tokens": 1,
            "finished": True,
        }
        for i in range(10_000)
        for s in (0, 1)
    ]
    html = write_report(folder(tmp_path, samples=samples)).read_text(encoding="utf-8")
    assert len(page_data(html)["samples"]) == 10_000 and html.count("<article") == 0
    assert "The score rose on 5,000, fell on 2,500 and stayed the same on 2,500." in html


def test_metric_names_open_their_sentence_and_constants_need_no_picture(tmp_path: Path) -> None:
    html = write_report(folder(tmp_path, ppo_history(), config={"method": "ppo"})).read_text(
        encoding="utf-8"
    )
    assert "<summary>KL to the reference</summary>" in html and "It starts at 0 and grows" in html
    assert "ratio/first = 1 " in html and "PPO run" in html


def test_title_color_kind_and_deciding_metrics_come_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = verbs.Method(
        name="nudge",
        summary="A method that a test makes up.",
        settings="",
        run="",
        title="Nudging",
        colour="sky",
        kind="policy",
        decides=("reward", "nudges"),
    )
    rows = [{**r, "nudges": 3.0 * r["step"]} for r in ppo_history()]
    path = folder(tmp_path / "one", rows, config={"method": "nudge"})
    general = write_report(path).read_text(encoding="utf-8")
    assert "nudge run: one" in general and "Nudging" not in general
    monkeypatch.setattr(verbs, "METHODS", [*verbs.METHODS, row])
    html = write_report(path).read_text(encoding="utf-8")
    assert "Nudging run: one" in html and answer(read_run(path))[0].startswith("Reward rose from")
    assert "nudges" in html.split("The picture that decides")[0]
    assert page_data(html)["figures"]["decide0"]["series"][-1]["color"] == PALETTE["sky"]


def test_a_method_that_the_table_does_not_know_gets_a_general_page(tmp_path: Path) -> None:
    rows: Rows = [{"step": i, "regret": 9.0 - i / 10, "loss": 1.0 / i} for i in range(1, 41)]
    path = folder(tmp_path, rows, summary={"status": "done"}, config={"method": "mine"})
    told = answer(read_run(path))
    assert told[0].startswith("regret fell from") and told[1].startswith("Loss fell from")
    html = write_report(path).read_text(encoding="utf-8")
    assert page_data(html)["figures"]["decide0"]["title"].startswith("regret falls from")
    assert method_colour("mine") == PALETTE["green"]
    assert answer(read_run(folder(tmp_path / "empty")))[0].startswith("This run has not recorded")


def test_every_colour_of_the_table_is_in_the_palette() -> None:
    rows: list[verbs.Method | verbs.Variant] = [*verbs.METHODS, *verbs.VARIANTS]
    assert {row.colour for row in rows} <= set(PALETTE)
    assert [method_colour(name) for name in ("ppo", "remax", "reinforce_none")] == [
        "#0072B2",
        "#E69F00",
        "ink",
    ]


def test_the_page_names_model_and_data_with_their_sums(tmp_path: Path) -> None:
    summary = {
        "status": "done",
        "model": {"name": "runs/sft/model", "sha256": "a1" * 32},
        "data": {
            "--data": {"source": "pairs.jsonl", "sha256": "b2" * 32},
            "--reward": {"source": "runs/reward/model", "sha256": "c3" * 32},
        },
    }
    html = write_report(folder(tmp_path, ppo_history(), summary=summary)).read_text("utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts["Model"] == f"runs/sft/model, SHA-256 {'a1' * 32}"
    assert facts["--data"] == f"pairs.jsonl, SHA-256 {'b2' * 32}"
    assert facts["--reward"] == f"runs/reward/model, SHA-256 {'c3' * 32}"
    missing = re.search(r"Not recorded: (.*?)\.</p>", html)
    assert missing and "Model" not in missing[1] and "Data" not in missing[1]
    html = write_report(folder(tmp_path, summary={"status": "done"})).read_text("utf-8")
    missing = re.search(r"Not recorded: (.*?)\.</p>", html)
    assert missing and missing[1].startswith("Model, Data, Seed")


def test_the_settings_of_report_are_read_without_torch_or_plotly() -> None:
    code = "import sys, fiducial.report.command; print({'torch', 'plotly'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_reward_model_says_nothing_and_its_page_misses_no_samples(tmp_path: Path) -> None:
    rows: Rows = [{"step": i, "accuracy": 0.6} for i in range(1, 9)]
    silent = write_report(folder(tmp_path / "rm", rows, config={"method": "reward"}))
    assert "What it said" not in (html := silent.read_text("utf-8")) and "samples.jsonl" not in html
    speaks = write_report(folder(tmp_path / "dpo", dpo_history(), config={"method": "dpo"}))
    html = speaks.read_text("utf-8")
    assert "What it said" in html and "samples.jsonl is missing" in html
