"""The pages: sentences no stronger than their intervals, hostile text kept as text, nothing
fetched, nothing failing on a torn folder. No browser.
"""

import base64
import copy
import hashlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fiducial.demo.page import demo_alarms, demo_answer, read_demo, write_demo_page
from fiducial.errors import InputError
from fiducial.metrics import GROUPS, METRICS, alarms, lookup
from fiducial.report import numbers as fmt
from fiducial.report.answer import answer
from fiducial.report.figures import change, figure, line, says, smooth, thin
from fiducial.report.folder import pair, read_run
from fiducial.report.numbers import Estimate
from fiducial.report.page import write_report
from fiducial.report.render import script_json

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!--<b>\ud800 {{ 7*7 }}"
EVIL = "<svg/onload=alert(2)>"


Rows = list[dict[str, Any]]


def folder(
    path: Path,
    history: Rows | None = None,
    samples: Rows | None = None,
    summary: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "plotly.min.js").write_text("// stands in for four megabytes")
    for name, rows in (("metrics.jsonl", history), ("samples.jsonl", samples)):
        if rows is not None:
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def page_data(html: str) -> dict[str, Any]:
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert block is not None
    return json.loads(block.group(1))  # type: ignore[no-any-return]


def ppo_history(steps: int = 40, **change: Any) -> list[dict[str, Any]]:
    """A healthy PPO run; `change` replaces a metric by a function of the share of the run done."""
    noise = random.Random(0)
    healthy: dict[str, Any] = {
        "reward": lambda t: t,
        "objective/kl": lambda t: 2 * t,
        "kl": lambda t: 0.1 * t,
        "entropy": lambda t: 2 - t,
        "clip_ratio": lambda t: 0.05,
        "approx_kl": lambda t: 0.01,
        "ratio/first": lambda t: 1.0,
        "explained_variance": lambda t: t - 0.2,
        "completions/finished": lambda t: 0.97,
        "completions/mean_length": lambda t: 20 + t,
        "sampler_gap": lambda t: 1e-4,
        "epochs_done": lambda t: 4,
        "loss": lambda t: 0.0,
    }
    rows = []
    for i in range(1, steps + 1):
        row = {"step": i, "seconds": float(i)}
        for name, value in {**healthy, **change}.items():
            noisy = name in ("reward", "objective/kl", "kl", "explained_variance", "entropy")
            row[name] = value(i / steps) + (0.001 * noise.gauss(0, 1) if noisy else 0)
        rows.append(row)
    return rows


def group_history(loss: str = "ppo_clip", **change: Any) -> list[dict[str, Any]]:
    """A healthy run without a critic: of grpo with one update a batch, gspo or cispo with several,
    or reinforce.
    """
    rows = ppo_history(
        **{"groups/no_spread": lambda t: 0.2 + 0.2 * t, "groups/sampled": lambda t: 8, **change}
    )
    own: dict[str, dict[str, float]] = {
        "ppo_clip": {"clip_ratio": 0.0, "approx_kl": 0.0, "ratio": 1.0, "ratio/max": 1.0},
        "gspo": {"clip_ratio/responses": 0.24, "approx_kl": 1e-4},
        "cispo": {"clip_ratio/capped": 0.0, "approx_kl": 1e-3},
        "reinforce": {},
    }
    gone = {"explained_variance", "epochs_done", "loss", "clip_ratio", "approx_kl"} | (
        {"ratio/first"} if loss == "reinforce" else set()
    )
    return [{k: v for k, v in row.items() if k not in gone} | own[loss] for row in rows]


