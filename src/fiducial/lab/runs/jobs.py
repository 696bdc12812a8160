"""All runs of the lab: which method, on which world, with which settings, and about how long each
takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .plan import METHODS, Kind, Plan, verb_of

Form = Literal["quick", "full"]


@dataclass(frozen=True)
class Job:
    """One run to be made, and where its result belongs on the page.

    section: "methods", "parts", "lengths" or "sensitivity".
    cost: about how many seconds it takes.
    case: which of the section's changes to a method it has; empty: none.
    """

    world: str
    plan: Plan
    section: str
    cost: float
    case: str = ""

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        p = self.plan
        parts = [self.world, p.method, p.policy]
        parts += [] if p.reward == "reward" else [p.reward]
        parts += [self.case] if self.case else []
        parts += [f"rate-{p.learning_rate:g}", f"steps-{p.steps}"]
        parts += [] if p.beta is None else [f"beta-{p.beta:g}"]
        return "-".join([*parts, f"seed-{p.seed}"])


@dataclass(frozen=True)
class Exchange:
    """A method with some of its settings changed. `words`: what that does."""

    name: str
    method: str
    settings: dict[str, Any]
    words: str = ""


SEQUENCE = tuple(m for m in METHODS if verb_of(m) == "reinforce")
ONLINE = tuple(m for m in METHODS if m != "dpo")
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
"""Learning rate and steps of each run. A step of DPO has 256 pairs, of the others 256 responses."""
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
"""Usual seconds per step: the longest runs start first, and the bar shows the time left."""
LONGER = 2.0
"""Factor on the time of a step in the world of long responses."""
PARTS: dict[str, Exchange] = {
    "no deviation": Exchange(
        "GRPO, no standard deviation",
        "grpo",
        {"advantage": "rloo"},
        "The mean of the other responses is subtracted, and nothing is divided by the standard "
        "deviation.",
    ),
    "exact KL": Exchange(
        "GRPO, exact KL",
        "grpo",
        {"kl": {"estimator": "k2"}},
        "k2 of the response instead of forward_k3: the gradient of KL(pi, ref) itself.",
    ),
    "constant length": Exchange(
        "GRPO, constant length",
        "grpo",
        {"loss_aggregation": "constant"},
        "Divided by a constant instead of each response's length.",
    ),
    "no deviation, exact KL": Exchange(
        "GRPO, no standard deviation, exact KL",
        "grpo",
        {"advantage": "rloo", "kl": {"estimator": "k2"}},
    ),
    "no deviation, constant length": Exchange(
        "GRPO, no standard deviation, constant length",
        "grpo",
        {"advantage": "rloo", "loss_aggregation": "constant"},
    ),
    "all three": Exchange(
        "GRPO, all three",
        "grpo",
        {"advantage": "rloo", "loss_aggregation": "constant", "kl": {"estimator": "k2"}},
    ),
    "KL in the reward": Exchange(
        "GRPO, KL in the reward",
        "grpo",
        {"kl": {"estimator": "k1"}},
        "Both divisions stay. At the optimum all returns of a prompt, with the KL penalty "
        "subtracted, are equal, so the divisions have no effect there.",
    ),
}
"""Parts of GRPO as in its paper that are exchanged, to see which of them move its optimum."""
LENGTHS: dict[str, Exchange] = {
    "masked": Exchange(
        "RLOO, truncated responses masked from the loss",
        "rloo",
        {"long": {"mask_truncated": True}},
        "This changes the objective: a truncated response has no gradient, whatever its reward.",
    ),
    "buffer": Exchange(
        "RLOO, a penalty for the last token",
        "rloo",
        {"score": {"length_buffer": 1}},
        "This changes the objective to one that is known exactly: the reward minus 1 for a "
        "response at the length limit.",
    ),
    "four epochs": Exchange(
        "Dr. GRPO, four epochs on each batch",
        "dr_grpo",
        {"epochs": 4},
        "Three of four updates are off policy, within the clip.",
    ),
    "off-policy mask": Exchange(
        "Dr. GRPO, four epochs, off-policy mask at 0.05 nats per token",
        "dr_grpo",
        {"epochs": 4, "off_policy_mask": 0.05},
        "The mask drops responses from which the policy has moved away within the batch.",
    ),
}
"""Settings that are meant for long responses, on the mild world."""
RATES = {"quick": (0.01, 0.05, 0.25), "full": (0.002, 0.01, 0.05, 0.25, 1.25)}
BETAS = {"quick": (0.2, 0.5, 1.0), "full": (0.1, 0.2, 0.5, 1.0, 2.0)}


def jobs(form: Form, seed: int) -> list[Job]:
    """All runs of a form."""
    seeds = (seed, seed + 1, seed + 2)
    full = form == "full"
    out: list[Job] = []

    def add(world: str, method: str, policy: Kind, chosen: Sequence[int], **changes: Any) -> None:
        rate, steps = SETTINGS[world, method, policy]
        cost = steps * seconds(method, policy, world)
        for s in chosen:
            out.append(
                Job(world, Plan(method, policy, rate, steps, seed=s, **changes), "methods", cost)
            )

    for method in ("dpo", "ppo"):
        add("mild", method, "table", seeds)
        add("mild", method, "transformer", seeds if full else seeds[:1])
        for world in ("peaked", "large"):
            add(world, method, "table", seeds)
            if full:
                add(world, method, "transformer", seeds)
    for method in [m for m in ONLINE if m != "ppo"]:
        every = full or method in ("rloo", "grpo")
        add("mild", method, "table", seeds if every else seeds[:1])
    for method in ("rloo", "grpo") if full else ():
        add("mild", method, "transformer", seeds)
    add("long", "ppo", "table", seeds[:1], points=50, credit=True)
    add("long", "ppo", "table", seeds[1:], points=50)
    for method in SEQUENCE:
        add("long", method, "table", seeds, points=50)
    add("long", "ppo", "table", seeds, points=50, reward="steps")
    add(
        "long",
        "rloo",
        "table",
        seeds,
        points=50,
        reward="steps",
        settings={"credit": "reward_to_go"},
    )
    add("sparse", "ppo", "table", seeds)
    add("exploit", "ppo", "table", seeds[:1], reward="proxy")
    return [*out, *exchanged(seed), *grid(form, seed)]


def exchanged(seed: int) -> list[Job]:
    """Runs on the mild world with a part of the method exchanged."""
    rate, steps = SETTINGS["mild", "grpo", "table"]
    sections = {"parts": PARTS, "lengths": LENGTHS}
    return [
        Job(
            "mild",
            Plan(e.method, "table", rate, steps, seed=seed, points=0, settings=e.settings),
            section,
            steps * seconds(e.method, "table", "mild"),
            dashed(case),
        )
        for section, exchanges in sections.items()
        for case, e in exchanges.items()
    ]


def grid(form: Form, seed: int) -> list[Job]:
    """Runs on the mild world over learning rate and beta."""
    return [
        Job(
            "mild",
            Plan(method, "table", rate, steps, seed=seed, beta=beta, points=0),
            "sensitivity",
            steps * seconds(method, "table", "mild"),
        )
        for method, steps in (("dpo", 300), ("ppo", 60))
        for beta in BETAS[form]
        for rate in RATES[form]
    ]


def dashed(case: str) -> str:
    """A case as part of the name of a run."""
    return case.replace(", ", "-").replace(" ", "-")


def seconds(method: str, policy: Kind, world: str) -> float:
    """Usual seconds per step."""
    return SECONDS[verb_of(method), policy] * (LONGER if world == "long" else 1.0)
