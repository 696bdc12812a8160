"""On-policy distillation on the demo's world, from nothing: a student with every other layer of the
demo's SFT model, before and after `fiducial distill`.

    python benchmarks/distill_demo.py [--out FOLDER] [--steps 300] [--learning-rate 2e-3]
    [--estimators exact sampled] [--seed 0]

The teacher is pretrained and fine-tuned as in `fiducial demo` (4 layers, about a million
parameters). The student is given its embeddings and its first and last layers, which together say
nothing sensible yet. Two questions, each with its 95% interval, prompts taken as independent:

- own samples: responses of the student to the 96 held-out prompts; loss of the student and of the
  teacher on them. Their difference is the KL.
- demonstrations: held-out ones, which neither has seen; loss of the student against that of the
  teacher.

"off" is how far the student's loss is from the teacher's, as a share of the teacher's. Both
estimators make the same number of steps at the same rate. Losses are computed here from the logits
of plain transformers models, not by the package. Nats a token.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = (
    # as the command does, before torch is loaded: threads that spin on a busy machine cost ten
    # times the work
    "PASSIVE"
)

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fiducial.core import intervals
from fiducial.demo import grammar
from fiducial.demo.pipeline import MAX_NEW, make_world
from fiducial.demo.settings import Demo
from fiducial.demo.world import DEMONSTRATION_FAULTS, StoryWorld
from fiducial.methods.distill import Distill, distill
from fiducial.methods.sft import SFT, sft
from fiducial.models.load import load_policy
from fiducial.rollout.local import local_sampler
from fiducial.rollout.sampling import Keys, sampling_params
from fiducial.settings import OptimizerSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer

QUIET = RunSettings(checkpoint_every=0, eval_every=0, samples=5, tokens=2048)
RESPONSES = 4
"""To each held-out prompt."""

Row = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's."""


def make_teacher(folder: Path, seed: int) -> Path:
    """The stages `world`, `pretrain` and `sft` of the demo."""
    settings = Demo(seed=seed)
    make_world(StoryWorld(seed), folder, settings)
    sft(
        SFT(
            model=str(folder / "base"),
            data=str(folder / "corpus.jsonl"),
            out=str(folder / "pretrain"),
            batch_size=32,
            learning_rate=3e-3,
            seed=seed,
            rows=RowSettings(held_out=0.01),
            optimizer=OptimizerSettings(schedule="cosine", warmup_steps=20),
            run=QUIET,
        )
    )
    sft(
        SFT(
            model=str(folder / "pretrain" / "model"),
            data=str(folder / "demonstrations.jsonl"),
            out=str(folder / "sft"),
            batch_size=32,
            steps=settings.sft_steps,
            learning_rate=5e-4,
            seed=seed,
            rows=RowSettings(held_out=0.02),
            run=QUIET,
        )
    )
    return folder / "sft" / "model"


def make_student(teacher: Path, out: Path) -> Path:
    """The teacher without its middle half."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[len(layers) - 1]])
    model.config.num_hidden_layers = 2
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(out)
    return out


def demonstrations(renderer: Any, seed: int) -> list[Row]:
    """Answers to the held-out prompts, told as the demonstrations were, by dice of their own."""
    rows = []
    for number, prompt in enumerate(StoryWorld(seed).prompts()[1] * RESPONSES):
        dice = random.Random(f"{seed}/held-out demonstrations/{number}")
        faults = [fault for fault, share in DEMONSTRATION_FAULTS.items() if dice.random() < share]
        start = renderer.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], tokenize=True, add_generation_prompt=True
        )["input_ids"]
        told = renderer.tokenizer(
            grammar.tell(prompt, dice, faults), add_special_tokens=False
        ).input_ids
        rows.append(([*start, *told, renderer.eos], len(start)))
    return rows


def samples(model: Path, renderer: Any, seed: int) -> list[Row]:
    """The model's own answers to the held-out prompts."""
    prompts = [
        renderer.tokenizer.apply_chat_template(
            [{"role": "user", "content": p.text}], tokenize=True, add_generation_prompt=True
        )["input_ids"]
        for p in StoryWorld(seed).prompts()[1]
    ]
    policy = load_policy(str(model), Distill.model_fields["lora"].default, QUIET)
    numbers = [i for i in range(len(prompts)) for _ in range(RESPONSES)]
    keys = Keys(seed + 100, 0, numbers, [k % RESPONSES for k in range(len(numbers))])
    params = sampling_params(renderer, MAX_NEW)
    t = local_sampler(policy).sample([prompts[i] for i in numbers], params, keys)
    return [
        (ids[:n], p)
        for ids, n, p in zip(
            t.ids.tolist(), t.lengths.tolist(), t.prompt_lengths.tolist(), strict=True
        )
    ]


