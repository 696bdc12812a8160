"""The one table of methods, and the other verbs of the command line.

A new method is its page in `methods/` and a row in `METHODS`: the command line, the page of a run,
the lab, the demo and the reference all read this table. Nothing here is imported before it is used:
`settings` and `run` are `module:name`, below `fiducial.` where they begin with a dot.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["loss", "reward", "process", "preference", "policy", "distillation"]
Colour = Literal["blue", "orange", "green", "vermillion", "sky", "purple", "grey", "ink"]


@dataclass(frozen=True)
class Verb:
    """One subcommand: what `--help` says of it, and where its settings and its function are.

    lines: where the function is that turns the result into the lines that the command prints; None
    for a run, whose numbers and page are printed, and for a path.
    """

    name: str
    summary: str
    settings: str
    run: str
    lines: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Method(Verb):
    """A verb that trains.

    title: what pages call it. colour: its colour on every page.
    kind: the question that a run of it answers, which decides the first sentences of its page.
    decides: the metrics that decide it, in the order in which a page shows them.
    """

    title: str
    colour: Colour
    kind: Kind
    decides: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A method under a name of its own: a verb with some of its settings given."""

    name: str
    verb: str
    title: str
    colour: Colour
    settings: Mapping[str, Any] = field(default_factory=dict)


_POLICY = (
    "reward",
    "objective/score",
    "objective/kl",
    "kl",
    "entropy",
    "completions/mean_length",
    "completions/finished",
)

METHODS: list[Method] = [
    Method(
        name="sft",
        summary="Supervised fine-tuning on demonstrations.",
        settings=".methods.settings.sft:SFT",
        run=".methods.sft:sft",
        title="SFT",
        colour="purple",
        kind="loss",
        decides=("loss",),
    ),
    Method(
        name="reward",
        summary="Train a Bradley-Terry reward model on preference pairs.",
        settings=".methods.settings.reward_model:RewardModel",
        run=".methods.reward_model:reward",
        title="Reward model",
        colour="green",
        kind="reward",
        decides=("accuracy", "margin", "loss"),
    ),
    Method(
        name="prm",
        summary="Train a process reward model on labelled steps, or on outcomes alone.",
        settings=".methods.settings.prm:PRM",
        run=".methods.prm:prm",
        title="Process reward model",
        colour="green",
        kind="process",
        decides=("steps/accuracy", "steps/probability", "steps/right", "loss"),
    ),
    Method(
        name="ppo",
        summary="PPO with a critic and a KL penalty to a frozen reference.",
        settings=".methods.settings.ppo:PPO",
        run=".methods.ppo:ppo",
        title="PPO",
        colour="blue",
        kind="policy",
        decides=_POLICY,
    ),
    Method(
        name="reinforce",
        summary="REINFORCE without a critic: RLOO, ReMax, REINFORCE++, running mean, no baseline.",
        settings=".methods.settings.reinforce:Reinforce",
        run=".methods.reinforce:reinforce",
        title="REINFORCE",
        colour="sky",
        kind="policy",
        decides=_POLICY,
    ),
    Method(
        name="grpo",
        summary="Group-relative policy optimization: GRPO, Dr. GRPO, DAPO, GSPO, CISPO.",
        settings=".methods.settings.grpo:GRPO",
        run=".methods.grpo:grpo",
        title="GRPO",
        colour="grey",
        kind="policy",
        decides=_POLICY,
    ),
    Method(
        name="dpo",
        summary="Direct preference optimization: learn from pairs without a reward model.",
        settings=".methods.settings.dpo:DPO",
        run=".methods.dpo:dpo",
        title="DPO",
        colour="orange",
        kind="preference",
        decides=(
            "rewards/accuracies",
            "rewards/margins",
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "logps/chosen",
            "logps/rejected",
        ),
    ),
    Method(
        name="distill",
        summary="On-policy distillation: reverse KL to a teacher on the student's own samples.",
        settings=".methods.settings.distill:Distill",
        run=".methods.distill:distill",
        title="Distillation",
        colour="green",
        kind="distillation",
        decides=(
            "kl_teacher",
            "objective/kl_teacher",
            "nll/student",
            "nll/teacher",
            "entropy",
            "completions/mean_length",
            "completions/finished",
        ),
    ),
]
"""In the order of `fiducial --help`."""

