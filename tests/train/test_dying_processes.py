"""A process of several that dies, hangs, or cannot write: all of them end, and resume equals."""

import json
import os
import signal
import subprocess
import sys

import pytest

import fiducial as fd
from fiducial.settings import OptimizerSettings, RunSettings
from fiducial.train import checkpoint
from support import PROMPTS, write_jsonl

DRIVER = """
import errno, json, os, signal, socket, sys, time
import torch
torch.set_num_threads(1)
import fiducial as fd
from fiducial.building import build
from fiducial.cli import main
from fiducial.run import Run
from fiducial.train import checkpoint
from fiducial.methods import grpo, sft
import accelerate, peft.tuners.lora, torch._dynamo
from transformers import GPT2LMHeadModel

def fault_of(kind):
    step, seal = Run.end_step, checkpoint.seal
    def end_step(self, *args, **keywords):
        if self.step == 3 and kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step == 3 and kind == "hangs":
            time.sleep(600)
        return step(self, *args, **keywords)
    def full(folder):
        if folder.name == ".aside-4":
            raise OSError(errno.ENOSPC, "No space left on device")
        return seal(folder)
    Run.end_step = end_step
    if kind == "cannot write":
        checkpoint.seal = full

def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])

for config, method, faults in json.load(open(sys.argv[1])):
    group, at, began = [], port(), time.monotonic()
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                           "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": at}
            if faults[rank]:
                fault_of(faults[rank])
            os._exit(main([method, "--config", config]))
        group.append(child)
    codes = [None, None]
    for rank in ((1, 0) if faults[0] == "hangs" else (0, 1)):
        if faults[rank] == "hangs":  # what a launcher does when the first process has ended
            os.kill(group[rank], signal.SIGKILL)
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(group[rank], 0)[1])
    print(json.dumps([codes, time.monotonic() - began]), flush=True)
"""
FAULTS = {  # what rank 0 and rank 1 do, and how they end
    "another-dies": ([None, "dies"], [1, -signal.SIGKILL]),
    "the-main-one-dies": (["dies", None], [-signal.SIGKILL, 1]),
    "another-hangs": ([None, "hangs"], [1, -signal.SIGKILL]),
    "the-disk-is-full": (["cannot write", None], [1, 1]),
}


@pytest.fixture(scope="module")
def ran(models, data, tmp_path_factory):
    """Every fault in a run of two processes, and what is left after it was resumed by two."""
    folder = tmp_path_factory.mktemp("dying")
    reward = folder / "reward.py"
    reward.write_text("def f(completions): return [float(len(c)) for c in completions]\n")
    prompts = write_jsonl(folder / "prompts.jsonl", ({"prompt": p} for p in PROMPTS))

    def job(method, name, faults, **changes):
        common = {"model": models["gpt2"], "out": str(folder / method / name), "steps": 6}
        common |= {"batch_size": 4, "max_new_tokens": 3, "learning_rate": 1e-3}
        common["run"] = RunSettings(samples=0, checkpoint_every=2, timeout_minutes=0.05)
        common["optimizer"] = OptimizerSettings(schedule="constant")
        if method == "sft":
            settings = fd.SFT(data=data["completions"], **(common | changes))
        else:
            settings = fd.GRPO(
                data=prompts, reward=(f"{reward}:f",), group_size=2, **(common | changes)
            )
        config = folder / f"{method}-{name}{len(changes)}.yaml"
        config.write_text(json.dumps(json.loads(settings.model_dump_json())))
        return str(config), method, faults

    def drive(jobs):
        (folder / "driver.py").write_text(DRIVER)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, folder / "driver.py", folder / "jobs.json"],
            capture_output=True,
            text=True,
            env=env,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line[:2] == "[["], (
            done.stderr
        )

    cases = [("sft", name) for name in FAULTS] + [("grpo", "another-dies")]
    whole = [job(m, "whole", [None, None]) for m in ("sft", "grpo")]
    ended, said = drive([*whole, *(job(m, name, FAULTS[name][0]) for m, name in cases)])
    left = {
        (m, name): checkpoint.newest_good(folder / m / name / "checkpoints")[0] for m, name in cases
    }
    again, _ = drive([job(m, name, [None, None], resume=True) for m, name in cases])
    return folder, dict(zip(cases, ended[2:], strict=True)), left, again, said


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


@pytest.mark.parametrize("name", FAULTS)
def test_all_processes_end_in_time_when_one(ran, name):
    _, ended, _, _, _ = ran
    codes, seconds = ended["sft", name]
    assert codes == FAULTS[name][1]
    assert seconds < 120  # of a run that would hang for ever; the time-out is three seconds


@pytest.mark.parametrize(
    ("method", "name"), [*(("sft", n) for n in FAULTS), ("grpo", "another-dies")]
)
def test_what_is_resumed_after_it_equals_the_run_without_the_fault(ran, method, name):
    folder, _, left, again, _ = ran
    assert all(codes == [0, 0] for codes, _ in again)
    assert left[method, name].name == "checkpoint-2"
    assert lines(folder / method / name) == lines(folder / method / "whole")
    both = [
        (folder / method / n / "model" / "model.safetensors").read_bytes() for n in (name, "whole")
    ]
    assert both[0] == both[1]


def test_the_reason_of_the_first_is_what_all_say(ran):
    _, _, _, _, said = ran
    told = [line for line in said.splitlines() if "No space left on device" in line]
    assert len(told) == 2  # the one whose disk is full, and the one that waited for it
    assert all("fiducial:" in line and "checkpoint-2 is safe" in line for line in told)
    lost = [line for line in said.splitlines() if "another process ended" in line]
    assert len(lost) == 4 and all("fiducial:" in line and "--resume" in line for line in lost)
    assert "Traceback" not in said
