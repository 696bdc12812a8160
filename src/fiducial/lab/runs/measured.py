"""One run of a method of the package on a world, as a user would run it, measured against the
world's optimum during training.

The run is made by `fiducial.methods`, with its sampler, its batches and its checkpoints; nothing is
written again here. The policy of each checkpoint is turned into its exact distribution over
responses, so no number is an estimate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from ...building import Settings
from ...methods.dpo import dpo
from ...methods.grpo import grpo
from ...methods.ppo import ppo
from ...methods.reinforce import reinforce
from ...methods.settings.dpo import DPO
from ...methods.settings.grpo import GRPO
from ...methods.settings.ppo import PPO
from ...methods.settings.reinforce import Reinforce
from ...run import Run
from ...settings import OptimizerSettings, RowSettings, RunSettings, WorkerSettings
from ...train.checkpoint import numbered
from ..study.credit import credit
from ..study.results import Credit
from ..worlds import exact, policies
from ..worlds.world import Array, World
from .plan import Plan
from .process_reward import TAUGHT, teach_steps
from .results import MeasuredRun, PathPoint, RunResult

ONLINE: dict[str, tuple[Callable[..., Run[Any]], type[Settings]]] = {
    "ppo": (ppo, PPO),
    "reinforce": (reinforce, Reinforce),
    "grpo": (grpo, GRPO),
}


def run(plan: Plan, folder: Path, out: Path) -> MeasuredRun:
    """Run the plan on the world in `folder`, into the run folder `out`, and measure its policy
    during training and at the end.
    """
    world = World.load(folder / "world.npz")
    world = world if plan.beta is None else world.with_(beta=plan.beta)
    done = train(plan, world, folder, out)
    start = exact.reference(world)
    end = exact.logprobs(world.tree, policies.logits(done.model.lm, world.prompts, world.tree))
    trail = {0: start, **dict(checkpoints(out, folder / plan.policy, world)), plan.steps: end}
    sampled = [0] * (plan.steps + 1) if plan.verb == "dpo" else responses(plan, out)
    if plan.reward == "steps":  # the process reward model was trained on samples too
        sampled = [n + TAUGHT * len(world.prompts) for n in sampled]
    kind = "proxy" if plan.reward == "proxy" else "reward"
    path = [point(world, step, logp, sampled[step], kind) for step, logp in trail.items()]
    best, _ = exact.optimum(world, reward=getattr(world, kind))
    last = {f.name: getattr(path[-1], f.name) for f in fields(PathPoint) if f.name != "step"}
    return MeasuredRun(
        result=RunResult(
            seed=plan.seed,
            **last,
            kl_optimum=exact.kl(best, start),
            pairs=plan.steps * plan.batch_size if plan.verb == "dpo" else 0,
            seconds=done.train_seconds,
            path=path,
        ),
        trail=[x.tolist() for x in trail.values()],
        final=end.tolist(),
        credit=half_way(plan, world, folder, out, path) if plan.credit else None,
    )


def train(plan: Plan, world: World, folder: Path, out: Path) -> Run[Any]:
    """The run itself."""
    every = max(1, plan.steps // plan.points) if plan.points else 0
    common: dict[str, Any] = {
        "model": str(folder / plan.policy),
        "out": str(out),
        "beta": world.beta,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
        "seed": plan.seed,
        "max_new_tokens": world.horizon,
        "optimizer": OptimizerSettings(schedule="linear"),
        "run": RunSettings(
            checkpoint_every=every,
            keep_checkpoints=plan.steps,
            eval_every=0,
            samples=2,
            tokens=65_536,
            on_alarm="off",  # rules of thumb, where the right answer is known exactly
        ),
        **plan.method_settings,
    }
    if plan.verb == "dpo":
        width = len(world.prompts[0]) + world.horizon
        rows = RowSettings(max_length=width, held_out=0.0)
        return dpo(DPO(data=str(folder / "pairs.jsonl"), rows=rows, **common))
    function, settings = ONLINE[plan.verb]
    reward = [f"{folder / 'reward.py'}:{'proxy' if plan.reward == 'proxy' else 'gold'}"]
    if plan.reward == "steps":
        reward.append(str(taught(plan, world, folder, out)))
    given = {"data": str(folder / "prompts.jsonl"), "reward": tuple(reward), **common}
    given["worker"] = WorkerSettings(in_process=True)  # the lab wrote the function itself
    return function(settings(**given))


def taught(plan: Plan, world: World, folder: Path, out: Path) -> Path:
    """The world's process reward model, in a folder beside the run."""
    return teach_steps(world, folder / plan.policy, out.with_name(f"{out.name}-prm"), plan.seed)


