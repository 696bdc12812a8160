"""The shipped methods, run on a world as a user would run them, and measured against its optimum
along the way.

What is run is `fiducial.methods`, with its sampler, its batches and its checkpoints; nothing is
written again here. The policy at each checkpoint is turned into its exact distribution over
responses, so that no number on the way is an estimate.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from ...methods.dpo import DPO, dpo
from ...methods.grpo import GRPO, grpo
from ...methods.ppo import PPO, ppo
from ...methods.prm import PRM, prm
from ...methods.reinforce import Reinforce, reinforce
from ...settings import OptimizerSettings, RowSettings, RunSettings
from ...train.checkpoint import numbered
from ...use.generate import Generate, generate
from ..study.credit import credit
from ..worlds import exact, policies
from ..worlds.files import write_rows
from ..worlds.world import EOS, LETTERS, Array, World

Kind = Literal["table", "transformer"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "ppo": ("ppo", {"critic": {"start": "policy"}}),
    "reinforce_none": ("reinforce", {"baseline": "none"}),
    "reinforce_mean": ("reinforce", {"baseline": "mean"}),
    "remax": ("reinforce", {"baseline": "remax"}),
    "rloo": ("reinforce", {"baseline": "rloo"}),
    "reinforce_pp": ("reinforce", {"baseline": "reinforce++"}),
    **{
        variant: ("grpo", {"variant": variant})
        for variant in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
    },
}
"""What is run under each name: the verb, and the settings that make it this method."""
ONLINE = {"ppo": (ppo, PPO), "reinforce": (reinforce, Reinforce), "grpo": (grpo, GRPO)}


@dataclass(frozen=True)
class Plan:
    """One run of a shipped method.

    method: a key of METHODS.
    beta: of the run and of the optimum it is held against; None: the world's.
    points: how many times on the way it is measured.
    reward: what is earned, and what the gap is measured in; steps: the true reward, and on the way
    what the world's process reward model makes of it. settings: any others of the method, as its
    own settings class takes them. credit: PPO with a table alone: tell of its policy half-way which
    token it credits with what.
    """

    method: str
    policy: Kind
    learning_rate: float
    steps: int
    seed: int = 0
    batch_size: int = 256
    beta: float | None = None
    points: int = 25
    reward: Literal["reward", "proxy", "steps"] = "reward"
    settings: dict[str, Any] = field(default_factory=dict)
    credit: bool = False


def run(plan: Plan, folder: Path, out: Path) -> dict[str, Any]:
    """Run it on the world in `folder`, into the run folder `out`; the measurements of the path and
    of the end.
    """
    world = World.load(folder / "world.npz")
    world = world if plan.beta is None else world.with_(beta=plan.beta)
    every = max(1, plan.steps // plan.points) if plan.points else 0
    verb, own = METHODS[plan.method]
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
        ),
        **own,
        **plan.settings,
    }
    if verb == "dpo":
        width = len(world.prompts[0]) + world.horizon
        done = dpo(
            DPO(
                data=str(folder / "pairs.jsonl"),
                rows=RowSettings(max_length=width, held_out=0.0),
                **common,
            )
        )
    else:
        train, settings = ONLINE[verb]
        name = "proxy" if plan.reward == "proxy" else "gold"
        steps = (
            (
                str(
                    teach_steps(
                        world, folder / plan.policy, out.with_name(f"{out.name}-prm"), plan.seed
                    )
                ),
            )
            if plan.reward == "steps"
            else ()
        )
        done = train(
            settings(
                data=str(folder / "prompts.jsonl"),
                reward=(f"{folder / 'reward.py'}:{name}", *steps),
                **common,
            )
        )  # type: ignore[operator]
    start = exact.reference(world)
    end = exact.logprobs(world.tree, policies.logits(done.model.lm, world.prompts, world.tree))
    trail = {0: start, **dict(checkpoints(out, folder / plan.policy, world)), plan.steps: end}
    sampled = [0] * (plan.steps + 1) if verb == "dpo" else responses(plan, out)
    if plan.reward == "steps":  # what the process reward model has learned from was sampled too
        sampled = [n + TAUGHT * len(world.prompts) for n in sampled]
    kind = "proxy" if plan.reward == "proxy" else "reward"
    path = [point(world, step, logp, sampled[step], kind) for step, logp in trail.items()]
    last = {k: v for k, v in path[-1].items() if k != "step"}
    best, _ = exact.optimum(world, reward=getattr(world, kind))
    pairs = plan.steps * plan.batch_size if verb == "dpo" else 0
    return {
        "seed": plan.seed,
        **last,
        "kl_optimum": exact.kl(best, start),
        "pairs": pairs,
        "seconds": done.train_seconds,
        "path": path,
        "trail": [x.tolist() for x in trail.values()],
        "final": end.tolist(),
        "credit": half_way(plan, world, folder, out, path) if plan.credit else None,
    }


def half_way(
    plan: Plan, world: World, folder: Path, out: Path, path: list[dict[str, Any]]
) -> dict[str, Any]:
    """What PPO's policy with half of the gap closed, its critic of that moment and a process reward
    model say of each token.
    """
    here = min(path[1:-1], key=lambda point: abs(point["relative_gap"] - 0.5))
    at = out / "checkpoints" / f"checkpoint-{here['step']}"
    model = policies.load(folder / plan.policy)
    state = load_file(at / "model.safetensors")
    model.load_state_dict(
        {k.removeprefix("lm."): v for k, v in state.items() if k.startswith("lm.")}, strict=False
    )
    judge = AutoModelForSequenceClassification.from_pretrained(
        teach_steps(world, folder / plan.policy, out.with_name(f"{out.name}-prm"), plan.seed)
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
        step=here["step"],
        samples=here["samples"],
    )


TAUGHT = 1_000
"""Responses of the reference to each prompt that a process reward model learns from."""


def teach_steps(world: World, start: Path, out: Path, seed: int) -> Path:
    """A process reward model from outcomes alone: the reference answers, the verifier says right or
    wrong, and every token is taught its response's outcome.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn, rows = out / "drawn.jsonl", out / "outcomes.jsonl"
    if not (out / "run" / "model").exists():
        for old in (drawn, rows):
            old.unlink(missing_ok=True)
        shutil.rmtree(out / "run", ignore_errors=True)
        write_rows(
            out / "prompts.jsonl",
            ({"prompt": world.prompt_text(p)} for p in range(len(world.prompts))),
        )
        generate(
            Generate(
                model=str(start),
                prompts=str(out / "prompts.jsonl"),
                out=str(drawn),
                samples=TAUGHT,
                max_new_tokens=world.horizon,
                seed=seed,
            )
        )
        found = [json.loads(line) for line in drawn.read_text(encoding="utf-8").splitlines()]
        right = world.scores([r["prompt"] for r in found], [r["completion"] for r in found])
        write_rows(
            rows,
            (
                {
                    "prompt": r["prompt"],
                    "completion": r["completion"] + (LETTERS[EOS] if r["finished"] else ""),
                    "label": score > 0.5,
                }
                for r, score in zip(found, right, strict=True)
            ),
        )
        prm(
            PRM(
                model=str(start),
                data=str(rows),
                out=str(out / "run"),
                separator="",
                epochs=4,
                batch_size=256,
                learning_rate=0.3,
                seed=seed,
                rows=RowSettings(max_length=len(world.prompts[0]) + world.horizon, held_out=0.0),
                run=RunSettings(checkpoint_every=0, eval_every=0, tokens=65_536),
            )
        )
    return out / "run" / "model"


