"""A model's answers to a file of prompts, sampled once or chosen as the best of n."""

from __future__ import annotations

from typing import Any

from ..rewards.types import Responses
from ..rollout.sampling import sampling_params
from ..train.processes import Processes
from ..train.progress import say
from .answering import Model
from .best_of import BestOf
from .output import Output, read_from
from .settings import Generate


def generate(settings: Generate) -> int:
    """Write one line per response: prompt, completion, tokens, finished; to a file also the token
    ids, for training on exactly what was sampled.

    A best of n also has its score and `of`, the n.

    Returns:
        The number of lines.

    Raises:
        InputError: a row, the scorer or the model cannot be used.
        RunError: the scorer failed, the file cannot be written, or a signal asked to stop.
    """
    processes = Processes()
    with Output("generate", settings, processes, suffix="") as output:
        return _generate(settings, processes, output)


def _generate(settings: Generate, processes: Processes, output: Output) -> int:
    best = BestOf.open(
        settings.best_of,
        settings.score,
        settings.aggregate,
        settings.temperature,
        processes,
        settings.worker,
        trust=settings.trust_remote_code,
    )
    model = Model.open(
        settings.model,
        settings.prompts,
        settings.rows,
        processes,
        max_new_tokens=settings.max_new_tokens,
        trust=settings.trust_remote_code,
    )
    if best is not None:
        best.scorer.check_rows(model.rows)
        for block in output.added:
            best.recall(block)
    params = sampling_params(
        model.renderer, settings.max_new_tokens, settings.temperature, settings.stop
    )
    count, samples = output.counts.get("rows", 0), settings.samples * (best.n if best else 1)
    output.begin(model, read_from(settings) | {"--score": settings.score})
    for numbers, responses in model.answer(
        samples, params, seed=settings.seed, title="generate", start=output.prompts
    ):
        scored = None
        if best is not None:
            drawn, kept = len(best.drawn), len(best.kept)
            _, responses = best.keep(numbers, responses)
            scored = best.since(drawn, kept)
        rows = as_rows(responses, best)
        if output.path is not None:
            rows = [row | ids for row, ids in zip(rows, responses.token_ids(), strict=True)]
        count += len(rows)
        output.add(rows, numbers[-1] + 1, {"rows": count}, scored)
    if output.path is not None and processes.main:
        say(f"generate: {count:,} responses in {output.path}")
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
