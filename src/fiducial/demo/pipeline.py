"""`fiducial demo`: from nothing to an aligned model and a page that compares the ways there, on a
world whose true value is known.

Every stage is a verb that users run on their own model and data; what each was given is in its run
folder.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers import LlamaConfig, LlamaForCausalLM

from ..methods.dpo import DPO, dpo
from ..methods.grpo import GRPO, grpo
from ..methods.ppo import PPO, ppo
from ..methods.reinforce import Reinforce, reinforce
from ..methods.reward_model import RewardModel, reward
from ..methods.sft import SFT, sft
from ..settings import OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.folders import open_folder
from ..train.machine import command_line
from ..train.progress import say
from ..use.collect import Collect, collect
from .compare import compare
from .page import write_demo_page
from .world import World, build_tokenizer


class Demo(Settings):
    """Demo: pretrain, fine-tune, collect preferences, train a reward model, PPO, RLOO, GRPO, DPO
    and PPO without KL on an embedded world; compare them.
    """

    out: str | None = None
    """The folder for everything. Default: demo-run, demo-run-2, ..."""
    seed: int = 0
    """Of the world and of everything in it."""
    documents: int = Field(7_200, gt=0)
    """Texts to pretrain on, 32 a step."""
    sft_steps: int = Field(150, gt=0)
    """Steps of 32 demonstrations."""
    samples: int = Field(5, gt=1)
    """Responses a training prompt that are compared, all pairs."""
    ppo_steps: int = Field(22, gt=0)
    """Iterations of 64 responses."""
    prompts: int = Field(288, gt=1, le=288)
    """Training prompts in use."""
    eval_samples: int = Field(3, gt=0)
    """Responses to each of the 96 held-out prompts."""
    resume: bool = False
    """Keep the stages that are finished in --out and go on behind them."""


STAGES = {
    "world": 2,
    "pretrain": 50,
    "sft": 32,
    "collect": 8,
    "reward": 18,
    "ppo": 60,
    "rloo": 22,
    "grpo": 22,
    "ppo_no_kl": 64,
    "dpo": 30,
    "ppo_fast": 30,
    "dpo_fast": 25,
    "compare": 22,
}
"""Usual seconds of each stage on two cores, for the time left."""


@dataclass
class Stages:
    """Runs the stages in their order, tells which one it is and how long the rest may take, and
    keeps their times.
    """

    folder: Path
    seconds: dict[str, float]
    began: float

    def __call__(
        self, name: str, words: str, work: Callable[[], Any], done: Path | None = None
    ) -> None:
        """Do `work`, unless `done` is a file that says it was done before."""
        names = list(STAGES)
        rest = sum(STAGES[n] for n in names[names.index(name) :])
        before = sum(STAGES[n] for n in names[: names.index(name)])
        left = (
            rest * (time.monotonic() - self.began) / before
            if before and not any(v == 0 for v in self.seconds.values())
            else rest
        )
        if done is not None and done.exists():
            self.seconds[name] = _seconds(done)
            say(f"[{names.index(name) + 1}/{len(names)}] {words}: done before")
            return
        say(
            f"[{names.index(name) + 1}/{len(names)}] {words}  (all that is left: about "
            f"{left / 60:.1f} min)"
        )
        start = time.monotonic()
        work()
        self.seconds[name] = time.monotonic() - start


def demo(settings: Demo) -> Path:
    """The path of the page."""
    folder = open_folder(settings.out, "demo-run", settings.resume)
    stage = Stages(folder, {}, time.monotonic())
    world = World(settings.seed)
    base, policy = folder / "base", folder / "sft" / "model"
    common: dict[str, Any] = {"seed": settings.seed}
    quiet = RunSettings(checkpoint_every=0, eval_every=50, samples=5, tokens=2048)

    stage(
        "world",
        "make the world: prompts, texts, tokenizer, an untrained model",
        lambda: make_world(world, folder, settings),
        folder / "prompts.jsonl",
    )
    stage(
        "pretrain",
        "pretrain on texts of mixed quality",
        lambda: sft(
            SFT(
                model=str(base),
                data=str(folder / "corpus.jsonl"),
                out=str(folder / "pretrain"),
                batch_size=32,
                learning_rate=3e-3,
                **common,
                rows=RowSettings(held_out=0.01),
                optimizer=OptimizerSettings(schedule="cosine", warmup_steps=20),
                run=quiet,
            )
        ),
        folder / "pretrain" / "summary.json",
    )
    stage(
        "sft",
        "fine-tune on demonstrations",
        lambda: sft(
            SFT(
                model=str(folder / "pretrain" / "model"),
                data=str(folder / "demonstrations.jsonl"),
                out=str(folder / "sft"),
                batch_size=32,
                steps=settings.sft_steps,
                learning_rate=5e-4,
                **common,
                rows=RowSettings(held_out=0.02),
                run=quiet,
            )
        ),
        folder / "sft" / "summary.json",
    )
    stage(
        "collect",
        "sample from the SFT model and have the annotators compare",
        lambda: collect(
            Collect(
                model=str(policy),
                prompts=str(folder / "prompts.jsonl"),
                judge=f"{folder / 'annotators.py'}:compare",
                out=str(folder / "pairs.jsonl"),
                samples=settings.samples,
                max_new_tokens=MAX_NEW,
                **common,
            )
        ),
        folder / "pairs.jsonl",
    )
    stage(
        "reward",
        "train the reward model on their comparisons",
        lambda: reward(
            RewardModel(
                model=str(policy),
                data=str(folder / "pairs.jsonl"),
                out=str(folder / "reward"),
                batch_size=16,
                epochs=2,
                learning_rate=5e-4,
                **common,
                optimizer=OptimizerSettings(schedule="cosine", warmup_steps=5, weight_decay=0.1),
                run=quiet,
            )
        ),
        folder / "reward" / "summary.json",
    )
    online: dict[str, Any] = common | {
        "model": str(policy),
        "data": str(folder / "prompts.jsonl"),
        "max_new_tokens": MAX_NEW,
        "optimizer": OptimizerSettings(schedule="constant"),
        "run": quiet,
        "reward": (str(folder / "reward" / "model"), "fiducial.demo.world:gold"),
        "reward_weights": (1.0, 0.0),  # gold is watched, not followed
    }

    def run_ppo(
        name: str, beta: float, rate: float = 5e-4, steps: int = settings.ppo_steps
    ) -> None:
        ppo(
            PPO(
                out=str(folder / name),
                beta=beta,
                steps=steps,
                epochs=2,
                learning_rate=rate,
                **online,
            )
        )

    def run_rloo() -> None:
        reinforce(
            Reinforce(
                out=str(folder / "rloo"),
                baseline="rloo",
                group_size=4,
                beta=0.1,
                steps=settings.ppo_steps,
                learning_rate=5e-4,
                **online,
            )
        )

    def run_grpo() -> (
        None
        # its beta is another: rewards are divided by their deviation first. 0.3 leads about as far
        # as
        # PPO's 0.1
    ):
        grpo(
            GRPO(
                out=str(folder / "grpo"),
                variant="grpo",
                beta=0.3,
                steps=settings.ppo_steps,
                learning_rate=5e-4,
                **online,
            )
        )

    def run_dpo(name: str, rate: float = 1e-4, epochs: float = 1.0) -> None:
        dpo(
            DPO(
                model=str(policy),
                data=str(folder / "pairs.jsonl"),
                out=str(folder / name),
                beta=0.1,
                learning_rate=rate,
                epochs=epochs,
                **common,
                optimizer=OptimizerSettings(betas=(0.9, 0.999), schedule="linear", warmup_steps=10),
                run=quiet,
            )
        )

    stage(
        "ppo",
        "PPO with the KL penalty",
        lambda: run_ppo("ppo", 0.1),
        folder / "ppo" / "summary.json",
    )
    stage("rloo", "RLOO: the same without a critic", run_rloo, folder / "rloo" / "summary.json")
    stage("grpo", "GRPO, as its paper has it", run_grpo, folder / "grpo" / "summary.json")
    stage(
        "ppo_no_kl",
        "PPO without the KL penalty",
        lambda: run_ppo("ppo_no_kl", 0.0),
        folder / "ppo_no_kl" / "summary.json",
    )
    stage(
        "dpo",
        "DPO on the same comparisons",
        lambda: run_dpo("dpo"),
        folder / "dpo" / "summary.json",
    )
    half = max(1, settings.ppo_steps // 2)
    stage(
        "ppo_fast",
        "PPO at three times the learning rate",
        lambda: run_ppo("ppo_fast", 0.1, 1.5e-3, half),
        folder / "ppo_fast" / "summary.json",
    )
    stage(
        "dpo_fast",
        "DPO at three times the learning rate",
        lambda: run_dpo("dpo_fast", 3e-4, 0.5),
        folder / "dpo_fast" / "summary.json",
    )
    page: dict[str, Any] = {}
    stage(
        "compare",
        "compare all on held-out prompts",
        lambda: page.update(compare(folder, world, settings.eval_samples, MAX_NEW)),
    )
    page |= {
        "seed": settings.seed,
        "command": command_line(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("fiducial", "torch", "transformers")},
        },
        "timings": {WORDS[k]: round(v, 1) for k, v in stage.seconds.items()},
    }
    (folder / "comparison.json").write_text(
        json.dumps(page, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return write_demo_page(folder, page)


MAX_NEW = 80
WORDS = {
    "world": "making the world",
    "pretrain": "pretraining",
    "sft": "SFT",
    "collect": "collecting",
    "reward": "reward model",
    "ppo": "PPO",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "ppo_no_kl": "PPO without KL",
    "dpo": "DPO",
    "ppo_fast": "PPO, learning rate x3",
    "dpo_fast": "DPO, learning rate x3",
    "compare": "comparing",
}

ANNOTATORS = '''"""The demo's simulated annotators, as a judge for `fiducial collect --judge annotators.py:compare`: noisy, and a little too fond of length."""