def responses(plan: Plan, out: Path) -> list[int]:
    """How many responses a run had sampled after each step, the greedy ones of ReMax and the groups
    that DAPO passed over included.
    """
    verb, own = METHODS[plan.method]
    settings = ONLINE[verb][1].model_fields  # type: ignore[attr-defined]
    chosen = {
        k: plan.settings.get(k, own.get(k, settings[k].default))
        for k in ("group_size", "baseline")
        if k in settings
    }
    total = [0]
    with open(out / "metrics.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "reward" not in row:
                continue
            groups = row.get("groups/sampled")
            each = plan.batch_size if groups is None else round(groups) * chosen["group_size"]
            total.append(
                total[-1]
                + each
                + (
                    plan.batch_size // chosen["group_size"]
                    if chosen.get("baseline") == "remax"
                    else 0
                )
            )
    return total


def point(world: World, step: int, logp: Array, samples: int, reward: str) -> dict[str, Any]:
    """Where a policy [P, Y] stands."""
    found = exact.gap(world, logp, reward=getattr(world, reward))
    gold = {"gold": exact.expected(logp, world.reward)} if reward == "proxy" else {}
    return {
        "step": step,
        "samples": samples,
        "kl": found.kl,
        "reward": found.reward,
        "gap": found.gap,
        "relative_gap": found.relative,
        "total_variation": found.total_variation,
        **gold,
    }


def checkpoints(out: Path, start: Path, world: World) -> Iterator[tuple[int, Array]]:
    """(step, log-probabilities [P, Y]) of the policy in each checkpoint of a run."""
    model = policies.load(start)
    for folder in numbered(out / "checkpoints"):
        state = load_file(folder / "model.safetensors")
        model.load_state_dict(
            {k.removeprefix("lm."): v for k, v in state.items() if k.startswith("lm.")},
            strict=False,
        )
        yield (
            int(folder.name.rpartition("-")[2]),
            exact.logprobs(world.tree, policies.logits(model, world.prompts, world.tree)),
        )


def run_quietly(plan: Plan, folder: Path, out: Path) -> dict[str, Any]:
    """`run` in a process of its own: one thread, and what it says goes to a file beside its folder."""
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f"{out.name}.log"), "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)
        return {**run(plan, folder, out), "plan": asdict(plan)}
