"""--run.tokens auto, the warning of a run that will not fit, and what memory is said to be free."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import fiducial as fd
from fiducial.errors import InputError
from fiducial.methods import memory
from fiducial.methods.memory import GRAIN, Needs
from fiducial.models.load import SHARED
from fiducial.settings import LoraSettings, RunSettings
from fiducial.train import machine
from support import BAD, GOOD, PROMPTS, write_jsonl

PROCESS = 10 * 2**20


@pytest.fixture
def train(models, tmp_path, monkeypatch):
    """train("sft", ...): the needs that the run's start looked at, and the run; without `go` it is
    refused there.
    """
    monkeypatch.setattr(machine, "resident_memory", lambda device: PROCESS)
    monkeypatch.setattr(machine, "return_freed_memory", lambda: None)
    seen: list[Needs] = []
    settled = Needs.settled

    def spy(self: Needs, go: bool) -> Needs:
        seen.append(self)
        if not go:
            raise InputError("enough is seen")
        return settled(self)

    triples = list(zip(PROMPTS * 4, GOOD * 4, BAD * 4, strict=True))
    rows = {
        "sft": [{"prompt": f"{p} {i}", "completion": 5 * g} for i, (p, g, _) in enumerate(triples)],
        "dpo": [{"prompt": p, "chosen": g, "rejected": b} for p, g, b in triples[:10]],
        "grpo": [{"prompt": p, "max_words": 3} for p in PROMPTS],
    }
    rows |= {"reward": rows["dpo"], "ppo": rows["grpo"]}
    classes = {"sft": fd.SFT, "dpo": fd.DPO, "reward": fd.RewardModel, "ppo": fd.PPO}
    classes |= {"grpo": fd.GRPO}

    def run(method, name="run", *, run=None, go=True, **changes):
        monkeypatch.setattr(Needs, "settled", lambda self: spy(self, go))
        data = write_jsonl(tmp_path / f"{method}.jsonl", rows[method])
        common = {"model": models["llama"], "data": data, "out": str(tmp_path / name), "steps": 1}
        common |= {"batch_size": 32, "run": RunSettings(samples=0, **(run or {}))}
        if method in ("ppo", "grpo"):
            common |= {"reward": ("length",), "max_new_tokens": 8}
        settings = classes[method](**(common | changes))
        with contextlib.nullcontext() if go else pytest.raises(InputError, match="enough is seen"):
            done = getattr(fd, method)(settings)
        return seen[-1], done if go else None

    return run


@pytest.mark.parametrize(
    ("method", "r"), [("sft", 0), ("dpo", 4), ("reward", 0), ("ppo", 0), ("grpo", 4)]
)
def test_a_generous_bound_is_above_the_plan(train, method, r):
    needs, _ = train(method, go=False, lora=LoraSettings(r=r))
    plan = needs.plan()
    assert plan.process == PROCESS
    assert PROCESS < plan.peak < needs.generous()


def test_auto_takes_the_largest_budget_that_fits_and_trains_the_same(train, tmp_path, capsys):
    needs, fixed = train("sft", "fixed", run={"tokens": 4096})
    enough = needs.plan(2 * GRAIN).peak / 0.9 / 1e9 + 1e-6  # in GB, for two grains and no more
    assert needs.plan(3 * GRAIN).peak > needs.plan(2 * GRAIN).peak
    capsys.readouterr()
    _, run = train("sft", run={"tokens": "auto", "memory_gb": enough, "checkpoint_every": 1})
    assert "--run.tokens auto: 512 padded tokens per micro-batch" in capsys.readouterr().err
    assert yaml.safe_load((run.path / "config.yaml").read_text())["run"]["tokens"] == 512
    assert run.settings.run.tokens == 512
    for one, other in zip(run.model.parameters(), fixed.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)

    # a resumed run keeps the number, whatever is free by then
    _, again = train("sft", steps=2, resume=True, run={"tokens": "auto", "memory_gb": 100})
    assert again.settings.run.tokens == 512 and again.processes.budget == 512


def test_auto_is_no_more_than_a_step_needs_and_refuses_where_nothing_fits(train):
    _, run = train("sft", run={"tokens": "auto", "memory_gb": 100})
    assert run.processes.budget % GRAIN == 0 and run.processes.budget <= 32 * 128
    with pytest.raises(
        InputError, match=r"--run.tokens auto: no budget fits: .* 9.5 MiB are there"
    ):
        train("sft", "none", run={"tokens": "auto", "memory_gb": 0.01})


def test_a_run_that_will_not_fit_is_told_what_would(train, capsys):
    needs, _ = train("sft", run={"tokens": 512, "memory_gb": 0.0112})
    said = capsys.readouterr().err
    peak = memory.in_words(needs.plan().peak)
    assert f"memory: this run needs {peak} at its peak, in training, and 10.7 MiB are" in said
    less = dict(
        re.findall(r"(--[a-z.-]+(?: [a-z0-9]+)?) ([0-9.]+) MiB", said.partition("instead:")[2])
    )
    assert {"--run.tokens 256", "--run.gradient-checkpointing", "--lora.r 8"} <= set(less)
    assert all(float(found) <= float(peak.split()[0]) for found in less.values())


def test_a_critic_on_the_policy_s_trunk_needs_less(train):
    needs, _ = train("ppo", go=False)
    shared = replace(needs, models=replace(needs.models, critic=SHARED))
    assert shared.plan().peak - PROCESS < 0.7 * (needs.plan().peak - PROCESS)


def test_every_process_counts_its_own_part_and_the_exchange_of_gradients(train):
    needs, _ = train("sft", go=False)
    alone = needs.plan()

    class Two:
        count, device, budget, main = 2, torch.device("cpu"), None, True

    shared = replace(needs, processes=Two()).plan()
    assert shared.phases["training"]["activations"] < alone.phases["training"]["activations"]
    weights = alone.phases["training"]["weights of the policy"]
    assert shared.phases["training"]["gradients"] >= weights * 0.9


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "inactive_file 100"}, 700),
        ({"memory.max": "1000", "memory.current": "1400", "memory.stat": "anon 1400"}, 0),
        ({"memory.max": "max", "memory.current": "400", "memory.stat": "anon 1"}, 2**62),
        ({}, 2**62),
    ],
)
def test_what_a_control_group_leaves(tmp_path: Path, files: dict[str, str], free: int):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert min(machine.free_in_group(tmp_path), 2**62) == free


def test_what_a_process_may_use_is_what_it_has_and_what_is_free():
    cpu = torch.device("cpu")
    before = machine.available_memory(cpu)
    ballast = torch.ones(2**26)  # 256 MiB
    assert machine.resident_memory(cpu) > 2**28
    assert machine.available_memory(cpu) == pytest.approx(before, rel=0.2)
    del ballast
