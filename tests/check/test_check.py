"""`fiducial check`: silent mistakes of rewards, models and settings by name, exit codes, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fiducial.check import command
from fiducial.check import model as measuring
from fiducial.check import reward as rewarding
from fiducial.check.command import check
from fiducial.check.report import Report
from fiducial.check.view import histogram, shown
from fiducial.cli import main
from fiducial.methods.settings.distill import Distill
from fiducial.methods.settings.dpo import DPO
from fiducial.methods.settings.grpo import GRPO
from fiducial.methods.settings.ppo import PPO
from fiducial.methods.settings.prm import PRM
from fiducial.methods.settings.reinforce import Reinforce
from fiducial.methods.settings.reward_model import RewardModel
from fiducial.methods.settings.sft import SFT
from fiducial.models.memory import Plan, Work
from fiducial.models.rehearsal import Rehearsal
from fiducial.settings import (
    LoraSettings,
    OptimizerSettings,
    RowSettings,
    RunSettings,
    ScoreSettings,
)
from fiducial.train import machine
from small_rows import asked, pairs, sft, solutions
from support import write_jsonl

REWARDS = """
import itertools, random

def _texts(completions):
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]

def healthy(prompts, completions, **columns):
    return [sum(map(ord, c)) % 7 for c in _texts(completions)]

def constant(prompts, completions, **columns):
    return [0.5] * len(completions)

def nothing(prompts, completions, **columns):
    return [0.0] * len(completions)

def by_prompt(prompts, completions, **columns):
    return [float(sum(map(ord, p)) % 101) for p in prompts]

def long(prompts, completions, **columns):
    return [3.0 * len(c) for c in _texts(completions)]

def rare(prompts, completions, number, **columns):
    return [h if n % 9 == 0 else 1 for h, n in zip(healthy(prompts, completions), number)]

def tiny(prompts, completions, **columns):
    return [0.001 * h for h in healthy(prompts, completions)]

def huge(prompts, completions, **columns):
    return [10_000 * h + 20_000 for h in healthy(prompts, completions)]

def noise(prompts, completions, **columns):
    return [random.random() for c in completions]

def none(prompts, completions, **columns):
    return [None if i % 2 else 1.0 for i in range(len(completions))]

def fails(prompts, completions, **columns):
    raise KeyError("answer")
"""


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts with four responses each, to be quick."""
    monkeypatch.setattr(rewarding, "PROMPTS", 4)
    monkeypatch.setattr(command, "GROUP", 4)