def dpo_history(
    steps: int = 40, chosen: float = -1.0, accuracy: float = 0.7, margin: float = 1.0
) -> list[dict[str, Any]]:
    return [
        {
            "step": i,
            "loss": 0.69 - 0.2 * i / steps,
            "rewards/accuracies": 0.5 + (accuracy - 0.5) * min(1, 10 * i / steps),
            "rewards/margins": margin * i / steps,
            "logps/chosen": -40 + chosen * i / steps,
            "logps/rejected": -42 - 9 * i / steps,
        }
        for i in range(1, steps + 1)
    ]


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
        (Estimate(1.3456, 1.3056, 1.3856), "1.35 ± 0.04"),
        (Estimate(0.0792, 0.0099, 0.1485), "0.079 ± 0.069"),
        (Estimate(-40.41, -40.61, -40.21), "\u221240.4 ± 0.2"),
        (Estimate(12345, 12145, 12545), "12,300 ± 200"),
        (Estimate(2.0), "2.00"),
        (Estimate(2.0, 2.0, 2.0), "2.00"),
        (Estimate(0.999, 0.99896, 0.99904), "0.999 ± 0.00004"),
        (None, "not measured"),
    ],
)
def test_estimates_are_written_with_half_their_interval(e: Estimate | None, text: str) -> None:
    assert fmt.with_interval(e).replace("\u00a0", " ") == text


def test_shares_counts_times_and_sizes() -> None:
    assert fmt.percent(Estimate(0.812, 0.762, 0.862)).replace("\u00a0", " ") == "81% ± 5"
    assert fmt.percent(Estimate(0.504, 0.498, 0.510)).replace("\u00a0", " ") == "50.4% ± 0.6"
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


# ---- the registry and its alarms


def test_every_metric_says_what_it_is_and_what_to_do() -> None:
    for name, metric in METRICS.items():
        assert metric.title and metric.group in GROUPS and metric.sentence.endswith("."), name
        assert len(metric.sentence) > 60 and "  " not in metric.sentence, name
        assert metric.healthy is None or metric.healthy != (None, None), name
    assert METRICS["ratio/first"].healthy == (0.999, 1.001)


def test_lookup_knows_held_out_and_unknown_names() -> None:
    assert lookup("eval/rewards/accuracies").title == "Preference accuracy, held out"
    assert lookup("eval/accuracy").healthy == METRICS["accuracy"].healthy
    assert lookup("my/own").title == "my/own" and lookup("my/own").healthy is None


def test_healthy_runs_raise_no_alarm() -> None:
    assert alarms(ppo_history()) == []
    assert alarms(dpo_history()) == []
    assert [alarms(group_history(loss)) for loss in ("ppo_clip", "gspo", "cispo", "reinforce")] == [
        []
    ] * 4
    assert (
        alarms([{"step": i, "loss": 1 / i, "eval/loss": 1 / i + 0.1} for i in range(1, 30)]) == []
    )
    assert (
        alarms(
            [
                {"step": i, "accuracy": 0.66, "margin": 0.5, "eval/accuracy": 0.65}
                for i in range(1, 30)
            ]
        )
        == []
    )
    assert alarms([]) == []
    noise = random.Random(1)  # a KL estimate that scatters around 0 is no alarm
    assert (
        alarms(
            ppo_history(
                **{"objective/kl": lambda t: noise.gauss(0, 1), "kl": lambda t: noise.gauss(0, 0.1)}
            )
        )
        == []
    )
    assert (
        alarms(ppo_history(clip_ratio=lambda t: 0.0, epochs_done=lambda t: 1)) == []
    )  # one pass over the batch cannot clip


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ppo_history(**{"objective/kl": lambda t: -0.4}), ["-0.4", "nats per response", "top-k"]),
        (
            ppo_history(**{"ratio/first": lambda t: 1.02 if t == 0.5 else 1.0}),
            ["1.02 at step 20", "must be 1", "dropout"],
        ),
        (
            ppo_history(sampler_gap=lambda t: 0.2 if t == 1 else 0.001),
            ["0.2 nats at step 40", "heuristic", "sync"],
        ),
        (ppo_history(explained_variance=lambda t: -0.5), ["-0.5", "heuristic", "critic"]),
        (
            ppo_history(approx_kl=lambda t: 0.08),
            ["0.08 nats a token", "heuristic", "learning rate"],
        ),
        (ppo_history(clip_ratio=lambda t: 0.3), ["30% of tokens", "heuristic"]),
        (ppo_history(clip_ratio=lambda t: -0.0001), ["timid", "heuristic"]),
        (
            group_history(**{"groups/no_spread": lambda t: t}),
            ["88.8% of the groups", "heuristic", "middling difficulty"],
        ),
        (
            ppo_history(**{"completions/finished": lambda t: 0.5}),
            ["50% of responses", "heuristic", "max_new_tokens"],
        ),
        (
            ppo_history(**{"completions/mean_length": lambda t: 30 + 40 * t}),
            ["from 32.5 to 65.5 tokens", "heuristic", "length"],
        ),
        (ppo_history(entropy=lambda t: 2 * math.exp(-9 * t)), ["Entropy", "heuristic", "beta"]),
        (dpo_history(chosen=-80), ["nats per response", "heuristic", "raise beta"]),
        (
            [{**row, "completions/mean_length": 10.0} for row in dpo_history(chosen=-20)],
            ["nats a token", "heuristic"],
        ),
        (dpo_history(accuracy=1.0), ["first third", "heuristic", "look at them"]),
        (dpo_history(margin=-1.0), ["below 0", "exchanged"]),
        (
            [
                {"step": i, "accuracy": 0.97, "margin": 3.0, "eval/accuracy": 0.6}
                for i in range(1, 30)
            ],
            ["0.97", "0.6 on held-out", "heuristic"],
        ),
        (
            [{"step": i, "eval/loss": abs(i - 10) / 10 + 1} for i in range(1, 30)],
            ["from 1 at step 10 to 2.9", "stop near step 10"],
        ),
        (
            [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}],
            ["loss is not finite at step 2"],
        ),
    ],
)
def test_each_alarm_fires_alone_with_its_number_and_its_remedy(
    rows: list[dict[str, Any]], words: list[str]
) -> None:
    (sentence,) = alarms(rows)
    assert [word for word in words if word not in sentence] == []
    assert sentence.endswith(".")


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
        summary = {
            "status": "done",
            "evaluation": {
                "win_rate": {"value": (low + high) / 2, "low": low, "high": high, "n": 256}
            },
        }
        return answer(read_run(folder(tmp_path, ppo_history(), summary=summary)))[0].replace(
            "\u00a0", " "
        )

    assert (
        told(0.76, 0.86)
        == "It beats the model it started from on 81% ± 5 of held-out prompts (n = 256)."
    )
    assert "not shown to beat" in told(0.48, 0.58) and "one half is not excluded" in told(
        0.48, 0.58
    )
    assert told(0.2, 0.3).startswith("It loses")


