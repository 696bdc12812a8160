"""Alarms while a run goes on: each is raised in time by the run that deserves it and by no healthy
one, names settings that the method has, and is the same in the run, after a resume and on the page.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fiducial as fd
from fiducial import verbs
from fiducial.building import Settings
from fiducial.errors import RunError
from fiducial.metrics import METRICS
from fiducial.report.alarms import RULES, Alarms, Watch, alarms
from fiducial.report.endings import ENDINGS
from fiducial.report.page import write_report
from fiducial.report.rules import bounds, factors
from fiducial.report.tracks import KEPT, Setup, flags
from fiducial.run import Run
from fiducial.settings import KLSettings, OptimizerSettings, RunSettings
from histories import Change, Rows, dpo_history, group_history, ppo_history
from pages import page_data
from support import BAD, GOOD, PROMPTS, write_jsonl


def found(rows: Rows, config: dict[str, Any] | None = None) -> list[tuple[str, int | None]]:
    return [(alarm.name, alarm.step) for alarm in alarms(rows, config or {})]


def noisy(mean: float, spread: float, seed: int = 0) -> Callable[[float], float]:
    source = random.Random(seed)
    return lambda t: source.gauss(mean, spread)


def columns(curves: Change, steps: int = 40) -> Rows:
    return [
        {"step": i, **{name: value(i / steps) for name, value in curves.items()}}
        for i in range(1, steps + 1)
    ]


TARGET = {"kl": {"target": 6.0}, "beta": 0.05}
RUNAWAY: Change = {"objective/kl": lambda t: 80 * t, "kl": lambda t: 2 * t}
LONGER: Change = {"completions/mean_length": lambda t: 20 + 40 * t}
ONCE: Change = {"ratio/first": lambda t: 1.02 if t == 0.5 else 1.0}
BAD_RUNS: dict[str, tuple[Rows, int, list[str]]] = {
    "kl-negative": (
        ppo_history({"objective/kl": lambda t: -0.4}),
        10,
        ["-0.4 nats per response", "cannot be true", "--temperature 1"],
    ),
    "kl-negative, per token": (
        [{"step": i, "kl": -0.01 + 0.001 * (i % 3)} for i in range(1, 30)],
        10,
        ["nats per token"],
    ),
    "kl-negative, to a teacher": (
        [{"step": i, "kl_teacher": -0.1 + 0.01 * (i % 3)} for i in range(1, 30)],
        10,
        ["KL to the teacher"],
    ),
    "kl-runaway": (ppo_history(RUNAWAY), 16, ["runs away", "heuristic", "Raise --beta"]),
    "ratio-first": (ppo_history(ONCE), 20, ["1.02", "must be 1", "dropout"]),
    "sampler-gap": (
        ppo_history({"sampler_gap": lambda t: 0.2 if t == 0.75 else 0.001}),
        30,
        ["0.2 nats", "heuristic", "Sync the weights"],
    ),
    "weights": (
        group_history(change={"correction/effective": lambda t: 0.3}),
        10,
        ["30% of the batch", "heuristic", "--long.correction tis"],
    ),
    "weights, dropped": (
        group_history(change={"correction/dropped": lambda t: 0.3}),
        10,
        ["drops 30% of the tokens", "heuristic"],
    ),
    "critic": (
        ppo_history({"explained_variance": noisy(-0.5, 0.1)}, steps=70),
        60,
        ["explained variance -0.", "heuristic", "--critic.learning-rate"],
    ),
    "update-kl": (
        ppo_history({"approx_kl": lambda t: 0.08}),
        10,
        ["0.08 nats per token", "heuristic", "Lower --learning-rate"],
    ),
    "clipping": (
        ppo_history({"clip_ratio": lambda t: 0.3}),
        10,
        ["30% of tokens are clipped", "heuristic"],
    ),
    "clipping, of responses": (
        [row | {"clip_ratio/responses": 0.95} for row in group_history("gspo")],
        10,
        ["95% of tokens lie in clipped responses"],
    ),
    "clipping, of weights": (
        [row | {"clip_ratio/capped": 0.2} for row in group_history("cispo")],
        10,
        ["20% of tokens have a capped weight"],
    ),
    "no-spread": (
        group_history(change={"groups/no_spread": lambda t: t}),
        30,
        ["% of the groups", "heuristic", "medium difficulty", "--group-size"],
    ),
    "no-spread, at all": (
        ppo_history({"reward_std": lambda t: 0.0}),
        5,
        ["All responses got the same reward", "--temperature"],
    ),
    "ends": (
        ppo_history({"completions/finished": lambda t: 1 - 0.6 * t}),
        25,
        ["Ends vanish", "at the start", "--max-new-tokens"],
    ),
    "ends, of the first batch": (
        ppo_history({"completions/finished": lambda t: t if t > 0.03 else 0.0}),
        1,
        ["None of the responses of the first batch", "--stop"],
    ),
    "ends, few": (
        ppo_history({"completions/finished": lambda t: 0.3}),
        10,
        ["Only 30% of the responses", "heuristic"],
    ),
    "ends, fewer than few": (
        ppo_history({"completions/finished": lambda t: 0.2 if t < 0.13 else 0.05}),
        10,
        ["Only 12.5% of"],
    ),
    "length": (
        ppo_history(LONGER),
        24,
        ["tokens while the reward rose", "heuristic", "--score.length-buffer"],
    ),
    "repetition": (
        ppo_history({"completions/repetition": lambda t: t}),
        25,
        ["stood in them before", "heuristic", "--reward"],
    ),
    "entropy-collapse": (
        ppo_history({"entropy": lambda t: 2 * math.exp(-9 * t)}),
        19,
        ["Entropy fell", "heuristic", "Raise --beta"],
    ),
    "reward-range": (
        ppo_history({"calibration/outside": lambda t: t}),
        33,
        ["reward model's", "heuristic", "over-optimization"],
    ),
    "reward-falling": (
        ppo_history(
            {
                "reward": lambda t: 2 * t if t < 0.5 else 1 - 4 * (t - 0.5),
                "reward_std": lambda t: 0.3,
            }
        ),
        33,
        ["The reward fell from", "heuristic"],
    ),
    "gradient-spike": (
        ppo_history({"grad_norm": lambda t: 80.0 if t == 0.5 else 0.5 + 0.3 * math.sin(99 * t)}),
        20,
        ["The norm of the gradient is 80", "heuristic", "--optimizer.warmup-steps"],
    ),
    "gradient-spike, several": (
        ppo_history({"grad_norm": lambda t: 7.0 if t in (0.4, 0.5, 0.6) else 0.5}),
        24,
        ["14 times its median", "3 of them are spikes"],
    ),
    "critic-gradient-spike": (
        ppo_history({"critic/grad_norm": lambda t: 80.0 if t == 0.5 else 0.5}),
        20,
        ["The norm of the critic's gradient", "--critic.learning-rate"],
    ),
    "displacement": (
        dpo_history(chosen=-80),
        20,
        ["nats per response", "heuristic", "Raise --beta"],
    ),
    "margin-negative": (
        dpo_history(margin=-1.0),
        40,
        ["stays below 0", "exchanged in --data"],
    ),
    "loss-rising": (
        columns({"loss": lambda t: 2 + 2 * t}),
        30,
        ["rose from", "heuristic", "Lower --learning-rate"],
    ),
    "loss-rising, at once": (
        columns({"loss": lambda t: 2.0 if t < 0.03 else 8.0 + math.sin(99 * t)}),
        11,
        ["rose from 2 to", "diverges"],
    ),
    "teacher-kl-rising": (
        columns({"kl_teacher": lambda t: 0.2 + 2 * t}),
        20,
        ["KL to the teacher rose"],
    ),
    "not-finite": (
        [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}],
        2,
        ["loss is nan", "Lower --learning-rate"],
    ),
}
"""By the alarm: a history that must raise it alone, the step by which it must, and what it says."""


@pytest.mark.parametrize("case", BAD_RUNS)
def test_each_alarm_is_raised_alone_and_in_time_with_its_number_and_its_remedy(case: str) -> None:
    rows, latest, words = BAD_RUNS[case]
    (alarm,) = alarms(rows, {})
    assert alarm.name == case.partition(",")[0]
    assert alarm.step is not None and alarm.step <= latest
    assert [word for word in words if word not in alarm.text] == []
    assert alarm.text.endswith(".") and "  " not in alarm.text
    row = json.loads(alarm.line())
    assert (row["step"], row["alarm"], row["text"]) == (alarm.step, alarm.name, alarm.text)
    assert row["metric"] in METRICS and row["value"] == pytest.approx(
        alarm.values[row["metric"]], nan_ok=True
    )


def test_every_alarm_has_a_run_that_must_raise_it() -> None:
    raised = {case.partition(",")[0] for case in BAD_RUNS}
    assert raised == {rule.name for rule in RULES} | {"not-finite"}
    assert {ending.name for ending in ENDINGS} == {
        "critic",
        "unclipped",
        "ends",
        "too-easy",
        "memorized",
        "overfit",
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"clip_ratio": lambda t: 0.0, "epochs_done": lambda t: 1.0},  # one pass clips nothing
        {"objective/kl": noisy(0, 1), "kl": noisy(0, 0.1)},  # scatters around 0
        {"objective/kl": lambda t: 16 * t, "kl": lambda t: 0.8 * t},  # short and far per token
        {"objective/kl": lambda t: 300 * t, "kl": lambda t: 0.3 * t},  # long and far in all
        {
            "objective/kl": lambda t: 60 * (1 - t) ** 4,
            "kl": lambda t: 1.5 * (1 - t) ** 4,
        },  # returns
        {"explained_variance": lambda t: -1.4 + 2 * t},  # a new critic
        {"completions/finished": lambda t: 0.2 + 0.79 * min(1, 2 * t)},  # ends are being learned
        {"completions/finished": lambda t: 1 - 0.04 * t},
        {"completions/mean_length": lambda t: 20 + 40 * t, "reward": noisy(0, 0.1)},
        {"completions/mean_length": lambda t: 20 + 8 * t},
        {"completions/mean_length": lambda t: 60 - 40 * t},  # shorter
        {"completions/repetition": lambda t: 0.7},  # from the start on
        {"completions/repetition": lambda t: 0.4 * t},
        {"calibration/outside": lambda t: 0.3 * t},
        {"entropy": lambda t: 2 - 1.7 * t},
        {"reward_std": lambda t: 0.0 if t in (0.1, 0.5, 0.525) else 1.0},
        {"reward": noisy(0, 0.3), "reward_std": lambda t: 1.0},
        {"reward": lambda t: 1 - 0.5 * t, "reward_std": lambda t: 1.0},
        {"grad_norm": lambda t: 8.0 * math.exp(-30 * t) + 0.1},  # falls from a high start
        {"grad_norm": lambda t: 2.18 if t == 0.5 else 0.169},  # one spike, which is clipped
        {"grad_norm": lambda t: math.exp(1.2 * noisy(0, 1, round(t * 997))(t))},  # heavy tails
        {"grad_norm": lambda t: 0.0 if round(40 * t) % 4 else 1.0},  # few batches teach
        {"sampler_gap": lambda t: 0.015, "ratio/first": lambda t: 1.0005},
        {"correction/effective": lambda t: 0.8, "correction/dropped": lambda t: 0.05},
    ],
)
def test_a_healthy_twin_raises_none(change: Change) -> None:
    assert found(ppo_history(change)) == []


def test_other_healthy_runs_raise_none() -> None:
    assert found([]) == []
    assert found(dpo_history()) == []
    for loss in ("ppo_clip", "gspo", "cispo", "reinforce"):
        assert found(group_history(loss)) == []
    lengths = noisy(-40, 15)  # batches of four pairs of very different lengths
    chosen = noisy(-0.05, 0.2)
    rows = [r | {"logps/chosen": lengths(0), "rewards/chosen": chosen(0)} for r in dpo_history(400)]
    assert found(rows, {"beta": 0.1}) == []
    assert found(columns({"eval/loss": lambda t: 1 / t, "loss": lambda t: 1 / t})) == []
    assert found(columns({"loss": noisy(2, 0.3)})) == []
    assert found(columns({"loss": lambda t: 1e-4 * (1 + math.sin(99 * t)) + (t < 0.1)})) == []
    pairs: Change = {"accuracy": lambda t: 0.66, "eval/accuracy": lambda t: 0.65}
    assert found(columns(pairs)) == []


def test_thousands_of_steps_of_noise_raise_none_and_what_is_kept_does_not_grow() -> None:
    source = random.Random(5)
    stream = Alarms({})
    said = []
    for step in range(1, 4001):
        row = {
            "step": step,
            "reward": source.gauss(0, 0.3),
            "reward_std": 1.0,
            "objective/kl": source.gauss(0.01, 1),
            "kl": source.gauss(0.001, 0.1),
            "rewards/margins": source.gauss(0.0, 0.5),
            "loss": source.gauss(2, 0.4),
            "grad_norm": math.exp(source.gauss(0, 0.8)),
            "completions/mean_length": source.gauss(30, 8),
            "completions/finished": min(1.0, source.gauss(0.97, 0.02)),
            "explained_variance": source.gauss(0.3, 0.4),
        }
        said += stream.see(row)
    assert said == []
    assert all(len(track.last(10**6)) <= KEPT for track in stream.tracks.values())
    assert len(stream.tracks) < len(row)


def test_an_alarm_is_raised_once_and_again_only_after_a_long_quiet() -> None:
    def steps(*gaps: int) -> list[int | None]:
        rows = [{"step": i, "sampler_gap": 0.2 if i in gaps else 0.0} for i in range(1, 400)]
        return [step for _, step in found(rows)]

    assert steps(10, 11, 12, 60, 110) == [10]
    assert steps(10, 110, 211) == [10, 211]  # between 110 and 211 lie 100 quiet records
    assert steps(10, 110, 210) == [10]


def test_a_target_of_the_kl_is_what_the_kl_is_judged_by() -> None:
    rows = ppo_history({"objective/kl": lambda t: 40 * t, "kl": lambda t: 0.1 * t})
    (alarm,) = alarms(rows, TARGET)
    assert alarm.name == "kl-runaway" and alarm.step == 23  # the mean of steps 14 to 23 is 18.5
    assert "--kl.target 6" in alarm.text and "--kl.horizon" not in alarm.text  # not in TARGET
    assert found(ppo_history({"objective/kl": lambda t: 17 * t}), TARGET) == []


def test_bounds_are_those_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bounds("approx_kl")[1] == 0.02 and bounds("explained_variance")[0] == 0
    assert factors("completions/mean_length")[1] == 1.5 and factors("entropy")[0] == 0.1
    for name in ("approx_kl", "clip_ratio", "sampler_gap", "groups/no_spread"):
        metric = METRICS[name]
        assert metric.healthy is not None and metric.alarm is None
        assert bounds(name)[1] == metric.healthy[1]


PAIRED = ("displacement", "margin-negative")
TAUGHT = ("kl-negative, to a teacher", "teacher-kl-rising")
LOSS = ("loss-rising", "loss-rising, at once")
ONLINE = [case for case in BAD_RUNS if case not in (*PAIRED, *TAUGHT, *LOSS)]
CASES = {
    "sft": ["loss-rising", "not-finite"],
    "reward": ["loss-rising", "not-finite"],
    "prm": ["loss-rising", "not-finite"],
    "dpo": ["loss-rising", "not-finite", *PAIRED],
    "distill": [
        *TAUGHT,
        "ends",
        "ends, few",
        "repetition",
        "entropy-collapse",
        "gradient-spike",
        "sampler-gap",
    ],
    "ppo": [case for case in ONLINE if case not in ("weights", "weights, dropped", "no-spread")],
    "reinforce": ONLINE,
    "grpo": ONLINE,
}
"""By the method: the alarms that its metrics can raise."""


def settings(verb: str, **changes: Any) -> dict[str, Any]:
    """The config of a run of this method."""
    row = verbs.method(verb)
    assert row is not None
    kind: type[Settings] = verbs.resolve(row.settings)
    needed = {name: "x" for name, f in kind.model_fields.items() if f.is_required()}
    return {"method": verb, **kind(**(needed | changes)).model_dump(mode="json")}


@pytest.mark.parametrize("verb", CASES)
def test_the_settings_that_alarms_name_exist_for_the_method(verb: str) -> None:
    config = settings(verb)
    known = Setup(config)
    for case in CASES[verb]:
        (alarm,) = [a for a in alarms(BAD_RUNS[case][0], config) if a.name == case.split(",")[0]]
        named = flags(alarm.text)
        assert named and [flag for flag in named if not known.has(flag)] == [], (case, alarm.text)
    assert not known.has("no-such-flag") and not known.has("kl.nothing")


def test_advice_follows_the_settings() -> None:
    rows = BAD_RUNS["critic"][0]
    (own,) = alarms(rows, settings("ppo"))
    assert "--critic.learning-rate" in own.text and "--critic.start reward" in own.text
    (shared,) = alarms(rows, settings("ppo", critic={"start": "shared"}))
    assert "--critic.coefficient" in shared.text and "learning-rate or" not in shared.text
    (once,) = alarms(BAD_RUNS["update-kl"][0], settings("grpo"))
    assert once.text.endswith("Lower --learning-rate.")  # it takes one step per batch already
    (four,) = alarms(BAD_RUNS["update-kl"][0], settings("grpo", epochs=4))
    assert four.text.endswith("Lower --learning-rate or lower --epochs.")


# ---- at the end


@pytest.mark.parametrize(
    ("rows", "name", "words"),
    [
        (ppo_history({"explained_variance": noisy(-0.5, 0.1)}), "critic", ["a constant would"]),
        (ppo_history({"clip_ratio": lambda t: -0.0001}), "unclipped", ["steps are too small"]),
        (ppo_history({"completions/finished": lambda t: 0.8}), "ends", ["80% of responses"]),
        (dpo_history(accuracy=1.0), "too-easy", ["first third", "look at them"]),
        (
            columns({"accuracy": lambda t: 0.97, "eval/accuracy": lambda t: 0.6}),
            "memorized",
            ["0.97", "0.6 on held-out"],
        ),
        (
            [{"step": i, "eval/loss": abs(i - 10) / 10 + 1} for i in range(1, 30)],
            "overfit",
            ["from 1 at step 10 to 2.9", "stop near step 10"],
        ),
    ],
)
def test_what_only_the_end_tells_is_told_at_the_end(
    rows: Rows, name: str, words: list[str]
) -> None:
    (alarm,) = alarms(rows, {})
    assert (alarm.name, alarm.step) == (name, None) and "heuristic" in alarm.text
    assert [word for word in words if word not in alarm.text] == []


# ---- the run


class Replay(Settings):
    """A method that records rows that are given."""

    out: str
    rows: str
    steps: int
    seed: int = 0
    resume: bool = False
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings(checkpoint_every=0)


def replay(
    rows: Rows,
    out: Path,
    action: str = "warn",
    *,
    fail: int = 0,
    every: int = 0,
    resume: bool = False,
) -> Run[None]:
    """A run that records the rows; it fails before the step `fail`."""
    run = RunSettings(on_alarm=action, checkpoint_every=every)
    how = Replay(out=str(out), rows="x", steps=len(rows), resume=resume, run=run)
    with Run("replay", how, state=None) as going:
        going.start(how.steps)
        while going.running():
            if going.step + 1 == fail:
                raise ZeroDivisionError
            row = {k: v for k, v in rows[going.step].items() if k not in ("step", "seconds")}
            held = {k: row.pop(k) for k in list(row) if k.startswith("eval/")}
            going.end_step(row, rows=1, tokens=1)
            if held:
                going.record(held)
            going.checkpoint_if_due()
        return going.finish()


BOTH = ppo_history({**RUNAWAY, **ONCE, **LONGER})
"""Raises ratio-first, kl-runaway and length."""


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "alarms.jsonl").read_text().splitlines()]


def test_a_run_writes_and_says_each_alarm_once_and_its_page_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(BOTH, tmp_path / "run")
    written = lines(tmp_path / "run")
    assert [row["alarm"] for row in written] == ["kl-runaway", "ratio-first", "length"]
    assert written[1] == {
        "step": 20,
        "alarm": "ratio-first",
        "metric": "ratio/first",
        "value": 1.02,
        "text": written[1]["text"],
    }
    assert written[0]["also"] == {"kl": pytest.approx(written[0]["value"] / 40, abs=0.01)}
    said = capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for row in written:
        assert said.count(row["text"]) == 1
        assert f"alarm ({row['alarm']}) at step {row['step']}: " in said
        assert f"Step {row['step']}: {row['text'][:60]}" in page.replace("&#39;", "'")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    stored = [json.loads(line) for line in text.splitlines()]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    again = [a for a in alarms(stored, config) if a.step is not None]
    assert "".join(a.line() for a in again) == (tmp_path / "run" / "alarms.jsonl").read_text()


@pytest.mark.parametrize("fail", [3, 20, 35])
def test_a_resumed_run_has_the_alarms_of_the_uninterrupted_one(tmp_path: Path, fail: int) -> None:
    replay(BOTH, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        replay(BOTH, tmp_path / "run", fail=fail, every=2)
    newest = max((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    late = tmp_path / "run" / "alarms.jsonl"
    late.write_text(late.read_text() + '{"step": 39, "alarm": "of a lost step"}\n{"to')
    replay(BOTH, tmp_path / "run", resume=True, every=2)
    assert newest and late.read_bytes() == (tmp_path / "whole" / "alarms.jsonl").read_bytes()


def test_the_state_after_any_row_is_that_of_a_watch_that_saw_them_all(tmp_path: Path) -> None:
    whole = "".join(a.line() for a in alarms(BOTH, {}) if a.step)
    for cut in range(0, len(BOTH), 3):
        folder = tmp_path / str(cut)
        folder.mkdir()
        write_jsonl(folder / "metrics.jsonl", BOTH[:cut])
        watch = Watch(folder, {}, writes=True)
        watch.begin()
        for row in BOTH[cut:]:
            watch.see(row)
        assert (folder / "alarms.jsonl").read_text() == whole


def test_stop_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RunError) as stopped:
        replay(BOTH, out, "stop")
    (alarm,) = lines(out)
    told = str(stopped.value)
    assert told.startswith(f"stopped at step {alarm['step']} of 40, saved: go on with: fiducial")
    assert "--resume --run.on-alarm warn" in told and alarm["text"] in told
    assert (out / "checkpoints" / f"checkpoint-{alarm['step']}").is_dir()
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    replay(BOTH, out, "warn", resume=True)
    replay(BOTH, tmp_path / "whole")
    assert (out / "alarms.jsonl").read_bytes() == (tmp_path / "whole" / "alarms.jsonl").read_bytes()
    assert json.loads((out / "summary.json").read_text())["status"] == "done"


def test_a_run_that_goes_on_with_stop_is_not_stopped_by_what_it_was_told(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        replay(ppo_history(ONCE), tmp_path / "run", "stop")
    replay(ppo_history(ONCE), tmp_path / "run", "stop", resume=True)
    assert [row["step"] for row in lines(tmp_path / "run")] == [20]


def test_off_judges_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay(BOTH, tmp_path / "run", "off")
    assert not (tmp_path / "run" / "alarms.jsonl").exists()
    assert "alarm" not in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "--run.on-alarm off" in page and "runs away" not in page
    assert not [f for f in page_data(page)["figures"].values() if "marks" in f]


# ---- the page


def test_alarms_are_marked_on_the_curves_of_their_metrics(tmp_path: Path) -> None:
    steps = 3000  # the curves are smoothed and thinned
    once: Change = {"ratio/first": lambda t: 1.02 if t == 0.5 else 1.0}
    rows = ppo_history({**once, "sampler_gap": lambda t: 0.2 if t == 1 else 1e-4}, steps)
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": "ppo"}))
    (tmp_path / "plotly.min.js").write_text("// stands in for four megabytes")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    marked = {f["title"]: f["marks"] for f in page_data(page)["figures"].values() if "marks" in f}
    assert sorted(title.split(" ")[0] for title in marked) == ["Gap", "Probability"]
    (ratio,), (gap,) = sorted(marked.values(), key=lambda marks: marks[0]["x"])
    assert (ratio["x"], ratio["y"]) == (1500, 1.02) and ratio["text"].startswith("ratio-first. ")
    assert (gap["x"], gap["y"]) == (3000, 0.2) and "Step 3,000: " in gap["text"]
    assert "A dotted line marks the step of an alarm" in page


# ---- real runs


@pytest.fixture(scope="module")
def go(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """go("grpo", reward="length", ...): the names of the alarms of a short run."""
    folder = tmp_path_factory.mktemp("alarms")
    triples = list(zip(PROMPTS, GOOD, BAD, strict=True))
    rows = {
        "prompts": [{"prompt": p} for p in PROMPTS],
        "pairs": [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in triples],
        "completions": [{"prompt": p, "completion": g} for p, g, _ in triples],
    }
    data = {name: write_jsonl(folder / f"{name}.jsonl", some) for name, some in rows.items()}
    (folder / "rewards.py").write_text(REWARDS)
    number = itertools.count()

    def run(verb: str, reward: str = "", rows: str = "prompts", **changes: Any) -> Any:
        kind, train = verbs.method(verb), getattr(fd, verb)
        assert kind is not None
        how = {
            "model": models["gpt2"],
            "data": data[rows],
            "out": str(folder / str(next(number))),
            "batch_size": 8,
            "run": RunSettings(samples=1, checkpoint_every=0),
            "optimizer": OptimizerSettings(schedule="constant"),
        }
        if reward:
            named = reward if Path(reward).is_dir() else f"{folder / 'rewards.py'}:{reward}"
            how["reward"] = (named,)
        done = train(verbs.resolve(kind.settings)(**(how | changes)))
        return {row["alarm"]: row["step"] for row in lines(done.path)}, done

    yield run


REWARDS = """
def length(completions, **columns):
    return [float(len(c)) for c in completions]

