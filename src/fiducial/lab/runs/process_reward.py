"""The process reward model of a world, trained by the package's own commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ...methods.prm import prm
from ...methods.settings.prm import PRM
from ...names import progress_file
from ...settings import RowSettings, RunSettings
from ...use.generate import generate
from ...use.settings import Generate
from ..worlds.files import write_rows
from ..worlds.world import EOS, LETTERS, World

TAUGHT = 1_000
"""Responses of the reference to each prompt on which a process reward model is trained."""


def teach_steps(world: World, start: Path, out: Path, seed: int) -> Path:
    """A process reward model trained on outcomes alone: the reference answers, the verifier says
    right or wrong, and every token is labeled with the outcome of its response. Returns the model's
    folder; a model that is there already is kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    model, drawn, rows = out / "run" / "model", out / "drawn.jsonl", out / "outcomes.jsonl"
    if model.exists():
        return model
    for old in (drawn, progress_file(drawn), rows):
        old.unlink(missing_ok=True)
    shutil.rmtree(out / "run", ignore_errors=True)
    write_rows(
        out / "prompts.jsonl",
        ({"prompt": world.prompt_text(p)} for p in range(len(world.prompts))),
    )
    generate(
        Generate(
            model=str(start),
            prompts=str(out / "prompts.jsonl"),
            out=str(drawn),
            samples=TAUGHT,
            max_new_tokens=world.horizon,
            seed=seed,
        )
    )
    with drawn.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    right = world.scores([r["prompt"] for r in found], [r["completion"] for r in found])
    write_rows(
        rows,
        (
            {
                "prompt": r["prompt"],
                "completion": r["completion"] + (LETTERS[EOS] if r["finished"] else ""),
                "label": score > 0.5,
            }
            for r, score in zip(found, right, strict=True)
        ),
    )
    prm(
        PRM(
            model=str(start),
            data=str(rows),
            out=str(out / "run"),
            separator="",
            epochs=4,
            batch_size=256,
            learning_rate=0.3,
            seed=seed,
            rows=RowSettings(max_length=len(world.prompts[0]) + world.horizon, held_out=0.0),
            run=RunSettings(checkpoint_every=0, eval_every=0, tokens=65_536, on_alarm="off"),
        )
    )
    return model
