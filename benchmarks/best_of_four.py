"""Best of four real solutions by a process reward model and by an outcome model, on grade-school
questions that neither has seen.

    python benchmarks/best_of_four.py [--data ../shared/data/gsm8k] [--model
    ../shared/models/stories260K] [--epochs 2] [--held-out 0.33] [--seed 0]

labelled.jsonl has four solutions of other models to each of 900 questions, and whether each ends
right. Two models are trained from --model on the same questions with the same settings, and asked
about the others:

- `prm` from the outcomes, read at the end of every line (Cobbe et al. 2021's way to a verifier of
  steps);
- the outcome model: `prm` on the same rows, read at the last token alone (a separator that never
  occurs).

With --sft both start from --model fine-tuned on the worked answers of sft.jsonl.

Printed: the share of held-out questions of which the chosen solution is right, with its 95%
interval over questions, beside a choice at random (its exact expectation), by length, and of one
who knows; then the paired differences between process and outcome, question by question.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from fiducial.core import intervals
from fiducial.data.prepare import split
from fiducial.data.row_types import LabeledRow
from fiducial.methods.prm import PRM, prm, solver, tensors
from fiducial.methods.sft import SFT, sft
from fiducial.rewards.process import AGGREGATES, aggregate
from fiducial.settings import OptimizerSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer

SHARED = Path(__file__).resolve().parents[2] / "shared"
NEVER = "\x00"


def scores(run: object, rows: list[dict], separator: str) -> list[list[float]]:
    """The scores of the steps of each solution."""
    renderer = load_renderer(str(run.path / "model"), RowSettings())
    render = solver(renderer, separator)
    solutions = [
        render(LabeledRow(r["prompt"], r["completion"], r["label"], "held out")) for r in rows
    ]
    width = max(len(s) for s in solutions)

    def compute(numbers: list[int]) -> tuple[torch.Tensor, ...]:
        ids, _, mask = tensors([solutions[i] for i in numbers])
        return (run.model(ids.to(run.processes.device), after=mask.to(run.processes.device)),)

    (out,) = run.processes.map_rows([[len(s)] for s in solutions], 16_384, width, compute)
    return [out[i, s.ends].double().sigmoid().tolist() for i, s in enumerate(solutions)]


def right(choice: list[float], labels: list[bool]) -> float:
    """The expected share of right ones among the solutions with the highest score."""
    best = [x for c, x in zip(choice, labels, strict=True) if c == max(choice)]
    return sum(best) / len(best)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "gsm8k")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories260K")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=float, default=0.33)
    parser.add_argument("--sft", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.data / "labelled.jsonl").is_file():
        raise SystemExit(
            f"there is no labelled.jsonl in {options.data}: give the folder of the questions with "
            "--data"
        )
    if not options.model.is_dir():
        raise SystemExit(f"there is no model in {options.model}: give one with --model")
    os.environ.setdefault("FIDUCIAL_CACHE", tempfile.mkdtemp())
    rows = [
        json.loads(line)
        for line in (options.data / "labelled.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    train, held = (
        [rows[i] for i in part]
        for part in split([r["prompt"] for r in rows], options.held_out, options.seed)
    )

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in train), encoding="utf-8")
        quiet = RunSettings(samples=0, checkpoint_every=0, eval_every=0, tokens=16_384)
        start = str(options.model)
        if options.sft:
            first = SFT(
                model=start,
                data=str(options.data / "sft.jsonl"),
                out=f"{folder}/sft",
                learning_rate=options.learning_rate,
                epochs=2,
                run=quiet,
            )
            start = str(sft(first).path / "model")
        found = {}
        for name, separator in (("process", "\n"), ("outcome", NEVER)):
            settings = PRM(
                model=start,
                data=str(data),
                out=f"{folder}/{name}",
                separator=separator,
                epochs=options.epochs,
                batch_size=32,
                seed=options.seed,
                learning_rate=options.learning_rate,
                rows=RowSettings(held_out=0.1),
                optimizer=OptimizerSettings(schedule="cosine", warmup_steps=20),
                run=quiet,
            )
            run = prm(settings)
            found[name] = scores(run, held, separator)
            for label, e in run.evaluation.items():
                if "by last" in label or "steps" in label or "calling" in label:
                    print(f"  {name}: {label} {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]")

    groups: dict[str, list[int]] = {}
    for i, r in enumerate(held):
        groups.setdefault(r["prompt"], []).append(i)
    chosen = {
        **{
            f"process reward, {how}": [aggregate(s, how) for s in found["process"]]
            for how in AGGREGATES
        },
        "outcome model": [s[-1] for s in found["outcome"]],
        "shortest": [-float(len(r["completion"])) for r in held],
        "longest": [float(len(r["completion"])) for r in held],
        "at random": [0.0] * len(held),
        "knowing": [float(r["label"]) for r in held],
    }
    shares = {
        name: [
            right([choice[i] for i in group], [held[i]["label"] for i in group])
            for group in groups.values()
        ]
        for name, choice in chosen.items()
    }
    print(
        f"{len(train):,} solutions to train on, {len(groups)} held-out questions of "
        f"{len(held) / len(groups):.2g} solutions each; {options.model.name}"
    )
    print(f"{'chosen by':<26} right, with 95% interval over questions")
    for name, share in shares.items():
        e = intervals.mean(share)
        print(f"{name:<26} {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]")
    for name in (f"process reward, {how}" for how in AGGREGATES):
        for other in ("outcome model", "at random"):
            e = intervals.mean([a - b for a, b in zip(shares[name], shares[other], strict=True)])
            print(f"{name} less {other}: {e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]")
    e = intervals.mean(
        [a - b for a, b in zip(shares["outcome model"], shares["at random"], strict=True)]
    )
    print(f"outcome model less at random: {e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]")


if __name__ == "__main__":
    main()
