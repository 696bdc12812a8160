"""A run that is killed, stopped or damaged goes on to the very same end: weights bit for bit,
metrics number for number.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fiducial as fd
from fiducial.errors import InputError, RunError
from fiducial.run import Run
from fiducial.settings import KLSettings, LoraSettings, RunSettings, ScoreSettings
from fiducial.train import checkpoint
from support import BAD, GOOD, PROMPTS, write_jsonl

STEPS = 7
METHODS = ("sft", "reward", "dpo", "ppo", "reinforce", "grpo", "distill", "prm")
DRIVER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import fiducial as fd
from fiducial.building import build
from fiducial import run
from fiducial.train import checkpoint, folders, step
from fiducial.methods import distill, dpo, grpo, ppo, prm, reinforce, reward_model, sft
# what a run imports late, once for all children
import accelerate, peft, peft.tuners.lora, fiducial.report.page, torch._dynamo
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PLACES = {"update": (step.Stepper, "step"), "record": (run.Run, "end_step"),
          "seal": (checkpoint, "seal"), "rename": (checkpoint.os, "rename"),
          "cut": (folders, "write_bytes"),
          "finish": (run, "together"), "page": (run, "write_report")}

def kill_at(place, call):
    owner, name = PLACES[place]
    whole, calls = getattr(owner, name), []
    def deadly(*args, **keywords):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **keywords)
    setattr(owner, name, deadly)

CLASSES = {"sft": fd.SFT, "reward": fd.RewardModel, "dpo": fd.DPO, "ppo": fd.PPO,
           "reinforce": fd.Reinforce, "grpo": fd.GRPO, "distill": fd.Distill, "prm": fd.PRM}
for method, settings, place, call in json.load(open(sys.argv[1])):
    child = os.fork()
    if child == 0:  # each in a process of its own that has trained nothing before
        if place:
            kill_at(place, call)
        getattr(fd, method)(build(CLASSES[method], settings))
        os._exit(0)
    print(method, place, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def settings_of(models, make, data, tmp_path_factory):
    deeper = make("gpt2", n_layer=3)
    reward = tmp_path_factory.mktemp("rewards") / "reward.py"
    reward.write_text(
        "def score(completions, **columns):\n    return [c.count('e') + len(c) / 10 for c in "
        "completions]\n\n"
        "def some(completions, number, **columns):\n    return [0.0 if n % 2 else s for n, s in "
        "zip(number, score(completions))]\n"
    )

    steps = write_jsonl(
        reward.parent / "steps.jsonl",
        (
            {"prompt": p, "completions": [g, b, g], "labels": [1, len(g) % 2, 1]}
            for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)
        ),
    )

    def settings(method, out, **changes):
        common = {
            "model": models["gpt2"],
            "out": str(out),
            "steps": STEPS,
            "learning_rate": 1e-2,
            "batch_size": 4,
        }
        common |= {"run": RunSettings(eval_every=1, samples=2, checkpoint_every=2)}
        cls, extra = {
            "sft": (fd.SFT, {"data": data["completions"], "max_new_tokens": 4}),
            "reward": (fd.RewardModel, {"data": data["pairs"]}),
            "prm": (fd.PRM, {"data": steps}),
            "dpo": (
                fd.DPO,
                {
                    "data": data["pairs"],
                    "max_new_tokens": 4,
                    "lora": LoraSettings(r=2),
                    "model": models["llama"],
                },
            ),
            "ppo": (
                fd.PPO,
                {
                    "data": data["prompts"],
                    "reward": (f"{reward}:score",),
                    "max_new_tokens": 6,
                    "epochs": 2,
                    "minibatches": 2,
                },
            ),
            "distill": (
                fd.Distill,
                {
                    "data": data["prompts"],
                    "teacher": deeper,
                    "max_new_tokens": 6,
                    "discount": 0.5,
                    "eval_samples": 4,
                },
            ),
            "reinforce": (
                fd.Reinforce,
                {
                    "data": data["prompts"],
                    "reward": (f"{reward}:score",),
                    "max_new_tokens": 6,
                    "baseline": "mean",
                    "group_size": 2,
                },
            ),
            "grpo": (
                fd.GRPO,
                {
                    "data": data["prompts"],
                    "reward": (f"{reward}:some",),
                    "max_new_tokens": 6,
                    "group_size": 2,
                    "variant": "dapo",
                    "beta": 0.05,
                    "epochs": 2,
                    "minibatches": 2,
                },
            ),
        }[method]
        if (
            method in ("ppo", "reinforce", "grpo")
            # a controller and statistics that live in the run's state, beside a running mean and a
            # place in the data
        ):
            extra |= {
                "kl": KLSettings(target=0.1, horizon=20),
                "score": ScoreSettings(normalise="first"),
            }
        return cls(**(common | extra | changes))

    return settings


@pytest.fixture(scope="module")
def whole(settings_of, tmp_path_factory):
    """A run of each method that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        method: getattr(fd, method)(settings_of(method, folder / method)).path for method in METHODS
    }


