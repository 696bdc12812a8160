"""Process reward models: is the solution right so far?

Lightman et al. 2023 (arXiv 2305.20050); from outcomes alone, Cobbe et al. 2021 (arXiv 2110.14168).
A model with a scalar head is read at the last token of each step, and sigma(score) is the
probability that the step is right. Of a solution with labeled steps, those up to and including the
first wrong one are trained on: nobody knows what "right" means after a mistake. Of a solution with
a known outcome alone, every step is trained on the outcome. What is learned then is the probability
that a solution that begins like this ends right, for the policy that sampled the solutions; a wrong
step that is often recovered from scores high.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..core import intervals
from ..data.batches import pad
from ..data.elements import RowFormat
from ..data.prepare import prompt_text
from ..data.render import Rendered, Renderer
from ..data.row_types import LabeledRow, StepsRow
from ..data.steps import Steps
from ..errors import InputError
from ..models.save import pick_pad_token, save
from ..models.scores import StepScores
from ..rewards.process import AGGREGATES, aggregate
from ..run import Run
from ..train.processes import Processes, accumulate
from ..train.progress import say
from .settings.prm import PRM
from .setup import Prepared, prepare_offline


@dataclass(frozen=True)
class Solution:
    """One solution: tokens, the columns with which its steps end, labels of the first `len(labels)`
    of them, and whether the whole of it is right.
    """

    rendered: Rendered
    ends: list[int]
    labels: list[bool]
    right: bool

    def __len__(self) -> int:
        return len(self.rendered)


def prm(settings: PRM) -> Run[None]:
    """Train; returns the run: its path, metrics and model."""
    with Run("prm", settings, state=None) as run:
        ready = prepare(settings, run.processes, run.path / "skipped.jsonl")
        train, scorer = ready.train.items, ready.roles.scorer
        announce(ready, run)
        scorer.facts = replace(
            scorer.facts, steps=StepScores(settings.separator, settings.aggregate)
        )
        stepper = run.stepper(scorer, settings.learning_rate, ready.total)
        run.start(ready.total)

        run.nonfinite.rows = lambda: ready.describe(run.step)
        while run.running():
            solutions = [train[i] for i in ready.batches[run.step]]
            count = sum(len(s.labels) for s in solutions)
            plan = run.processes.plan([[len(s)] for s in solutions], settings.run.tokens)
            for micro in accumulate(plan, run.processes, stepper.module):
                some = [solutions[i] for i in micro.rows]
                ids, labels, mask = (x.to(run.processes.device) for x in tensors(some))
                loss, metrics = losses.process_reward_sum(
                    stepper.module(ids, after=mask), labels, mask
                )
                stepper.backward(loss * micro.weight / count)
                if micro.weight:
                    run.meter.add(metrics, float(mask.sum()))
            norms = stepper.step(run.step)
            tokens = sum(len(s) for s in solutions)
            run.end_step(norms, rows=len(solutions), tokens=tokens, show=("loss", "steps/accuracy"))
            if len(ready.held_out) and run.due(settings.run.eval_every):
                run.record(evaluate(ready, settings, run))
            run.checkpoint_if_due()

        run.model = scorer
        probe = torch.tensor([train[0].rendered.ids])
        return run.finish(save=lambda path: save(scorer, ready.renderer.tokenizer, path, probe))


def prepare(settings: PRM, processes: Processes, skipped: Path | None = None) -> Prepared[Solution]:
    """Solutions, the model and the plan.

    Raises:
        InputError: a row or the model cannot be used.
    """

    rows = RowFormat[Solution](
        (StepsRow, LabeledRow),
        partial(solver, separator=settings.separator),
        prompt_text,
        lambda s: [s.rendered.ids],
    )
    return prepare_offline(settings, processes, rows, scorer=True, skipped=skipped)


def announce(ready: Prepared[Solution], run: Run[None]) -> None:
    """Give the saved model a pad token, and say what is trained on."""
    token = pick_pad_token(ready.renderer.tokenizer, ready.roles.scorer.model)
    if not run.main:
        return
    if ready.note:
        say(ready.note)
    train = ready.train.items
    cut = sum(s.rendered.truncated for s in train)
    note = f"; {cut:,} solutions cut at {ready.renderer.max_length} tokens" if cut else ""
    say(
        f"prm: {len(train):,} solutions with {sum(len(s.ends) for s in train):,} steps, "
        f"{sum(len(s.labels) for s in train):,} of them labeled, and {len(ready.held_out):,} "
        f"solutions held out{note}"
    )
    if token:
        say(f"prm: the tokenizer has no pad token of its own, so the saved model uses {token}")


def solver(renderer: Renderer, separator: str) -> Callable[[Any], Solution]:
    """Rows to solutions. The steps are joined and tokenized as the one text that they would be if
    they were sampled, and then found in the tokens.

    Raises:
        InputError: the tokens of a row show another number of steps than the row has, or none of
            its steps is whole within max_length.
    """
    steps = Steps(renderer, separator)
    uncut = replace(renderer, max_length=2**40)

    def ends(rendered: Rendered) -> list[int]:
        columns = [t for t, mine in enumerate(rendered.mask) if mine]
        return [columns[k] for k in steps.ends([rendered.ids[t] for t in columns])]

    def render(row: StepsRow | LabeledRow) -> Solution:
        if isinstance(row, LabeledRow):
            rendered = renderer.completion(row.prompt, row.completion, row.where, row.sampled)
            found = ends(rendered)
            return Solution(rendered, found, [row.label] * len(found), row.label)
        text = separator.join(row.completions)
        rendered = renderer.completion(row.prompt, text, row.where, row.sampled)
        if rendered.truncated:
            found = ends(uncut.completion(row.prompt, text, row.where, row.sampled))
        else:
            found = ends(rendered)
        if len(found) != len(row.completions):
            raise InputError(
                f"{row.where}: the row has {len(row.completions)} steps and the tokens of its text "
                f"show {len(found)} that end with {separator!r}: "
                "no step may hold what ends one, nor share a token with the end of another; set "
                "--separator to what parts the steps"
            )
        found = [t for t in found if t < len(rendered)]
        if not found:
            raise InputError(
                f"{row.where}: no step ends within {renderer.max_length} tokens: shorten it, or "
                "leave it out with --rows.on-error skip"
            )
        return Solution(
            rendered, found, up_to_first_wrong(list(row.labels[: len(found)])), all(row.labels)
        )

    return render


def up_to_first_wrong(labels: list[bool]) -> list[bool]:
    """The labels that are taught: those of the steps up to and including the first wrong one."""
    return labels[: labels.index(False) + 1] if False in labels else labels


def tensors(solutions: Sequence[Solution], *, every: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T], labels [B, T] (true: right), and the mask [B, T] of the step ends that have a
    label, or of every step end.
    """
    batch = pad([s.rendered for s in solutions])
    labels, mask = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)
    for i, s in enumerate(solutions):
        mask[i, s.ends if every else s.ends[: len(s.labels)]] = True
        labels[i, s.ends[: len(s.labels)]] = torch.tensor(s.labels)
    return batch.ids, labels, mask


