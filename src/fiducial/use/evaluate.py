"""One model measured: its score and length, how often it beats another, how far it has moved from a
reference. Each with its interval.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from ..core import intervals, kl
from ..core.reductions import select
from ..errors import InputError
from ..models.load import load_policy
from ..rewards import Responses
from ..rewards.process import Aggregate
from ..settings import LoraSettings, RowSettings, RunSettings, Settings
from ..train.checkpoint import write_json
from ..train.processes import Processes
from ..train.progress import say
from .answering import Judge, Model
from .best_of import BestOf


class Evaluate(Settings):
    """Evaluate a model: win rate over a baseline by a judge, mean score, KL to a reference, length;
    with 95% intervals.
    """

    model: str
    """The model to measure: a folder or a Hub name."""
    prompts: str
    """Rows with a prompt, best held out from training: a file or a Hub name."""
    judge: str | None = None
    """A reward model's folder, file.py:function with TRL's reward signature, one that compares (see
    `fiducial collect --help`), or exact_match,
    numeric_answer, format, length: of these the score is the share of right answers."""
    baseline: str | None = None
    """The model to beat, by the judge."""
    reference: str | None = None
    """The model that the KL is measured to."""
    out: str | None = None
    """A .json file for the numbers."""
    samples: int = Field(1, gt=0)
    """Responses a prompt."""
    best_of: int | None = Field(None, gt=0)
    """The model (not the baseline) draws so many for each of them and is measured by the best by
    --score: best-of-n against a trained model.
    """
    score: str | None = None
    """What chooses the best of n, as --reward; what measures is --judge. Where both are the same,
    the measure flatters.
    """
    aggregate: Aggregate | None = None
    """Of a process reward model as --score: how the scores of the steps become one. Default: as its
    folder says.
    """
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of a response, at most."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response beside EOS."""
    seed: int = 0
    """Of the samples."""
    rows: RowSettings = RowSettings()


def evaluate(settings: Evaluate) -> dict[str, Any]:
    """The numbers by name: {"value", "low", "high", "n"} each; KL in nats, lengths in tokens."""
    if settings.baseline and not settings.judge:
        raise InputError("--baseline needs --judge: somebody must say which response is better")
    if settings.best_of and settings.reference:
        raise InputError(
            "--reference with --best-of: responses that were chosen no longer follow the model's "
            "probabilities, so no KL can be read from them"
        )
    processes = Processes()
    best = BestOf.open(
        settings.best_of, settings.score, settings.aggregate, settings.temperature, processes
    )
    judge = Judge(settings.judge, RunSettings(), processes) if settings.judge else None
    model = Model.open(
        settings.model, settings.prompts, settings.rows, processes, reserve=settings.max_new_tokens
    )
    for reads in (best, judge):
        if reads is not None:
            reads.check_rows(model.rows)
    numbers, responses = everything(model, settings, settings.seed, best)
    out: dict[str, Any] = {
        "length": intervals.mean(
            [float(n) for r in responses for n in r.trajectory.response_lengths], numbers
        ),
        "finished": intervals.mean(
            [float(f) for r in responses for f in r.trajectory.finished], numbers
        ),
    }
    scores = [judge.scores(r) for r in responses] if judge else []
    if judge and judge.scorer:
        out["score"] = intervals.mean([s for block in scores for s in block or []], numbers)
    if best is not None:
        out |= best.means()
        if processes.main:
            say(f"eval: {best.bound()}")
    if settings.reference:
        out |= divergence(model, settings.reference, responses, numbers, settings)
    if settings.baseline and judge:
        other = Model.open(
            settings.baseline,
            settings.prompts,
            settings.rows,
            processes,
            reserve=settings.max_new_tokens,
        )
        _, theirs = everything(
            other, settings, settings.seed + 1
        )  # another stream: equal models must not give equal responses
        wins = [
            w
            for mine, their in zip(responses, theirs, strict=True)
            for w in compare(judge, mine, their)
        ]
        out["win_rate"] = (
            intervals.wilson(sum(wins), len(wins))
            if settings.samples == 1
            else intervals.mean(wins, numbers)
        )
        if judge.scorer:
            out["baseline_score"] = intervals.mean(
                [s for r in theirs for s in judge.scores(r) or []], numbers
            )
    if settings.out and processes.main:
        path = Path(settings.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, out)
    return out