def drive(jobs, folder):
    script, list_of_jobs = folder / "driver.py", folder / "jobs.json"
    script.write_text(DRIVER)
    list_of_jobs.write_text(json.dumps(jobs))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, list_of_jobs],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(line.split()[-1]) for line in done.stdout.splitlines()], done.stderr


def weights(run):
    return {p.name: load_file(p) for p in (Path(run) / "model").glob("*.safetensors")}


def metrics(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def assert_equal_runs(one, other):
    a, b = weights(one), weights(other)
    assert a and a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name])
    assert metrics(one) == metrics(other)
    samples = [Path(r) / "samples.jsonl" for r in (one, other)]
    assert samples[0].is_file() == samples[1].is_file()
    if samples[0].is_file():
        assert samples[0].read_text() == samples[1].read_text()


# Killed
# ------------------------------------------------------------

KILLS = [  # where, at which call of it, and the newest checkpoint that is left
    ("sft", "update", 6, 4),
    ("sft", "seal", 2, 2),
    ("reward", "record", 4, 2),
    ("reward", "rename", 3, 4),
    ("prm", "update", 6, 4),
    ("prm", "rename", 3, 4),
    ("dpo", "record", 6, 4),
    ("dpo", "rename", 2, 2),
    (
        "ppo",
        "update",
        2 * (2 * 2 * 4) + 3,
        4,
    ),  # two optimizers, four updates an iteration: in the middle of the fifth
    ("ppo", "seal", 3, 4),
    ("ppo", "update", 1, None),
    ("reinforce", "update", 6, 4),
    ("reinforce", "seal", 1, None),
    (
        "grpo",
        "update",
        4 * 4 + 3,
        4,
    ),  # in the middle of the fifth iteration, after other prompts were drawn in place of some
    ("grpo", "record", 4, 2),
    ("distill", "update", 6, 4),
    ("sft", "page", 1, 7),
]


AGAIN = {  # killed a second time, while it is resumed: at which call of what
    ("sft", "seal", 2): ("cut", 1),
    ("reward", "record", 4): ("finish", 1),
    ("dpo", "rename", 2): ("page", 1),
    ("reinforce", "seal", 1): ("cut", 2),
    ("distill", "update", 6): ("record", 2),
}


@pytest.fixture(scope="module")
def killed(settings_of, whole, tmp_path_factory):
    """Each job killed in one process and gone on with in another; the folder of each, with the
    checkpoint it had when it died.
    """
    folder = tmp_path_factory.mktemp("killed")
    outs = [folder / f"{method}-{place}-{call}" for method, place, call, _ in KILLS]
    jobs = [
        (kill[0], json.loads(settings_of(kill[0], out).model_dump_json()))
        for kill, out in zip(KILLS, outs, strict=True)
    ]
    places = [(place, call) for _, place, call, _ in KILLS]
    codes, _ = drive([(*job, *place) for job, place in zip(jobs, places, strict=True)], folder)
    assert codes == [-signal.SIGKILL] * len(KILLS)
    left = []
    for out in outs:
        newest, faults = checkpoint.newest_good(out / "checkpoints")
        assert not faults
        left.append(newest and int(newest.name.rpartition("-")[2]))
    resumed = [(method, plain | {"resume": True}) for method, plain in jobs]
    again = [AGAIN.get((m, *place), (None, 0)) for (m, _), place in zip(jobs, places, strict=True)]
    codes, said = drive([(*job, *place) for job, place in zip(resumed, again, strict=True)], folder)
    assert codes == [-signal.SIGKILL if place else 0 for place, _ in again], said[-3000:]
    twice = [(*job, None, 0) for job, (place, _) in zip(resumed, again, strict=True) if place]
    codes, said = drive(twice, folder)
    assert codes == [0] * len(AGAIN), said[-3000:]
    return list(zip(outs, left, strict=True))