def flat(completions, **columns):
    return [1.0 for c in completions]

def count_e(completions, **columns):
    return [float(c.count("e")) for c in completions]
"""
MEASURED = KLSettings(estimator="k1")


def test_a_real_reward_for_length_is_told(go: Any) -> None:
    stops = tuple("etaoinshrdlucmfw")  # so that answers begin short
    how = {"beta": 0.0, "learning_rate": 3e-3, "steps": 18, "max_new_tokens": 12, "stop": stops}
    raised, _ = go("reinforce", "length", **how)
    assert {"length", "ends"} <= set(raised)


def test_a_real_run_with_too_large_steps_is_told(go: Any) -> None:
    how = {"beta": 0.0, "kl": MEASURED, "learning_rate": 0.1, "steps": 10, "max_new_tokens": 8}
    raised, _ = go("ppo", "count_e", **how)
    assert {"update-kl", "clipping", "kl-runaway"} <= set(raised)


def test_a_real_constant_reward_and_answers_that_never_end_are_told(go: Any) -> None:
    raised, _ = go("reinforce", "flat", steps=10, max_new_tokens=1)
    assert raised["no-spread"] == 5 and raised["ends"] <= 10


def test_a_real_run_that_repeats_itself_is_told(go: Any) -> None:
    how = {"beta": 0.0, "learning_rate": 1e-2, "steps": 15, "max_new_tokens": 12}
    raised, _ = go("reinforce", "length", **how)
    assert {"repetition", "entropy-collapse"} <= set(raised)


def test_a_real_run_beyond_its_reward_model_is_told(go: Any) -> None:
    _, taught = go("reward", rows="pairs", learning_rate=1e-3, steps=6)
    raised, _ = go(
        "reinforce",
        str(taught.path / "model"),
        beta=0.0,
        learning_rate=1e-2,
        steps=13,
        max_new_tokens=12,
    )
    assert "reward-range" in raised


def test_a_real_divergence_is_told(go: Any) -> None:
    raised, _ = go("sft", rows="completions", learning_rate=3.0, batch_size=4, steps=12)
    assert "loss-rising" in raised


def test_real_displacement_is_told(go: Any) -> None:
    raised, _ = go("dpo", rows="pairs", learning_rate=0.1, beta=0.1, steps=14)
    assert "displacement" in raised


def test_a_real_healthy_run_raises_none(go: Any) -> None:
    raised, _ = go("sft", rows="completions", learning_rate=1e-3, batch_size=4, steps=12)
    assert raised == {}
