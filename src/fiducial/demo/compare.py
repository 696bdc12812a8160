"""The demo's models side by side on held-out prompts: what the page shows, measured."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import intervals, kl
from ..core.reductions import select
from ..rewards.load import ModelReward, load_reward
from ..settings import RowSettings, RunSettings
from ..train.processes import Processes
from ..use.answering import Model
from .grammar import words
from .world import World, annotator, gold

SHOWN = 5


@dataclass
class Answers:
    """One model's responses to the held-out prompts, and what they are worth."""

    prompts: list[str]
    numbers: list[int]
    texts: list[str]
    gold: list[float]
    proxy: list[float]
    lengths: list[int]
    kl: list[float]
    entropy: float


def compare(folder: Path, world: World, samples: int, max_new_tokens: int) -> dict[str, Any]:
    """All of the page but the run's circumstances: methods, reward model, paths, samples."""
    processes = Processes()
    judge = load_reward(str(folder / "reward" / "model"), RunSettings(), processes)
    assert isinstance(judge, ModelReward)
    reference = Model.open(
        str(folder / "sft" / "model"),
        str(folder / "held_out.jsonl"),
        RowSettings(),
        processes,
        reserve=max_new_tokens,
    )
    found = {
        key: answers(
            folder / key / "model",
            folder,
            reference,
            judge,
            samples,
            max_new_tokens,
            seed=world.seed + number,
        )
        for number, key in enumerate(("sft", "ppo", "rloo", "grpo", "dpo", "ppo_no_kl"))
    }
    scale = Scale.between(found["sft"])
    methods = [method(key, folder, one, found["sft"], scale) for key, one in found.items()]
    setting = "learning rate x3, half the steps"
    for row in (m for m in methods if m["key"] in ("ppo", "dpo")):
        other = answers(
            folder / f"{row['key']}_fast" / "model",
            folder,
            reference,
            judge,
            samples,
            max_new_tokens,
            seed=world.seed + 10,
        )
        divergence = statistics.fmean(other.kl)
        row["sensitivity"] = [
            {
                "setting": setting,
                "win_rate": intervals.mean(wins(other, found["sft"]), other.numbers),
                "kl": divergence,
            }
        ]
    return {
        "methods": methods,
        "reward_model": reward_model(folder, world, judge),
        "paths": {key: path(folder / key, scale) for key in ("ppo", "rloo", "grpo", "ppo_no_kl")}
        | {"dpo": ends(found["sft"], found["dpo"], folder, scale)},
        "samples": [
            {
                "prompt": found["sft"].prompts[i * samples],
                "answers": [
                    {
                        "key": k,
                        "text": a.texts[i * samples],
                        "gold": a.gold[i * samples],
                        "proxy": scale(a.proxy[i * samples]),
                    }
                    for k, a in found.items()
                ],
            }
            for i in range(SHOWN)
        ],
        "score_unit": "gold points, 0 to 1",
        "task": (
            "A prompt asks for a short story about an animal, its trait and its wish. The true "
            "value, gold, is the product of: on topic, kind ending, "
            "whole sentences, no repetition, a length near 36 words. No method sees it: they learn "
            "from annotators who follow it noisily."
        ),
        "notes": [
            "The proxy is the reward model's score, put on gold's scale: equal mean and deviation "
            "over the SFT model's answers to the held-out prompts.",
            f"Peak memory is that of the whole process, with Python and torch; {samples} responses "
            "to each held-out prompt, intervals clustered by prompt.",
        ],
    }


@dataclass(frozen=True)
class Scale:
    """Proxy scores in units of gold: equal mean and deviation on the SFT model's answers."""

    shift: float
    factor: float
    origin: float

    @staticmethod
    def between(sft: Answers) -> Scale:
        factor = statistics.pstdev(sft.gold) / max(statistics.pstdev(sft.proxy), 1e-9)
        return Scale(statistics.fmean(sft.proxy), factor, statistics.fmean(sft.gold))

    def __call__(self, proxy: float) -> float:
        return self.origin + (proxy - self.shift) * self.factor


