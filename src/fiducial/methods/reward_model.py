"""Reward models from comparisons: Bradley-Terry, with all pairs of a prompt as one element.

Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1. Pairs that share responses are not
independent: shuffled apart they are overfitted within one epoch (section 3.5). Rows of the same
prompt are therefore put together: each of its K responses is scored once and stands in all its
pairs, and the prompt counts once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import losses
from ..core import intervals
from ..data.batches import pad
from ..data.elements import RowFormat
from ..data.pairs import Pair, preference_rows
from ..data.prepare import load, prompt_text
from ..data.render import Rendered, Renderer
from ..data.row_types import CompletionRow, PreferenceRow
from ..models.roles import ScoreModel
from ..models.save import pick_pad_token, save
from ..models.scores import ScoreFacts
from ..run import Run
from ..train.processes import Processes, accumulate
from ..train.progress import say
from .settings.reward_model import RewardModel
from .setup import Prepared, prepare_offline

SAMPLE = 512
"""Number of responses that set the zero of the scores, where there is no reference data, and their
range.
"""
RANGE = (0.01, 0.99)
"""The quantiles of the scores that are the ends of their range."""


@dataclass(frozen=True)
class Ranking:
    """The responses of one prompt, each once, and its pairs (winner, loser) as indices into them.

    margins: by how much the winner should win, one per pair.
    """

    responses: list[Rendered]
    pairs: list[tuple[int, int]]
    margins: list[float]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each response with its prompt."""
        return [len(r) for r in self.responses]


def reward(settings: RewardModel) -> Run[None]:
    """Train; returns the run: its path, metrics and model."""
    with Run("reward", settings, state=None) as run:
        ready = prepare(settings, run.processes, run.path / "skipped.jsonl")
        train, held_out, scorer = ready.train.items, ready.held_out.items, ready.roles.scorer
        announce(ready, run)
        stepper = run.stepper(scorer, settings.learning_rate, ready.total)
        run.start(ready.total)

        run.nonfinite.rows = lambda: ready.describe(run.step)
        while run.running():
            prompts = [train[i] for i in ready.batches[run.step]]
            plan = run.processes.plan([p.lengths for p in prompts], settings.run.tokens)
            for micro in accumulate(plan, run.processes, stepper.module):
                rankings = [prompts[i] for i in micro.rows]
                responses = [r for ranking in rankings for r in ranking.responses]
                scores = score(stepper.module, responses, run.processes.device)
                loss, metrics = losses.ranking_sum(
                    scores, *pair_tensors(rankings, scores), centering=settings.centering
                )
                stepper.backward(loss * micro.weight / len(prompts))
                if micro.weight:
                    run.meter.add(metrics, len(rankings))
            norms = stepper.step(run.step)
            run.end_step(
                norms,
                rows=sum(len(p.pairs) for p in prompts),
                tokens=sum(sum(p.lengths) for p in prompts),
                show=("loss", "accuracy"),
            )
            if held_out and run.due(settings.run.eval_every):
                run.record(evaluate(scorer, held_out, train, settings, run))
            run.checkpoint_if_due()

        scorer.facts = score_facts(scorer, train, held_out, settings, ready.renderer, run)
        run.model = scorer
        probe = torch.tensor([train[0].responses[0].ids])
        return run.finish(save=lambda path: save(scorer, ready.renderer.tokenizer, path, probe))


def prepare(
    settings: RewardModel, processes: Processes, skipped: Path | None = None
) -> Prepared[Ranking]:
    """Rankings, the model and the plan.

    Raises:
        InputError: a row or the model cannot be used.
    """

    def ids(ranking: Ranking) -> list[list[int]]:
        return [r.ids for r in ranking.responses]

    rows = RowFormat((PreferenceRow,), preference_rows, prompt_text, ids, rankings)
    return prepare_offline(settings, processes, rows, scorer=True, skipped=skipped)