def half_way(plan: Plan, world: World, folder: Path, out: Path, path: list[PathPoint]) -> Credit:
    """How PPO's policy with half of the gap closed, its critic at that step and a process reward
    model credit each token.
    """
    here = min(path[1:-1], key=lambda point: abs((point.relative_gap or 0.0) - 0.5))
    at = out / "checkpoints" / f"checkpoint-{here.step}"
    model = policies.load(folder / plan.policy)
    load_policy(model, at)
    judge = AutoModelForSequenceClassification.from_pretrained(
        taught(plan, world, folder, out), trust_remote_code=False
    )
    (critic,) = (
        v for k, v in load_file(at / "model_1.safetensors").items() if k.endswith("score.weight")
    )
    shape = len(world.prompts), len(world.tree.states)
    return credit(
        world,
        policies.logits(model, world.prompts, world.tree),
        critic.double().numpy().reshape(shape),
        judge.score.weight.detach().double().sigmoid().numpy().reshape(shape),
        step=here.step,
        samples=int(here.samples),
    )


def responses(plan: Plan, out: Path) -> list[int]:
    """How many responses a run had sampled after each step. ReMax's greedy responses and the groups
    that DAPO skipped are counted.
    """
    fields = ONLINE[plan.verb][1].model_fields
    chosen = {
        k: plan.method_settings.get(k, fields[k].default)
        for k in ("group_size", "baseline")
        if k in fields
    }
    total = [0]
    with open(out / "metrics.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "reward" not in row:
                continue
            groups = row.get("groups/sampled")
            each = plan.batch_size if groups is None else round(groups) * chosen["group_size"]
            if chosen.get("baseline") == "remax":
                each += plan.batch_size // chosen["group_size"]
            total.append(total[-1] + each)
    return total


def point(world: World, step: int, logp: Array, samples: int, reward: str) -> PathPoint:
    """Where a policy [P, Y] is. `reward`: the world's reward that is optimized."""
    found = exact.gap(world, logp, reward=getattr(world, reward))
    return PathPoint(
        step=step,
        samples=samples,
        kl=found.kl,
        reward=found.reward,
        gap=found.gap,
        relative_gap=found.relative,
        total_variation=found.total_variation,
        gold=exact.expected(logp, world.reward) if reward == "proxy" else None,
    )


def checkpoints(out: Path, start: Path, world: World) -> Iterator[tuple[int, Array]]:
    """(step, log-probabilities [P, Y]) of the policy in each checkpoint of a run."""
    model = policies.load(start)
    for folder in numbered(out / "checkpoints"):
        load_policy(model, folder)
        table = policies.logits(model, world.prompts, world.tree)
        yield int(folder.name.rpartition("-")[2]), exact.logprobs(world.tree, table)


def load_policy(model: Any, checkpoint: Path) -> None:
    """Give the model the weights of the policy in a checkpoint."""
    state = load_file(checkpoint / "model.safetensors")
    model.load_state_dict(
        {k.removeprefix("lm."): v for k, v in state.items() if k.startswith("lm.")}, strict=False
    )


def run_quietly(plan: Plan, folder: Path, out: Path) -> MeasuredRun:
    """`run` in a process of its own: one thread, and messages go to a file beside its folder."""
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f"{out.name}.log"), "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        return run(plan, folder, out)
