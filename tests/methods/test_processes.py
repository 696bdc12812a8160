"""Two processes do what one does: the same losses, the same gradients, the same weights, also where
their shares are uneven.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import fiducial as fd
from fiducial.methods.settings.ppo import CriticSettings, PtxSettings
from fiducial.settings import LoraSettings, OptimizerSettings, RunSettings
from support import BAD, GOOD, PROMPTS, write_jsonl

DRIVER = """
import json, runpy, sys
import torch
torch.set_num_threads(1)
from pydantic import TypeAdapter
from fiducial.run import Run
from fiducial.train.step import Stepper

step, finish, gradients = Stepper.step, Run.finish, []

def watched_step(self, number):
    trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
    named = ((n.removeprefix("module."), p.grad) for n, p in trained)
    gradients.append({n: torch.zeros(0) if g is None else g.clone() for n, g in named})
    return step(self, number)

def watched_finish(self, **keywords):
    found = {
        "gradients": list(gradients),
        "weights": {n: p.detach() for n, p in self.model.named_parameters()},
        "state": state_of(self),
    }
    for name, value in found.items():
        torch.save(value, f"{self.path}/{name}-{self.processes.index}.pt")
    return finish(self, **keywords)

def state_of(run):
    # its numbers by name; what is not set yet has none
    plain = TypeAdapter(type(run.state)).dump_python(run.state)
    flat = {k: v for k, v in (plain or {}).items() if not isinstance(v, dict)}
    for name, part in (plain or {}).items():
        flat |= {f"{name}.{k}": v for k, v in part.items()} if isinstance(part, dict) else {}
    return {k: v for k, v in flat.items() if v is not None}

Stepper.step, Run.finish = watched_step, watched_finish
for config in json.load(open(sys.argv[1])):  # `python -m fiducial METHOD --config FILE`
    gradients.clear()
    sys.argv = ["fiducial", *config]
    try:
        runpy.run_module("fiducial", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{config}: exit code {end.code}"
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "OMP_")
"""How the names of variables begin that a launcher sets, none of which a user has to."""

GENTLE = OptimizerSettings(eps=1e-2, schedule="constant", max_grad_norm=1e9)
"""Close to plain gradient descent: Adam would make a large step of a rounding error's sign."""
JOBS = {  # lengths far apart; batches of 5, 3 and 1 rows cannot be shared evenly
    "sft": ("sft", "gpt2", {"batch_size": 5}),
    "sft-one-row": ("sft", "llama", {"batch_size": 1}),
    "reward": ("reward", "gpt2", {"batch_size": 3}),
    "prm": ("prm", "gpt2", {"batch_size": 5}),
    "prm-one-row": ("prm", "llama", {"batch_size": 1}),
    "dpo": ("dpo", "llama", {"batch_size": 5}),
    "dpo-small-micro": (
        "dpo",
        "gpt2",
        {"batch_size": 5, "run": {"tokens": 40, "samples": 3, "eval_every": 1}},
    ),
    "dpo-one-row": ("dpo", "qwen3", {"batch_size": 1}),
    "dpo-lora": ("dpo", "llama", {"batch_size": 3, "lora": {"r": 2}}),
    "ppo": ("ppo", "gpt2", {"batch_size": 5, "minibatches": 2}),
    "ppo-lora": ("ppo", "llama", {"batch_size": 3, "lora": {"r": 2}}),
    "ppo-shared-ptx": ("ppo", "llama", {"batch_size": 4}),
    "ppo-one-row": ("ppo", "qwen3", {"batch_size": 1}),
    "rloo": (
        "reinforce",
        "gpt2",
        {"batch_size": 6, "group_size": 3},
    ),  # groups of three are split over the processes
    "whitened": (
        "reinforce",
        "llama",
        {"batch_size": 5, "group_size": 1, "baseline": "reinforce++", "beta": 0.2},
    ),
    "remax": (
        "reinforce",
        "qwen3",
        {
            "batch_size": 3,
            "group_size": 1,
            "baseline": "remax",
            "run": {"tokens": 30, "samples": 3},
        },
    ),
    "mean-lora": (
        "reinforce",
        "llama",
        {
            "batch_size": 3,
            "group_size": 1,
            "baseline": "mean",
            "lora": {"r": 2},
            "kl": {"estimator": "k2"},
        },
    ),
    "grpo": ("grpo", "gpt2", {"batch_size": 6, "group_size": 3, "minibatches": 2}),
    "dapo": ("grpo", "llama", {"batch_size": 9, "group_size": 3, "variant": "dapo", "beta": 0.1}),
    "gspo-one-group": (
        "grpo",
        "qwen3",
        {"batch_size": 2, "group_size": 2, "variant": "gspo", "minibatches": 2},
    ),
    "cispo-uncut": (
        "grpo",
        "llama",
        {
            "batch_size": 6,
            "group_size": 3,
            "variant": "cispo",
            "long": {"mask_truncated": True},
            "stop": ["e", "a", "o"],
        },
    ),
    "distill": ("distill", "gpt2", {"batch_size": 5, "discount": 0.5}),
    "distill-sampled-lora": (
        "distill",
        "gpt2",
        {"batch_size": 3, "estimator": "sampled", "lora": {"r": 2}},
    ),
    "distill-one-row": ("distill", "gpt2", {"batch_size": 1}),
}


