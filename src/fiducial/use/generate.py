"""Answers of a model to a file of prompts, each the only one drawn or the best of several."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import Field

from ..data.prepare import messages_of
from ..errors import InputError
from ..rewards.process import Aggregate
from ..settings import RowSettings, Settings
from ..train.processes import Processes
from ..train.progress import say
from .answering import Model
from .best_of import BestOf


class Generate(Settings):
    """Generate: answer a file of prompts with a model; with --best-of N --score NAME each answer is
    the best of N, more reward with nothing trained.
    """

    model: str
    """The model that answers: a folder or a Hub name."""
    prompts: str
    """Rows with a prompt: a file or a Hub name."""
    out: str | None = None
    """The .jsonl file to write. Default: to the terminal."""
    samples: int = Field(1, gt=0)
    """Responses a prompt."""
    best_of: int | None = Field(None, gt=0)
    """Draw so many for each of them and keep the best by --score; of equal scores, the first drawn."""
    score: str | None = None
    """By what: a reward model's folder, file.py:function with TRL's signature, or exact_match,
    numeric_answer, format, length (they read the row).
    """
    aggregate: Aggregate | None = None
    """Of a process reward model: how the scores of the steps become one. Default: as its folder says."""
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of a response, at most."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits; 0 takes the most likely token."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response beside EOS."""
    seed: int = 0
    """Of the samples."""
    rows: RowSettings = RowSettings()


def generate(settings: Generate) -> int:
    """Write a line a response: prompt, completion, tokens, finished, and of a best of n also its
    score and `of`, the n; returns how many.
    """
    processes = Processes()
    out = Path(settings.out) if settings.out else None
    if out is not None and out.exists():
        raise InputError(f"--out: {out} exists already: choose another file, or remove it")
    best = BestOf.open(
        settings.best_of, settings.score, settings.aggregate, settings.temperature, processes
    )
    model = Model.open(
        settings.model, settings.prompts, settings.rows, processes, reserve=settings.max_new_tokens
    )
    if best is not None:
        best.check_rows(model.rows)
    if out is not None and processes.main:
        out.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    for numbers, r in model.answer(
        settings.samples * (best.n if best else 1),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop=settings.stop,
        seed=settings.seed,
        title="generate",
    ):
        if best is not None:
            _, r = best.keep(numbers, r)
        t = r.trajectory
        scored = (
            [{"score": s, "of": best.n} for s in best.kept[-len(t) :]] if best else [{}] * len(t)
        )
        lines = [
            json.dumps(
                {"prompt": messages_of(p), "completion": c, "tokens": n, "finished": f} | s,
                ensure_ascii=False,
            )
            for p, c, n, f, s in zip(
                r.prompts,
                r.completions,
                t.response_lengths.tolist(),
                t.finished.tolist(),
                scored,
                strict=True,
            )
        ]
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
