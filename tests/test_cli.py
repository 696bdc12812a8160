"""The command line as a user meets it: exit codes, one sentence per error, YAML under flags, and
the frozen list of flags.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fiducial import verbs
from fiducial.cli import main
from fiducial.config_file import dump_yaml
from fiducial.flags import flags, section_flags, sections
from fiducial.methods.settings.dpo import DPO
from fiducial.methods.settings.grpo import GRPO
from fiducial.methods.settings.ppo import PPO
from fiducial.methods.settings.reinforce import Reinforce
from fiducial.methods.settings.reward_model import RewardModel
from fiducial.methods.settings.sft import SFT
from fiducial.parse import parse
from fiducial.usage import shown

SURFACE = Path(__file__).with_name("cli_surface.txt")
VERBS = verbs.verbs()


def refused(capsys, *args: str) -> str:
    assert main(list(args)) == 2
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err and len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["pppo"], "did you mean ppo"),
        (["dpo", "--model", "m"], "--data is required"),
        (["dpo", "--model", "m", "--data", "d", "--betta", "1"], "--betta: did you mean --beta"),
        (
            ["dpo", "--model", "m", "--data", "d", "--beta", "-1"],
            "--beta: input should be greater than 0",
        ),
        (["dpo", "--model", "m", "--data", "d", "--optimizer.eps", "0"], "--optimizer.eps"),
        (
            ["dpo", "--model", "/no/such/folder", "--data", "d"],
            "there is no folder /no/such/folder",
        ),
        (["dpo", "--config", "/no/such.yaml"], "there is no file /no/such.yaml"),
        (["report", "/"], "run folder"),
        (["report"], "RUN is required"),
        (["report", "a", "b"], "'b' belongs to no flag"),
        (["dpo", "--model"], "--model needs a value"),
        (["dpo", "--model", "m", "--data", "d", "--beta", "high"], "should be a number, not high"),
        (
            ["dpo", "--model", "m", "--data", "d", "--steps=1.5"],
            "should be a whole number, not 1.5",
        ),
        (["dpo", "--model", "m", "--data", "d", "--optimizer", "x"], "is a section, not a flag"),
        (["dpo", "--model", "m", "--data", "d", "--schedule", "x"], "mean --optimizer.schedule"),
        (["dpo", "--model", "m", "--data", "d", "--optimizer.betas", "0.9"], "needs more values"),
        (["dpo", "--model", "m", "--data", "d", "--resume=yes"], "--resume takes no value"),
        (["dpo", "--model", "m", "--data", "./no.jsonl"], "--data: there is no file ./no.jsonl"),
        (["dpo", "--help", "kl"], "the sections are rows, lora, optimizer, run"),
        (
            ["ppo", "--model", "m", "--data", "d", "--reward", "a", "--reward", "/no/such"],
            "--reward: there is no folder /no/such",
        ),
        (
            ["ppo", "--model", "m", "--data", "d", "--reward", "/no/such.py:f"],
            "--reward: there is no file /no/such.py",
        ),
        (
            ["eval", "--model", "m", "--prompts", "p", "--judge", "./no"],
            "--judge: there is no folder ./no",
        ),
        (
            ["distill", "--model", "m", "--data", "d", "--teacher", "./no"],
            "--teacher: there is no folder ./no",
        ),
        (
            ["ppo", "--model", "m", "--data", "d", "--kl.estimator", "k3"],
            "--kl.estimator k3: it is right as a value, but",
        ),
        (["collect", "--steps", "8"], "fiducial label-steps --completions N"),
        (
            [
                "collect",
                "--model",
                "m",
                "--prompts",
                "p",
                "--judge",
                "j",
                "--out",
                "o",
                "--steps=8",
            ],
            "fiducial label-steps --completions N",
        ),
        (
            ["label-steps", "--model=m", "--prompts=p", "--judge=j", "--out=o", "--separator="],
            "every token would be a step",
        ),
    ],
)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(capsys, args, said):
    assert said in refused(capsys, *args)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("betta: 1\n", "unknown setting betta: did you mean beta"),
        ("optimizer:\n  lr: 1\n", "unknown setting optimizer.lr"),
        ("beta: [1\n", ":2: not YAML"),
        ("- 1\n", "expected settings"),
        ("beta: high\n", "--beta"),
        ("model: 3\n", "--model"),
        ("optimizer: fast\n", "optimizer is a section"),
        ("model: /no/such/folder\ndata: d\n", "--model: there is no folder"),
    ],
)
def test_a_wrong_yaml_file_names_the_file_and_the_setting(tmp_path, capsys, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refused(capsys, "dpo", "--config", str(file))
    assert said in message and ("run.yaml" in message or "there is no" in said)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: ppo\nmodel: a\ndata: b\nbeta: 0.3\nreward: [x]\noptimizer: {weight_decay: 0.5}\n"
    )
    settings = parse(
        PPO,
        [
            "--config",
            str(file),
            "--beta",
            "0.7",
            "--critic.start",
            "shared",
            "--reward",
            "y",
            "--reward",
            "z",
        ],
        command="ppo",
    )
    assert (settings.beta, settings.model, settings.optimizer.weight_decay, settings.clip) == (
        0.7,
        "a",
        0.5,
        0.2,
    )
    assert settings.critic.start == "shared"
    assert settings.reward == ("y", "z")
    assert settings.run.eval_every == 10  # the method's own default of a shared section


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (SFT, "sft"),
        (RewardModel, "reward"),
        (PPO, "ppo"),
        (Reinforce, "reinforce"),
        (GRPO, "grpo"),
        (DPO, "dpo"),
    ],
)
def test_the_resolved_settings_are_read_back_equal(tmp_path, cls, method):
    settings = cls(model="m", data="d", seed=3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(settings, method))
    assert parse(cls, ["--config", str(file)], command=method) == settings


def helped(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_explains_every_flat_setting_and_folds_the_sections(capsys, verb):
    cls = verbs.resolve(VERBS[verb].settings)
    out = helped(capsys, verb, "--help")
    for flag in flags(cls):
        shows = flag.path[-1].upper() if flag.positional else f"--{flag.name} "
        assert (f"  {shows}" in out) == (len(flag.path) == 1), flag.name
    for name in sections(cls):
        assert f"  {name}" in out
        assert f"{len(section_flags(cls, name))} settings" in out


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_all_and_the_sections_explain_the_rest(capsys, verb):
    cls = verbs.resolve(VERBS[verb].settings)
    everything = " ".join(helped(capsys, verb, "--help", "all").split())
    for flag in flags(cls):
        assert flag.text and flag.text in everything, flag.name
    for name in sections(cls):
        out = helped(capsys, verb, "--help", name)
        for flag in section_flags(cls, name):
            assert f"--{flag.name} " in out


@pytest.mark.parametrize(("verb", "before"), [("sft", 35), ("dpo", 37), ("ppo", 62), ("grpo", 64)])
def test_help_shows_about_half_of_the_settings_that_it_once_showed(verb, before):
    flat = [f for f in flags(verbs.resolve(VERBS[verb].settings)) if len(f.path) == 1]
    assert len(flat) <= before / 2


def surface() -> str:
    """Verb, flag, type and default of every setting, one per line."""
    lines = []
    for verb in VERBS.values():
        for flag in flags(verbs.resolve(verb.settings)):
            default = "required" if flag.required else shown(flag.default)
            name = flag.name if flag.positional else f"--{flag.name}"
            lines.append(f"{verb.name} {name} {flag.type} = {default}")
    return "\n".join(lines) + "\n"


def test_the_command_line_is_the_one_that_was_frozen():
    if os.environ.get("FREEZE_CLI"):
        SURFACE.write_text(surface(), encoding="utf-8")
    assert surface().splitlines() == SURFACE.read_text(encoding="utf-8").splitlines(), (
        "the command line has changed: if that is meant, write tests/cli_surface.txt again with "
        "FREEZE_CLI=1 python -m pytest tests/test_cli.py -k frozen"
    )


HEAVY = ("torch", "transformers", "numpy", "accelerate", "datasets", "peft", "plotly")


def loaded(*commands: list[str]) -> list[str]:
    """The heavy modules that are loaded once these commands have been refused or have helped."""
    code = f"""