from fiducial.demo.world import annotator

ask = annotator({seed})


def compare(prompts, first, second):
    """True where the first answer is preferred."""
    return [ask(p[-1]["content"], a, b, key=0) for p, a, b in zip(prompts, first, second)]
'''


def make_world(world: World, folder: Path, settings: Demo) -> None:
    """Files of the world: corpus, demonstrations, prompts, the annotators, and a model that knows
    nothing yet.
    """
    corpus = world.corpus(settings.documents)
    tokenizer = build_tokenizer(corpus[:2000])
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # at 0.02 a model this small does not learn to look back at its prompt in time
            initializer_range=0.08,
        )
    )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    training, held_out = world.prompts()
    (folder / "annotators.py").write_text(ANNOTATORS.format(seed=settings.seed), encoding="utf-8")
    _write(folder / "corpus.jsonl", [{"text": tokenizer.bos_token + text} for text in corpus])
    told = world.demonstrations(settings.sft_steps * 32)
    _write(
        folder / "demonstrations.jsonl",
        [
            {"prompt": _user(p.text), "completion": [{"role": "assistant", "content": story}]}
            for p, story in told
        ],
    )
    _write(folder / "held_out.jsonl", [{"prompt": _user(p.text)} for p in held_out])
    _write(
        folder / "prompts.jsonl", [{"prompt": _user(p.text)} for p in training[: settings.prompts]]
    )


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def _seconds(done: Path) -> float:
    try:
        return float(json.loads(done.read_text(encoding="utf-8"))["train_seconds"])
    except (ValueError, KeyError):
        return 0.0