def everything(
    model: Model, settings: Evaluate, seed: int, best: BestOf | None = None
) -> tuple[list[int], list[Responses]]:
    """All responses of a model, or the best of each n, and the prompt's number of each."""
    blocks = [
        best.keep(*block) if best else block
        for block in model.answer(
            settings.samples * (best.n if best else 1),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=settings.stop,
            seed=seed,
            title=Path(model.name).name or model.name,
        )
    ]
    return [i for numbers, _ in blocks for i in numbers], [r for _, r in blocks]


def compare(judge: Judge, mine: Responses, theirs: Responses) -> list[float]:
    """1 where the model's response wins, one half at a tie, 0 where it loses."""
    if (
        judge.compare is not None
    ):  # who stands first is drawn by position, so that a judge who likes the first gains nobody
        swap = [i % 2 == 1 for i in range(len(mine.completions))]
        first = [
            t if s else m
            for m, t, s in zip(mine.completions, theirs.completions, swap, strict=True)
        ]
        second = [
            m if s else t
            for m, t, s in zip(mine.completions, theirs.completions, swap, strict=True)
        ]
        return [
            float(w != s)
            for w, s in zip(judge.prefers_first(mine.prompts, first, second), swap, strict=True)
        ]
    a, b = judge.scores(mine), judge.scores(theirs)
    assert a is not None and b is not None
    return [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)]


def divergence(
    model: Model, reference: str, responses: list[Responses], numbers: list[int], settings: Evaluate
) -> dict[str, Any]:
    """KL(model, reference) in nats a response and a token, from the model's own responses (k1)."""
    other = load_policy(reference, LoraSettings(), RunSettings(), model.renderer.tokenizer).to(
        model.processes.device
    )
    per_response: list[float] = []
    tokens = 0
    for block in responses:
        t = block.trajectory

        def compute(rows: list[int], t: Any = t) -> tuple[Tensor, ...]:
            width = int(t.lengths[rows].max())
            ids, mask = (
                t.ids[rows, :width].to(model.processes.device),
                t.mask[rows, :width].to(model.processes.device),
            )
            mine, theirs = (
                p(ids, mask, settings.temperature).logprobs for p in (model.policy, other)
            )
            return (select(kl.estimate(mine, theirs), mask).sum(1),)

        (sums,) = model.processes.map_rows(
            [[int(n)] for n in t.lengths], RunSettings().tokens, None, compute
        )
        per_response += sums.tolist()
        tokens += int(t.mask.sum())
    total = intervals.mean(per_response, numbers)
    return {
        "kl": total,
        "kl_per_token": {
            k: (v * len(per_response) / tokens if k != "n" else tokens) for k, v in total.items()
        },
    }


def as_lines(numbers: dict[str, Any]) -> list[str]:
    """For the terminal: a line a number, with its interval."""
    names = {
        "win_rate": "win rate over the baseline",
        "score": "score",
        "baseline_score": "score of the baseline",
        "drawn_score": "score of all drawn, by --score",
        "kept_score": "score of the best of n, by --score",
        "kl": "KL to the reference, nats a response",
        "kl_per_token": "KL to the reference, nats a token",
        "length": "tokens a response",
        "finished": "share that ended by itself",
    }
    rows = [(names[k], v) for k, v in numbers.items()]
    return [
        f"{n:<38} {v['value']:>9.4g}   [{v['low']:.4g}, {v['high']:.4g}]   n {v['n']:,}"
        for n, v in rows
    ]


__all__ = ["Evaluate", "as_lines", "evaluate"]
