"""Will a run fit into memory? What it computes at a time follows from its settings and its rows,
and what that needs is rehearsed before any model is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..core.logprobs import CHUNK_BYTES
from ..data.batches import Batches, micro_batches
from ..data.elements import RowFormat
from ..errors import InputError
from ..models.load import SHARED, load_config
from ..models.memory import Models, Plan, Sampling, Shape, Work, in_words
from ..models.rehearsal import Rehearsal
from ..models.scores import CriticStart
from ..models.trunk import text_config
from ..rewards.load import Rewards
from ..rollout.sampling import SIDE_BY_SIDE
from ..settings import LoraSettings, OnlineSettings, RunSettings
from ..train import machine
from ..train.processes import Processes
from ..train.progress import say

T = TypeVar("T")

GRAIN = 256
"""Budgets that `auto` tries are multiples of this many tokens."""
SCANNED = 2_000
"""Rows whose micro-batches are looked at for the largest."""
USUAL_RANK = 8
"""The rank of the adapters that are proposed."""

Costs = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Needs:
    """What the memory of a run depends on.

    costs: of each optimizer step that is looked at, the lengths of the sequences of its elements;
    where the model can share prefixes, of the rows that hold them together. labels: the tokens of a
    row that are labels; None: all. process: bytes that the process held before models were loaded.
    once: whether there is one optimizer step. pairs: whether prefixes are shared where they can be.
    """

    run: RunSettings
    lora: LoraSettings
    models: Models
    processes: Processes
    costs: Callable[[bool], Sequence[Costs]]
    probe: int
    process: int
    labels: int | None = None
    sampling: Sampling | None = None
    once: bool = False
    pairs: bool = False
    _plans: dict[int, Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def limit(self) -> int:
        """Bytes that this process may use: --run.memory-gb, or what it has and what is free."""
        if self.run.memory_gb is not None:
            return int(self.run.memory_gb * 1e9)
        return machine.available_memory(self.processes.device)

    def plan(self, tokens: int | None = None) -> Plan:
        """The memory that the run needs. Each budget is rehearsed once.

        Args:
            tokens: the budget; None: the one of the settings.

        Raises:
            InputError: the kind of model cannot be rehearsed.
        """
        tokens = tokens or self.budget
        return self._plans.get(tokens) or self._planner()(tokens)

    @property
    def budget(self) -> int:
        """Tokens per micro-batch, which `auto` has found or will find."""
        if self.run.tokens != "auto":
            return self.run.tokens
        if self.processes.budget is None:
            self.processes.budget = self._found(self.limit)
        return self.processes.budget

    def settled(self) -> Needs:
        """At the start of a run, before models are loaded: finds the budget of --run.tokens auto,
        and warns if the run will not fit.

        Raises:
            InputError: no budget fits, or the kind of model cannot be rehearsed for `auto`.
        """
        auto, enough = self.run.tokens == "auto" and self.processes.budget is None, self.generous()
        if auto or enough is None or enough >= self.limit / 2:
            machine.return_freed_memory()
            budget = self.budget  # all processes look for it together
            if self.processes.main:
                self._tell(budget, auto)
        return self

    def _tell(self, budget: int, auto: bool) -> None:
        try:
            plan = self.plan(budget)
        except InputError as error:  # nothing depends on the plan
            say(str(error))
            return
        if auto:
            say(
                f"--run.tokens auto: {budget:,} padded tokens per micro-batch, which need "
                f"{in_words(plan.peak)} of {in_words(self.limit)} at the peak"
            )
        elif not plan.fits(self.limit):
            say(self.advice(plan))

    def advice(self, plan: Plan) -> str:
        """What a plan needs, what there is, and what would change it."""
        return (
            f"memory: this run needs {in_words(plan.peak)} at its peak, in {plan.busiest}, and "
            f"{in_words(self.limit)} are there; {self.instead(plan)}"
        )

    def instead(self, plan: Plan) -> str:
        """The settings that need less memory than a plan, with what they need."""
        smaller = "take a smaller model"
        found = [f"{name} {in_words(peak)}" for name, peak in self.alternatives if peak < plan.peak]
        return f"instead: {', '.join(found)}; or {smaller}" if found else smaller

    @functools.cached_property
    def alternatives(self) -> list[tuple[str, int]]:
        """Settings that would need less memory, with the peak of each in bytes."""
        smaller, budget = replace(self, run=_with(self.run, tokens=self.budget)), self.budget
        out = []
        for tokens in (budget // 2 // GRAIN * GRAIN, GRAIN):
            if 0 < tokens < budget:
                out.append((f"--run.tokens {tokens}", smaller.plan(tokens).peak))
        changes: list[tuple[str, dict[str, Any]]] = []
        if not self.run.gradient_checkpointing:
            run = _with(smaller.run, gradient_checkpointing=True)
            changes.append(("--run.gradient-checkpointing", {"run": run}))
        if self.lora.r == 0 and self.models.critic != SHARED:
            lora = LoraSettings(r=USUAL_RANK)
            changes.append((f"--lora.r {USUAL_RANK}", {"lora": lora}))
        if self.run.precision == "float32":
            run = _with(smaller.run, precision="bfloat16")
            changes.append(("--run.precision bfloat16", {"run": run}))
        if self.models.critic not in (None, SHARED) and self.lora.r == 0:
            models = replace(self.models, critic=SHARED)
            changes.append(("--critic.start shared", {"models": models}))
        return [*out, *((name, replace(smaller, **change).plan().peak) for name, change in changes)]

    # -- the search

    def _found(self, limit: int) -> int:
        """The largest budget that fits on every process."""
        plan = self._planner()
        most = -(-self._largest_step() // GRAIN)
        low, high = 0, most + 1  # in grains: `low` fits, `high` does not
        if plan(most * GRAIN).fits(limit):
            low = most
        while high - low > 1 and low < most:
            middle = (low + high) // 2
            low, high = (middle, high) if plan(middle * GRAIN).fits(limit) else (low, middle)
        least = min(self.processes.gather([low]))  # none waits for one that was refused
        if least == 0:
            raise InputError(self._nothing_fits(plan(GRAIN)))
        return least * GRAIN

    def _nothing_fits(self, plan: Plan) -> str:
        fixed = replace(self, run=_with(self.run, tokens=GRAIN))
        return f"--run.tokens auto: no budget fits: {fixed.advice(plan)}"

    def _largest_step(self) -> int:
        """Padded tokens of the largest optimizer step: a larger budget changes nothing."""
        return max(
            sum(map(len, costs)) * max(max(lengths) for lengths in costs)
            for costs in self.costs(False)
        )

    def _planner(self) -> Callable[[int], Plan]:
        rehearsal = Rehearsal(self.models, self.lora, self.run, self.processes.device)

        def plan(tokens: int) -> Plan:
            if tokens not in self._plans:
                self._plans[tokens] = rehearsal.plan(self._work(tokens, rehearsal), self.process)
            return self._plans[tokens]

        return plan

    def _work(self, tokens: int, rehearsal: Rehearsal) -> Work:
        first, later = None, None
        for costs in self.costs(rehearsal.shares_prefix):
            for mine in micro_batches(costs, tokens, self.processes.count):
                shapes = [self._shape([costs[i] for i in rows]) for rows in mine if rows]
                for shape in shapes[:1]:
                    first = _larger(first, shape)
                for shape in shapes[1:]:
                    later = _larger(later, shape)
        assert first is not None
        return Work(
            tokens,
            first,
            later,
            self.probe,
            self.sampling,
            self.once,
            copies=self.processes.count > 1,
            shared=self.pairs,
        )

    def _shape(self, costs: Costs) -> Shape:
        width = max(max(lengths) for lengths in costs)
        return Shape(sum(map(len, costs)), width, self.labels or width - 1)

    def generous(self) -> int | None:
        """Bytes that are more than the run needs, by the size of the files and an amount per token,
        without a rehearsal; None where the files or the sizes of the model are not known.
        """
        models, files = self.models, 0
        for name in (models.trained, models.critic, models.teacher, *models.rewards):
            if name is not None and name != SHARED:
                found = [p.stat().st_size for p in Path(name).glob("*.safetensors")]
                if not found:
                    return None
                files += sum(found)
        config = text_config(load_config(models.trained, trust=models.trust))
        layers, width = (getattr(config, n, None) for n in ("num_hidden_layers", "hidden_size"))
        if not isinstance(layers, int) or not isinstance(width, int) or self.run.tokens == "auto":
            return None
        longest = max(max(map(max, costs)) for costs in self.costs(False))
        tokens = max(self.run.tokens, longest, 2 * self.probe)
        if (asked := self.sampling) is not None:
            tokens += asked.rows * (asked.width + asked.new) // 8
        critics = 2 if models.critic not in (None, SHARED) else 1
        return (
            self.process
            + 12 * files
            + 8 * CHUNK_BYTES
            + critics * PER_UNIT * tokens * layers * width
        )


PER_UNIT = 200
"""Bytes of activations per token, layer and unit of width: twice what common architectures need."""


def offline(
    settings: Any,
    processes: Processes,
    scored: bool,
    rows: RowFormat[T],
    items: Sequence[T],
    longest: int,
    batches: Batches,
    total: int,
) -> Needs:
    """The needs of a method that learns from rows.

    Args:
        scored: the trained model has a scalar head.
        rows, items: the elements that are trained on, and how long their sequences are.
        longest: tokens of the longest sequence.
        batches, total: the elements of each optimizer step, and the number of steps.
    """

    @functools.cache
    def costs(shared: bool) -> list[Costs]:
        one, found, read = rows.together if shared else None, list[Costs](), 0
        for step in range(min(total, batches.per_epoch)):
            step_items = [items[i] for i in batches[step]]
            found.append(
                [[len(x) for x in rows.ids(y)] if one is None else [one(y)] for y in step_items]
            )
            if (read := read + len(step_items)) >= SCANNED:
                break
        return [*found, [[longest]]]  # wherever it stands

    later = getattr(settings, "reads_reference_at_each_step", None)
    copied = later is not None and later(len(batches.rows(total)))
    asked, new = settings.run.samples, getattr(settings, "max_new_tokens", 0)
    return Needs(
        settings.run,
        settings.lora,
        Models(settings.model, scored=scored, reference=copied, trust=settings.trust_remote_code),
        processes,
        costs,
        longest,
        machine.resident_memory(processes.device),
        sampling=None if scored or not asked else Sampling(asked, asked, longest, new),
        once=total == 1,
        pairs=rows.together is not None,
    )


def online_models(
    settings: OnlineSettings, reference: bool, critic: CriticStart | None, rewards: Rewards | None
) -> Models:
    """The models of a method that learns from its own samples.

    Args:
        critic: where one starts. rewards: those that are loaded; models among them have weights.
    """
    return Models(
        settings.model,
        reference=reference,
        critic=None if critic is None else critic.folder,
        rewards=tuple(p.name for p in rewards.parts if hasattr(p, "scorer")) if rewards else (),
        trust=settings.trust_remote_code,
    )


def online(
    settings: Any,
    processes: Processes,
    models: Models,
    prompts: Sequence[Sequence[int]],
    process: int,
) -> Needs:
    """The needs of a method that learns from its own samples.

    Every response is taken to be as long as it may be.

    Args:
        prompts: token ids. process: bytes that were in use before any model was loaded.
    """
    new, responses = settings.max_new_tokens, settings.batch_size
    group = getattr(settings, "group_size", 1)
    together = -(-responses // getattr(settings, "minibatches", 1))
    longest = sorted(map(len, prompts), reverse=True)
    lengths = [longest[(i // group) % len(longest)] + new for i in range(together)]
    mine = -(-responses // processes.count)
    at_once = min(mine, max(1, SIDE_BY_SIDE // (longest[0] + new)))
    updates = settings.steps * getattr(settings, "epochs", 1) * getattr(settings, "minibatches", 1)
    return Needs(
        settings.run,
        settings.lora,
        models,
        processes,
        lambda shared: [[[n] for n in lengths]],
        longest[0] + new,
        process,
        labels=new,
        sampling=Sampling(at_once, -(-at_once // group), longest[0], new),
        once=updates == 1,
    )


def _larger(one: Shape | None, other: Shape) -> Shape:
    return other if one is None or other.tokens > one.tokens else one


def _with(run: RunSettings, **changes: Any) -> RunSettings:
    return run.model_copy(update=changes)