def answers(
    name: Path,
    folder: Path,
    reference: Model,
    judge: ModelReward,
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> Answers:
    """Sample and measure one model."""
    model = Model.open(
        str(name),
        str(folder / "held_out.jsonl"),
        RowSettings(),
        reference.processes,
        reserve=max_new_tokens,
    )
    out = Answers([], [], [], [], [], [], [], 0.0)
    entropy = tokens = 0.0
    for numbers, r in model.answer(
        samples,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        stop=(),
        seed=seed,
        title=name.parent.name,
    ):
        prompts = [p if isinstance(p, str) else p[-1].content for p in r.prompts]
        out.prompts += prompts
        out.numbers += numbers
        out.texts += r.completions
        out.gold += gold(prompts, r.completions)
        out.proxy += judge(r)
        out.lengths += r.trajectory.response_lengths.tolist()
        t = r.trajectory

        def look(rows: list[int], t: Any = t) -> tuple[Tensor, ...]:
            width = int(t.lengths[rows].max())
            ids, mask = t.ids[rows, :width], t.mask[rows, :width]
            mine, theirs = model.policy(ids, mask, entropy=True), reference.policy(ids, mask)
            assert mine.entropy is not None
            return select(kl.estimate(mine.logprobs, theirs.logprobs), mask).sum(
                1
            ), mine.entropy.sum(1)

        divergence, spread = model.processes.map_rows(
            [[int(n)] for n in t.lengths], RunSettings().tokens, None, look
        )
        out.kl += divergence.tolist()
        entropy += float(spread.sum())
        tokens += float(t.mask.sum())
    out.entropy = entropy / tokens
    return out


HELD = {
    "sft": ["policy"],
    "ppo": ["policy", "reference", "critic", "reward model"],
    "ppo_no_kl": ["policy", "reference", "critic", "reward model"],
    "rloo": ["policy", "reference", "reward model"],
    "grpo": ["policy", "reference", "reward model"],
    "dpo": [
        "policy"
        # the reference is the policy before its first step: its log-probabilities are computed once
        # and
        # kept, not its weights
    ],
}


def method(key: str, folder: Path, mine: Answers, sft: Answers, scale: Scale) -> dict[str, Any]:
    """One row of the tables."""
    summary = json.loads((folder / key / "summary.json").read_text(encoding="utf-8"))
    online = "reward model" in HELD[key]
    divergence = intervals.mean(mine.kl, mine.numbers)
    return {
        "key": key,
        "gold": intervals.mean(mine.gold, mine.numbers),
        "proxy": intervals.mean([scale(p) for p in mine.proxy], mine.numbers),
        "length": statistics.fmean(mine.lengths),
        "models_held": HELD[key],
        "train_seconds": summary["train_seconds"],
        "responses_sampled": summary["rows"] if online else 0,
        "reward_model": online,
        "critic": "critic" in HELD[key],
        "online": online,
        "win_rate": None if key == "sft" else intervals.mean(wins(mine, sft), mine.numbers),
        "kl": None if key == "sft" else divergence,
        "kl_token": None if key == "sft" else sum(mine.kl) / sum(mine.lengths),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "distinct": distinct(mine.texts),
        "entropy": mine.entropy,
        "report": f"{key}/report.html",
    }


def wins(mine: Answers, sft: Answers) -> list[float]:
    """1 where an answer is worth more than SFT's, by gold, one half at a tie."""
    return [
        1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(mine.gold, sft.gold, strict=True)
    ]


def distinct(texts: Sequence[str]) -> float:
    """Distinct-2: the share of different ones among all pairs of neighbouring words."""
    pairs = [pair for text in texts for pair in zip(words(text), words(text)[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def reward_model(folder: Path, world: World, judge: ModelReward) -> dict[str, Any]:
    """Held-out accuracy beside the best that any model could reach on labels this noisy, and how
    far its confidence can be trusted.
    """
    evaluation = json.loads((folder / "reward" / "summary.json").read_text(encoding="utf-8"))[
        "evaluation"
    ]
    rows = [
        json.loads(line)
        for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    from ..data.prepare import split, text_of
    from ..data.row_types import Message

    keys = [text_of((Message("user", r["prompt"][-1]["content"]),)) for r in rows]
    _, held = split(list(dict.fromkeys(keys)), RowSettings().held_out, world.seed)
    names = [list(dict.fromkeys(keys))[i] for i in held]
    mine = [r for r, k in zip(rows, keys, strict=True) if k in set(names)]
    asked = annotator(world.seed)
    triples = [
        (r["prompt"][-1]["content"], r["chosen"][-1]["content"], r["rejected"][-1]["content"])
        for r in mine
    ]
    scores = judge.score_ids(
        [
            judge.renderer.completion((Message("user", p),), (Message("assistant", text),), "").ids
            for p, *both in triples
            for text in both
        ]
    )
    gaps = [scores[i] - scores[i + 1] for i in range(0, len(scores), 2)]
    length_only = next(v for k, v in evaluation.items() if k.startswith("length"))
    return {
        "accuracy": evaluation["accuracy on held-out pairs"],
        "bayes": asked.bayes_accuracy(triples),
        "length_only": length_only,
        "comparisons": len(rows) - len(mine),
        "reliability": reliability(gaps),
        "report": "reward/report.html",
    }


def reliability(gaps: Sequence[float], bins: int = 8) -> list[dict[str, float]]:
    """Predicted against observed preference, from the gaps chosen - rejected. By symmetry only p >=
    1/2 is shown: a pair says p of one order.
    """
    groups: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for gap in gaps:
        p = 1 / (1 + math.exp(-abs(gap)))
        groups[min(bins - 1, int((p - 0.5) * 2 * bins))].append((p, float(gap > 0)))
    out = []
    for group in groups:
        if group:
            observed = intervals.wilson(sum(o for _, o in group), len(group))
            out.append(
                {
                    "predicted": statistics.fmean(p for p, _ in group),
                    "observed": observed["value"],
                    "low": observed["low"],
                    "high": observed["high"],
                    "n": len(group),
                }
            )
    return out


def path(run: Path, scale: Scale) -> list[dict[str, float]]:
    """A PPO run from step to step: KL, proxy and gold of the responses it learned from."""
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        {
            "step": r["step"],
            "kl": max(0.0, r["objective/kl"]),
            "proxy": scale(r["reward/model"]),
            "gold": r["reward/gold"],
        }
        for r in lines
        if "objective/kl" in r
    ]


def ends(sft: Answers, mine: Answers, folder: Path, scale: Scale) -> list[dict[str, float]]:
    """DPO samples nothing while it trains: its way is known at its two ends."""
    steps = json.loads((folder / "dpo" / "summary.json").read_text(encoding="utf-8"))["steps"]
    return [
        {
            "step": step,
            "kl": k,
            "proxy": scale(statistics.fmean(a.proxy)),
            "gold": statistics.fmean(a.gold),
        }
        for step, k, a in ((0, 0.0, sft), (steps, max(0.0, statistics.fmean(mine.kl)), mine))
    ]


__all__ = ["compare"]
