"""One model measured: its score and length, how often it beats another, and its KL to a reference.

Each number comes with its 95% interval.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import intervals, kl
from ..core.reductions import select
from ..errors import InputError, RunError
from ..models.load import load_policy
from ..rewards.judge import Judge
from ..rewards.types import Responses
from ..rollout.sampling import sampling_params
from ..settings import LoraSettings, RunSettings
from ..train.checkpoint import write_json
from ..train.processes import Processes
from ..train.progress import say
from .answering import Model
from .best_of import BestOf
from .settings import Evaluate

Estimate = dict[str, float]


def evaluate(settings: Evaluate) -> dict[str, Estimate]:
    """The numbers by name: {"value", "low", "high", "n"} each; KL in nats, lengths in tokens.

    Raises:
        InputError: a row, the judge or a model cannot be used, or settings contradict each other.
    """
    if settings.baseline and not settings.judge:
        raise InputError("--baseline needs --judge, which says which response is better")
    if settings.best_of and settings.reference:
        raise InputError(
            "--reference with --best-of: responses that were chosen no longer follow the model's "
            "probabilities, so no KL can be computed from them"
        )
    processes = Processes()
    best = BestOf.open(
        settings.best_of,
        settings.score,
        settings.aggregate,
        settings.temperature,
        processes,
        settings.worker,
        trust=settings.trust_remote_code,
    )
    judge = None
    if settings.judge:
        judge = Judge.open(
            settings.judge,
            RunSettings(),
            processes,
            settings.worker,
            trust=settings.trust_remote_code,
        )
    model = _open(settings.model, "--model", settings, processes)
    if best is not None:
        best.scorer.check_rows(model.rows)
    if judge is not None:
        judge.check_rows(model.rows)
    numbers, responses = everything(model, settings, settings.seed, best)
    lengths = [float(n) for r in responses for n in r.trajectory.response_lengths]
    finished = [float(f) for r in responses for f in r.trajectory.finished]
    out = {
        "length": intervals.mean(lengths, numbers),
        "finished": intervals.mean(finished, numbers),
    }
    if judge and judge.scorer:
        out["score"] = _mean_score(judge, responses, numbers)
    if best is not None:
        out |= best.means()
        if processes.main:
            say(f"eval: {best.bound()}")
    if settings.reference:
        out |= divergence(model, settings.reference, responses, numbers, settings)
    if settings.baseline and judge:
        other = _open(settings.baseline, "--baseline", settings, processes)
        # other random streams, because equal models must not give equal responses
        _, theirs = everything(other, settings, settings.seed + 1)
        pairs = zip(responses, theirs, strict=True)
        compared = [w for mine, their in pairs for w in compare(judge, mine, their)]
        wins, of = _judged(compared, numbers, judge.name)
        if settings.samples == 1:
            out["win_rate"] = intervals.wilson(sum(wins), len(wins))
        else:
            out["win_rate"] = intervals.mean(wins, of)
        if judge.scorer:
            out["baseline_score"] = _mean_score(judge, theirs, numbers)
    if settings.out and processes.main:
        path = Path(settings.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, out)
    return out


def everything(
    model: Model, settings: Evaluate, seed: int, best: BestOf | None = None
) -> tuple[list[int], list[Responses]]:
    """All responses of a model, or the best of each n, and the prompt's number of each."""
    params = sampling_params(
        model.renderer, settings.max_new_tokens, settings.temperature, settings.stop
    )
    samples, title = settings.samples * (best.n if best else 1), Path(model.name).name or model.name
    blocks = [
        best.keep(*block) if best else block
        for block in model.answer(samples, params, seed=seed, title=title)
    ]
    return [i for numbers, _ in blocks for i in numbers], [r for _, r in blocks]


def compare(judge: Judge, mine: Responses, theirs: Responses) -> list[float | None]:
    """1 where the model's response wins, one half at a tie, 0 where it loses; None where the judge
    does not judge one of the two.
    """
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
        preferred = judge.prefers_first(mine.prompts, first, second, mine.where)
        return [None if w is None else float(w != s) for w, s in zip(preferred, swap, strict=True)]
    a, b = judge.scores(mine), judge.scores(theirs)
    assert a is not None and b is not None
    return [_win(x, y) for x, y in zip(a, b, strict=True)]


def _win(mine: float | None, theirs: float | None) -> float | None:
    if mine is None or theirs is None:
        return None
    return 1.0 if mine > theirs else 0.5 if mine == theirs else 0.0


def divergence(
    model: Model,
    reference: str,
    responses: list[Responses],
    numbers: list[int],
    settings: Evaluate,
) -> dict[str, Estimate]:
    """KL(model, reference) in nats per response and per token, from the model's own responses.

    The estimator is k1.
    """
    tokenizer, processes = model.renderer.tokenizer, model.processes
    other = load_policy(
        reference,
        LoraSettings(),
        RunSettings(),
        tokenizer,
        flag="--reference",
        trust=settings.trust_remote_code,
    ).to(processes.device)
    per_response: list[float] = []
    tokens = 0
    for block in responses:
        t = block.trajectory

        def compute(rows: list[int], t: Any = t) -> tuple[Tensor, ...]:
            ids, mask = t.slice_rows(rows, processes.device)
            mine, theirs = (
                p(ids, mask, settings.temperature).logprobs for p in (model.policy, other)
            )
            return (select(kl.estimate(mine, theirs), mask).sum(1),)

        costs = [[int(n)] for n in t.lengths]
        (sums,) = processes.map_rows(costs, RunSettings().tokens, None, compute)
        per_response += sums.tolist()
        tokens += int(t.mask.sum())
    total = intervals.mean(per_response, numbers)
    per_token = {k: v * len(per_response) / tokens for k, v in total.items()}
    return {"kl": total, "kl_per_token": per_token | {"n": tokens}}


def as_lines(numbers: dict[str, Estimate]) -> list[str]:
    """For the terminal: one line per number, with its interval."""
    names = {
        "win_rate": "win rate over the baseline",
        "score": "score",
        "baseline_score": "score of the baseline",
        "drawn_score": "score of all samples, by --score",
        "kept_score": "score of the best of n, by --score",
        "kl": "KL to the reference, nats per response",
        "kl_per_token": "KL to the reference, nats per token",
        "length": "tokens per response",
        "finished": "share that ended with a stop token",
    }
    rows = [(names[k], v) for k, v in numbers.items()]
    return [
        f"{n:<38} {v['value']:>9.4g}   [{v['low']:.4g}, {v['high']:.4g}]   n {v['n']:,}"
        for n, v in rows
    ]


def _open(name: str, flag: str, settings: Evaluate, processes: Processes) -> Model:
    return Model.open(
        name,
        settings.prompts,
        settings.rows,
        processes,
        max_new_tokens=settings.max_new_tokens,
        flag=flag,
        trust=settings.trust_remote_code,
    )


def _mean_score(judge: Judge, responses: list[Responses], numbers: list[int]) -> Estimate:
    """The mean score of the responses that the judge judges; `n` is their number."""
    every = [s for block in responses for s in judge.scores(block) or []]
    return intervals.mean(*_judged(every, numbers, judge.name))


def _judged(
    values: list[float | None], numbers: list[int], judge: str
) -> tuple[list[float], list[int]]:
    """The values that there are, and the prompt's number of each."""
    there = [(v, n) for v, n in zip(values, numbers, strict=True) if v is not None]
    if not there:
        raise RunError(
            f"the judge {judge} judges none of the responses (it returned None for each): give a "
            "judge that applies to these prompts"
        )
    return [v for v, _ in there], [n for _, n in there]
