"""`fiducial demo`: from nothing to aligned models and a page that compares the methods, on a world
whose true value is known.

Every stage is a verb that users run on their own models and data; its settings are in its run
folder.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..methods.dpo import dpo
from ..methods.grpo import grpo
from ..methods.ppo import ppo
from ..methods.reinforce import reinforce
from ..methods.reward_model import reward
from ..methods.settings.dpo import DPO
from ..methods.settings.grpo import GRPO
from ..methods.settings.ppo import PPO
from ..methods.settings.reinforce import Reinforce
from ..methods.settings.reward_model import RewardModel
from ..methods.settings.sft import SFT
from ..methods.sft import sft
from ..names import progress_file
from ..settings import KLSettings, OptimizerSettings, RowSettings, RunSettings
from ..train.folders import open_folder
from ..train.launch import alone
from ..train.machine import command_line, versions
from ..train.progress import say
from ..use.collect import collect
from ..use.settings import Collect
from .compare import Entrant, compare
from .page import write_demo_page
from .results import Circumstances, Comparison
from .settings import Demo
from .world import StoryWorld, build_tokenizer

MAX_NEW = 80
"""Tokens of a response, at most."""

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""Sizes of the model that the demo trains; together about a million weights."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the demo.

    seconds: usual time on two cores, for the time that is left. title: its name on the page.
    doing: what is printed when it starts.
    """

    seconds: float
    title: str
    doing: str


STAGES = {
    "world": Stage(
        2, "making the world", "make the world: prompts, texts, tokenizer, an untrained model"
    ),
    "pretrain": Stage(50, "pretraining", "pretrain on texts of mixed quality"),
    "sft": Stage(32, "SFT", "fine-tune on demonstrations"),
    "collect": Stage(
        8, "collecting", "sample from the SFT model and have the annotators compare the responses"
    ),
    "reward": Stage(18, "reward model", "train the reward model on these comparisons"),
    "ppo": Stage(60, "PPO", "PPO with the KL penalty"),
    "rloo": Stage(22, "RLOO", "RLOO: the same without a critic"),
    "grpo": Stage(22, "GRPO", "GRPO, as in its paper"),
    "ppo_no_kl": Stage(64, "PPO without KL", "PPO without the KL penalty"),
    "dpo": Stage(30, "DPO", "DPO on the same comparisons"),
    "ppo_fast": Stage(30, "PPO, learning rate x3", "PPO at three times the learning rate"),
    "dpo_fast": Stage(25, "DPO, learning rate x3", "DPO at three times the learning rate"),
    "compare": Stage(22, "comparing", "compare all models on held-out prompts"),
}
"""In the order in which they run."""

CRITIC_FREE = ("policy", "reference", "reward model")
FASTER = "learning rate x3, half the steps"
ENTRANTS = (
    Entrant("sft", ("policy",)),
    Entrant("ppo", ("policy", "reference", "critic", "reward model"), {"ppo_fast": FASTER}),
    Entrant("rloo", CRITIC_FREE),
    Entrant("grpo", CRITIC_FREE),
    # DPO computes the log-probabilities of its reference once, before the first step, and keeps
    # them instead of the weights
    Entrant("dpo", ("policy",), {"dpo_fast": FASTER}),
    Entrant("ppo_no_kl", ("policy", "reference", "critic", "reward model")),
)
"""The runs that are compared, in the order of the page."""


