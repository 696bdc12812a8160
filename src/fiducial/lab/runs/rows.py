"""From finished runs to the rows of the page."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ...report.numbers import number
from ...rewards.shaping import overlong
from ...verbs import title
from ..kit.trainer import places
from ..study.results import Curve, Overoptimization
from ..worlds import exact
from ..worlds.world import World
from .folders import WORLDS, Worlds
from .jobs import LENGTHS, PARTS, Exchange, Job, dashed
from .plan import Plan
from .results import Change, MeasuredRun, MethodResult, RunResult, Sensitivity
from .workers import Done

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
"""The row of the table of gradient estimators that stands behind each method as it is run here. On
policy, GSPO's is GRPO's.
"""
NEEDS_CAUSE = 0.05
"""A run that leaves more than this share of the gap needs an explanation."""


def gap_of(run: RunResult) -> float:
    """The share of the gap that a finished run left."""
    assert run.relative_gap is not None
    return run.relative_gap


def methods(done: Done, worlds: Worlds) -> list[MethodResult]:
    """One row per method, kind of policy and world, with the runs of all seeds."""
    groups: dict[tuple[str, str, str], list[tuple[Job, MeasuredRun]]] = {}
    for job, found in done:
        if job.section == "methods":
            key = job.plan.method + ("_steps" if job.plan.reward == "steps" else "")
            groups.setdefault((job.world, job.plan.policy, key), []).append((job, found))
    rows = []
    for (world, policy, key), group in groups.items():
        job, worst = max(group, key=lambda pair: gap_of(pair[1].result))
        why = cause(worlds[world, job.plan.seed], job.plan, worst)
        if key == "grpo" and why:
            why = its_own_objective(done) or why
        rows.append(
            MethodResult(
                method=key,
                name=title(key),
                policy=policy,
                world=world,
                estimator=ESTIMATORS.get(key),
                setting=setting(job.plan),
                runs=[found.result for _, found in group],
                cause=why,
            )
        )
    order = list(WORLDS)
    return sorted(rows, key=lambda r: (order.index(r.world), r.policy == "transformer", r.method))


def setting(plan: Plan) -> str:
    """Learning rate, steps and batch of a run, in words."""
    dpo = plan.method == "dpo"
    steps, each = ("steps", "pairs per step") if dpo else ("iterations", "responses per iteration")
    return f"learning rate {plan.learning_rate:g}, {plan.steps:,} {steps}, {plan.batch_size} {each}"


def changes(section: str, done: Done, worlds: Worlds) -> list[Change]:
    """One row per exchange of a section, after a row for the method as it is: where each ends, and
    how many of its responses are truncated.
    """
    parts = section == "parts"
    plain = Exchange("GRPO as in its paper", "grpo", {}) if parts else Exchange("RLOO", "rloo", {})
    listed = {"": plain, **(PARTS if parts else LENGTHS)}
    out = []
    for case, exchange in listed.items():
        found = [
            (job, run)
            for job, run in done
            if job.plan.method == exchange.method
            and job.case == dashed(case)
            and job.section == (section if case else "methods")
            and (job.world, job.plan.policy, job.plan.reward) == ("mild", "table", "reward")
        ]
        if found:
            job, run = min(found, key=lambda pair: pair[0].plan.seed)
            out.append(changed(exchange, job, run, worlds[job.world, job.plan.seed]))
    return out


def changed(exchange: Exchange, job: Job, run: MeasuredRun, world: World) -> Change:
    """The row of one exchange."""
    logp = np.array(run.final)
    known = places(world) | {"optimum": exact.optimum(world)[0]}
    if (buffer := job.plan.settings.get("score", {}).get("length_buffer")) is not None:
        penalty = overlong(torch.from_numpy(world.tree.lengths), world.horizon, buffer).numpy()
        known["optimum of the reward minus the penalty"] = exact.optimum(
            world, reward=world.reward - penalty
        )[0]
    nearest = min(known, key=lambda k: exact.total_variation(logp, known[k]))
    truncated = (~world.tree.finished).astype(float)
    return Change(
        name=exchange.name,
        words=exchange.words,
        relative_gap=run.result.relative_gap,
        total_variation=run.result.total_variation,
        nearest=nearest,
        distance=exact.total_variation(logp, known[nearest]),
        cut=exact.expected(logp, truncated),
        cut_optimum=exact.expected(known["optimum"], truncated),
        seed=job.plan.seed,
    )


def its_own_objective(done: Done) -> str | None:
    """Why GRPO does not reach the optimum, from the runs in which its parts were exchanged."""
    left = {job.case: gap_of(run.result) for job, run in done if job.section == "parts"}
    if not {"all-three", "no-deviation-exact-KL", "exact-KL", "no-deviation"} <= set(left):
        return None
    said = {k: f"{100 * v:.2g}%" for k, v in left.items()}
    seed = next(job.plan.seed for job, _ in done if job.section == "parts")
    return (
        f"Its loss has another optimum. Gap left with parts exchanged, seed {seed}: with the exact "
        f"KL {said['exact-KL']}, without the standard deviation {said['no-deviation']}, with both "
        f"changes {said['no-deviation-exact-KL']}, and also with a constant instead of the length "
        f"{said['all-three']}."
    )


def cause(world: World, plan: Plan, run: MeasuredRun) -> str | None:
    """Why a run stopped short: the response whose probability is furthest below the optimum's, and
    how often it was sampled.
    """
    if gap_of(run.result) <= NEEDS_CAUSE:
        return None
    reward = world.proxy if plan.reward == "proxy" else world.reward
    best = np.exp(exact.optimum(world, reward=reward)[0])
    ends = np.exp(np.array(run.final))
    p, y = (int(i) for i in np.unravel_index(np.argmax(best - ends), best.shape))
    said = (
        f"Seed {plan.seed} gives the response {world.response_text(y)!r} to "
        f"{world.prompt_text(p)!r} a probability of {number(float(ends[p, y]))}; the optimum has "
        f"{number(float(best[p, y]))}"
    )
    path = run.result.path
    if plan.method == "dpo":
        pairs = len(world.prompts) * len(world.responses) * (len(world.responses) - 1) / 2
        before = number(100 * (path[-2].relative_gap or 0.0))
        return (
            f"{said}. Each comparison was seen about "
            f"{number(plan.steps * plan.batch_size / pairs)} times, and one measurement before the "
            f"end the gap was {before}%."
        )
    steps = [point.step for point in path]
    chance = [float(np.exp(trail[p][y])) for trail in run.trail]
    each = plan.batch_size / len(world.prompts)
    drawn = sum(
        (b - a) * each * (x + z) / 2
        for a, b, x, z in zip(steps, steps[1:], chance, chance[1:], strict=False)
    )
    low = next((k for k, c in enumerate(chance) if c < chance[0] / 10), None)
    sank = f" and falls below a tenth of that by step {steps[low]}" if low is not None else ""
    return (
        f"{said}. It starts at {number(chance[0])} under the reference{sank}: about "
        f"{number(drawn)} of {plan.steps * each:,.0f} sampled responses to that prompt were it."
    )


def sensitivity(done: Done) -> list[Sensitivity]:
    """The gap left over learning rate and beta, for each method."""
    out = []
    for method in ("ppo", "dpo"):
        here = {
            (job.plan.beta or 0.0, job.plan.learning_rate): (job, run)
            for job, run in done
            if job.section == "sensitivity" and job.plan.method == method
        }
        if not here:
            continue
        betas, rates = sorted({b for b, _ in here}), sorted({r for _, r in here})
        plan = next(iter(here.values()))[0].plan
        steps, each = ("steps", "pairs") if method == "dpo" else ("iterations", "responses")
        out.append(
            Sensitivity(
                method=method,
                name=title(method),
                policy=plan.policy,
                world="mild",
                learning_rates=rates,
                betas=betas,
                relative_gap=[[here[b, r][1].result.relative_gap for r in rates] for b in betas],
                setting=f"{plan.steps} {steps} of {plan.batch_size} {each}",
            )
        )
    return out


def with_path(curve: Overoptimization, done: Done) -> Overoptimization:
    """The curve of the world with the exploit, with the path of PPO trained on the proxy."""
    path = next((run.result.path for job, run in done if job.plan.reward == "proxy"), [])
    if curve.key != "world_exploit" or not path:
        return curve
    first = path[0]
    return dataclasses.replace(
        curve,
        path=Curve(  # relative to the reference, as the curve is
            kl=[p.kl or 0.0 for p in path],
            proxy=[(p.reward or 0.0) - (first.reward or 0.0) for p in path],
            gold=[(p.gold or 0.0) - (first.gold or 0.0) for p in path],
        ),
    )