def test_the_answer_for_preferences_and_rewards(tmp_path: Path) -> None:
    def told(rows: list[dict[str, Any]], **evaluation: Any) -> str:
        return " ".join(
            answer(
                read_run(
                    folder(tmp_path, rows, summary={"status": "done", "evaluation": evaluation})
                )
            )
        ).replace("\u00a0", " ")

    def e(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half, "n": 400}

    rm = [{"step": i, "accuracy": 0.6, "margin": 0.3} for i in range(1, 20)]
    assert "prefers the chosen answer, relative to the reference, on 72% ± 4" in told(
        dpo_history(), **{"rewards/accuracies": e(0.72, 0.04)}
    )
    assert "prefers" in told(
        dpo_history(), **{"implicit reward accuracy on held-out pairs": e(0.72, 0.04)}
    )
    named = {
        "length alone: the longer wins": e(0.6, 0.03),
        "accuracy on held-out pairs": e(0.7, 0.03),
    }
    assert "on 70% ± 3 of held-out pairs" in told(
        rm, **named
    ) and "by length alone is right on 60% ± 3: it knows more" in told(rm, **named)
    assert "not shown to do better than a coin flip" in told(
        dpo_history(), **{"rewards/accuracies": e(0.52, 0.04)}
    )
    assert "held-out pairs were not measured" in told(dpo_history())
    assert "knows more than length" in told(rm, accuracy=e(0.7, 0.03), length_only=e(0.6, 0.03))
    assert "not shown to know more than length" in told(
        rm, accuracy=e(0.64, 0.03), length_only=e(0.6, 0.03)
    )
    assert "carries no interval" in told([*rm, {"step": 20, "eval/accuracy": 0.7}])