def evaluate(ready: Prepared[Solution], settings: PRM, run: Run[None]) -> dict[str, float]:
    """Held-out loss and accuracy; the accuracies of steps and solutions go to the summary.

    A solution is called right where its score is above one half, for each way to combine the scores
    of its steps. Beside it stands the judge who calls everything what most training labels are. The
    intervals are clustered by prompt.
    """
    scorer, held_out, prompts = ready.roles.scorer, ready.held_out.items, ready.held_out.keys
    train = ready.train.items
    width = max(len(s) for s in held_out)

    def compute(rows: list[int]) -> tuple[Tensor, ...]:
        ids, _, mask = (
            x.to(run.processes.device) for x in tensors([held_out[i] for i in rows], every=True)
        )
        return (scorer(ids, after=mask),)

    (scores,) = run.processes.map_rows(
        [[len(s)] for s in held_out], settings.run.tokens, width, compute
    )
    _, labels, mask = tensors(held_out)
    loss, metrics = losses.process_reward(scores, labels, mask)
    row, column = mask.nonzero(as_tuple=True)
    where = [prompts[i] for i in row.tolist()]
    _note(
        run,
        "steps",
        (scores[row, column] > 0).tolist(),
        labels[row, column].tolist(),
        where,
        [x for s in train for x in s.labels],
    )
    right = [s.right for s in held_out]
    for how in AGGREGATES:
        whole = [
            aggregate(scores[i, s.ends].double().sigmoid().tolist(), how) > 0.5
            for i, s in enumerate(held_out)
        ]
        _note(run, "solutions", whole, right, prompts, [s.right for s in train], how)
    return {f"eval/{name}": float(value) for name, value in (metrics | {"loss": loss}).items()}


def _note(
    run: Run[None],
    what: str,
    said: list[bool],
    labels: list[bool],
    prompts: Sequence[bytes],
    train: list[bool],
    how: str = "",
) -> None:
    name = f"accuracy on held-out {what}" + (f", by {how}" if how else "")
    run.evaluation[name] = intervals.mean(
        [float(s == x) for s, x in zip(said, labels, strict=True)], prompts
    )
    usual = 2 * sum(train) >= len(train)
    run.evaluation[f"calling all {what} {'right' if usual else 'wrong'}"] = intervals.mean(
        [float(x == usual) for x in labels], prompts
    )
