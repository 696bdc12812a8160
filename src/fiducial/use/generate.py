"""A model's answers to a file of prompts, sampled once or chosen as the best of n."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..rewards.types import Responses
from ..rollout.sampling import sampling_params
from ..train.folders import new_file
from ..train.processes import Processes
from ..train.progress import say
from .answering import Model
from .best_of import BestOf
from .settings import Generate


def generate(settings: Generate) -> int:
    """Write one line per response: prompt, completion, tokens, finished; to a file also the token
    ids, for training on exactly what was sampled.

    A best of n also has its score and `of`, the n.

    Returns:
        The number of lines.

    Raises:
        InputError: a row, the scorer or the model cannot be used.
    """
    processes = Processes()
    out = new_file(settings.out) if settings.out else None
    best = BestOf.open(
        settings.best_of,
        settings.score,
        settings.aggregate,
        settings.temperature,
        processes,
        settings.worker,
    )
    model = Model.open(
        settings.model,
        settings.prompts,
        settings.rows,
        processes,
        max_new_tokens=settings.max_new_tokens,
    )
    if best is not None:
        best.scorer.check_rows(model.rows)
    params = sampling_params(
        model.renderer, settings.max_new_tokens, settings.temperature, settings.stop
    )
    if out is not None and processes.main:
        out.parent.mkdir(parents=True, exist_ok=True)
    count, samples = 0, settings.samples * (best.n if best else 1)
    for numbers, responses in model.answer(samples, params, seed=settings.seed, title="generate"):
        if best is not None:
            _, responses = best.keep(numbers, responses)
        rows = as_rows(responses, best)
        if out is not None:
            rows = [row | ids for row, ids in zip(rows, responses.token_ids(), strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        count += len(lines)
        if processes.main and out is None:
            print("\n".join(lines), file=sys.stdout)
        elif processes.main and out is not None:
            with open(out, "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
    if out is not None and processes.main:
        say(f"generate: {count:,} responses in {out}")
    if best is not None and processes.main:
        say(f"generate: {best.summary()}")
    return count


def as_rows(responses: Responses, best: BestOf | None) -> list[dict[str, Any]]:
    """One row per response; of a best of n, the newest that were kept."""
    rows = responses.as_rows()
    if best is not None:
        for row, score in zip(rows, best.kept[-len(rows) :], strict=True):
            row |= {"score": score, "of": best.n}
    return rows