@torch.no_grad()
def losses(model: Path, rows: list[Row]) -> list[float]:
    """Nats of each row's response."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    out = []
    for start in range(0, len(rows), 64):
        some = rows[start : start + 64]
        width = max(len(ids) for ids, _ in some)
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row, _ in some])
        logp = lm(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        out += [-float(logp[i, p - 1 : len(row) - 1].sum()) for i, (row, p) in enumerate(some)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="keep everything here; a teacher that is there already is used again",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--estimators", nargs="+", default=["exact", "sampled"], choices=["exact", "sampled"]
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        teacher = folder / "sft" / "model"
        if not teacher.exists():
            make_teacher(folder, arguments.seed)
        print(f"teacher: {time.monotonic() - began:.0f} s", flush=True)
        students = {"before": make_student(teacher, folder / "student")}
        for estimator in arguments.estimators:
            run = distill(
                Distill(
                    model=str(students["before"]),
                    teacher=str(teacher),
                    data=str(folder / "prompts.jsonl"),
                    out=str(folder / f"distill-{estimator}"),
                    estimator=estimator,
                    steps=arguments.steps,
                    batch_size=arguments.batch_size,
                    learning_rate=arguments.learning_rate,
                    max_new_tokens=MAX_NEW,
                    seed=arguments.seed,
                    rows=RowSettings(eval_data=str(folder / "held_out.jsonl")),
                    optimizer=OptimizerSettings(schedule="cosine", warmup_steps=10),
                    run=QUIET,
                )
            )
            students[estimator] = run.path / "model"
            print(f"{estimator}: {run.train_seconds:.0f} s, {run.rows:,} responses", flush=True)
        renderer = load_renderer(str(teacher), RowSettings())
        table(teacher, students, renderer, arguments.seed)
        print(f"all: {time.monotonic() - began:.0f} s")


def table(teacher: Path, students: dict[str, Path], renderer: Any, seed: int) -> None:
    """Print it."""
    told = demonstrations(renderer, seed)
    theirs_told = losses(teacher, told)

    def per_token(nats: list[float], rows: list[Row]) -> dict[str, float]:
        clusters = [str(ids[:p]) for ids, p in rows]
        return intervals.ratio(nats, [len(ids) - p for ids, p in rows], clusters)

    def words(found: dict[str, float]) -> str:
        return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"

    print(
        f"\nnats per token, {len(told)} responses to held-out prompts\n{'student':<10}"
        f"{'own samples: student':>24}{'teacher':>20}{'KL':>20}{'off':>8}   "
        f"{'demonstrations: student':>24}{'teacher':>20}{'off':>8}"
    )
    for name, student in students.items():
        own = samples(student, renderer, seed)
        mine, theirs = losses(student, own), losses(teacher, own)
        a, b = per_token(mine, own), per_token(theirs, own)
        gap = per_token([t - m for m, t in zip(mine, theirs, strict=True)], own)
        c, d = per_token(losses(student, told), told), per_token(theirs_told, told)
        print(
            f"{name:<10}{words(a):>24}{words(b):>20}{words(gap):>20}"
            f"{abs(a['value'] / b['value'] - 1):>8.1%}   "
            f"{words(c):>24}{words(d):>20}{abs(c['value'] / d['value'] - 1):>8.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
