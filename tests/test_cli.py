"""The command line as a user meets it: exit codes, one sentence an error, YAML under flags."""

import json

import pytest
import yaml

from fiducial.cli import VERBS, main
from fiducial.errors import InputError
from fiducial.methods.distill import Distill
from fiducial.methods.dpo import DPO
from fiducial.methods.grpo import GRPO
from fiducial.methods.ppo import PPO
from fiducial.methods.reinforce import Reinforce
from fiducial.methods.reward_model import RewardModel
from fiducial.methods.sft import SFT
from fiducial.parse import parse
from fiducial.settings import Settings, dump_yaml


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
        (["report", "/"], "is no run folder"),
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
    ],
)
def test_a_wrong_yaml_file_names_the_file_and_the_setting(tmp_path, capsys, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refused(capsys, "dpo", "--config", str(file))
    assert said in message and "run.yaml" in message


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
    assert settings.reward[-2:] == ("y", "z")


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


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_explains_every_setting(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    import importlib

    module, settings, _ = VERBS[verb].where.split(":")
    cls: type[Settings] = getattr(importlib.import_module(f"fiducial.{module}"), settings)
    for name in cls.model_fields:
        assert name.replace("_", "-") in out or "STR" in out


@pytest.mark.parametrize("cls", [SFT, RewardModel, PPO, Reinforce, GRPO, DPO, Distill])
def test_every_setting_has_a_line_of_documentation(cls):
    import ast
    import inspect
    import textwrap

    for one in {
        cls,
        *(
            f.annotation
            for f in cls.model_fields.values()
            if isinstance(f.annotation, type) and issubclass(f.annotation, Settings)
        ),
    }:
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body
        for field, after in zip(body, [*body[1:], None], strict=True):
            section = isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation).endswith(
                "Settings"
            )  # its class explains it
            if isinstance(field, ast.AnnAssign) and not section:
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{one.__name__}.{field.target.id}"


def test_resume_takes_the_settings_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(DPO(model="m", data="d", beta=0.4), "dpo"))
    settings = parse(DPO, ["--out", str(tmp_path), "--resume"], command="dpo")
    assert (settings.model, settings.beta, settings.resume) == ("m", 0.4, True)


def test_settings_refuse_to_be_changed():
    settings = DPO(model="m", data="d")
    with pytest.raises(ValueError, match="frozen"):
        settings.beta = 1.0  # type: ignore[misc]


def test_the_yaml_of_a_run_is_plain(tmp_path):
    assert json.loads(json.dumps(yaml.safe_load(dump_yaml(PPO(model="m", data="d"), "ppo"))))[
        "kl"
    ] == {"placement": None, "estimator": None, "target": None, "horizon": 10_000}


def test_bad_python_settings_raise_a_value_error():
    with pytest.raises(ValueError, match="beta"):
        DPO(model="m", data="d", beta=-1)
    with pytest.raises(InputError, match="betta"):
        from fiducial.settings import build

        build(DPO, {"model": "m", "data": "d", "betta": 1})
