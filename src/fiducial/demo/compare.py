"""Compares the demo's models on held-out prompts: measures everything that the page shows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from .. import verbs
from ..core import intervals, kl
from ..core.reductions import select
from ..data.prepare import split, text_of
from ..data.row_types import Message, SampledIds
from ..rewards.load import load_reward_model
from ..rewards.model import ModelReward
from ..rollout.sampling import sampling_params
from ..rollout.trajectory import Trajectory
from ..settings import RowSettings, RunSettings
from ..train.processes import Processes
from ..use.answering import Model
from .grammar import words
from .results import (
    Answer,
    Comparison,
    Measured,
    MethodResult,
    PathPoint,
    Reliability,
    RewardModelResult,
    Sample,
    Sensitivity,
)
from .world import StoryWorld, annotator, gold

SHOWN = 5
"""Prompts whose answers the page shows."""
TASK = (
    "A prompt asks for a short story about an animal, its trait and its wish. The true value, "
    "gold, is the product of five parts: on topic, kind ending, whole sentences, no repetition, a "
    "length near 36 words. No method sees it: they learn from annotators who follow it noisily."
)


@dataclass(frozen=True)
class Entrant:
    """A run that takes part in the comparison.

    key: its folder. models_held: the models in memory while it trained. changed: folders of the
    same method with one setting changed, and which.
    """

    key: str
    models_held: tuple[str, ...]
    changed: Mapping[str, str] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        """Whether it learned from responses of its own, which the reward model scored."""
        return "reward model" in self.models_held


@dataclass
class Answers:
    """One model's responses to the held-out prompts and their values."""

    prompts: list[str]
    numbers: list[int]
    texts: list[str]
    gold: list[float]
    proxy: list[float]
    lengths: list[int]
    kl: list[float]
    entropy: float


@dataclass(frozen=True)
class Scale:
    """Puts proxy scores in the units of gold: with the same mean and standard deviation on the SFT
    model's answers.
    """

    shift: float
    factor: float
    origin: float

    @staticmethod
    def between(sft: Answers) -> Scale:
        factor = statistics.pstdev(sft.gold) / max(statistics.pstdev(sft.proxy), 1e-9)
        return Scale(statistics.fmean(sft.proxy), factor, statistics.fmean(sft.gold))

    def __call__(self, proxy: float) -> float:
        return self.origin + (proxy - self.shift) * self.factor


@dataclass(frozen=True)
class Examiner:
    """What every model is measured with: the SFT model, the reward model and the settings."""

    folder: Path
    reference: Model
    judge: ModelReward
    samples: int
    max_new_tokens: int

    @staticmethod
    def open(folder: Path, samples: int, max_new_tokens: int) -> Examiner:
        processes = Processes()
        judge = load_reward_model(str(folder / "reward" / "model"), RunSettings(), processes)
        reference = _open(folder, "sft", processes, max_new_tokens)
        return Examiner(folder, reference, judge, samples, max_new_tokens)

    def answers(self, key: str, seed: int) -> Answers:
        """Samples from one model and measures the responses."""
        model = _open(self.folder, key, self.reference.processes, self.max_new_tokens)
        out = Answers([], [], [], [], [], [], [], 0.0)
        entropy = tokens = 0.0
        params = sampling_params(model.renderer, self.max_new_tokens)
        for numbers, r in model.answer(self.samples, params, seed=seed, title=key):
            prompts = [p if isinstance(p, str) else p[-1].content for p in r.prompts]
            out.prompts += prompts
            out.numbers += numbers
            out.texts += r.completions
            out.gold += gold(prompts, r.completions)
            out.proxy += self.judge.score(r).floats()
            out.lengths += r.trajectory.response_lengths.tolist()
            divergence, total = self._from_sft(model, r.trajectory)
            out.kl += divergence.tolist()
            entropy += float(total.sum())
            tokens += float(r.trajectory.mask.sum())
        out.entropy = entropy / tokens
        return out

    def _from_sft(self, model: Model, t: Trajectory) -> tuple[Tensor, Tensor]:
        """KL from the SFT model and entropy of each response, in nats."""

        def compute(rows: list[int]) -> tuple[Tensor, ...]:
            ids, mask = t.slice_rows(rows, model.processes.device)
            mine, theirs = model.policy(ids, mask, entropy=True), self.reference.policy(ids, mask)
            assert mine.entropy is not None
            per_token = select(kl.estimate(mine.logprobs, theirs.logprobs), mask)
            return per_token.sum(1), mine.entropy.sum(1)

        lengths = [[int(n)] for n in t.lengths]
        divergence, entropy = model.processes.map_rows(lengths, RunSettings().tokens, None, compute)
        return divergence, entropy


