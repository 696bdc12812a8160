"""What must survive: full disks, numbers that are not finite, changed inputs, a last step, time.

The rows are those of the table of faults: each is injected where it would arise, and what is left
in the run folder is compared with what a run without the fault leaves.
"""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fiducial as fd
from fiducial import run as life
from fiducial.cli import main
from fiducial.errors import InputError, RunError
from fiducial.models.roles import Policy
from fiducial.models.weights import is_finite
from fiducial.run import Run
from fiducial.settings import OptimizerSettings, RunSettings
from fiducial.train import checkpoint, keep
from fiducial.train.step import Stepper
from support import PROMPTS, write_jsonl

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def sft(models, data, tmp_path):
    """sft("name", steps=3): a short run in a folder of that name."""

    def settings(name, steps=4, *, run=None, resume=False, **changes):
        run = {"samples": 1, "checkpoint_every": 2, "eval_every": 1} | (run or {})
        common = {"model": models["gpt2"], "data": data["completions"], "batch_size": 4}
        common |= {"learning_rate": 1e-3, "max_new_tokens": 2, "steps": steps, "resume": resume}
        common |= {"optimizer": OptimizerSettings(schedule="constant"), "run": RunSettings(**run)}
        return fd.SFT(**(common | changes), out=str(tmp_path / name))

    return settings


