"""What the rewards say of real samples of the model: can anything be learned from them?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from ..data.findings import Finding, Level
from ..methods.distill import Ready
from ..methods.setup import PreparedOnline, before_training
from ..rewards.types import Responses, Scored, TrainerState
from ..rollout.sampling import Keys, sample_all
from ..rollout.trajectory import Trajectory
from ..train.processes import Processes

PROMPTS, GROUP = 8, 8
"""At most so many prompts, and so many responses to each."""
SECONDS = 12.0
"""Time for the samples; a slower model is sampled with fewer prompts."""


@dataclass(frozen=True)
class Sampled:
    """Samples of the model. prompts: the number of the prompt of each. seconds: it took."""

    trajectory: Trajectory
    prompts: list[int]
    texts: list[str]
    seconds: float


def sample(
    ready: PreparedOnline | Ready, settings: Any, processes: Processes, group: int
) -> Sampled:
    """Responses to prompts from all over the rows, `group` to each."""
    prompts = ready.prompts if isinstance(ready, PreparedOnline) else ready.train.items
    count = min(PROMPTS, len(prompts))
    numbers = [i * len(prompts) // count for i in range(count)]

    def some(rows: Sequence[int]) -> tuple[Trajectory, list[int], float]:
        chosen = [i for i in rows for _ in range(group)]
        keys = Keys(settings.seed, 0, chosen, [k for _ in rows for k in range(group)])
        start = time.monotonic()
        asked = [prompts[i] for i in chosen]
        out = sample_all(ready.sampler, asked, ready.params, keys, processes)
        return out, chosen, time.monotonic() - start

    ready.sampler.sync(ready.roles.policy, 0)
    trajectory, chosen, seconds = some(numbers[: max(1, count // 4)])
    if seconds * count / max(1, count // 4) < SECONDS:
        trajectory, chosen, seconds = some(numbers)
    texts = [ready.renderer.decode(ids) for ids in trajectory.responses()]
    return Sampled(trajectory, chosen, texts, seconds)


def sample_findings(sampled: Sampled, limit: int) -> list[Finding]:
    """What is to be seen in the samples without a reward."""
    found = []
    count = len(sampled.texts)
    cut = count - int(sampled.trajectory.finished.sum())
    if cut > 0.05 * count:
        many = cut >= 0.5 * count
        found.append(
            Finding(
                "warning" if many else "note",
                "responses-cut",
                f"{cut} of {count} sampled responses do not end within --max-new-tokens {limit}",
                "raise --max-new-tokens, name the token that ends an answer of this model with "
                "--stop, or teach it to end with `fiducial sft` first",
                {"cut": cut, "of": count},
            )
        )
    groups = grouped(sampled.prompts, sampled.texts)
    same = sum(len(set(g)) == 1 for g in groups if len(g) > 1)
    several = sum(len(g) > 1 for g in groups)
    if several and same >= 0.5 * several:
        found.append(
            Finding(
                "warning",
                "same-responses",
                f"for {same} of {several} prompts all sampled responses are the same text, so "
                "nothing can be compared",
                "raise --temperature, or take harder prompts",
                {"same": same, "of": several},
            )
        )
    empty = sum(not text.strip() for text in sampled.texts)
    if empty >= 0.5 * count:
        found.append(
            Finding(
                "warning",
                "empty-responses",
                f"{empty} of {count} sampled responses are empty: the model ends at once",
                "look at the prompts as they are shown above: a chat model wants messages",
                {"empty": empty, "of": count},
            )
        )
    return found


def reward_findings(
    ready: PreparedOnline, settings: Any, sampled: Sampled
) -> tuple[list[Finding], dict[str, Any]]:
    """The findings about the rewards of these samples, and the numbers behind them.

    Raises:
        InputError: a reward fails.
    """
    state = TrainerState(0, ready.steps, 0.0)
    rows = [ready.rows[i] for i in sampled.prompts]
    responses = Responses.of(rows, sampled.trajectory, ready.renderer, state)
    start = time.monotonic()
    with before_training():
        scored = ready.rewards.score(responses)
    seconds = time.monotonic() - start
    found = _not_judged(scored)
    count = len(sampled.texts)
    numbers: dict[str, Any] = {"responses": count, "seconds": seconds}
    if any(s is None for s in scored.scores):
        return found, numbers
    scores = scored.floats()
    mean, std = fmean(scores), pstdev(scores)
    numbers |= {"mean": mean, "std": std, "min": min(scores), "max": max(scores)}
    numbers["different"] = len(set(scores))
    if seconds < SECONDS:
        with before_training():
            again = ready.rewards.score(responses)
        found += _noise(scores, again, std)
    flat = _constant(scores, sampled)
    found += flat or _spread(scores, sampled, numbers)
    if not flat:
        found += _length(scores, sampled, numbers) + _scale(settings, std, numbers)
        found += _clipped(settings, scores)
    told = (
        f"{count} responses: mean {mean:.4g}, standard deviation {std:.3g}, "
        f"{numbers['different']} different values, {seconds / count * 1000:.3g} ms per response"
    )
    return [*found, Finding("note", "reward-scale", told, numbers=dict(numbers))], numbers


def grouped(prompts: Sequence[int], values: Sequence[Any]) -> list[list[Any]]:
    """The values of each prompt."""
    groups: dict[int, list[Any]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        groups.setdefault(prompt, []).append(value)
    return list(groups.values())


def _differ(values: Sequence[float]) -> bool:
    """Whether scores differ by more than the methods take for rounding."""
    return max(values) - min(values) > 1e-6 * (1 + max(map(abs, values)))


def _not_judged(scored: Scored) -> list[Finding]:
    found = []
    whole = len(scored.scores)
    if none := sum(s is None for s in scored.scores):
        found.append(
            Finding(
                "error",
                "reward-judges-not",
                f"no reward judges {none} of {whole} sampled responses (all returned None): the "
                "run would stop at the first of them",
                "add a reward that does, or remove such rows",
                {"none": none, "of": whole},
            )
        )
    for name, part in scored.parts.items():
        none = sum(s is None for s in part)
        if none and len(scored.parts) > 1:
            told = f"{name} returns None for {none} of {whole} sampled responses"
            level: Level = "warning" if none == whole else "note"
            change = "look at the function and its columns" if none == whole else ""
            numbers = {"none": none, "of": whole}
            found.append(Finding(level, "reward-part-judges-not", told, change, numbers))
    return found


def _noise(scores: list[float], again: Scored, std: float) -> list[Finding]:
    gaps = [abs(a - b) for a, b in zip(scores, again.scores, strict=True) if b is not None]
    if max(gaps, default=0.0) <= 1e-6 * (1 + max(map(abs, scores))):
        return []
    gap = fmean(gaps)
    return [
        Finding(
            "warning" if gap > 0.5 * std else "note",
            "reward-not-deterministic",
            f"the same responses scored twice differ by {gap:.3g} on average (standard deviation "
            f"over the responses: {std:.3g})",
            "remove the randomness, or average several calls: noise is learned from too",
            {"gap": gap, "std": std},
        )
    ]


def _constant(scores: list[float], sampled: Sampled) -> list[Finding]:
    if _differ(scores) or len(set(sampled.texts)) == 1:
        return []
    value, count = scores[0], len(scores)
    told = (
        f"all {count} sampled responses, {len(set(sampled.texts))} of them different, score "
        f"{value:.4g}: advantages would be 0, and nothing is learned from the reward"
    )
    if value == 0:
        told += " as long as that stays so"
        change = "look at the reward function; if it is right, take easier prompts or larger groups"
    else:
        change = "look at the reward function, which does not tell responses apart"
    level: Level = "warning" if value == 0 else "error"
    return [Finding(level, "reward-constant", told, change, {"value": value, "of": count})]


def _spread(scores: list[float], sampled: Sampled, numbers: dict[str, Any]) -> list[Finding]:
    several = [g for g in grouped(sampled.prompts, scores) if len(g) > 1]
    texts = [g for g in grouped(sampled.prompts, sampled.texts) if len(g) > 1]
    flat = sum(not _differ(g) for g in several)
    numbers["groups"], numbers["groups_without_spread"] = len(several), flat
    if not flat:
        return []
    apart = sum(len(set(g)) > 1 for g in texts)
    about = {"flat": flat, "of": len(several)}
    if flat == len(several) and apart >= 3 and len(set(scores)) > 2:
        return [
            Finding(
                "error",
                "reward-ignores-the-response",
                f"the reward depends on the prompt alone: for each of {flat} prompts all different "
                "responses score the same, so no response is better than another",
                "look at the reward function: it may read the wrong column or argument",
                about,
            )
        ]
    if flat < 0.5 * len(several):
        return []
    return [
        Finding(
            "warning",
            "groups-without-spread",
            f"for {flat} of {len(several)} prompts all responses score the same; such groups have "
            "advantages of 0 where responses to one prompt are compared (grpo, rloo)",
            "take prompts of medium difficulty, larger groups (--group-size), a finer reward, or "
            "--resample",
            about,
        )
    ]


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    x, y = fmean(a), fmean(b)
    spread = math.sqrt(sum((i - x) ** 2 for i in a) * sum((j - y) ** 2 for j in b))
    if not spread:
        return 0.0
    return sum((i - x) * (j - y) for i, j in zip(a, b, strict=True)) / spread


def _length(scores: list[float], sampled: Sampled, numbers: dict[str, Any]) -> list[Finding]:
    if len(scores) < 8:
        return []
    tokens = [float(n) for n in sampled.trajectory.response_lengths]
    letters = [float(len(text)) for text in sampled.texts]
    found = max(correlation(scores, tokens), correlation(scores, letters), key=abs)
    found = max(found, correlation(scores, letters), key=abs)
    numbers["length_correlation"] = found
    if abs(found) <= 0.9:
        return []
    way = "longer" if found > 0 else "shorter"
    return [
        Finding(
            "warning",
            "reward-is-length",
            f"the reward follows the length of the response (correlation {found:.2f} over "
            f"{len(scores)} responses): the model learns to answer {way}",
            "compare responses of equal length in the reward, unless length is what you want",
            {"correlation": found, "of": len(scores)},
        )
    ]


def _scale(settings: Any, std: float, numbers: dict[str, Any]) -> list[Finding]:
    """How much KL a standard deviation of the reward pays for."""
    beta = settings.parts.beta if hasattr(settings, "parts") else settings.beta
    scaled = hasattr(settings, "parts") and settings.parts.advantage == "grpo"
    normal = scaled or settings.score.normalise != "none"
    if not beta:
        return []
    nats = (1.0 if normal else std) / beta
    numbers["nats_per_std"] = nats
    unit = "one standard deviation of the reward pays for"
    told = f"with --beta {beta:g} {unit} {nats:.3g} nats of KL per response"
    about = {"beta": beta, "std": std, "nats": nats}
    if nats < 0.2:
        change = "lower --beta, or scale the reward up (--reward-weights, --score.normalise)"
        told += ": the penalty outweighs the reward"
        return [Finding("warning", "beta-outweighs-reward", told, change, about)]
    if nats > 2000:
        change = "raise --beta, or scale the reward down (--reward-weights, --score.normalise)"
        told += ": the penalty hardly counts"
        return [Finding("warning", "beta-hardly-counts", told, change, about)]
    return [Finding("note", "kl-price", told, numbers=about)]


def _clipped(settings: Any, scores: list[float]) -> list[Finding]:
    limit = settings.score.clip
    if limit is None or settings.score.normalise != "none":
        return []
    beyond = sum(abs(s) > limit for s in scores)
    if beyond < 0.5 * len(scores):
        return []
    return [
        Finding(
            "warning",
            "reward-clipped",
            f"{beyond} of {len(scores)} scores lie beyond --score.clip {limit:g} and become equal",
            "raise --score.clip, or normalize first (--score.normalise)",
            {"clipped": beyond, "of": len(scores)},
        )
    ]