def test_a_bare_number_never_beats_anything(tmp_path: Path) -> None:
    run = folder(
        tmp_path, ppo_history(), summary={"status": "interrupted", "evaluation": {"win_rate": 0.9}}
    )
    told = answer(read_run(run))
    assert "not shown to beat" in told[0] and "interrupted" in told[-1]


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
    for page in (write_report(run), write_demo_page(tmp_path / "demo", demo_data())):
        html = page.read_text(encoding="utf-8")
        links = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)["']""", html)
        assert "plotly.min.js" in links and not [
            link for link in links if ":" in link or link.startswith("/")
        ]
        assert (
            "http" not in html.replace("http-equiv", "")
            and "@import" not in html
            and "url(" not in html
        )
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
        own = re.findall(r"<script>(.*?)</script>", html, re.S)
        assert policy and len(own) == 1 and "default-src &#39;none&#39;" in policy.group(1)
        assert base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode() in policy.group(
            1
        )
        assert (page.parent / "plotly.min.js").is_file() and "innerHTML" not in html


def test_plotly_is_written_once(tmp_path: Path) -> None:
    run = folder(tmp_path, ppo_history())
    write_report(run)
    assert (run / "plotly.min.js").read_text() == "// stands in for four megabytes"
    (run / "plotly.min.js").unlink()
    write_report(run)
    assert (run / "plotly.min.js").stat().st_size > 1_000_000
    assert not list(run.glob(".*"))  # nothing half-written is left


def test_missing_and_torn_files_are_said_not_fatal(tmp_path: Path) -> None:
    html = write_report(folder(tmp_path / "none")).read_text(encoding="utf-8")
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json"):
        assert f"{name} is missing" in html
    torn = folder(tmp_path / "torn", ppo_history(10))
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
        "reliability": [{"predicted": "a"}],
        "command": 7,
    }
    assert write_report(
        folder(tmp_path / "odd", [{"step": 1, "loss": None}], summary=odd)
    ).is_file()


def test_long_curves_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    rows = ppo_history(3000)
    rows[1234]["reward"] = 99.0
    html = write_report(folder(tmp_path / "long", rows)).read_text(encoding="utf-8")
    assert "Curves are thinned for display: 3,000 points" in html
    drawn = page_data(html)["figures"]["decide0"]["series"]
    assert (
        all(len(s["x"]) <= 1000 for s in drawn)
        and max(drawn[0]["y"]) == 99.0
        and drawn[0]["x"][-1] == 3000
    )
    assert "thinned" not in write_report(folder(tmp_path / "short", ppo_history(50))).read_text(
        encoding="utf-8"
    )


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


def test_smoothing_is_a_mean_of_neighbours() -> None:
    points = [(float(i), float(i % 2)) for i in range(80)]
    assert smooth(points)[40] == (
        40.0,
        pytest.approx(2 / 5),
    )  # two neighbours each side of an even place: 0 1 0 1 0
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
    assert "The score rose on 5,000, fell on 2,500 and stayed on 2,500." in html


def test_metric_names_open_their_sentence_and_constants_need_no_picture(tmp_path: Path) -> None:
    html = write_report(folder(tmp_path, ppo_history(), config={"method": "ppo"})).read_text(
        encoding="utf-8"
    )
    assert "<summary>KL to the reference</summary>" in html and "Starts at 0 and grows" in html
    assert "ratio/first = 1 " in html and "PPO run" in html


# ---- the demo


def demo_data() -> dict[str, Any]:
    def m(value: float, half: float = 0.05, n: int = 400) -> dict[str, Any]:
        return {"value": value, "low": value - half, "high": value + half, "n": n}

    def method(key: str, win: float | None, proxy: float, length: float = 14.0) -> dict[str, Any]:
        return {
            "key": key,
            "gold": m(0.5),
            "proxy": m(proxy),
            "length": length,
            "models_held": ["policy"],
            "train_seconds": 60.0,
            "responses_sampled": 0,
            "reward_model": False,
            "critic": False,
            "online": False,
            "win_rate": m(win) if win is not None else None,
            "kl": m(2.4, 0.1) if win is not None else None,
        }

    return {
        "seed": 0,
        "command": "fiducial demo",
        "machine": "2 cores",
        "versions": {"torch": "2.6"},
        "timings": {"SFT": 10.0},
        "methods": [
            method("sft", None, 0.0),
            method("ppo", 0.81, 1.2),
            method("dpo", 0.7, 1.0),
            method("ppo_no_kl", 0.24, 2.3),
        ],
        "reward_model": {
            "accuracy": m(0.71, 0.02),
            "bayes": 0.75,
            "length_only": m(0.58, 0.02),
            "comparisons": 4000,
        },
        "paths": {
            "ppo": [
                {"step": 0, "kl": -0.01, "proxy": 0.0, "gold": 0.0},
                {"step": 10, "kl": 2.4, "proxy": 1.2, "gold": 1.0},
            ]
        },
        "samples": [
            {
                "prompt": HOSTILE,
                "answers": [{"key": "sft", "text": EVIL, "gold": 0.1, "proxy": 0.2}],
            }
        ],
    }