@pytest.mark.parametrize(
    "number", range(len(KILLS)), ids=lambda i: "-".join(map(str, KILLS[i][:3]))
)
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(killed, whole, number):
    method, _, _, expected = KILLS[number]
    out, left = killed[number]
    assert left == expected
    assert_equal_runs(whole[method], out)
    assert not list(
        (out / "checkpoints").glob(".aside-*")
    )  # what the killed one left half-written is gone


def test_the_runs_that_are_compared_did_learn_and_differ(whole, models):
    assert len({json.dumps(metrics(whole[m])[-1]) for m in METHODS}) == len(METHODS)
    assert any(line.get("beta") != 0.05 for line in metrics(whole["ppo"]))
    for method, beta in (("reinforce", 0.03), ("grpo", 0.05)):
        assert len({line["beta"] for line in metrics(whole[method])} - {beta}) > 3
    assert (
        max(line["groups/sampled"] for line in metrics(whole["grpo"])) > 2
    )  # some prompts had to give way


# Stopped
# ------------------------------------------------------------


def stop_at(monkeypatch, step):
    whole_step = Run.end_step

    def interrupted(self, *args, **keywords):
        whole_step(self, *args, **keywords)
        if self.step == step and not self.settings.resume:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "end_step", interrupted)


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(
    settings_of, whole, tmp_path, monkeypatch, method
):
    before = signal.getsignal(signal.SIGINT)
    stop_at(monkeypatch, 3)
    seal, sealed = checkpoint.seal, []
    monkeypatch.setattr(
        checkpoint, "seal", lambda folder: sealed.append(folder.name) or seal(folder)
    )
    out = tmp_path / "run"
    with pytest.raises(
        RunError,
        match=f"stopped at step 3 of {STEPS}, saved: go on with: fiducial {method} "
        f"--out {out} --resume",
    ):
        getattr(fd, method)(settings_of(method, out))
    assert signal.getsignal(signal.SIGINT) is before
    assert sealed == [
        ".aside-2",
        ".aside-3",
    ]  # once each: writing one again would have to take the good one away first
    assert [p.name for p in checkpoint.numbered(out / "checkpoints")] == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert not (out / "model").exists()
    getattr(fd, method)(settings_of(method, out, resume=True))
    assert_equal_runs(whole[method], out)
    assert json.loads((out / "summary.json").read_text())["status"] == "done"


def test_ctrl_c_twice_stops_at_once(settings_of, tmp_path, monkeypatch):
    def twice(self, *args, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "end_step", twice)
    with pytest.raises(KeyboardInterrupt):
        fd.sft(settings_of("sft", tmp_path / "run"))
    assert not checkpoint.numbered(tmp_path / "run" / "checkpoints")


def test_a_finished_run_can_be_resumed_for_its_end(settings_of, whole, tmp_path):
    out = tmp_path / "run"
    fd.sft(settings_of("sft", out))
    fd.sft(settings_of("sft", out, resume=True))
    assert_equal_runs(whole["sft"], out)


def test_a_run_with_fewer_steps_can_be_made_longer(settings_of, tmp_path):
    """`steps` may change; at a constant rate the result is that of the longer run."""
    constant = {
        "optimizer": fd.SFT.model_fields["optimizer"].default.model_copy(
            update={"schedule": "constant"}
        )
    }
    short, long = tmp_path / "short", tmp_path / "long"
    fd.sft(settings_of("sft", long, steps=6, **constant))
    fd.sft(settings_of("sft", short, steps=4, **constant))
    fd.sft(settings_of("sft", short, steps=6, resume=True, **constant))
    a, b = weights(long), weights(short)
    assert all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


