"""Kills runs of every method at random moments, goes on with them, and compares what is left with a
run that nobody disturbed: weights, optimizer, random state, counters, metrics and samples.

    python benchmarks/kills.py                       # 200 kills per method, about an hour
    python benchmarks/kills.py --kills 5 --methods sft grpo

A moment is a time between the start of a run and shortly after its usual end, so kills fall on
loading, steps, saves, the cutting of records and the writing of the model and the page. One run in
three is killed a second time while it is resumed. Runs are children of one process that has
imported everything, so that a kill costs the run alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import accelerate  # noqa: F401
import peft.tuners.lora  # noqa: F401
import torch
import torch._dynamo
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel  # noqa: F401

import fiducial as fd
import fiducial.report.page
from fiducial.building import build
from fiducial.methods import (  # noqa: F401
    distill,
    dpo,
    grpo,
    ppo,
    prm,
    reinforce,
    reward_model,
    sft,
)
from support import BAD, GOOD, PROMPTS, make_model, write_jsonl

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (fd.SFT, {"data": "completions"}),
    "reward": (fd.RewardModel, {"data": "pairs"}),
    "prm": (fd.PRM, {"data": "steps"}),
    "dpo": (fd.DPO, {"data": "pairs"}),
    "ppo": (fd.PPO, {"epochs": 2, "minibatches": 2}),
    "reinforce": (fd.Reinforce, {"group_size": 2}),
    "grpo": (fd.GRPO, {"group_size": 2, "minibatches": 2}),
    "distill": (fd.Distill, {}),
}
TIMES = {"seconds", "tokens_per_second", "train_seconds"}
STEPS = 6


def world(folder: Path) -> dict[str, str]:
    """A tiny model, rows of every form and a reward."""
    triples = list(zip(PROMPTS, GOOD, BAD, strict=True))
    reward = folder / "reward.py"
    reward.write_text(
        "def f(completions): return [c.count('e') + len(c) / 10 for c in completions]"
    )
    (folder / "model").mkdir()
    return {
        "model": make_model("gpt2", folder / "model"),
        "reward": f"{reward}:f",
        "prompts": write_jsonl(folder / "prompts.jsonl", ({"prompt": p} for p in PROMPTS)),
        "completions": write_jsonl(
            folder / "completions.jsonl", ({"prompt": p, "completion": g} for p, g, _ in triples)
        ),
        "pairs": write_jsonl(
            folder / "pairs.jsonl",
            ({"prompt": p, "chosen": g, "rejected": b} for p, g, b in triples),
        ),
        "steps": write_jsonl(
            folder / "steps.jsonl",
            (
                {"prompt": p, "completions": [g, b, g], "labels": [1, len(g) % 2, 1]}
                for p, g, b in triples
            ),
        ),
    }


def settings(method: str, made: dict[str, str], out: Path, resume: bool) -> Any:
    cls, own = METHODS[method]
    values: dict[str, Any] = {"model": made["model"], "out": str(out), "resume": resume}
    values |= {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-3}
    values |= {"run": {"checkpoint_every": 2, "eval_every": 2, "samples": 2}}
    values |= own
    values["data"] = made[own.get("data", "prompts")]
    if method in ("ppo", "reinforce", "grpo", "distill"):
        values["max_new_tokens"] = 4
    if method in ("ppo", "reinforce", "grpo"):
        values["reward"] = [made["reward"]]
    if method == "distill":
        values["teacher"] = made["model"]
    return build(cls, values)


def start(method: str, made: dict[str, str], out: Path, resume: bool) -> int:
    """A run in a child; its pid."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        with open(out.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                getattr(fd, method)(settings(method, made, out, resume))
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(code)
    return child


def until(child: int, seconds: float | None) -> int | None:
    """Kill a child after some seconds (None: never); its exit code, -9 for one that was killed."""
    if seconds is not None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def phase(out: Path) -> str:
    """Where a run was when it died."""
    if not (out / "config.yaml").is_file():
        return "before config.yaml"
    if (out / "summary.json").is_file():
        return "finishing"
    if list(out.glob(".model-aside*")) or (out / "model").exists():
        return "writing the model"
    if list((out / "checkpoints").glob(".aside*")):
        return "saving"
    if not (out / "inputs.json").is_file():
        return "loading"
    return "steps"


def state(out: Path) -> dict[str, Any]:
    """Everything that must be equal, without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in TIMES}
        return value

    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = out / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found[name] = [timeless(json.loads(line)) for line in text.split("\n") if line]
    for path in sorted((out / "model").glob("*.safetensors")):
        found[f"model/{path.name}"] = path.read_bytes()
    last = out / "checkpoints" / f"checkpoint-{STEPS}"
    for path in sorted(p for p in last.rglob("*") if p.is_file() and p.name != "manifest.json"):
        name = str(path.relative_to(last))
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix in (".bin", ".pkl", ".pt"):
            found[name] = torch.load(path, weights_only=False)
        else:
            found[name] = path.read_bytes()
    found["summary"] = timeless(json.loads((out / "summary.json").read_text())["metrics"])
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return (
            type(a) is type(b)
            and len(a) == len(b)
            and all(equal(x, y) for x, y in zip(a, b, strict=True))
        )
    return bool((a == b).all()) if hasattr(a, "shape") else bool(a == b)


def one(
    method: str,
    made: dict[str, str],
    out: Path,
    whole: dict[str, Any],
    usual: float,
    rng: random.Random,
) -> tuple[str, list[str]]:
    """One run, killed and gone on with; where it was killed, and what differs."""
    while True:
        shutil.rmtree(out, ignore_errors=True)
        code = until(start(method, made, out, False), rng.uniform(0.0, usual * 1.05))
        if code == -signal.SIGKILL:
            break
        if code != 0:
            return "first run", [out.with_suffix(".log").read_text()[-400:]]
    where = phase(out)
    if rng.random() < 1 / 3:
        until(start(method, made, out, where != "before config.yaml"), rng.uniform(0.0, usual))
        where += ", again"
    resume = (out / "config.yaml").is_file()
    if until(start(method, made, out, resume), None) != 0:
        return where, [out.with_suffix(".log").read_text()[-400:]]
    after = state(out)
    if after.keys() != whole.keys():
        return where, sorted(after.keys() ^ whole.keys())
    return where, [name for name in whole if not equal(whole[name], after[name])]


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    assert fiducial.report.page.write_report  # imported, so that children need not
    failed = 0
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        os.environ["FIDUCIAL_CACHE"] = str(folder / "cache")
        made = world(folder)
        for method in args.methods:
            rng = random.Random(f"{args.seed} {method}")
            out = folder / f"{method}-whole"
            times = []
            for _ in range(2):  # the second finds a warm cache, as those that are killed do
                shutil.rmtree(out, ignore_errors=True)
                began = time.monotonic()
                if until(start(method, made, out, False), None) != 0:
                    say(f"{method}: {out.with_suffix('.log').read_text()[-2000:]}")
                    return 1
                times.append(time.monotonic() - began)
            whole, where, wrong = state(out), Counter[str](), 0
            for number in range(args.kills):
                here, differs = one(method, made, folder / method, whole, times[-1], rng)
                where[here.removesuffix(", again")] += 1
                where["killed again"] += here.endswith(", again")
                if differs:
                    wrong += 1
                    say(f"{method}: kill {number} ({here}): differs in {differs}")
            failed += wrong
            again = where.pop("killed again")
            places = ", ".join(f"{n} {place}" for place, n in where.most_common())
            say(
                f"{method}: {args.kills - wrong} of {args.kills} equal ({places}; {again} of them "
                "killed again while resumed)"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
