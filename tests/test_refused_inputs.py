"""Values, folders and files that make no sense: one sentence that names the setting, exit code 2,
and soon. What a resumed run finds damaged in its folder is refused or passed over with a word.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from fiducial.cli import main
from fiducial.train.folders import cut_after
from support import write_jsonl


@pytest.fixture
def refused(capsys):
    """refused("sft --model ..."): the last line of a command that ends with exit code 2."""

    def run(words):
        assert main(words if isinstance(words, list) else words.split()) == 2
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert said.startswith("fiducial: ") and len(said) < 600 and "Traceback" not in said
        return said

    return run


@pytest.fixture
def sft(models, data, tmp_path):
    """The beginning of a command that would run."""
    return (
        f"sft --model {models['gpt2']} --data {data['completions']} --steps 1 --batch-size 2 "
        f"--run.samples 0 --out {tmp_path / 'run'} "
    )


@pytest.mark.parametrize("count", [3, 10])
def test_a_held_out_share_that_leaves_nothing(refused, sft, data, tmp_path, count):
    lines = Path(data["completions"]).read_text().split("\n")[:count]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines))
    said = refused(f"{sft} --data {few} --rows.held-out 0.999")
    assert f"--rows.held-out 0.999 of {count} rows leaves none to train on" in said


@pytest.mark.parametrize(
    ("out", "why"),
    [("x" * 5000, "File name too long"), ("FILE/x", "Not a directory"), ("/proc/no/x", "No such")],
    ids=["long", "below a file", "read-only"],
)
@pytest.mark.parametrize("verb", ["sft", "lab"])
def test_a_folder_that_cannot_be_made(refused, sft, tmp_path, verb, out, why):
    (tmp_path / "FILE").write_text("")
    out = out.replace("FILE", str(tmp_path / "FILE"))
    said = refused(f"{sft} --out {out}" if verb == "sft" else f"lab --out {out}")
    assert "--out: " in said and f"cannot be made: {why}" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lora.target-modules nope --lora.r 2", "--lora.target-modules: the model has no layer"),
        ("--lora.r 100000", "--lora.r 100000 is more than the model's width of 32"),
        ("--max-new-tokens 1000000", "--max-new-tokens 1,000,000 is more than the model's context"),
        ("--data=", "--data: an empty name"),
        (f"--data {'/x' * 3000}", "--data: there is no file|--data: .* File name too long"),
        (f"--model {'/x' * 3000}", "--model: there is no folder|--model: .* File name too long"),
    ],
    ids=lambda x: x[:30],
)
def test_a_value_that_does_not_fit_the_model(refused, sft, flags, said):
    assert re.search(said, refused(f"{sft} {flags}"))


@pytest.mark.parametrize(
    "reward", [":", ".x:f", "os:system", "builtins:len", "nothere:f", "r.py:", "r.py:no", "length:"]
)
def test_a_reward_that_is_no_function(refused, models, data, tmp_path, monkeypatch, reward):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("def f(completions, **columns): ...\n")
    words = f"ppo --model {models['gpt2']} --data {data['prompts']} --out run --reward {reward}"
    assert "--reward: " in refused(words)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": -1}, "config.json says n_layer -1"),
        ({"n_layer": 100_000_000}, "config.json says n_layer 100,000,000, and the folder holds"),
        ({"eos_token_id": 1_000_000_000}, "eos_token_id 1000000000, which is no id"),
        ("{", "config.json is no JSON"),
        ("[]", "config.json holds a list, not an object"),
        (None, "holds no tokenizer"),
    ],
    ids=["negative", "vast", "eos", "torn", "list", "no tokenizer"],
)
def test_a_model_folder_at_fault(refused, sft, models, tmp_path, changes, said):
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "m"))
    config = folder / "config.json"
    if isinstance(changes, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    elif changes is None:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    else:
        config.write_text(changes)
    told = refused(f"{sft} --model {folder}")
    assert "--model: " in told and said in told


# What --resume finds
# ------------------------------------------------------------


@pytest.fixture
def stopped(models, data, tmp_path):
    """A run with checkpoints at its steps 2 and 4, whose model is gone."""
    out = tmp_path / "stopped"
    words = f"sft --model {models['gpt2']} --data {data['completions']} --steps 4 --batch-size 2"
    assert main([*words.split(), "--run.checkpoint-every", "2", "--out", str(out)]) == 0
    shutil.rmtree(out / "model")
    return out


@pytest.mark.parametrize("verb", ["sft", "grpo", "distill"])
def test_a_folder_without_a_run_is_not_told_as_a_missing_model(refused, tmp_path, verb):
    said = refused(f"{verb} --out {tmp_path / 'none'} --resume")
    assert "--resume: " in said and "holds no run to go on with" in said


def test_manifests_that_are_no_manifests(refused, stopped):
    for folder in (stopped / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("[]")
    assert "no whole checkpoint" in refused(f"sft --out {stopped} --resume")


def test_an_empty_manifest_vouches_for_nothing(stopped, capsys):
    (stopped / "checkpoints" / "checkpoint-4" / "manifest.json").write_text("{}")
    assert main(["sft", "--out", str(stopped), "--resume"]) == 0
    said = capsys.readouterr().err
    assert "passed over: checkpoint-4 has an empty manifest" in said and "checkpoint-2" in said


def test_a_settings_file_that_was_emptied(refused, stopped, models, data):
    (stopped / "config.yaml").write_text("")
    words = f"sft --model {models['gpt2']} --data {data['completions']} --steps 4 --batch-size 2"
    assert "config.yaml is empty or damaged" in refused(f"{words} --out {stopped} --resume")


def test_folders_and_lines_that_are_not_ours_are_passed_over(stopped, capsys):
    (stopped / "checkpoints" / "checkpoint-²").mkdir()
    records = stopped / "metrics.jsonl"
    whole = records.read_bytes()
    records.write_bytes(b'[1]\n{"a": 1}\n' + whole + '{"step": 9, "x": "é'.encode()[:-1])
    assert main(["sft", "--out", str(stopped), "--resume"]) == 0
    assert "metrics.jsonl: 3 lines were no records, and are dropped" in capsys.readouterr().err
    assert records.read_bytes() == whole


def test_records_are_cut_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    write_jsonl(file, ({"step": k, "text": "a\u2028b"} for k in range(6)))
    before = file.read_bytes()

    class Killed(BaseException): ...

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(Killed):
            cut_after(file, 3)
    assert file.read_bytes() == before
    assert cut_after(file, 3) == (4, 0)
    lines = file.read_text(encoding="utf-8").strip().split("\n")
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