def records(folder, *without):
    def plain(line):
        row = json.loads(line)
        return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", *without)}

    return [
        [plain(line) for line in (Path(folder) / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl")
    ]


def steps_of(folder):
    return [int(p.name.rpartition("-")[2]) for p in checkpoint.numbered(folder / "checkpoints")]


# The last step, and time
# ------------------------------------------------------------


def test_a_finished_run_that_is_made_longer_is_the_longer_run(sft, tmp_path):
    quiet = {"eval_every": 0, "checkpoint_every": 0}  # no evaluation that only a last step has
    fd.sft(sft("long", 5, run=quiet, rows={"held_out": 0.0}))
    fd.sft(sft("short", 3, run=quiet, rows={"held_out": 0.0}))
    assert steps_of(tmp_path / "short") == [3]  # though no step was asked to have a checkpoint
    fd.sft(sft("short", 5, run=quiet, rows={"held_out": 0.0}, resume=True))
    long, short = tmp_path / "long", tmp_path / "short"
    assert records(long) == records(short)
    a, b = (load_file(p / "model" / "model.safetensors") for p in (long, short))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_killed_while_it_finishes_has_its_records_once(sft, tmp_path, monkeypatch):
    fd.sft(sft("whole"))

    class Killed(BaseException):
        pass

    def killed(*args, **keywords):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(life, "together", killed)  # after the last samples, before the model
        with pytest.raises(Killed):
            fd.sft(sft("killed"))
    assert not (tmp_path / "killed" / "model").exists()
    fd.sft(sft("killed", resume=True))
    assert records(tmp_path / "killed") == records(tmp_path / "whole")


def test_a_checkpoint_is_made_when_its_minutes_have_passed(sft, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(keep.time, "monotonic", lambda: now[0])
    step = Run.end_step

    def slow(self, *args, **keywords):
        step(self, *args, **keywords)
        now[0] += 100.0  # seconds per step: 5 minutes have passed after the third

    monkeypatch.setattr(Run, "end_step", slow)
    minutes = {"checkpoint_every": 0, "checkpoint_minutes": 5.0, "keep_checkpoints": 9}
    fd.sft(sft("run", 8, run=minutes))
    assert steps_of(tmp_path / "run") == [3, 6, 8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_stops_at_once_and_says_how_to_go_on(
    sft, tmp_path, monkeypatch, capsys, number
):
    monkeypatch.setattr("fiducial.methods.sft.prepare", lambda *a: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        fd.sft(sft("run"))
    assert f"fiducial sft --out {tmp_path / 'run'} --resume" in capsys.readouterr().err
    monkeypatch.undo()
    fd.sft(sft("run", resume=True))
    fd.sft(sft("whole"))
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    began = [(tmp_path / name / "inputs.json").read_text() for name in ("run", "whole")]
    assert began[0] == began[1]


def test_a_schedule_that_a_longer_run_changes_is_said(sft, tmp_path, capsys):
    fd.sft(sft("run", 2))
    assert "the learning rate goes on" not in capsys.readouterr().err
    fd.sft(sft("run", 3, resume=True))
    assert "the learning rate goes on as in a run of 3 steps" in capsys.readouterr().err


def test_no_default_run_is_without_a_checkpoint():
    assert RunSettings().checkpoint_minutes == 10.0


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept(sft, tmp_path, monkeypatch):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.7, 6: 9.0}
    record = Run.record

    def told(self, values):
        record(self, values | {k: losses[self.step] for k in values if k == "eval/loss"})

    monkeypatch.setattr(Run, "record", told)
    fd.sft(sft("run", 6, run={"checkpoint_every": 1, "keep_checkpoints": 2}))
    assert steps_of(tmp_path / "run") == [2, 5, 6]


# A disk that refuses
# ------------------------------------------------------------

PLACES = {
    "seal": (checkpoint, "seal"),
    "rename": (checkpoint, "publish"),
    "counters": (checkpoint, "write_json"),
}


def raises(error):
    def fail(*args, **keywords):
        raise error

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_refuses_a_checkpoint_is_one_sentence_and_the_last_good_one_stays(
    sft, tmp_path, monkeypatch, place, number
):
    monkeypatch.undo()
    owner, name = PLACES[place]
    whole, calls = getattr(owner, name), []

    def second(path, *args, **keywords):
        if place == "counters" and "checkpoints" not in str(path):
            return whole(path, *args, **keywords)
        calls.append(1)
        if len(calls) >= 2:
            raise OSError(number, os.strerror(number))
        return whole(path, *args, **keywords)

    monkeypatch.setattr(owner, name, second)
    out = tmp_path / "run"
    with pytest.raises(RunError) as told:
        fd.sft(sft("run", 6))
    said = str(told.value)
    assert os.strerror(number) in said and str(out / "checkpoints" / "checkpoint-4") in said
    assert f"{out / 'checkpoints' / 'checkpoint-2'} is safe" in said
    assert said.endswith(f"go on with: fiducial sft --out {out} --resume")
    assert steps_of(out) == [2] and not list((out / "checkpoints").glob(".aside*"))
    monkeypatch.undo()
    fd.sft(sft("run", 6, resume=True))
    fd.sft(sft("whole", 6))
    assert records(out) == records(tmp_path / "whole")


def test_records_on_a_full_disk_are_one_sentence(sft, tmp_path, monkeypatch, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    start = Run.start

    def full(self, *args, **keywords):
        start(self, *args, **keywords)
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        (self.path / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(Run, "start", full)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No space left on devi"):
        fd.sft(sft("run"))


def test_a_model_that_cannot_be_written_leaves_the_last_checkpoint(sft, tmp_path, monkeypatch):
    from fiducial.methods import sft as page

    monkeypatch.setattr(page, "save", raises(FULL))
    with pytest.raises(RunError, match=r"model cannot be written.*checkpoint-4 is safe"):
        fd.sft(sft("run"))
    monkeypatch.undo()
    assert fd.sft(sft("run", resume=True)).step == 4
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [FULL, KeyError("a fault of the page")])
@pytest.mark.parametrize("part", ["write_report", "model_card"])
def test_a_page_or_a_card_that_cannot_be_written_fails_no_run(
    sft, tmp_path, monkeypatch, capsys, part, error
):
    monkeypatch.setattr(life, part, raises(error))
    assert fd.sft(sft("run")).step == 4
    assert "could not be written" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# Not finite
# ------------------------------------------------------------


def poison(monkeypatch, *updates):
    """The gradient of these updates (counted from 0) is NaN in one tensor."""
    step, calls = Stepper.step, []

    def poisoned(self, number):
        calls.append(number)
        if len(calls) - 1 in updates:
            next(p for p in self.module.parameters() if p.grad is not None).grad[0] = torch.nan
        return step(self, number)

    monkeypatch.setattr(Stepper, "step", poisoned)


def online(models, tmp_path, **changes):
    rewards = tmp_path / "reward.py"
    rewards.write_text("def f(completions): return [float(len(c)) for c in completions]\n")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": p} for p in PROMPTS))
    common = {"model": models["gpt2"], "data": prompts, "batch_size": 4, "steps": 3}
    common |= {"max_new_tokens": 3, "run": RunSettings(samples=0, checkpoint_every=1)}
    return common | {"out": str(tmp_path / "run")} | changes, f"{rewards}:f"


@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "ppo", "grpo", "reinforce", "distill"])
def test_a_gradient_that_is_not_finite_stops_the_run_and_its_batch_is_kept(
    models, data, tmp_path, monkeypatch, method
):
    poison(monkeypatch, 1)
    common, reward = online(models, tmp_path)
    classes = {"sft": fd.SFT, "dpo": fd.DPO, "reward": fd.RewardModel, "ppo": fd.PPO}
    classes |= {"grpo": fd.GRPO, "reinforce": fd.Reinforce, "distill": fd.Distill}
    if method in ("sft", "dpo", "reward"):
        common["data"] = data["completions" if method == "sft" else "pairs"]
        del common["max_new_tokens"]
    elif method == "distill":
        common["teacher"] = models["gpt2"]
    else:
        common["reward"] = (reward,)
    common |= {"epochs": 1, "minibatches": 1} if method in ("ppo", "grpo") else {}
    common |= {"group_size": 2} if method in ("grpo", "reinforce") else {}
    with pytest.raises(RunError, match=r"gradient is not finite in 1 tensor, first .*bad-batch"):
        getattr(fd, method)(classes[method](**common))
    out = tmp_path / "run"
    assert steps_of(out) == ([] if method == "ppo" else [1])  # its second update is the critic's
    tensors = load_file(out / "bad-batch.safetensors")
    rows = [json.loads(line) for line in (out / "bad-batch.jsonl").read_text().splitlines()]
    ids = [x for name, x in tensors.items() if name.endswith("ids")]
    assert ids and all(x.dtype == torch.long for x in ids)
    assert len(rows) in (3, 4) and all(row["row"] for row in rows)
    shown = " ".join(json.dumps(row) for row in rows)
    assert sum(p.split()[0] in shown for p in PROMPTS) >= 1
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"


def test_an_update_that_is_left_out_is_counted_and_said(sft, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 1, 4)
    fd.sft(sft("run", 6, run={"on_nonfinite": "skip"}))
    assert "this update is left out" in capsys.readouterr().err
    lines = [row for row in records(tmp_path / "run")[0] if "learning_rate" in row]
    assert [row.get("skipped_updates", 0) for row in lines] == [0, 1, 1, 1, 2, 2]
    assert ["grad_norm" in row for row in lines] == [True, False, True, True, False, True]


def test_an_update_that_is_left_out_changes_no_weight(sft, tmp_path, monkeypatch):
    poison(monkeypatch, 0)
    before = load_file(Path(sft("x").model) / "model.safetensors")
    fd.sft(sft("run", 1, run={"on_nonfinite": "skip"}))
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_too_many_in_a_row_stop_the_run(sft, tmp_path, monkeypatch):
    poison(monkeypatch, 0, 1, 3, 4, 5, 6)
    few = {"on_nonfinite": "skip", "nonfinite_limit": 2, "checkpoint_every": 1}
    with pytest.raises(RunError, match=r"after 2 updates in a row that were left out"):
        fd.sft(sft("run", 9, run=few))
    assert steps_of(tmp_path / "run")[-1] == 5  # the fourth to the sixth were bad in a row


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_is_sealed_in_a_checkpoint(sft, tmp_path, monkeypatch, value):
    step = Run.end_step

    def spoiled(self, *args, **keywords):
        step(self, *args, **keywords)
        if self.step == 3:
            policy = next(m for m in self.processes.accelerator._models if isinstance(m, Policy))
            with torch.no_grad():
                next(policy.parameters()).view(-1)[7] = value

    monkeypatch.setattr(Run, "end_step", spoiled)
    monkeypatch.setattr("fiducial.methods.sft.evaluate", lambda *a: 1.0)
    with pytest.raises(RunError, match=r"step 3: the weight .* is no longer finite"):
        fd.sft(sft("run", 6, run={"checkpoint_every": 1}))
    assert steps_of(tmp_path / "run") == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".aside*"))


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
def test_a_disk_that_is_full_before_the_first_step_is_one_sentence(
    models, data, tmp_path, monkeypatch, capsys, name
):
    sync = checkpoint._sync

    def full(path):
        if path.name == f"{name}.aside":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write: without a name
        sync(path)

    monkeypatch.setattr(checkpoint, "_sync", full)
    out = tmp_path / "run"
    words = f"sft --model {models['gpt2']} --data {data['completions']} --out {out} --steps 1"
    assert main([*words.split(), "--run.samples", "0"]) == 1
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said == f"fiducial: {out / name} cannot be read or written: No space left on device"


def test_a_bias_that_forbids_a_token_is_a_weight_like_others():
    bias = torch.zeros(4)
    bias[3] = -torch.inf
    assert is_finite(bias) and not is_finite(bias[None])
    for value in (torch.nan, torch.inf):
        bias[0] = value
        assert not is_finite(bias)


def test_an_optimizer_that_is_not_finite_is_not_sealed(sft, tmp_path, monkeypatch):
    step = Stepper.step

    def spoiled(self, number):
        out = step(self, number)
        if number == 2:
            next(iter(self.optimizer.state.values()))["exp_avg"].view(-1)[0] = torch.inf
        return out

    monkeypatch.setattr(Stepper, "step", spoiled)
    with pytest.raises(RunError, match="the optimizer's state is no longer finite"):
        fd.sft(sft("run", 6, run={"checkpoint_every": 1}))
    assert steps_of(tmp_path / "run") == [1, 2]


# Inputs that changed
# ------------------------------------------------------------


def edit(path):
    text = path.read_text()
    path.write_text(text.replace("}", " }", 1) if "}" in text else text + "\n# changed\n")


def stopped(models, data, tmp_path, monkeypatch):
    """A PPO run that was stopped after its first step, with every input a copy of its own."""
    for name in ("model", "reward"):
        shutil.copytree(models["gpt2"], tmp_path / name)
    fd.reward(
        fd.RewardModel(
            model=str(tmp_path / "model"),
            data=data["pairs"],
            out=str(tmp_path / "rm"),
            steps=1,
            batch_size=4,
            run=RunSettings(samples=0),
        )
    )
    common, reward = online(models, tmp_path, model=str(tmp_path / "model"))
    shutil.copy(data["completions"], tmp_path / "ptx.jsonl")
    common |= {"reward": (reward, str(tmp_path / "rm" / "model")), "epochs": 1, "minibatches": 1}
    common["ptx"] = {"data": str(tmp_path / "ptx.jsonl")}
    step = Run.end_step

    def stop(self, *args, **keywords):
        step(self, *args, **keywords)
        self._stopping.wanted = True

    with monkeypatch.context() as patch, pytest.raises(RunError, match="stopped at step 1"):
        patch.setattr(Run, "end_step", stop)
        fd.ppo(fd.PPO(**common))
    return common


CHANGES = {
    "--data": lambda at: edit(at / "prompts.jsonl"),
    "--ptx.data": lambda at: edit(at / "ptx.jsonl"),
    "--reward 1": lambda at: edit(at / "reward.py"),
    "--reward 2": lambda at: edit(at / "rm" / "model" / "config.json"),
    "the tokenizer of --model": lambda at: edit(at / "model" / "tokenizer.json"),
    "--model": lambda at: edit(at / "model" / "config.json"),
}


def test_inputs_that_changed_before_resume_are_refused_by_name(models, data, tmp_path, monkeypatch):
    common = stopped(models, data, tmp_path / "x", monkeypatch)
    before = (tmp_path / "x" / "run" / "metrics.jsonl").read_bytes()
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "x", kept)
    for name, change in CHANGES.items():
        change(tmp_path / "x")
        with pytest.raises(InputError, match=rf"^--resume: {name} .* not what the run began with"):
            fd.ppo(fd.PPO(**common, resume=True))
        assert (tmp_path / "x" / "run" / "metrics.jsonl").read_bytes() == before
        shutil.rmtree(tmp_path / "x")
        shutil.copytree(kept, tmp_path / "x")
    (tmp_path / "x" / "model" / "README.md").write_text("a note that nobody loads")
    assert fd.ppo(fd.PPO(**common, resume=True)).step == 3