@pytest.fixture(scope="module")
def models(make: Callable[..., str]) -> dict[str, str]:
    """Models as they are before training: no token is much more likely than another."""
    return {kind: make(kind, initializer_range=0.02) for kind in ("llama", "qwen3")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rewards.py").write_text(REWARDS)
    prompts = [{"prompt": asked(i), "number": i} for i in range(24)]
    return {
        "sft": write_jsonl(folder / "sft.jsonl", sft()),
        "dpo": write_jsonl(folder / "pairs.jsonl", pairs()),
        "prm": write_jsonl(folder / "steps.jsonl", solutions()),
        "prompts": write_jsonl(folder / "prompts.jsonl", prompts),
        "rewards": str(folder / "rewards.py"),
    }


def offline(models: dict[str, str], world: dict[str, str], **more: Any) -> dict[str, Any]:
    usual = {"model": models["llama"], "data": world["sft"], "batch_size": 8, "learning_rate": 1e-3}
    return usual | more


def online(
    models: dict[str, str], world: dict[str, str], reward: str, **more: Any
) -> dict[str, Any]:
    return {
        "model": models["llama"],
        "data": world["prompts"],
        "reward": (f"{world['rewards']}:{reward}",),
        "batch_size": 16,
        "max_new_tokens": 80,
        "learning_rate": 1e-4,
        "beta": 0.05,
        **more,
    }


def worrying(report: Report) -> set[str]:
    return {f.name for f in report.findings if f.level != "note"}


def test_healthy_runs_of_every_method_have_neither_errors_nor_warnings(models, world):
    llama = offline(models, world)
    group = online(models, world, "healthy")
    runs: dict[str, Any] = {
        "sft": SFT(**llama),
        "dpo": DPO(**llama | {"data": world["dpo"]}),
        "reward": RewardModel(**llama | {"data": world["dpo"]}),
        "prm": PRM(**llama | {"data": world["prm"]}),
        "grpo": GRPO(**group),
        "reinforce": Reinforce(**group),
        "ppo": PPO(**group),
    }
    for verb, settings in runs.items():
        report = check(verb, settings)
        assert (verb, worrying(report), report.exit_code) == (verb, set(), 0)
        step, times = report.sections["model"], report.sections["time"]
        assert step["grad_norm"] > 0 and math.isfinite(step["loss"])
        assert times["seconds"] == pytest.approx(times["seconds_per_step"] * times["steps"])
        assert sum(times["parts"].values()) == pytest.approx(times["seconds_per_step"])
        assert ("critic" in report.sections["model"]["roles"]) == (verb == "ppo")
        memory, names = report.sections["memory"], {f.name for f in report.findings}
        assert "memory-fits" in names and memory["peak"] < 0.9 * memory["available"]
        assert memory["measured"] > memory["process"] / 2  # both have the whole process in them


def test_the_memory_of_a_run_is_planned_once_and_compared_with_what_is_there(
    models, world, monkeypatch
):
    monkeypatch.setattr(machine, "resident_memory", lambda device: 2**20)
    monkeypatch.setattr(machine, "return_freed_memory", lambda: None)
    rehearsed, plan = [], Rehearsal.plan

    def counted(self: Rehearsal, work: Work, process: int) -> Plan:
        rehearsed.append(work.tokens)
        return plan(self, work, process)

    monkeypatch.setattr(Rehearsal, "plan", counted)

    def found(**run: Any) -> Report:
        rehearsed.clear()
        return check("sft", SFT(**offline(models, world, run=RunSettings(**run))))

    auto = found(memory_gb=0.05, tokens="auto")
    peak, tokens = auto.sections["memory"]["peak"], auto.sections["memory"]["tokens"]
    assert len(rehearsed) == len(set(rehearsed)) and tokens in rehearsed and tokens % 256 == 0
    assert "memory-fits" in {f.name for f in auto.findings} and "time" in auto.sections
    assert any("available: 47.7 MiB" in line for line in auto.as_lines(colour=False))
    tight = found(memory_gb=1.05 * peak / 1e9, tokens=tokens)
    assert worrying(tight) == {"memory-tight"} and tight.exit_code == 0 and "time" in tight.sections
    short = found(memory_gb=0.95 * peak / 1e9, tokens=tokens)
    assert worrying(short) == {"memory-short"} and short.exit_code == 1
    (error,) = short.of("error")
    assert "--run.gradient-checkpointing" in error.change and error.numbers["peak"] == peak
    assert "time" not in short.sections  # no step was tried that cannot fit


REWARD_MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "reward-constant": ("constant", {}),
    "reward-constant, 0": ("nothing", {}),
    "reward-ignores-the-response": ("by_prompt", {}),
    "reward-is-length": ("long", {}),
    "groups-without-spread": ("rare", {}),
    "beta-outweighs-reward": ("tiny", {"advantage": "dr_grpo"}),
    "beta-hardly-counts": ("huge", {"advantage": "dr_grpo", "beta": 0.001}),
    "reward-not-deterministic": ("noise", {}),
    "reward-judges-not": ("none", {}),
    "refused": ("fails", {}),
    "reward-clipped": ("huge", {"score": ScoreSettings(clip=1.0)}),
    "same-responses": ("healthy", {"temperature": 1e-4}),
    "temperature-unusual": ("healthy", {"temperature": 1e-4}),
    "responses-cut": ("healthy", {"max_new_tokens": 2}),
    "eval-data-not-read": ("healthy", {"rows": "held"}),
}


@pytest.mark.parametrize("case", REWARD_MISTAKES)
def test_a_mistake_around_a_reward_is_found_by_name(case, models, world):
    reward, settings = REWARD_MISTAKES[case]
    if "rows" in settings:
        settings = {"rows": RowSettings(eval_data=world["prompts"])}
    report = check("grpo", GRPO(**online(models, world, reward, **settings)))
    assert case.partition(",")[0] in worrying(report)
    errors = {"reward-constant", "reward-ignores-the-response", "reward-judges-not", "refused"}
    assert report.exit_code == (2 if case == "refused" else int(case in errors))


