"""`fiducial lab`: every method that the package ships, held against the exactly known optimum of
worlds small enough to enumerate, and the page of it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ..errors import RunError
from ..report.numbers import number
from ..rollout.shaping import overlong
from ..settings import Settings
from ..train.folders import open_folder
from ..train.machine import command_line
from ..train.progress import Progress, say
from .kit.trainer import places
from .page.page import write_lab_page
from .runs.measured import METHODS, Plan, run_quietly, write_world
from .study import derivation, estimators, labels, overoptimisation
from .worlds import exact, policies
from .worlds.world import World


class Lab(Settings):
    """Lab: run every method on worlds whose optimum is known exactly, measure how far from it each
    stops, and write the page with the whole derivation.
    """

    out: str | None = None
    """The folder for everything. Default: lab-run, lab-run-2, ..."""
    full: bool = False
    """Three seeds of everything, the large worlds with the transformer too, and a finer grid: about
    20 minutes on two cores. Default: about 5.
    """
    seed: int = 0
    """Of the worlds and of the runs on them; the seeds are this one and the next two."""
    processes: int | None = Field(None, gt=0)
    """Runs side by side. Default: one for each core, eight at most."""
    resume: bool = False
    """Keep the runs that are finished in --out."""


@dataclass(frozen=True)
class Job:
    """A run to be made, and where its result belongs on the page."""

    world: str
    plan: Plan
    section: str  # "methods", "parts", "lengths" or "sensitivity"
    cost: float  # about how many seconds
    case: str = ""  # which of a section's changes to a method it is

    @property
    def name(self) -> str:
        p = self.plan
        beta = "" if p.beta is None else f"-beta-{p.beta:g}"
        reward = "" if p.reward == "reward" else f"-{p.reward}"
        case = f"-{self.case}" if self.case else ""
        return f"{self.world}-{p.method}-{p.policy}{reward}{case}-rate-{p.learning_rate:g}-steps-{p.steps}{beta}-seed-{p.seed}"


SEQUENCE = tuple(method for method, (verb, _) in METHODS.items() if verb == "reinforce")
ONLINE = tuple(method for method, (verb, _) in METHODS.items() if verb != "dpo")
SETTINGS: dict[tuple[str, str, str], tuple[float, int]] = {
    ("mild", "dpo", "table"): (0.05, 1600),
    ("mild", "ppo", "table"): (0.05, 150),
    ("mild", "dpo", "transformer"): (1e-3, 1500),
    ("mild", "ppo", "transformer"): (1e-3, 150),
    ("peaked", "dpo", "table"): (0.05, 800),
    ("peaked", "ppo", "table"): (0.05, 150),
    ("peaked", "dpo", "transformer"): (1e-3, 1000),
    ("peaked", "ppo", "transformer"): (1e-3, 250),
    ("large", "dpo", "table"): (0.05, 800),
    ("large", "ppo", "table"): (0.05, 150),
    ("large", "dpo", "transformer"): (1e-3, 1500),
    ("large", "ppo", "transformer"): (1e-3, 250),
    ("sparse", "ppo", "table"): (0.05, 150),
    ("exploit", "ppo", "table"): (0.05, 150),
    **{("mild", method, "table"): (0.05, 150) for method in ONLINE if method != "ppo"},
    **{("mild", method, "transformer"): (1e-3, 150) for method in ("rloo", "grpo")},
    **{("long", method, "table"): (0.05, 150) for method in ONLINE},
}
"""Learning rate and steps of each run: steps of 256 pairs, iterations of 256 responses."""
SECONDS = {
    ("dpo", "table"): 0.012,
    ("ppo", "table"): 0.035,
    ("dpo", "transformer"): 0.05,
    ("ppo", "transformer"): 0.15,
    ("reinforce", "table"): 0.015,
    ("reinforce", "transformer"): 0.07,
    ("grpo", "table"): 0.015,
    ("grpo", "transformer"): 0.07,
}
"""Usual seconds a step by verb, to begin with the longest and to tell the time that is left."""
LONGER = 2.0
"""How many times that a step takes in the world of long responses."""
NAMES = {
    "ppo": "PPO",
    "dpo": "DPO",
    "reinforce_none": "REINFORCE",
    "reinforce_mean": "REINFORCE, mean",
    "remax": "ReMax",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "ppo_steps": "PPO, process rewards",
    "rloo_steps": "RLOO, process rewards",
}
ESTIMATORS = {
    "ppo": "PPO's surrogate, lambda 0.95, exact critic, whitened",
    "dpo": "DPO's loss",
    "reinforce_none": "REINFORCE, no baseline",
    "reinforce_mean": "REINFORCE, running mean",
    "remax": "REINFORCE, greedy response's score (ReMax)",
    "rloo": "REINFORCE, leave-one-out of 2 (RLOO)",
    "reinforce_pp": "REINFORCE, whitened over 8 responses (REINFORCE++)",
    "grpo": "GRPO, groups of 2, k3 in the loss",
    "dr_grpo": "Dr. GRPO, groups of 2",
    "gspo": "GRPO, groups of 2, k1 in the reward",
    "dapo": "no row",
    "cispo": "no row",
}
"""The row of the estimators' table that stands behind each method as it is run here; on policy
GSPO's is GRPO's.
"""
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no deviation": (
        "The mean of the others in place of mean and deviation.",
        {"advantage": "rloo"},
    ),
    "exact KL": (
        "k2 of the response in place of forward_k3: the gradient of KL(pi, ref) itself.",
        {"kl": {"estimator": "k2"}},
    ),
    "constant length": ("A constant in place of each response's length.", {"mean": "constant"}),
    "no deviation, exact KL": ("", {"advantage": "rloo", "kl": {"estimator": "k2"}}),
    "no deviation, constant length": ("", {"advantage": "rloo", "mean": "constant"}),
    "all three": ("", {"advantage": "rloo", "mean": "constant", "kl": {"estimator": "k2"}}),
    "KL in the reward": (
        "Both divisions stay. At the optimum all returns of a prompt, less the price of the KL, "
        "are equal: there is nothing to divide.",
        {"kl": {"estimator": "k1"}},
    ),
}
"""What is exchanged of GRPO as its paper has it, to see which part moves it from the optimum."""
LENGTH_WORDS = {
    "masked": "Another objective: cut responses have no gradient of their own, whatever they earn.",
    "buffer": "Another objective, and known exactly: the reward less 1 for a response at its limit.",
    "four epochs": "Three of four updates are off policy, within the clip.",
    "stale": "The mask leaves out what the policy has moved away from within its batch.",
}
LENGTHS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "masked": (
        "RLOO, cut responses left out of the loss",
        "rloo",
        {"long": {"mask_truncated": True}},
    ),
    "buffer": ("RLOO, a penalty for the last token", "rloo", {"score": {"length_buffer": 1}}),
    "four epochs": ("Four epochs on each batch (Dr. GRPO)", "dr_grpo", {"epochs": 4}),
    "stale": (
        "Four epochs, stale responses left out from 0.05 nats a token",
        "dr_grpo",
        {"epochs": 4, "stale": 0.05},
    ),
}
"""What is for long responses, on the mild world."""
COPIES = {"mild": 100, "peaked": 100, "large": 2, "sparse": 1, "long": 0, "exploit": 1}
"""How often every two responses are compared in the file of each world; once or not at all where no
method reads it.
"""
RATES = {"quick": (0.01, 0.05, 0.25), "full": (0.002, 0.01, 0.05, 0.25, 1.25)}
BETAS = {"quick": (0.2, 0.5, 1.0), "full": (0.1, 0.2, 0.5, 1.0, 2.0)}


def jobs(form: str, seed: int) -> list[Job]:
    """All runs of a form."""
    seeds = (seed, seed + 1, seed + 2)
    out = []

    def add(world: str, method: Any, policy: Any, chosen: Sequence[int], **changes: Any) -> None:
        rate, steps = SETTINGS[world, method, policy]
        for s in chosen:
            out.append(
                Job(
                    world,
                    Plan(method, policy, rate, steps, seed=s, **changes),
                    "methods",
                    steps * seconds(method, policy, world),
                )
            )

    for method in ("dpo", "ppo"):
        add("mild", method, "table", seeds)
        add("mild", method, "transformer", seeds if form == "full" else seeds[:1])
        for world in ("peaked", "large"):
            add(world, method, "table", seeds)
            if form == "full":
                add(world, method, "transformer", seeds)
    for method in [m for m in ONLINE if m != "ppo"]:
        add(
            "mild",
            method,
            "table",
            seeds if form == "full" or method in ("rloo", "grpo") else seeds[:1],
        )
    for method in ("rloo", "grpo") if form == "full" else ():
        add("mild", method, "transformer", seeds)
    add("long", "ppo", "table", seeds[:1], points=50, credit=True)
    add("long", "ppo", "table", seeds[1:], points=50)
    for method in SEQUENCE:
        add("long", method, "table", seeds, points=50)
    add("long", "ppo", "table", seeds, points=50, reward="steps")
    add("long", "rloo", "table", seeds, points=50, reward="steps", settings={"credit": "to_go"})
    add("sparse", "ppo", "table", seeds)
    add("exploit", "ppo", "table", seeds[:1], reward="proxy")
    out += exchanged(seed)
    for method, steps in (("dpo", 300), ("ppo", 60)):
        for beta in BETAS[form]:
            for rate in RATES[form]:
                plan = Plan(method, "table", rate, steps, seed=seed, beta=beta, points=0)  # type: ignore[arg-type]
                out.append(
                    Job("mild", plan, "sensitivity", steps * seconds(method, "table", "mild"))
                )
    return out


def exchanged(seed: int) -> list[Job]:
    """Runs on the mild world with a part of the method exchanged."""
    rate, steps = SETTINGS["mild", "grpo", "table"]
    cases = [("parts", case, "grpo", changes) for case, (_, changes) in PARTS.items()] + [
        ("lengths", k, m, c) for k, (_, m, c) in LENGTHS.items()
    ]
    return [
        Job(
            "mild",
            Plan(method, "table", rate, steps, seed=seed, points=0, settings=changes),
            section,
            steps * seconds(method, "table", "mild"),
            dashed(case),
        )
        for section, case, method, changes in cases
    ]


def dashed(case: str) -> str:
    """A case in the name of a run."""
    return case.replace(", ", "-").replace(" ", "-")


def seconds(method: str, policy: str, world: str) -> float:
    """Usual seconds a step."""
    return SECONDS[METHODS[method][0], policy] * (LONGER if world == "long" else 1.0)


def lab(settings: Lab) -> Path:
    """The path of the page."""
    folder = open_folder(settings.out, "lab-run", settings.resume)
    form = "full" if settings.full else "quick"
    times: dict[str, float] = {}

    with timed(times, "making the worlds"):
        say(
            f"lab: making the worlds ({form} form: about {'19' if settings.full else '5'} minutes "
            "on two cores)"
        )
        worlds = make_worlds(folder, settings.seed)
    todo = jobs(form, settings.seed)
    with Workers(folder, settings.processes, settings.resume) as workers:
        began = time.monotonic()
        pending = workers.start(todo)
        data = story(worlds["mild", settings.seed], form, times)
        try:
            done = workers.collect(pending)
        except KeyboardInterrupt:
            raise RunError(
                f"stopped; the runs that were finished are kept: go on with --out {folder} --resume"
            ) from None
        times["running the shipped methods"] = time.monotonic() - began
    data |= {
        "form": form,
        "seed": settings.seed,
        "command": command_line(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {workers.count} runs side by side",
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("fiducial", "torch", "transformers", "numpy")},
        },
        "worlds": [describe(name, worlds[name, settings.seed]) for name in WORLDS],
        "methods": methods(done, worlds),
        "parts": changes("parts", done, worlds),
        "lengths": changes("lengths", done, worlds),
        "credit": next((r["credit"] for _, r in done if r.get("credit")), None),
        "sensitivity": sensitivity(done),
    }
    data["overoptimisation"] = [followed(one, done) for one in data["overoptimisation"]]
    data["timings"] = {k: round(v, 1) for k, v in times.items()}
    (folder / "lab.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    return write_lab_page(folder, data)


def as_lines(page: Path) -> list[str]:
    """What the terminal says at the end: a line a method, and where the page is."""
    data = json.loads((page.parent / "lab.json").read_text(encoding="utf-8"))
    lines = []
    for row in data["methods"]:
        gaps = ", ".join(f"{100 * run['relative_gap']:.2g}%" for run in row["runs"])
        apart = ", ".join(number(run["total_variation"]) for run in row["runs"])
        lines.append(
            f"{row['world']:<8} {row['name']:<21} {row['policy']:<12} short of the optimum by "
            f"{gaps}; total variation {apart}"
        )
    return [*lines, str(page)]


# ---- worlds ----

WORLDS = {
    "mild": "Every response is within reach of the reference: methods should arrive.",
    "peaked": "The best responses are rare under the reference and the pull to it is weak: what is not sampled is not learned.",
    "large": "Eight times as many responses, and thirty times as many comparisons to learn from.",
    "sparse": "As large; a few responses are right and earn 1, all others 0, as a verifier gives it.",
    "long": "Up to eight tokens and EOS is rare: right, and worth 1, is what has the right letters at five places; all others earn 0.",
    "exploit": "As large as the sparse one; a proxy overrates the least likely responses, which the true reward hates. PPO follows the proxy, "
    "and so do gap and optimum here.",
}


def make_worlds(folder: Path, seed: int) -> dict[tuple[str, int], World]:
    """The worlds of three seeds, each with its files below `folder`; the exploit's only once."""
    made = {
        "mild": policies.mild,
        "peaked": policies.peaked,
        "large": policies.large,
        "sparse": policies.sparse,
        "long": policies.long,
        "exploit": policies.exploit,
    }
    out = {}
    for name, make in made.items():
        for s in (seed, seed + 1, seed + 2) if name != "exploit" else (seed,):
            world, model = make(s)
            out[name, s] = world
            where = folder / "worlds" / f"{name}-{s}"
            if not where.exists():
                aside = where.with_name(f".{where.name}")
                shutil.rmtree(aside, ignore_errors=True)
                write_world(world, model, aside, copies=COPIES[name]).rename(where)
    return out