def test_a_reward_that_was_mended_can_be_accepted(models, data, tmp_path, monkeypatch, capsys):
    common = stopped(models, data, tmp_path / "x", monkeypatch)
    edit(tmp_path / "x" / "reward.py")
    common["run"] = common["run"].model_copy(update={"changed_inputs": "accept"})
    assert fd.ppo(fd.PPO(**common, resume=True)).step == 3
    assert "--reward 1" in capsys.readouterr().err
    common["run"] = common["run"].model_copy(update={"changed_inputs": "refuse"})
    assert fd.ppo(fd.PPO(**common, resume=True)).step == 3  # what was accepted is what counts now


def test_a_damaged_list_of_inputs_is_refused(sft, tmp_path):
    fd.sft(sft("run", 2))
    for text in ("", "[]", "{}", '{"model": 3, "tokenizer": 1, "data": 2}'):
        (tmp_path / "run" / "inputs.json").write_text(text)
        with pytest.raises(InputError, match=r"inputs\.json is damaged"):
            fd.sft(sft("run", 3, resume=True))


def test_a_full_disk_on_the_command_line_is_exit_code_1(
    models, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "seal", raises(FULL))
    words = f"sft --model {models['gpt2']} --data {data['completions']} --out {tmp_path / 'run'}"
    assert main([*words.split(), "--steps", "1", "--run.samples", "0"]) == 1
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("fiducial: ") and "No space left on device: free some space" in said