def with_free(win: float, proxy: float, ppo: float = 0.81) -> str:
    data = demo_data()
    for key, name, value in (
        ("ppo_no_kl", "win_rate", win),
        ("ppo_no_kl", "proxy", proxy),
        ("ppo", "win_rate", ppo),
    ):
        entry = next(method for method in data["methods"] if method["key"] == key)[name]
        entry.update(value=value, low=value - 0.05, high=value + 0.05)
    return " ".join(demo_answer(read_demo(data))).replace("\u00a0", " ")


def test_the_demo_says_hacked_only_when_the_intervals_do() -> None:
    told = with_free(0.24, 2.3)
    assert told.startswith(
        "PPO beats SFT on 81% ± 5 of held-out prompts at 2.40 nats, DPO 70% ± 5 at 2.40 nats. "
        "Without"
    )  # 0.76 > 0.75: told apart
    assert (
        "rose further (1.20 to 2.30) and the true value fell: it beats SFT on only 24% ± 5 of "
        "held-out prompts. The reward was hacked." in told
    )
    assert "over-optimised" in with_free(0.6, 2.3) and "still beats SFT" in with_free(0.6, 2.3)
    assert "not shown to beat SFT (47% ± 5" in with_free(
        0.47, 2.3
    ) and "was hacked" not in with_free(0.47, 2.3)
    assert "does not show that the reward was hacked" in with_free(0.8, 2.3)
    assert "no hacking was seen" in with_free(0.24, 1.25)
    unsure = with_free(0.24, 2.3, ppo=0.53)
    assert unsure.startswith(
        "PPO is not shown to beat SFT (one half is not excluded): 53% ± 5 of held-out prompts at "
        "2.40 nats. DPO beats SFT on 70% ± 5"
    )
    assert "overlap" not in unsure and "These intervals overlap: neither is shown" in with_free(
        0.24, 2.3, ppo=0.79
    )
    assert (
        "DPO loses to SFT, winning on only 70%" not in unsure
        and "PPO loses to SFT, winning on only 30% ± 5" in with_free(0.24, 2.3, ppo=0.3)
    )

    assert "PPO loses to SFT" in with_free(0.24, 2.3, ppo=0.3)
    assert "overlap" in with_free(0.24, 2.3, ppo=0.75) and "overlap" not in with_free(0.24, 2.3)


def test_the_demo_page_escapes_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    html = write_demo_page(tmp_path, demo_data()).read_text(encoding="utf-8")
    assert "<svg" not in html and "<img" not in html and "&lt;svg/onload=alert(2)&gt;" in html
    assert (
        page_data(html)["figures"]["paths"]["series"][0]["x"][0] == 0
    )  # a KL estimate below 0 has no root
    links = [
        ("report", link)
        for link in ("https://example.org/x", "//example.org", "javascript:alert(1)")
    ]
    for key, bad in (*links, ("colour", "red"), ("length", None)):
        data = copy.deepcopy(demo_data())
        data["methods"][1][key] = bad
        with pytest.raises(InputError, match=rf"methods\.1\.{key}"):
            read_demo(data)


def test_the_demo_alarms_on_a_reward_model_that_knows_only_length() -> None:
    assert demo_alarms(read_demo(demo_data())) == []
    data = demo_data()
    data["reward_model"]["length_only"] = {"value": 0.69, "low": 0.67, "high": 0.71, "n": 400}
    data["methods"][3]["length"] = 40.0
    told = demo_alarms(read_demo(data))
    assert (
        len(told) == 2
        and "not shown to know more than length" in told[0]
        and "40.0 tokens where SFT takes 14.0" in told[1]
    )