VARIANTS: list[Variant] = [
    Variant("reinforce_none", "reinforce", "REINFORCE", "ink", {"baseline": "none"}),
    Variant("reinforce_mean", "reinforce", "REINFORCE, mean", "green", {"baseline": "mean"}),
    Variant("remax", "reinforce", "ReMax", "orange", {"baseline": "remax"}),
    Variant("rloo", "reinforce", "RLOO", "sky", {"baseline": "rloo"}),
    Variant("reinforce_pp", "reinforce", "REINFORCE++", "vermillion", {"baseline": "reinforce++"}),
    Variant("dr_grpo", "grpo", "Dr. GRPO", "green", {"variant": "dr_grpo"}),
    Variant("dapo", "grpo", "DAPO", "orange", {"variant": "dapo"}),
    Variant("gspo", "grpo", "GSPO", "vermillion", {"variant": "gspo"}),
    Variant("cispo", "grpo", "CISPO", "purple", {"variant": "cispo"}),
    Variant("ppo_no_kl", "ppo", "PPO without KL", "vermillion", {"beta": 0.0}),
    Variant("ppo_steps", "ppo", "PPO, process rewards", "green"),
    Variant("rloo_steps", "reinforce", "RLOO, process rewards", "purple", {"baseline": "rloo"}),
]
"""Methods of the lab and the demo. In no picture do two share a colour: REINFORCE's kin, GRPO's
kin, and the two ways to reward steps have pictures of their own.
"""

OTHERS: list[Verb] = [
    Verb(
        "collect",
        "Sample responses, have a judge compare them, and write preference pairs.",
        ".use.settings:Collect",
        ".use.collect:collect",
    ),
    Verb(
        "label-steps",
        "Label the steps of sampled solutions by completing every prefix several times.",
        ".use.settings:LabelSteps",
        ".use.label_steps:label_steps",
    ),
    Verb(
        "generate",
        "Answer a file of prompts, once or with the best of n.",
        ".use.settings:Generate",
        ".use.generate:generate",
    ),
    Verb(
        "eval",
        "Measure win rate, score, KL and length of a model, with 95% intervals.",
        ".use.settings:Evaluate",
        ".use.evaluate:evaluate",
        lines=".use.evaluate:as_lines",
    ),
    Verb(
        "lab",
        "Run every method against the exactly known optimum, and write the page.",
        ".lab.settings:Lab",
        ".lab.command:lab",
        lines=".lab.command:as_lines",
    ),
    Verb(
        "report",
        "Write the page of a run again.",
        ".report.command:Report",
        ".report.command:report",
    ),
]

CHECK = Verb(
    "check",
    "Check a run before it starts: can it learn, and how long will it take?",
    ".check.settings:Check",
    ".check.command:check",
)
"""It takes another verb and its flags, so the command line treats it apart."""

DEMO = Verb(
    "demo",
    "Run the whole pipeline on an embedded world, in minutes on a CPU.",
    ".demo.settings:Demo",
    ".demo.pipeline:demo",
)


def verbs() -> dict[str, Verb]:
    """Every verb by its name, in the order of `fiducial --help`."""
    return {verb.name: verb for verb in (DEMO, *METHODS, CHECK, *OTHERS)}


def method(name: str) -> Method | None:
    """The row of a method, or of the verb behind a variant; None for a name that is neither."""
    verb = next((v.verb for v in VARIANTS if v.name == name), name)
    return next((m for m in METHODS if m.name == verb), None)


def title(name: str) -> str:
    """What pages call a method or variant; the name itself where the table does not know it."""
    rows: list[Variant | Method] = [*VARIANTS, *METHODS]
    return next((row.title for row in rows if row.name == name), name)


def colour(name: str) -> Colour:
    """The colour of a method or variant on every page; green where the table does not know it."""
    rows: list[Variant | Method] = [*VARIANTS, *METHODS]
    return next((row.colour for row in rows if row.name == name), "green")


def resolve(where: str) -> Any:
    """The object that `module:name` names. Importing it may import torch."""
    module, _, name = where.partition(":")
    root = __package__ if module.startswith(".") else None
    return getattr(importlib.import_module(module, root), name)
