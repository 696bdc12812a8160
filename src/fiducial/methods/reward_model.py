"""Reward models from comparisons: Bradley-Terry with all pairs of a prompt as one element. Ouyang
et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1.

Pairs that share responses are not independent: shuffled apart they are over-fitted within one epoch
(section 3.5 of the paper). So rows of the same prompt are put together: each of its K responses is
scored once, stands in all its pairs, and the prompt counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from .. import losses
from ..core import intervals
from ..data.batches import Batches, pad
from ..data.prepare import load, split, text_of
from ..data.render import Rendered, Renderer
from ..data.rows import CompletionRow, PreferenceRow
from ..errors import InputError
from ..models.load import load_renderer, load_scorer, pick_pad_token, plain, save
from ..models.roles import Scorer
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import accumulate
from ..train.progress import say
from ..train.step import Stepper


class RewardModel(Settings):
    """Reward model: learn from comparisons which of two responses people prefer."""

    model: str
    """The model to start from, usually the SFT model: a folder or a Hub name. A folder with a
    scalar head keeps it.
    """
    data: str
    """Rows with prompt, chosen, rejected (and margin): a file or a Hub name. Rows of one prompt
    train as one element.
    """
    out: str | None = None
    """The run folder. Default: runs/reward-1, -2, ..."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the prompts. 1: InstructGPT."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps, instead of epochs."""
    batch_size: int = Field(64, gt=0)
    """Prompts for one optimizer step, over all processes. 64: InstructGPT."""
    learning_rate: float = Field(9e-6, gt=0)
    """Peak. 9e-6: InstructGPT, 6B. Ten to a hundred times that for LoRA and small models."""
    centering: float = Field(0.0, ge=0)
    """Weight of the pull of the scores to mean 0. 0.01: Eisenstein et al. 2023 (arXiv 2312.09244)."""
    reference_data: str | None = None
    """Rows with prompt and completion whose mean score is the zero of the scale (N+). Default: the
    responses of the training pairs.
    """
    seed: int = 0
    """Of the new head and of the order of prompts."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings(schedule="cosine")
    run: RunSettings = RunSettings()


@dataclass(frozen=True)
class Ranking:
    """The responses of one prompt, each once, and its pairs (winner, loser) as numbers into them."""

    responses: list[Rendered]
    pairs: list[tuple[int, int]]
    margins: list[float]

    @property
    def lengths(self) -> list[int]:
        return [len(r) for r in self.responses]


def reward(settings: RewardModel) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "reward",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        renderer = load_renderer(settings.model, settings.rows)
        train, held_out = read(settings, renderer, run)
        scorer = load_scorer(
            settings.model,
            settings.lora,
            settings.run,
            head="normal",
            tokenizer=renderer.tokenizer,
            seed=settings.seed,
        )
        if (token := pick_pad_token(renderer.tokenizer, scorer.model)) and run.main:
            say(
                "reward: the tokenizer has no pad token of its own, so the saved model uses "
                f"{token}"
            )

        batches = Batches(len(train), settings.batch_size, settings.seed)
        total = settings.steps or max(1, round(settings.epochs * batches.per_epoch))
        stepper = Stepper(scorer, settings.learning_rate, settings.optimizer, total, run.processes)
        run.start(total)

        while run.running():
            prompts = [train[i] for i in batches[run.step]]
            for micro in accumulate(
                run.processes.plan([p.lengths for p in prompts], settings.run.tokens),
                run.processes,
                stepper.module,
            ):
                rankings = [prompts[i] for i in micro.rows]
                scores = score(
                    stepper.module,
                    [r for ranking in rankings for r in ranking.responses],
                    run.processes.device,
                )
                loss, metrics = losses.ranking_sum(
                    scores, *pair_tensors(rankings, scores), centering=settings.centering
                )
                stepper.backward(loss * micro.weight / len(prompts))
                if micro.weight:
                    run.meter.add(metrics, len(rankings))
            norms = stepper.step(run.step)
            tokens = sum(sum(p.lengths) for p in prompts)
            run.end_step(
                norms,
                rows=sum(len(p.pairs) for p in prompts),
                tokens=tokens,
                show=("loss", "accuracy"),
            )
            if held_out and run.due(settings.run.eval_every):
                run.record(evaluate(scorer, held_out, train, settings, run))
            run.checkpoint_if_due()

        config = plain(scorer.model).config
        vars(config).pop("process_reward", None)  # of the model it may have started from
        config.reward_mean, config.reward_std = reference_scores(
            scorer, train, settings, renderer, run
        )
        run.model = scorer
        return run.finish(
            save=lambda path: save(
                scorer, renderer.tokenizer, path, torch.tensor([train[0].responses[0].ids])
            )
        )