def plain(settings):
    return json.loads(json.dumps(settings.model_dump(mode="json")))


def torchrun(jobs, folder, processes):
    """The jobs one after the other, in a group that was started with nothing but torchrun."""
    script, listed = folder / "driver.py", folder / f"jobs-{processes}.json"
    script.write_text(DRIVER)
    commands = []
    for name, method, settings in jobs:
        config = folder / f"{name}-{processes}.yaml"
        config.write_text(yaml.safe_dump(settings))
        commands.append([method, "--config", str(config)])
    listed.write_text(json.dumps(commands))
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    done = subprocess.run(
        [sys.executable, *launch, script, listed],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def ran(models, make, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    reward = folder / "reward.py"
    reward.write_text(
        "def score(completions, **columns):\n    return [c.count('e') + len(c) / 10 for c in "
        "completions]\n\n"
        "def some(completions, number, **columns):\n    return [0.0 if n % 3 == 2 else s for n, s "
        "in zip(number, score(completions))]\n"
    )
    classes = {
        "sft": fd.SFT,
        "reward": fd.RewardModel,
        "dpo": fd.DPO,
        "ppo": fd.PPO,
        "reinforce": fd.Reinforce,
        "grpo": fd.GRPO,
        "distill": fd.Distill,
        "prm": fd.PRM,
    }
    ranked = write_jsonl(
        folder / "ranked.jsonl",
        (
            {"prompt": p, "chosen": g, "rejected": b + "z" * k}
            for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)
            for k in range(1 + len(p) % 3)
        ),
    )
    steps = write_jsonl(
        folder / "steps.jsonl",
        (
            {
                "prompt": p,
                "completions": [g, b][: 1 + k % 2] * 2,
                "labels": [1, k % 3 > 0, 1, 0][: 2 + k % 2 * 2],
            }
            for k, (p, g, b) in enumerate(zip(PROMPTS, GOOD, BAD, strict=True))
        ),
    )
    extra = {
        "sft": {"data": data["completions"], "max_new_tokens": 4},
        "reward": {"data": ranked},
        "prm": {"data": steps},
        "dpo": {"data": data["pairs"], "max_new_tokens": 4},
        "ppo": {
            "data": data["prompts"],
            "reward": (f"{reward}:score",),
            "max_new_tokens": 6,
            "epochs": 2,
        },
        "reinforce": {"data": data["prompts"], "reward": (f"{reward}:score",), "max_new_tokens": 6},
        "grpo": {
            "data": data["prompts"],
            "reward": (f"{reward}:some",),
            "max_new_tokens": 6,
            "epochs": 2,
        },
        "distill": {
            "data": data["prompts"],
            "teacher": make("gpt2", n_layer=3),
            "max_new_tokens": 6,
            "eval_samples": 5,
        },
    }

    def jobs(processes):
        out = []
        for name, (method, kind, changes) in JOBS.items():
            common = {
                "model": models[kind],
                "out": str(folder / f"{name}-{processes}"),
                "steps": 3,
                "learning_rate": 1e-2,
                "optimizer": GENTLE,
            }
            changes = dict(changes)
            common["run"] = RunSettings(**changes.pop("run", {"samples": 3, "eval_every": 1}))
            common["lora"] = LoraSettings(**changes.pop("lora", {}))
            if name == "ppo-shared-ptx":
                changes |= {
                    "critic": CriticSettings(start="shared"),
                    "ptx": PtxSettings(data=data["completions"], batch_size=3, coefficient=1.0),
                }
            out.append((name, method, plain(classes[method](**(common | extra[method] | changes)))))
        return out

    torchrun(jobs(1), folder, 1)
    torchrun(jobs(2), folder, 2)
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_give_the_gradients_of_one(ran, name):
    one = torch.load(ran / f"{name}-1" / "gradients-0.pt")
    two = [torch.load(ran / f"{name}-2" / f"gradients-{i}.pt") for i in range(2)]
    assert len(one) == len(two[0]) == len(two[1]) > 0
    for step, (alone, first, second) in enumerate(zip(one, *two, strict=True)):
        assert alone.keys() == first.keys() == second.keys()
        flat = [torch.cat([g[k].flatten() for k in sorted(g)]) for g in (alone, first, second)]
        assert torch.equal(flat[1], flat[2])
        assert step > 0 or flat[0].norm() > 1e-4  # later a clipped critic may have none
        assert (flat[0] - flat[1]).norm() < (1e-5 if step == 0 else 1e-3) * flat[0].norm() + 1e-7, (
            step
        )


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_give_the_metrics_and_weights_of_one(ran, name):
    counted = {
        "rewards/accuracies",
        "eval/rewards/accuracies",
        "value_clip_ratio",
        "clip_ratio",
    }  # of ties: rounding decides them
    one, two = metrics(ran / f"{name}-1"), metrics(ran / f"{name}-2")
    assert len(one) == len(two)
    states = [
        torch.load(ran / f"{name}-{p}" / f"state-{i}.pt") for p, i in ((1, 0), (2, 0), (2, 1))
    ]
    assert states[1] == states[2] and states[0] == pytest.approx(states[1], rel=1e-4, abs=2e-5)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "tokens_per_second"} - counted:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-5), key
    alone, first, second = (
        torch.load(ran / f"{name}-{p}" / f"weights-{i}.pt") for p, i in ((1, 0), (2, 0), (2, 1))
    )
    for key in alone:
        assert torch.equal(first[key], second[key])
        assert torch.allclose(alone[key], first[key], rtol=1e-5, atol=1e-5), key