def settings_mistakes(models: dict[str, str], world: dict[str, str]) -> dict[str, tuple[str, Any]]:
    usual = offline(models, world)
    return {
        "learning-rate-high": ("sft", SFT(**usual | {"learning_rate": 0.5})),
        "learning-rate-low": ("sft", SFT(**usual | {"learning_rate": 1e-9})),
        "learning-rate-low, adapters": (
            "sft",
            SFT(**usual | {"learning_rate": 1e-6, "lora": LoraSettings(r=4)}),
        ),
        "batch-larger-than-data": ("sft", SFT(**usual | {"batch_size": 64})),
        "many-epochs": ("sft", SFT(**usual | {"epochs": 50})),
        "warmup-outlasts-run": (
            "sft",
            SFT(**usual, optimizer=OptimizerSettings(warmup_steps=1000)),
        ),
        "beta-unusual": ("dpo", DPO(**usual | {"data": world["dpo"], "beta": 50})),
        "rows-cut": ("sft", SFT(**usual, rows=RowSettings(max_length=30))),
        "plain-text-for-chat-model": ("sft", SFT(**usual | {"model": models["qwen3"]})),
        "no-gradient": (
            "distill",
            Distill(
                model=models["llama"],
                teacher=models["llama"],
                data=world["prompts"],
                max_new_tokens=8,
                batch_size=8,
            ),
        ),
    }


@pytest.mark.parametrize(
    "case",
    settings_mistakes(
        dict.fromkeys(("llama", "qwen3"), "m"), {"sft": "d", "dpo": "d", "prompts": "d"}
    ),
)
def test_a_mistake_in_settings_or_model_is_found_by_name(case, models, world):
    verb, settings = settings_mistakes(models, world)[case]
    report = check(verb, settings)
    assert case.partition(",")[0] in worrying(report)
    assert report.exit_code == int(case == "no-gradient")


def test_a_model_with_another_tokenizer_is_worse_than_chance(make, world):
    """The logits of a wrong vocabulary are confident about the wrong tokens."""
    confident = make("llama", initializer_range=0.5)
    report = check("sft", SFT(model=confident, data=world["sft"], batch_size=8))
    assert "worse-than-chance" in worrying(report)


def test_a_gradient_that_is_not_finite_is_an_error(models, world, monkeypatch):
    def broken(*args: Any) -> torch.Tensor:
        return real(*args) * torch.tensor(math.inf)

    real = measuring.offline_loss
    monkeypatch.setattr(measuring, "offline_loss", broken)
    report = check("sft", SFT(**offline(models, world)))
    assert "gradient-not-finite" in worrying(report) and report.exit_code == 1