def read(
    settings: RewardModel, renderer: Renderer, run: Run
) -> tuple[list[Ranking], list[Ranking]]:
    """Rankings for training and evaluation, with no prompt in both."""

    def render(row: PreferenceRow) -> tuple[Rendered, Rendered]:
        return renderer.completion(row.prompt, row.chosen, row.where), renderer.completion(
            row.prompt, row.rejected, row.where
        )

    def rankings(source: str, skipped: Path | None) -> tuple[list[str], list[Ranking]]:
        pairs, rows, note = load(source, settings.rows, (PreferenceRow,), render, skipped=skipped)
        if note and run.main:
            say(note)
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(text_of(row.prompt), []).append(i)
        return list(groups), [
            _rank([pairs[i] for i in g], [rows[i].margin for i in g], rows[g[0]].where)
            for g in groups.values()
        ]

    keys, train = rankings(settings.data, Path(run.path) / "skipped.jsonl")
    if settings.rows.eval_data:
        held = rankings(settings.rows.eval_data, None)[1]
    else:
        here, there = split(keys, settings.rows.held_out, settings.seed)
        train, held = [train[i] for i in here], [train[i] for i in there]
    if run.main:
        count = sum(len(r.pairs) for r in train)
        cut = sum(x.truncated for r in train for x in r.responses)
        note = f"; {cut:,} responses cut at {renderer.max_length} tokens" if cut else ""
        say(
            f"reward: {count:,} pairs of {len(train):,} prompts to train on, "
            f"{sum(len(r.pairs) for r in held):,} pairs of {len(held):,} held out{note}"
        )
    return train, held


def _rank(
    pairs: list[tuple[Rendered, Rendered]], margins: list[float | None], where: str
) -> Ranking:
    numbers: dict[tuple[int, ...], int] = {}
    responses: list[Rendered] = []
    indices = []
    for pair in pairs:
        for r in pair:
            if tuple(r.ids) not in numbers:
                numbers[tuple(r.ids)] = len(responses)
                responses.append(r)
        indices.append((numbers[tuple(pair[0].ids)], numbers[tuple(pair[1].ids)]))
    if all(w == l for w, l in indices):  # noqa: E741
        raise InputError(
            f"{where}: chosen and rejected are the same tokens after truncation: raise "
            "--rows.max-length, or leave the row out"
        )
    return Ranking(responses, indices, [m or 0.0 for m in margins])


def pair_tensors(rankings: list[Ranking], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs [P, 2], prompt of each pair [P] and margins [P] of rankings whose responses stand one
    after the other.
    """
    pairs, prompt, margins, offset = [], [], [], 0
    for number, ranking in enumerate(rankings):
        pairs += [(w + offset, l + offset) for w, l in ranking.pairs]  # noqa: E741
        prompt += [number] * len(ranking.pairs)
        margins += ranking.margins
        offset += len(ranking.responses)
    return (
        torch.tensor(pairs, device=like.device),
        torch.tensor(prompt, device=like.device),
        torch.tensor(margins, device=like.device, dtype=like.dtype),
    )


def score(scorer: Scorer, responses: list[Rendered], device: torch.device) -> Tensor:
    """[R] scores at the last token of each response."""
    batch = pad(responses).to(device)
    scores: Tensor = scorer(batch.ids, batch.lengths)
    return scores


def all_scores(
    scorer: Scorer, responses: list[Rendered], settings: RewardModel, run: Run
) -> Tensor:
    """[R] scores without gradient, in micro-batches, on all processes."""
    (scores,) = run.processes.map_rows(
        [[len(r)] for r in responses],
        settings.run.tokens,
        None,
        lambda rows: (score(scorer, [responses[i] for i in rows], run.processes.device),),
    )
    return scores


def evaluate(
    scorer: Scorer, held_out: list[Ranking], train: list[Ranking], settings: RewardModel, run: Run
) -> dict[str, float]:
    """Held-out loss and accuracy; its interval and that of a judge who only looks at the length go
    to the summary.

    A tie counts one half. The pairs of one prompt are not independent, and the intervals know it.
    """
    scores = all_scores(
        scorer, [r for ranking in held_out for r in ranking.responses], settings, run
    )
    pairs, prompt, margins = pair_tensors(held_out, scores)
    loss, metrics = losses.ranking(scores, pairs, prompt, margins, settings.centering)
    gaps = (scores[pairs[:, 0]] - scores[pairs[:, 1]]).tolist()
    run.evaluation["accuracy on held-out pairs"] = intervals.mean(
        [_half(g) for g in gaps], prompt.tolist()
    )

    longer = _mean([_half(gap) for ranking in train for gap in _length_gaps(ranking)])
    sign = (
        1 if longer >= 0.5 else -1
    )  # the better of "longer wins" and "shorter wins", as the training pairs say
    lengths = [_half(sign * gap) for ranking in held_out for gap in _length_gaps(ranking)]
    run.evaluation[f"length alone: the {'longer' if sign > 0 else 'shorter'} wins"] = (
        intervals.mean(lengths, prompt.tolist())
    )
    return {
        "eval/accuracy": _mean([_half(g) for g in gaps]),
        "eval/loss": float(loss),
        "eval/margin": float(metrics["margin"]),
    }


def reference_scores(
    scorer: Scorer, train: list[Ranking], settings: RewardModel, renderer: Renderer, run: Run
) -> tuple[float, float]:
    """Mean and standard deviation of the scores of the reference completions."""
    if settings.reference_data:
        rendered, _, _ = load(
            settings.reference_data,
            settings.rows,
            (CompletionRow,),
            lambda r: renderer.completion(r.prompt, r.completion, r.where),
        )
    else:
        rendered = [r for ranking in train for r in ranking.responses][:512]
    scores = all_scores(scorer, rendered, settings, run)
    return float(scores.mean()), float(scores.std()) if len(scores) > 1 else 1.0


def _length_gaps(ranking: Ranking) -> list[int]:
    return [
        ranking.responses[w].num_labels - ranking.responses[l].num_labels for w, l in ranking.pairs
    ]  # noqa: E741


def _half(gap: float) -> float:
    return 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