class Stages:
    """Runs the stages in their order, prints each with an estimate of the time that is left, and
    keeps their times.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def __call__(self, name: str, work: Callable[[], object], done: Path | None = None) -> None:
        """Does `work`, unless `done` is a file which says that it was done before."""
        names = list(STAGES)
        number = f"[{names.index(name) + 1}/{len(names)}] {STAGES[name].doing}"
        if done is not None and _is_done(done):
            self.seconds[name] = _seconds(done)
            say(f"{number}: done before")
            return
        usual = [STAGES[n].seconds for n in names]
        before, left = sum(usual[: names.index(name)]), sum(usual[names.index(name) :])
        if before and not any(v == 0 for v in self.seconds.values()):
            left *= (time.monotonic() - self._began) / before
        say(f"{number}  (all that is left: about {left / 60:.1f} min)")
        start = time.monotonic()
        work()
        self.seconds[name] = time.monotonic() - start


def demo(settings: Demo) -> Path:
    """The path of the page."""
    alone("demo")
    folder = open_folder(settings.out, "demo-run", settings.resume)
    world, stage = StoryWorld(settings.seed), Stages()
    train(folder, world, settings, stage)
    found: list[Comparison] = []
    stage(
        "compare",
        lambda: found.append(compare(folder, world, ENTRANTS, settings.eval_samples, MAX_NEW)),
    )
    how = Circumstances(
        seed=settings.seed,
        command=command_line(),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
        versions=versions(),
        timings={STAGES[name].title: round(v, 1) for name, v in stage.seconds.items()},
    )
    both = dataclasses.asdict(found[0]) | dataclasses.asdict(how)
    (folder / "comparison.json").write_text(
        json.dumps(both, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return write_demo_page(folder, found[0], how)


def train(folder: Path, world: StoryWorld, settings: Demo, stage: Stages) -> None:
    """Every stage but the comparison."""
    policy = str(folder / "sft" / "model")
    common: dict[str, Any] = {"seed": settings.seed}
    quiet = RunSettings(checkpoint_every=0, eval_every=50, samples=5, tokens=2048)

    stage("world", lambda: make_world(world, folder, settings), folder / "prompts.jsonl")

    def pretrain(out: str) -> None:
        sft(
            SFT(
                model=str(folder / "base"),
                data=str(folder / "corpus.jsonl"),
                out=out,
                batch_size=32,
                learning_rate=3e-3,
                **common,
                rows=RowSettings(held_out=0.01),
                optimizer=OptimizerSettings(schedule="cosine", warmup_steps=20),
                run=quiet,
            )
        )

    def run_sft(out: str) -> None:
        sft(
            SFT(
                model=str(folder / "pretrain" / "model"),
                data=str(folder / "demonstrations.jsonl"),
                out=out,
                batch_size=32,
                steps=settings.sft_steps,
                learning_rate=5e-4,
                **common,
                rows=RowSettings(held_out=0.02),
                run=quiet,
            )
        )

    def run_collect() -> None:
        collect(
            Collect(
                model=policy,
                prompts=str(folder / "prompts.jsonl"),
                judge=f"{folder / 'annotators.py'}:compare",
                out=str(folder / "pairs.jsonl"),
                samples=settings.samples,
                max_new_tokens=MAX_NEW,
                resume=progress_file(folder / "pairs.jsonl").exists(),
                **common,
            )
        )

    def run_reward(out: str) -> None:
        reward(
            RewardModel(
                model=policy,
                data=str(folder / "pairs.jsonl"),
                out=out,
                batch_size=16,
                epochs=2,
                learning_rate=5e-4,
                **common,
                optimizer=OptimizerSettings(schedule="cosine", warmup_steps=5, weight_decay=0.1),
                run=quiet,
            )
        )

    online: dict[str, Any] = common | {
        "model": policy,
        "data": str(folder / "prompts.jsonl"),
        "max_new_tokens": MAX_NEW,
        "optimizer": OptimizerSettings(schedule="constant"),
        "run": quiet,
        "reward": (str(folder / "reward" / "model"), "fiducial.demo.world:gold"),
        "reward_weights": (1.0, 0.0),  # gold is watched, not followed
    }

    def run_ppo(
        out: str, beta: float = 0.1, rate: float = 5e-4, steps: int = settings.ppo_steps
    ) -> None:
        measured = KLSettings(estimator="k1")  # also where beta is 0
        ppo(
            PPO(
                out=out, beta=beta, kl=measured, steps=steps, epochs=2, learning_rate=rate, **online
            )
        )

    def run_rloo(out: str) -> None:
        reinforce(
            Reinforce(
                out=out,
                baseline="rloo",
                group_size=4,
                beta=0.1,
                steps=settings.ppo_steps,
                learning_rate=5e-4,
                **online,
            )
        )

    def run_grpo(out: str) -> None:
        grpo(
            GRPO(
                out=out,
                variant="grpo",
                # rewards are divided by their standard deviation first, so this goes about as far
                # as PPO's 0.1
                beta=0.3,
                steps=settings.ppo_steps,
                learning_rate=5e-4,
                **online,
            )
        )

    def run_dpo(out: str, rate: float = 1e-4, epochs: float = 1.0) -> None:
        dpo(
            DPO(
                model=policy,
                data=str(folder / "pairs.jsonl"),
                out=out,
                beta=0.1,
                learning_rate=rate,
                epochs=epochs,
                **common,
                optimizer=OptimizerSettings(betas=(0.9, 0.999), schedule="linear", warmup_steps=10),
                run=quiet,
            )
        )

    def run(name: str, method: Callable[[str], None]) -> None:
        def anew() -> None:
            shutil.rmtree(folder / name, ignore_errors=True)  # what a stage left that was stopped
            method(str(folder / name))

        stage(name, anew, folder / name / "summary.json")

    half = max(1, settings.ppo_steps // 2)
    run("pretrain", pretrain)
    run("sft", run_sft)
    stage("collect", run_collect, folder / "pairs.jsonl")
    run("reward", run_reward)
    run("ppo", run_ppo)
    run("rloo", run_rloo)
    run("grpo", run_grpo)
    run("ppo_no_kl", lambda out: run_ppo(out, beta=0.0))
    run("dpo", run_dpo)
    run("ppo_fast", lambda out: run_ppo(out, rate=1.5e-3, steps=half))
    run("dpo_fast", lambda out: run_dpo(out, rate=3e-4, epochs=0.5))


ANNOTATORS = '''\
"""The demo's simulated annotators: noisy, and with a slight preference for longer answers.

They are a judge for `fiducial collect --judge annotators.py:compare`.
"""

from fiducial.demo.world import annotator

ask = annotator({seed})


def compare(prompts, first, second):
    """True where the first answer is preferred."""
    return [ask(p[-1]["content"], a, b, key=0) for p, a, b in zip(prompts, first, second)]
'''


def make_world(world: StoryWorld, folder: Path, settings: Demo) -> None:
    """Writes the files of the world: corpus, demonstrations, prompts, the annotators, and a model
    with random weights.
    """
    corpus = world.corpus(settings.documents)
    tokenizer = build_tokenizer(corpus[:2000])
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            **SHAPE,
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


def _is_done(done: Path) -> bool:
    """Whether a stage has made its last file: the summary of a finished run, or whole rows."""
    if not done.exists() or progress_file(done).exists():
        return False
    if done.suffix != ".json":
        return True
    try:
        status = json.loads(done.read_text(encoding="utf-8"))["status"]
    except (ValueError, KeyError, TypeError):
        return False
    return bool(status == "done")


def _seconds(done: Path) -> float:
    try:
        return float(json.loads(done.read_text(encoding="utf-8"))["train_seconds"])
    except (ValueError, KeyError):
        return 0.0