def test_adapters_train_a_part_and_all_of_it_gets_a_gradient(models, world):
    report = check("sft", SFT(**offline(models, world), lora=LoraSettings(r=4)))
    about = report.sections["model"]["roles"]["policy"]
    assert 0 < about["trained"] < about["weights"] / 2
    assert all("lora_" in name for name in about["kinds"])
    assert "weights-without-gradient" not in {f.name for f in report.findings}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_writes_nothing_and_its_exit_code_says_what_was_found(
    capsys, models, world, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["--model", models["llama"], "--data", world["sft"], "--batch-size", "8"]
    words += ["--learning-rate", "1e-3"]
    code, out, _ = run(capsys, "check", "sft", *words, "--out", "run")
    assert code == 0 and "nothing forbids this run of sft" in out
    assert "«" in out and "\x1b" not in out and "█" in out
    assert list(tmp_path.iterdir()) == []

    bad = ["check", "reinforce", "--model", models["llama"], "--data", world["prompts"]]
    bad += ["--max-new-tokens", "8", "--reward", f"{world['rewards']}:constant"]
    code, out, _ = run(capsys, *bad, "--json")
    found = json.loads(out)
    assert code == 1 and not found["ok"] and not found["refused"]
    names = {f["name"]: f for f in found["findings"]}
    assert names["reward-constant"]["level"] == "error"
    assert names["reward-constant"]["numbers"]["value"] == 0.5
    assert {"rows", "rewards", "model", "time"} <= set(found)


def test_what_the_verb_refuses_is_refused_with_2_in_json_too(capsys, models, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": 3}])
    words = ["check", "sft", "--model", models["llama"], "--data", rows]
    code, out, _ = run(capsys, *words)
    assert code == 2 and "rows.jsonl:1" in out and "would refuse" in out
    code, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)
    assert code == 2 and found["refused"] and "rows.jsonl:1" in found["findings"][0]["sentence"]


def test_rows_with_one_label_are_refused_and_the_other_findings_are_told_too(
    capsys, models, tmp_path
):
    rows = [row | {"labels": [1, 1]} for row in solutions()]
    source = write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:5]])
    words = ["prm", "--model", models["llama"], "--data", source]
    assert run(capsys, *words, "--out", str(tmp_path / "o"))[0] == 2
    code, out, _ = run(capsys, "check", *words, "--json")
    assert code == 2
    assert {"one-label", "duplicate-rows"} <= {f["name"] for f in json.loads(out)["findings"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "check: VERB is required"),
        (["--json"], "check: VERB is required"),
        (["dpoo"], "did you mean dpo?"),
        (["collect"], "no verb that trains"),
        (["dpo", "--model", "m"], "check dpo: --data is required"),
        (["dpo", "--model", "m", "--data", "d", "--betta", "1"], "did you mean --beta?"),
    ],
)
def test_a_wrong_command_is_one_sentence(capsys, words, said):
    code, _, err = run(capsys, "check", *words)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_help_shows_the_flags_of_the_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", "dpo", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "fiducial check dpo --model" in out and "--beta" in out


def test_a_file_of_settings_is_that_of_the_verb(capsys, models, world, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"method: dpo\nmodel: {models['llama']}\ndata: {world['dpo']}\n")
    code, out, _ = run(capsys, "check", "dpo", "--config", str(file), "--batch-size", "8", "--json")
    assert code == 0 and json.loads(out)["verb"] == "dpo"
    code, _, err = run(capsys, "check", "sft", "--config", str(file))
    assert code == 2 and "settings of dpo" in err


def test_a_run_says_at_its_start_what_its_rows_are_wrong_in(capsys, models, world, tmp_path):
    words = ["--model", models["qwen3"], "--data", world["sft"], "--steps", "1"]
    code, _, err = run(capsys, "sft", *words, "--out", str(tmp_path / "a"), "--run.samples", "0")
    lines = [line for line in err.splitlines() if line.startswith("warning (")]
    assert code == 0 and len(lines) == 1 and "plain-text-for-chat-model" in lines[0]
    words[1] = models["llama"]
    code, _, err = run(capsys, "sft", *words, "--out", str(tmp_path / "b"), "--run.samples", "0")
    assert code == 0 and "warning (" not in err


def test_correlation_is_pearsons():
    x, y = [1.0, 2.0, 4.0, 7.0], [2.0, 1.0, 5.0, 6.0]
    want = float(torch.corrcoef(torch.tensor([x, y]))[0, 1])
    assert rewarding.correlation(x, y) == pytest.approx(want, abs=1e-6)
    assert rewarding.correlation(x, [3.0] * 4) == 0.0


def test_the_histogram_counts_every_value_once():
    lines = histogram([1, 1, 2, 9, 10, 80], "tokens")
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == 6
    assert lines[0].startswith(" 1 to 10 tokens") and lines[-1].split()[2] == "80"
    assert histogram([], "tokens") == [] and len(histogram([5], "tokens")) == 1


def test_what_is_shown_cannot_move_the_cursor():
    assert "\x1b" not in shown("a\x1b[2Jb\r\n\u202e") and shown("a\nb") == "a⏎b"
    assert len(shown("x" * 5000)) < 500


def test_rows_are_shown_with_what_is_trained(models, world, tmp_path):
    report = check("dpo", DPO(**offline(models, world, data=world["dpo"])))
    plain, coloured = report.shown
    first = pairs()[0]
    assert f"«{first['chosen']}</s>»" in plain[1] and first["prompt"] in plain[1]
    assert "«" not in coloured[1] and "\x1b[32m" in coloured[1]
    assert Path(world["dpo"]).name in plain[0]