def describe(name: str, world: World) -> dict[str, Any]:
    """The facts of a world, for the page."""
    reward = world.reward if world.proxy is None else world.proxy
    best, _ = exact.optimum(world, reward=reward)
    ref = exact.reference(world)
    return {
        "key": name,
        "words": WORLDS[name],
        "prompts": len(world.prompts),
        "responses": len(world.responses),
        "vocabulary": world.vocabulary,
        "horizon": world.horizon,
        "beta": world.beta,
        "kl_optimum": exact.kl(best, ref),
        "objective_reference": exact.objective(world, ref, reward=reward),
        "objective_optimum": exact.objective(world, best, reward=reward),
    }


# ---- what is known without a run ----


def story(world: World, form: str, times: dict[str, float]) -> dict[str, Any]:
    """Everything that is computed and not trained: the setting, the derivation, labels, estimators,
    best-of-n, over-optimisation.
    """
    out: dict[str, Any] = {}
    with timed(times, "the derivation, side by side"):
        out["setting"], out["frontier"] = derivation.setting(world), derivation.frontier(world)
        out["sparse"] = derivation.sparse(world)
        out["derivation"], out["recovered"] = derivation.derive(world)
    with timed(times, "what labels do"):
        out["missing"], out["labels"] = labels.missing(world), labels.annotators(world)
    with timed(times, "estimators against exact gradients"):
        out["kl"], out["estimators"] = estimators.kl_table(world), estimators.estimator_table()
    with timed(times, "best-of-n and over-optimisation"):
        out["best_of_n"] = derivation.best_of_n(world, [1, 2, 4, 8, 16, 32, 64, 256, 1024])
        out["overoptimisation"] = overoptimisation.curves(form)
    return out


