"""The life of a run folder: what it records of its inputs, and what a resumed run may change."""

import hashlib
import json

import pytest
import yaml

import fiducial as fd
from fiducial.errors import InputError
from fiducial.run import Run
from fiducial.settings import OptimizerSettings, RunSettings
from fiducial.train.inputs import inputs, sha256


def settings(models, data, out, steps=2, **changes):
    run = {"samples": 1, "checkpoint_every": 1} | changes.pop("run", {})
    return fd.SFT(
        model=models["gpt2"],
        data=data["completions"],
        out=str(out),
        steps=steps,
        batch_size=4,
        learning_rate=1e-3,
        max_new_tokens=2,
        optimizer=OptimizerSettings(schedule="constant"),
        run=RunSettings(**run),
        **changes,
    )


@pytest.fixture
def ran(models, data, tmp_path):
    return fd.sft(settings(models, data, tmp_path / "run")).path


def test_another_precision_is_refused_and_the_folder_stays_as_it_is(models, data, ran):
    before = (ran / "config.yaml").read_text()
    other = settings(models, data, ran, 3, resume=True, run={"precision": "bfloat16"})
    with pytest.raises(InputError, match=r"--resume: run\.precision differ"):
        fd.sft(other)
    assert (ran / "config.yaml").read_text() == before


def test_config_yaml_says_what_is_run_from_here_on_and_what_was_changed(models, data, ran):
    fd.sft(settings(models, data, ran, 3, resume=True, run={"eval_every": 7}))
    config = yaml.safe_load((ran / "config.yaml").read_text())
    assert config["steps"] == 3 and config["run"]["eval_every"] == 7
    (change,) = config["resumed"]
    assert change["step"] == 2 and change["changed"]["steps"] == {"was": 2, "is": 3}
    assert change["changed"]["run"]["was"]["eval_every"] == 50
    assert "resume" not in change["changed"] and "out" not in change["changed"]

    fd.sft(settings(models, data, ran, 4, resume=True, run={"eval_every": 7}))
    config = yaml.safe_load((ran / "config.yaml").read_text())
    assert [c["step"] for c in config["resumed"]] == [2, 3]


def test_the_summary_and_the_page_name_the_model_and_the_data_with_their_hashes(models, data, ran):
    summary = json.loads((ran / "summary.json").read_text())
    with open(data["completions"], "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert summary["data"] == {"--data": {"source": data["completions"], "sha256": digest}}
    assert summary["model"]["name"] == models["gpt2"] and len(summary["model"]["sha256"]) == 64
    page = (ran / "report.html").read_text()
    assert digest[:12] in page and summary["model"]["sha256"][:12] in page
    assert "Not recorded" not in page or "SHA-256" not in page.split("Not recorded")[1][:200]


def test_every_input_of_an_online_method_is_hashed(tmp_path):
    (tmp_path / "r.py").write_text("def f(completions): return [0.0]")
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "p.jsonl").write_text("{}")
    found = inputs(
        {
            "model": "name/on-the-hub",
            "teacher": str(tmp_path / "rm"),
            "data": str(tmp_path / "p.jsonl"),
            "reward": [f"{tmp_path / 'r.py'}:f", str(tmp_path / "rm"), "exact_match"],
            "ptx": {"data": str(tmp_path / "p.jsonl")},
            "rows": {"eval_data": None},
        }
    )
    assert found["model"] == {"name": "name/on-the-hub", "sha256": None}
    assert set(found["data"]) == {"--teacher", "--data", "--ptx.data", "--reward 1", "--reward 2"}
    assert found["data"]["--reward 1"]["sha256"] == sha256(tmp_path / "r.py")
    assert found["data"]["--reward 2"] == found["data"]["--teacher"]


def test_a_folders_hash_follows_names_and_bytes(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    (tmp_path / "b" / "x").write_text("2")
    (tmp_path / "c" / "x").rename(tmp_path / "c" / "y")
    hashes = {sha256(tmp_path / name) for name in ("a", "b", "c")}
    assert len(hashes) == 3


FOLDERS = {
    "--model": ("sft", {"model": "/no/such"}),
    "--teacher": ("distill", {"teacher": "/no/such"}),
    "--reward": ("ppo", {"reward": ("/no/such",)}),
    "--reference-data": ("reward", {"reference_data": "no.jsonl"}),
    "--rows.eval-data": ("dpo", {"rows": {"eval_data": "no.jsonl"}}),
    "--ptx.data": ("ppo", {"ptx": {"data": "no.jsonl"}}),
    "--data": ("grpo", {"data": "no.jsonl"}),
}


@pytest.mark.parametrize("flag", FOLDERS)
def test_what_does_not_exist_is_told_with_its_flag_before_a_row_is_read(
    models, tmp_path, flag, monkeypatch
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("not a row\n")  # would be refused as soon as it is read
    verb, changes = FOLDERS[flag]
    classes = {
        "sft": fd.SFT,
        "distill": fd.Distill,
        "ppo": fd.PPO,
        "reward": fd.RewardModel,
        "dpo": fd.DPO,
        "grpo": fd.GRPO,
    }
    common = {"model": models["gpt2"], "data": str(rows), "out": str(tmp_path / "run")}
    if verb in ("ppo", "grpo"):
        common["reward"] = ("length",)
    if verb == "distill":
        common["teacher"] = models["gpt2"]
    with pytest.raises(InputError, match=f"^{flag}: .*no"):
        getattr(fd, verb)(classes[verb](**(common | changes)))
    assert not (tmp_path / "run").exists()


def test_the_state_of_a_run_is_restored_as_it_was_typed(models, data, tmp_path):
    from fiducial.methods.ppo import PPOState
    from fiducial.rewards.shaping import ScoreScale

    asked = settings(models, data, tmp_path / "run", steps=3)
    with Run("sft", asked, state=PPOState(0.1)) as run:
        run.start(3)
        run.state = PPOState(0.25, ScoreScale(1.0, 2.0))
        run.end_step({}, rows=1, tokens=1)
        run.save_checkpoint()
    again = settings(models, data, tmp_path / "run", steps=3, resume=True)
    with Run("sft", again, state=PPOState(0.1)) as run:
        run.start(3)
        assert run.state == PPOState(0.25, ScoreScale(1.0, 2.0))