import contextlib, sys, io
from fiducial.cli import main
for command in {list(commands)!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        assert main(command) == 2, command
print(" ".join(m for m in {HEAVY!r} if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_a_typo_and_a_missing_file_answer_without_torch(verb):
    commands = [[verb, "--help"], [verb, "--help", "all"], [verb, "--no-such-flag", "1"]]
    needed = [f for f in flags(verbs.resolve(VERBS[verb].settings)) if f.required]
    for wrong in [f for f in needed if f.kind is not None]:
        names = [f"--{f.name}={'./no.jsonl' if f is wrong else 'name'}" for f in needed]
        commands.append([verb, *names])
    assert loaded(*commands) == []


def test_the_check_of_what_is_loaded_sees_torch(tmp_path):
    run = ["dpo", "--model", "no-such-model", "--data", str(tmp_path / "rows")]
    (tmp_path / "rows").write_text("not rows")
    assert "torch" in loaded(run)


def test_resume_takes_the_settings_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(DPO(model="m", data="d", beta=0.4), "dpo"))
    settings = parse(DPO, ["--out", str(tmp_path), "--resume"], command="dpo")
    assert (settings.model, settings.beta, settings.resume) == ("m", 0.4, True)


def test_resume_reads_the_folder_however_its_flag_is_written(tmp_path):
    (tmp_path / "config.yaml").write_text(
        dump_yaml(DPO(model="m", data="d", beta=0.4), "dpo")
        + "resumed:\n- {step: 1, changed: {}}\n"
    )
    settings = parse(DPO, [f"--out={tmp_path}", "--resume"], command="dpo")
    assert (settings.model, settings.beta, settings.resume) == ("m", 0.4, True)
    again = parse(DPO, ["--resume", f"--out={tmp_path}", "--beta=0.4"], command="dpo")
    assert again == settings


def test_several_values_replace_those_of_the_file_and_resume_with_the_same_command(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d\nreward: [x, y]\nstop: [a]\noptimizer: {betas: [0.1, 0.2]}\n"
    )
    command = [
        "--config",
        str(file),
        "--reward",
        "z",
        "--stop",
        "b",
        "c",
        "--optimizer.betas",
        "0.9",
        "0.8",
    ]
    settings = parse(PPO, command, command="ppo")
    assert (settings.reward, settings.stop, settings.optimizer.betas) == (
        ("z",),
        ("b", "c"),
        (0.9, 0.8),
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(settings, "ppo"))
    again = ["--out", str(tmp_path), "--resume", *command[2:]]
    assert parse(PPO, again, command="ppo").reward == ("z",)


def test_none_turns_off_what_a_file_turned_on(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\ncritic: {clip: 0.3}\nreward_weights: [2]\n")
    command = ["--config", str(file), "--critic.clip", "None", "--reward-weights", "None"]
    settings = parse(PPO, command, command="ppo")
    assert (settings.critic.clip, settings.reward_weights) == (None, None)


def test_switches_are_turned_on_and_off():
    base = ["--model", "m", "--data", "d"]
    assert parse(PPO, [*base, "--no-whiten"], command="ppo").whiten is False
    assert parse(
        PPO, [*base, "--run.gradient_checkpointing"], command="ppo"
    ).run.gradient_checkpointing


def test_the_yaml_of_a_run_is_plain(tmp_path):
    assert json.loads(json.dumps(yaml.safe_load(dump_yaml(PPO(model="m", data="d"), "ppo"))))[
        "kl"
    ] == {"placement": None, "estimator": None, "target": None, "horizon": 10_000}