# ---- runs ----


class Workers:
    """Processes that make runs side by side, each with one thread; finished runs are kept, and are
    not made again with `resume`.
    """

    def __init__(self, folder: Path, processes: int | None, resume: bool) -> None:
        self.folder, self.resume = folder, resume
        self.count = processes or max(1, min(8, os.cpu_count() or 1))
        os.environ["OMP_NUM_THREADS"] = (
            "1"  # for the processes to come; this one has read it already
        )
        self.pool = ProcessPoolExecutor(self.count, mp_context=get_context("spawn"))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.pool.shutdown(wait=True, cancel_futures=kind is not None)

    def start(self, todo: Sequence[Job]) -> dict[Future[dict[str, Any]], Job]:
        """Hand out the runs, the longest first."""
        out = {}
        for job in sorted(todo, key=lambda j: -j.cost):
            out[self.pool.submit(make_run, job, self.folder, self.resume)] = job
        return out

    def collect(
        self, pending: dict[Future[dict[str, Any]], Job]
    ) -> list[tuple[Job, dict[str, Any]]]:
        """All results, in an order that does not depend on who was quicker.

        Raises:
            RunError: a run failed; the sentence names its log.
        """
        found = []
        with Progress(
            "lab: the shipped methods, in seconds of work",
            round(sum(j.cost for j in pending.values())),
        ) as bar:
            for future in as_completed(pending):
                job = pending[future]
                try:
                    found.append((job, future.result()))
                except Exception as error:
                    log = self.folder / "runs" / f"{job.name}.log"
                    raise RunError(
                        f"the run {job.name} failed: {error}; its log is {log}; the others are "
                        f"kept: --out {self.folder} --resume"
                    ) from error
                bar.advance({"runs made": len(found), "of": len(pending)}, by=round(job.cost))
        return sorted(found, key=lambda pair: pair[0].name)