def compare(
    folder: Path,
    world: StoryWorld,
    entrants: Sequence[Entrant],
    samples: int,
    max_new_tokens: int,
) -> Comparison:
    """Measures the entrants; the one with the key `sft` is what the others started from."""
    examiner = Examiner.open(folder, samples, max_new_tokens)
    found = {e.key: examiner.answers(e.key, world.seed + i) for i, e in enumerate(entrants)}
    sft = found["sft"]
    scale = Scale.between(sft)
    changed = {
        key: examiner.answers(key, world.seed + 10) for one in entrants for key in one.changed
    }
    return Comparison(
        methods=tuple(result(e, folder, found[e.key], sft, scale, changed) for e in entrants),
        reward_model=reward_model(folder, world, examiner.judge),
        paths={
            e.key: path(folder / e.key, scale)
            if e.online
            else ends(sft, found[e.key], folder / e.key, scale)
            for e in entrants
            if e.key != "sft"
        },
        samples=tuple(
            Sample(
                sft.prompts[i],
                tuple(
                    Answer(key, a.texts[i], a.gold[i], scale(a.proxy[i]))
                    for key, a in found.items()
                ),
            )
            for i in range(0, SHOWN * samples, samples)
        ),
        score_unit="gold points, 0 to 1",
        task=TASK,
        notes=(
            "The proxy is the reward model's score on the scale of gold: it has the same mean and "
            "standard deviation over the SFT model's answers to the held-out prompts.",
            "Peak memory is that of the whole process, with Python and torch. Every model gave "
            f"{samples} responses to each held-out prompt; intervals are clustered by prompt.",
        ),
    )


def result(
    entrant: Entrant,
    folder: Path,
    mine: Answers,
    sft: Answers,
    scale: Scale,
    changed: Mapping[str, Answers],
) -> MethodResult:
    """One row of the tables."""
    key, itself = entrant.key, entrant.key == "sft"
    summary = _summary(folder / key)
    return MethodResult(
        key=key,
        method=name_of(folder / key),
        gold=Measured.of(intervals.mean(mine.gold, mine.numbers)),
        proxy=Measured.of(intervals.mean([scale(p) for p in mine.proxy], mine.numbers)),
        win_rate=None if itself else _win_rate(mine, sft),
        kl=None if itself else Measured.of(intervals.mean(mine.kl, mine.numbers)),
        kl_token=None if itself else sum(mine.kl) / sum(mine.lengths),
        length=statistics.fmean(mine.lengths),
        models_held=entrant.models_held,
        train_seconds=summary["train_seconds"],
        responses_sampled=summary["rows"] if entrant.online else 0,
        online=entrant.online,
        peak_memory_bytes=summary["peak_memory_bytes"],
        distinct=distinct(mine.texts),
        entropy=mine.entropy,
        sensitivity=tuple(
            Sensitivity(
                setting, _win_rate(changed[other], sft), statistics.fmean(changed[other].kl)
            )
            for other, setting in entrant.changed.items()
        ),
        report=f"{key}/report.html",
    )


def name_of(run: Path) -> str:
    """The run's name in the table of methods: that of its folder if the table knows it, as it knows
    variants, else the method in its config.yaml.
    """
    if verbs.method(run.name) is not None:
        return run.name
    return str(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["method"])


def wins(mine: Answers, sft: Answers) -> list[float]:
    """1 where an answer has more gold than SFT's, one half at a tie, 0 where it has less."""
    return [
        1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(mine.gold, sft.gold, strict=True)
    ]