LOSSES = ("loss", "policy_loss", "value_loss", "kl_teacher")


@pytest.mark.parametrize("method", dict.fromkeys(job[0] for job in JOBS.values()))
def test_torchrun_on_a_cpu_gives_the_losses_of_one_process(ran, method):
    """Each of the eight methods, from the command line, with nothing in the environment."""
    name = next(name for name, job in JOBS.items() if job[0] == method)
    assert json.loads((ran / f"{name}-2" / "summary.json").read_text())["processes"] == 2
    one, two = (
        [{k: row[k] for k in LOSSES if k in row} for row in metrics(ran / f"{name}-{count}")]
        for count in (1, 2)
    )
    one, two = ([row for row in rows if row][:2] for rows in (one, two))  # without evaluations
    assert len(one) == 2
    for alone, both in zip(one, two, strict=True):
        assert both == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "name", [name for name, job in JOBS.items() if job[0] not in ("reward", "prm")]
)
def test_two_processes_say_the_same(ran, name):
    """Every response has its own random stream, whoever samples it."""
    one, two = [
        [
            json.loads(line)
            for line in (ran / f"{name}-{p}" / "samples.jsonl").read_text().splitlines()
        ]
        for p in (1, 2)
    ]
    assert [row["completion"] for row in one] == [row["completion"] for row in two] and one


def test_the_folder_of_two_processes_is_that_of_one(ran):
    for name in JOBS:
        summary = json.loads((ran / f"{name}-2" / "summary.json").read_text())
        assert summary["processes"] == 2 and summary["status"] == "done"
        alone, both = ({p.name for p in (ran / f"{name}-{count}").iterdir()} for count in (1, 2))
        assert alone == both - {"gradients-1.pt", "weights-1.pt", "state-1.pt"}