def make_run(job: Job, folder: Path, resume: bool) -> dict[str, Any]:
    """In a worker: the result of one run, from the disk if it was made before."""
    out = folder / "runs" / job.name
    result = out.with_name(f"{out.name}.json")
    if resume and result.exists():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    shutil.rmtree(out, ignore_errors=True)  # what was cut short
    found = run_quietly(job.plan, folder / "worlds" / f"{job.world}-{job.plan.seed}", out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    aside = result.with_name(f".{result.name}")
    aside.write_text(json.dumps(found), encoding="utf-8")
    aside.replace(result)
    return found


# ---- from runs to what the page shows ----

Done = list[tuple[Job, dict[str, Any]]]


def methods(done: Done, worlds: dict[tuple[str, int], World]) -> list[dict[str, Any]]:
    """A row a method, policy and world, with its runs of all seeds."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for job, result in done:
        plan = job.plan
        if job.section != "methods":
            continue
        key = plan.method + ("_steps" if plan.reward == "steps" else "")
        each = "pairs a step" if plan.method == "dpo" else "responses an iteration"
        what = "steps" if plan.method == "dpo" else "iterations"
        row = rows.setdefault(
            (job.world, plan.policy, key),
            {
                "method": key,
                "name": NAMES[key],
                "policy": plan.policy,
                "world": job.world,
                "estimator": ESTIMATORS.get(key),
                "setting": f"learning rate {plan.learning_rate:g}, {plan.steps:,} {what}, {plan.batch_size} {each}",
                "runs": [],
                "cause": None,
            },
        )
        row["runs"].append(
            {k: v for k, v in result.items() if k not in ("plan", "trail", "final", "credit")}
        )
        if result["relative_gap"] == max(
            run["relative_gap"] for run in row["runs"]
        ):  # the worst seed speaks for all
            row["cause"] = cause(worlds[job.world, plan.seed], plan, result)
    for row in rows.values():
        if row["method"] == "grpo" and row["cause"]:
            row["cause"] = its_own_objective(done) or row["cause"]
    order = list(WORLDS)
    return sorted(
        rows.values(),
        key=lambda r: (order.index(r["world"]), r["policy"] == "transformer", r["method"]),
    )


def changes(section: str, done: Done, worlds: dict[tuple[str, int], World]) -> list[dict[str, Any]]:
    """A row for each change to a method of a section, first the method without it: where it ends,
    and how it is cut.
    """
    listed: list[tuple[str, str, str, str]] = []  # name, words, method, case
    if section == "parts":
        listed = [
            ("GRPO as its paper has it", "", "grpo", ""),
            *((f"GRPO, {k}", w, "grpo", k) for k, (w, _) in PARTS.items()),
        ]
    else:
        listed = [
            ("RLOO", "", "rloo", ""),
            *((name, LENGTH_WORDS[k], m, k) for k, (name, m, _) in LENGTHS.items()),
        ]
    out = []
    for name, words, method, case in listed:
        found = [
            (j, r)
            for j, r in done
            if j.plan.method == method
            and j.case == dashed(case)
            and j.section == (section if case else "methods")
            and j.world == "mild"
            and j.plan.policy == "table"
            and j.plan.reward == "reward"
        ]
        if not found:
            continue
        job, result = min(found, key=lambda pair: pair[0].plan.seed)
        world, logp = worlds[job.world, job.plan.seed], np.array(result["final"])
        away = places(world) | {"optimum": exact.optimum(world)[0]}
        if (buffer := job.plan.settings.get("score", {}).get("length_buffer")) is not None:
            less = overlong(torch.from_numpy(world.tree.lengths), world.horizon, buffer).numpy()
            away["optimum of the reward less the penalty"] = exact.optimum(
                world, reward=world.reward - less
            )[0]
        nearest = min(away, key=lambda k: exact.total_variation(logp, away[k]))
        out.append(
            {
                "name": name,
                "words": words,
                "relative_gap": result["relative_gap"],
                "total_variation": result["total_variation"],
                "nearest": nearest,
                "distance": exact.total_variation(logp, away[nearest]),
                "cut": exact.expected(logp, (~world.tree.finished).astype(float)),
                "cut_optimum": exact.expected(
                    away["optimum"], (~world.tree.finished).astype(float)
                ),
                "seed": job.plan.seed,
            }
        )
    return out


def its_own_objective(done: Done) -> str | None:
    """Why GRPO does not arrive, from the runs in which its parts were exchanged."""
    left = {j.case: r["relative_gap"] for j, r in done if j.section == "parts"}
    if not {"all-three", "no-deviation-exact-KL", "exact-KL", "no-deviation"} <= set(left):
        return None
    said = {k: f"{100 * v:.2g}%" for k, v in left.items()}
    seed = next(j.plan.seed for j, _ in done if j.section == "parts")
    return (
        f"Its loss has another optimum. Seed {seed}, parts exchanged: with the exact KL "
        f"{said['exact-KL']} is left, without the "
        f"deviation {said['no-deviation']}, with both {said['no-deviation-exact-KL']}, and with a "
        f"constant in place of the length too {said['all-three']}."
    )


SHORT = 0.05
"""A run that leaves more than this share of the gap owes an explanation."""


def cause(world: World, plan: Plan, result: dict[str, Any]) -> str | None:
    """Why a run stopped short, measured: the response on which it lies furthest below the optimum,
    and how often it was ever drawn.
    """
    if result["relative_gap"] <= SHORT:
        return None
    reward = world.proxy if plan.reward == "proxy" else world.reward
    best = np.exp(exact.optimum(world, reward=reward)[0])
    ends = np.exp(np.array(result["final"]))
    p, y = np.unravel_index(np.argmax(best - ends), best.shape)
    text, seed = f"{world.response_text(int(y))!r} to {world.prompt_text(int(p))!r}", plan.seed
    said = f"Seed {seed} gives the response {text} {number(float(ends[p, y]))} where the optimum has {number(float(best[p, y]))}"
    if plan.method != "dpo":
        steps = [point["step"] for point in result["path"]]
        chance = [float(np.exp(trail[p][y])) for trail in result["trail"]]
        each = plan.batch_size / len(world.prompts)
        drawn = sum(
            (b - a) * each * (x + z) / 2
            for a, b, x, z in zip(steps, steps[1:], chance, chance[1:], strict=False)
        )
        half = next((k for k, c in enumerate(chance) if c < chance[0] / 10), None)
        sank = (
            f", and its probability was below a tenth of that by step {steps[half]}"
            if half is not None
            else ""
        )
        return f"{said}: the reference gives it {number(chance[0])}{sank}; of {plan.steps * each:,.0f} responses to that prompt about {number(drawn)} were it."
    seen = (
        plan.steps
        * plan.batch_size
        / (len(world.prompts) * len(world.responses) * (len(world.responses) - 1) / 2)
    )
    before = number(100 * result["path"][-2]["relative_gap"])
    return f"{said}: each comparison was seen about {number(seen)} times, and one measurement before the end the gap was {before}%."


def sensitivity(done: Done) -> list[dict[str, Any]]:
    """The gap that is left, over learning rate and beta, for each method."""
    out = []
    for method in ("ppo", "dpo"):
        here = {
            (j.plan.beta, j.plan.learning_rate): (j, r)
            for j, r in done
            if j.section == "sensitivity" and j.plan.method == method
        }
        if not here:
            continue
        betas, rates = (
            sorted({b for b, _ in here}, key=lambda b: b or 0.0),
            sorted({r for _, r in here}),
        )
        plan = next(iter(here.values()))[0].plan
        what = (
            f"{plan.steps} steps of {plan.batch_size} pairs"
            if method == "dpo"
            else f"{plan.steps} iterations of {plan.batch_size} responses"
        )
        out.append(
            {
                "method": method,
                "name": NAMES[method],
                "policy": plan.policy,
                "world": "mild",
                "learning_rates": rates,
                "betas": betas,
                "relative_gap": [[here[b, r][1]["relative_gap"] for r in rates] for b in betas],
                "setting": what,
            }
        )
    return out


def followed(curve: dict[str, Any], done: Done) -> dict[str, Any]:
    """The curve of the world with the exploit, with the path that PPO took behind the proxy."""
    if curve["key"] != "world_exploit":
        return curve
    paths = [r["path"] for j, r in done if j.plan.reward == "proxy"]
    if not paths:
        return curve
    path = paths[0]
    above = {
        k: [p[k] - path[0][k] for p in path] for k in ("reward", "gold")
    }  # the curve too is above the reference
    return {
        **curve,
        "path": {"kl": [p["kl"] for p in path], "proxy": above["reward"], "gold": above["gold"]},
    }


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of the block to `times`."""
    start = time.monotonic()
    yield
    times[name] = time.monotonic() - start