def distinct(texts: Sequence[str]) -> float:
    """Distinct-2: the share of different ones among all pairs of neighboring words."""
    pairs = [pair for text in texts for pair in zip(words(text), words(text)[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def reward_model(folder: Path, world: StoryWorld, judge: ModelReward) -> RewardModelResult:
    """Held-out accuracy beside the best that any model could reach on labels this noisy, and how
    far its confidence can be trusted.
    """
    evaluation = _summary(folder / "reward")["evaluation"]
    rows = _lines(folder / "pairs.jsonl")
    prompts = [text_of((Message("user", r["prompt"][-1]["content"]),)) for r in rows]
    different = list(dict.fromkeys(prompts))
    _, held = split(different, RowSettings().held_out, world.seed)
    names = {different[i] for i in held}
    held_rows = [r for r, prompt in zip(rows, prompts, strict=True) if prompt in names]
    triples = [
        tuple(str(r[column][-1]["content"]) for column in ("prompt", "chosen", "rejected"))
        for r in held_rows
    ]
    scores = judge.score_ids(
        [
            judge.reader.renderer.completion(
                (Message("user", p),),
                (Message("assistant", text),),
                "",
                SampledIds(tuple(r[f"{side}_ids"]), r["tokenizer"]),
            ).ids
            for r, (p, *both) in zip(held_rows, triples, strict=True)
            for side, text in zip(("chosen", "rejected"), both, strict=True)
        ]
    )
    gaps = [scores[i] - scores[i + 1] for i in range(0, len(scores), 2)]
    length_only = next(v for k, v in evaluation.items() if k.startswith("length"))
    return RewardModelResult(
        accuracy=Measured.of(evaluation["accuracy on held-out pairs"]),
        bayes=annotator(world.seed).bayes_accuracy([(p, a, b) for p, a, b in triples]),
        length_only=Measured.of(length_only),
        comparisons=len(rows) - len(triples),
        reliability=reliability(gaps),
        report="reward/report.html",
    )


def reliability(gaps: Sequence[float], bins: int = 8) -> tuple[Reliability, ...]:
    """Predicted against observed preference, from the gaps chosen - rejected. Only p >= 1/2 is
    shown: the pair in the other order has 1 - p.
    """
    groups: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for gap in gaps:
        p = 1 / (1 + math.exp(-abs(gap)))
        groups[min(bins - 1, int((p - 0.5) * 2 * bins))].append((p, float(gap > 0)))
    out = []
    for group in groups:
        if group:
            seen = Measured.of(intervals.wilson(sum(o for _, o in group), len(group)))
            predicted = statistics.fmean(p for p, _ in group)
            out.append(Reliability(predicted, seen.value, seen.low, seen.high, seen.n))
    return tuple(out)


def path(run: Path, scale: Scale) -> tuple[PathPoint, ...]:
    """An online run from step to step: KL, proxy and gold of the responses it learned from."""
    return tuple(
        PathPoint(
            step=r["step"],
            kl=max(0.0, r["objective/kl"]),
            proxy=scale(r["reward/model"]),
            gold=r["reward/gold"],
        )
        for r in _lines(run / "metrics.jsonl")
        if "objective/kl" in r
    )


def ends(sft: Answers, mine: Answers, run: Path, scale: Scale) -> tuple[PathPoint, ...]:
    """An offline method samples nothing while it trains: only both ends of its way are known."""
    both = ((0, 0.0, sft), (_summary(run)["steps"], max(0.0, statistics.fmean(mine.kl)), mine))
    return tuple(
        PathPoint(step, far, scale(statistics.fmean(a.proxy)), statistics.fmean(a.gold))
        for step, far, a in both
    )


def _open(folder: Path, key: str, processes: Processes, max_new_tokens: int) -> Model:
    return Model.open(
        str(folder / key / "model"),
        str(folder / "held_out.jsonl"),
        RowSettings(),
        processes,
        max_new_tokens=max_new_tokens,
    )


def _win_rate(mine: Answers, sft: Answers) -> Measured:
    return Measured.of(intervals.mean(wins(mine, sft), mine.numbers))


def _summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