# Damaged
# ------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(settings_of, tmp_path_factory):
    """A PPO run with two checkpoints, at 4 and 5."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(RunError):
            fd.ppo(settings_of("ppo", out))
    return out


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model_1.safetensors",
        "optimizer.bin",
        "run.json",
        "random_states_0.pkl",
    ],
)
def test_one_flipped_bit_is_refused_by_name_and_the_older_checkpoint_used(
    stopped, settings_of, whole, capsys, name
):
    flip(stopped / "checkpoints" / "checkpoint-5" / name)
    fd.ppo(settings_of("ppo", stopped, resume=True))
    said = capsys.readouterr().err
    assert (
        f"passed over: checkpoint-5/{name} is damaged" in said
        and "resumed from" in said
        and "checkpoint-4" in said
    )
    assert_equal_runs(whole["ppo"], stopped)


def test_a_checkpoint_that_was_cut_short_or_lost_a_file(stopped, settings_of, whole, capsys):
    newest = stopped / "checkpoints" / "checkpoint-5"
    (newest / "optimizer.bin").write_bytes((newest / "optimizer.bin").read_bytes()[:-100])
    assert "optimizer.bin is damaged" in checkpoint.fault(newest)
    (newest / "optimizer.bin").unlink()
    assert "optimizer.bin is missing" in checkpoint.fault(newest)
    (newest / "manifest.json").write_text("{")
    fd.ppo(settings_of("ppo", stopped, resume=True))
    assert "passed over: checkpoint-5 has no readable manifest" in capsys.readouterr().err
    assert_equal_runs(whole["ppo"], stopped)


def test_no_whole_checkpoint_is_an_error_not_a_new_start(stopped, settings_of):
    for number in (4, 5):
        flip(stopped / "checkpoints" / f"checkpoint-{number}" / "optimizer.bin")
    with pytest.raises(
        InputError,
        match=r"--resume: no whole checkpoint in .*checkpoint-5/optimizer.bin is damaged",
    ):
        fd.ppo(settings_of("ppo", stopped, resume=True))


def test_a_line_that_was_torn_is_dropped(stopped, settings_of, whole):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "los')
    fd.ppo(settings_of("ppo", stopped, resume=True))
    assert_equal_runs(whole["ppo"], stopped)


# Refused
# ------------------------------------------------------------


def test_a_resumed_run_keeps_its_settings(stopped, settings_of, data):
    with pytest.raises(InputError, match=r"--resume: beta differ from .*config.yaml"):
        fd.ppo(settings_of("ppo", stopped, resume=True, beta=0.2))
    with pytest.raises(InputError, match="--resume: learning_rate, kl differ"):
        fd.ppo(settings_of("ppo", stopped, resume=True, learning_rate=1e-4, kl=KLSettings()))
    with pytest.raises(InputError, match="is a run of ppo, not of sft"):
        fd.sft(settings_of("sft", stopped, resume=True))


def test_a_folder_is_never_overwritten(settings_of, whole, tmp_path):
    with pytest.raises(
        InputError, match=r"--out: .* exists already: choose another folder, or go on with --resume"
    ):
        fd.sft(settings_of("sft", whole["sft"]))
    with pytest.raises(InputError, match=r"--resume: .* holds no run to go on with"):
        fd.sft(settings_of("sft", tmp_path / "nowhere", resume=True))
    (tmp_path / "empty").mkdir()
    assert fd.sft(settings_of("sft", tmp_path / "empty", steps=1)).step == 1


def test_a_finished_run_is_not_begun_again(models, data, tmp_path):
    from fiducial.errors import InputError
    from fiducial.methods.sft import SFT, sft
    from fiducial.settings import RunSettings

    settings = SFT(
        model=str(models["llama"]),
        data=data["completions"],
        out=str(tmp_path / "run"),
        steps=1,
        run=RunSettings(samples=0),
    )
    sft(settings)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # what somebody does to save space
    with pytest.raises(InputError, match="is finished"):
        sft(settings.model_copy(update={"resume": True}))
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "run" / "config.yaml").is_file()