def rankings(
    pairs: Sequence[Pair], rows: Sequence[PreferenceRow]
) -> tuple[list[str], Iterator[Ranking]]:
    """The prompts, and the ranking of each: all rows of a prompt together."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(prompt_text(row), []).append(i)
    ranked = (_rank([pairs[i] for i in g], [rows[i].margin for i in g]) for g in groups.values())
    return list(groups), ranked


def announce(ready: Prepared[Ranking], run: Run[None]) -> None:
    """Give the saved model a pad token, and say what is trained on."""
    token = pick_pad_token(ready.renderer.tokenizer, ready.roles.scorer.model)
    if not run.main:
        return
    if ready.note:
        say(ready.note)
    train, held = ready.train.items, ready.held_out.items
    cut = sum(x.truncated for r in train for x in r.responses)
    note = f"; {cut:,} responses cut at {ready.renderer.max_length} tokens" if cut else ""
    say(
        f"reward: {sum(len(r.pairs) for r in train):,} pairs of {len(train):,} prompts to train "
        f"on, {sum(len(r.pairs) for r in held):,} pairs of {len(held):,} held out{note}"
    )
    if token:
        say(f"reward: the tokenizer has no pad token of its own, so the saved model uses {token}")


def _rank(pairs: Sequence[Pair], margins: Sequence[float | None]) -> Ranking:
    numbers: dict[tuple[int, ...], int] = {}
    responses: list[Rendered] = []
    indices = []
    for pair in pairs:
        for r in pair:
            if tuple(r.ids) not in numbers:
                numbers[tuple(r.ids)] = len(responses)
                responses.append(r)
        indices.append((numbers[tuple(pair[0].ids)], numbers[tuple(pair[1].ids)]))
    return Ranking(responses, indices, [m or 0.0 for m in margins])


def pair_tensors(rankings: Sequence[Ranking], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def score(scorer: ScoreModel, responses: list[Rendered], device: torch.device) -> Tensor:
    """[R] scores at the last token of each response."""
    batch = pad(responses).to(device)
    scores: Tensor = scorer(batch.ids, batch.lengths)
    return scores


def all_scores(
    scorer: ScoreModel, responses: list[Rendered], settings: RewardModel, run: Run[None]
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
    scorer: ScoreModel,
    held_out: Sequence[Ranking],
    train: Sequence[Ranking],
    settings: RewardModel,
    run: Run[None],
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


def score_facts(
    scorer: ScoreModel,
    train: Sequence[Ranking],
    held_out: Sequence[Ranking],
    settings: RewardModel,
    renderer: Renderer,
    run: Run[None],
) -> ScoreFacts:
    """Mean and standard deviation of the scores of the reference completions, and the range of the
    scores of held-out responses.

    Without reference data, and without held-out pairs, a random sample of the training responses
    takes their place.
    """
    if settings.reference_data:
        rendered, _, _ = load(
            settings.reference_data,
            settings.rows,
            (CompletionRow,),
            lambda r: renderer.completion(r.prompt, r.completion, r.where, r.sampled),
        )
    else:
        rendered = _sample(train, settings.seed)
    scores = all_scores(scorer, rendered, settings, run)
    judged = all_scores(scorer, _sample(held_out or train, settings.seed), settings, run)
    low, high = (float(judged.double().quantile(q)) for q in RANGE)
    std = float(scores.std()) if len(scores) > 1 else 1.0
    return ScoreFacts(float(scores.mean()), std, low=low, high=high)


def _sample(rankings: Sequence[Ranking], seed: int) -> list[Rendered]:
    """Some of the responses, in their order."""
    count = sum(len(ranking.responses) for ranking in rankings)
    # files are often sorted, so their first rows are not like the others
    drawn = set(random.Random(seed).sample(range(count), min(SAMPLE, count)))
    every = (r for ranking in rankings for r in ranking.responses)
    return [r for i, r in enumerate(every) if i in drawn]


def _length_gaps(ranking: Ranking) -> list[int]:
    return [
        ranking.responses[w].num_labels - ranking.responses[l].num_labels
        for w, l in ranking.pairs  # noqa: E741
    ]


def _half(gap: float) -> float:
    return 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
