"""Process reward models: is the solution right so far? Lightman et al. 2023 (arXiv 2305.20050);
from outcomes alone, Cobbe et al. 2021 (arXiv 2110.14168).

A model with a scalar head is read at the last token of each step, and sigma(score) is the chance
that the step is right. Of a solution with labelled steps, those up to and including the first wrong
one are taught: what "right" means behind a mistake nobody knows. Of a solution of which only the
outcome is known, every step is taught the outcome: what is learned is the chance that a solution
which begins like this ends right, for whom the solutions were sampled from, and so a wrong step
that is often mended scores high.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from .. import losses
from ..core import intervals
from ..data.batches import Batches, pad
from ..data.prepare import load, split, text_of
from ..data.render import Rendered, Renderer
from ..data.rows import LabelledRow, StepsRow
from ..data.steps import Steps
from ..errors import InputError
from ..models.load import load_renderer, load_scorer, pick_pad_token, plain, save
from ..models.roles import Scorer
from ..rewards.process import AGGREGATES, Aggregate, aggregate
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import accumulate
from ..train.progress import say
from ..train.step import Stepper


class PRM(Settings):
    """Process reward model: learn from the steps of solutions, or from their outcomes alone,
    whether a solution is right so far.
    """

    model: str
    """The model to start from, usually the SFT model: a folder or a Hub name. A folder with a
    scalar head keeps it.
    """
    data: str
    """Rows with prompt, completions and labels (steps; collect --steps writes them), or with
    prompt, completion and label (outcomes): a file or a Hub name.
    """
    out: str | None = None
    """The run folder. Default: runs/prm-1, -2, ..."""
    separator: str = "\n"
    """What ends a step. A new line: Lightman et al. 2023. "": every token is a step, as the
    verifiers of Cobbe et al. 2021 have it.
    """
    aggregate: Aggregate = "last"
    """What the saved model scores a whole solution by: its last step, its least, or the product
    (Lightman et al. 2023). In RL last is the plainest.
    """
    epochs: float = Field(2.0, gt=0)
    """Passes over the solutions. 2: Lightman et al. 2023, and Cobbe et al. 2021 for verifiers."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps, instead of epochs."""
    batch_size: int = Field(64, gt=0)
    """Solutions for one optimizer step, over all processes. Ours."""
    learning_rate: float = Field(9e-6, gt=0)
    """Peak. 9e-6: InstructGPT's reward model. Ten to a hundred times that for LoRA and small models."""
    seed: int = 0
    """Of the new head and of the order of solutions."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings(schedule="cosine")
    run: RunSettings = RunSettings()


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


def prm(settings: PRM) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "prm",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        renderer = load_renderer(settings.model, settings.rows)
        train, held_out, prompts = read(settings, renderer, run)
        scorer = load_scorer(
            settings.model,
            settings.lora,
            settings.run,
            head="normal",
            tokenizer=renderer.tokenizer,
            seed=settings.seed,
        )
        if (token := pick_pad_token(renderer.tokenizer, scorer.model)) and run.main:
            say(f"prm: the tokenizer has no pad token of its own, so the saved model uses {token}")
        plain(scorer.model).config.process_reward = {
            "separator": settings.separator,
            "aggregate": settings.aggregate,
        }

        batches = Batches(len(train), settings.batch_size, settings.seed)
        total = settings.steps or max(1, round(settings.epochs * batches.per_epoch))
        stepper = Stepper(scorer, settings.learning_rate, settings.optimizer, total, run.processes)
        run.start(total)

        while run.running():
            solutions = [train[i] for i in batches[run.step]]
            count = sum(len(s.labels) for s in solutions)
            for micro in accumulate(
                run.processes.plan([[len(s)] for s in solutions], settings.run.tokens),
                run.processes,
                stepper.module,
            ):
                some = [solutions[i] for i in micro.rows]
                ids, labels, mask = (x.to(run.processes.device) for x in tensors(some))
                loss, metrics = losses.process_reward_sum(
                    stepper.module(ids, after=mask), labels, mask
                )
                stepper.backward(loss * micro.weight / count)
                if micro.weight:
                    run.meter.add(metrics, float(mask.sum()))
            norms = stepper.step(run.step)
            run.end_step(
                norms,
                rows=len(solutions),
                tokens=sum(len(s) for s in solutions),
                show=("loss", "steps/accuracy"),
            )
            if held_out and run.due(settings.run.eval_every):
                run.record(evaluate(scorer, held_out, prompts, train, settings, run))
            run.checkpoint_if_due()

        run.model = scorer
        return run.finish(
            save=lambda path: save(
                scorer, renderer.tokenizer, path, torch.tensor([train[0].rendered.ids])
            )
        )


def read(
    settings: PRM, renderer: Renderer, run: Run
) -> tuple[list[Solution], list[Solution], list[str]]:
    """Solutions for training and for evaluation, with no prompt in both, and the prompt of each of
    the latter.
    """
    render = solver(renderer, settings.separator)

    def solutions(source: str, skipped: Path | None) -> tuple[list[str], list[Solution]]:
        found, rows, note = load(
            source, settings.rows, (StepsRow, LabelledRow), render, skipped=skipped
        )
        if note and run.main:
            say(note)
        return [text_of(row.prompt) for row in rows], found

    keys, train = solutions(settings.data, Path(run.path) / "skipped.jsonl")
    if settings.rows.eval_data:
        prompts, held = solutions(settings.rows.eval_data, None)
    else:
        here, there = split(keys, settings.rows.held_out, settings.seed)
        prompts, held, train = (
            [keys[i] for i in there],
            [train[i] for i in there],
            [train[i] for i in here],
        )
    if run.main:
        cut = sum(s.rendered.truncated for s in train)
        steps, labels = (
            sum(len(x) for x in xs) for xs in ([s.ends for s in train], [s.labels for s in train])
        )
        note = f"; {cut:,} solutions cut at {renderer.max_length} tokens" if cut else ""
        say(
            f"prm: {len(train):,} solutions of {steps:,} steps, {labels:,} of them taught, and "
            f"{len(held):,} solutions held out{note}"
        )
    return train, held, prompts


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

    def render(row: StepsRow | LabelledRow) -> Solution:
        if isinstance(row, LabelledRow):
            rendered = renderer.completion(row.prompt, row.completion, row.where)
            found = ends(rendered)
            return Solution(rendered, found, [row.label] * len(found), row.label)
        text = separator.join(row.completions)
        rendered = renderer.completion(row.prompt, text, row.where)
        found = ends(
            rendered if not rendered.truncated else uncut.completion(row.prompt, text, row.where)
        )
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


def tensors(solutions: list[Solution], *, every: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, T], labels [B, T] (true: right), and the mask [B, T] of the step ends that have a
    label, or of every step end.
    """
    batch = pad([s.rendered for s in solutions])
    labels, mask = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)
    for i, s in enumerate(solutions):
        mask[i, s.ends if every else s.ends[: len(s.labels)]] = True
        labels[i, s.ends[: len(s.labels)]] = torch.tensor(s.labels)
    return batch.ids, labels, mask


def evaluate(
    scorer: Scorer,
    held_out: list[Solution],
    prompts: list[str],
    train: list[Solution],
    settings: PRM,
    run: Run,
) -> dict[str, float]:
    """Held-out loss and accuracy; what is right of steps and of solutions goes to the summary, with
    intervals that know what shares a prompt.

    A solution is called right where its score, by each way to make one of its steps' scores, is
    above one half. Beside it stands the judge who calls everything what most of the training labels
    are.
    """
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
    run: Run,
    what: str,
    said: list[bool],
    labels: list[bool],
    prompts: list[str],
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
