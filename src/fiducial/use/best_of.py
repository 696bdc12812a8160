"""Best of n: sample n responses for each answer and keep the one with the highest score.

Nothing is trained, and a bound on the KL divergence from the model is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import intervals
from ..core.best_of_n import kl_bound
from ..errors import InputError, RunError
from ..rewards.load import FORMS, load_reward
from ..rewards.process import Aggregate
from ..rewards.types import Responses, Scorer
from ..settings import RunSettings, WorkerSettings
from ..train.processes import Processes


def best_rows(scores: Sequence[float | None], n: int) -> list[int]:
    """For each n consecutive scores the place of the highest.

    Among equal scores the first drawn wins, which keeps the model's own proportions among them. A
    response without a score is never chosen where another has one.
    """

    def height(i: int) -> float:
        score = scores[i]
        return -math.inf if score is None else score

    return [max(range(start, start + n), key=height) for start in range(0, len(scores), n)]


@dataclass
class BestOf:
    """Keeps the best of each n responses, and the scores of all that were drawn."""

    n: int
    name: str
    scorer: Scorer
    temperature: float
    drawn: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    """The number of the prompt of each response that was kept."""
    drawn_prompts: list[int] = field(default_factory=list)
    """The number of the prompt of each score in `drawn`."""

    @staticmethod
    def open(
        n: int | None,
        score: str | None,
        aggregate: Aggregate | None,
        temperature: float,
        processes: Processes,
        worker: WorkerSettings | None = None,
        *,
        trust: bool = False,
    ) -> BestOf | None:
        """The choice that --best-of, --score and --aggregate ask for; None if none is given.

        Args:
            worker: where a function of a Python file runs; None: as by default.

        Raises:
            InputError: one of the settings needs another, the score only compares responses, or all
                n responses would be the same.
        """
        if n is None and score is None and aggregate is None:
            return None
        if score is None:
            flag = f"--best-of {n}" if n is not None else f"--aggregate {aggregate}"
            raise InputError(f"{flag} needs --score, by which the best is chosen: {FORMS}")
        if n is None:
            raise InputError(
                "--score chooses the best of several responses and needs --best-of N, the number "
                "drawn for each answer"
            )
        if n > 1 and temperature == 0:
            raise InputError(
                f"--best-of {n} with --temperature 0: all {n} responses would be the same, the "
                "most likely one; give a temperature above 0, such as --temperature 1"
            )
        scorer = load_reward(
            score, RunSettings(), processes, "--score", aggregate, worker=worker, trust=trust
        )
        return BestOf(n, score, scorer, temperature)

    def keep(self, numbers: list[int], responses: Responses) -> tuple[list[int], Responses]:
        """The best of each n consecutive responses. Their scores are added to `kept`.

        Responses that the reward does not judge are passed over.

        Args:
            numbers: for each response the number of its prompt.

        Raises:
            RunError: a score is not finite, or none of the n responses to a prompt has one.
        """
        scores = self.scorer.score(responses).scores
        if any(s is not None and not math.isfinite(s) for s in scores):
            raise RunError(
                f"{self.name} gave a score that is not finite, so there is no best response: mend "
                "the reward, or give another one with --score"
            )
        best = best_rows(scores, self.n)
        for i in best:
            if scores[i] is None:
                raise RunError(
                    f"{responses.where[i]}: {self.name} judges none of the {self.n} responses to "
                    "this row, so there is no best one: give another reward with --score, or "
                    "remove the row"
                )
        judged = [i for i, s in enumerate(scores) if s is not None]
        self.drawn += [s for s in scores if s is not None]
        self.drawn_prompts += [numbers[i] for i in judged]
        self.kept += [s for i in best if (s := scores[i]) is not None]
        self.prompts += (chosen := [numbers[i] for i in best])
        return chosen, responses.take(best)

    def since(self, drawn: int, kept: int) -> dict[str, list[Any]]:
        """What was added after the first `drawn` and `kept` scores: plain values, for a file."""
        return {
            "drawn": self.drawn[drawn:],
            "drawn_prompts": self.drawn_prompts[drawn:],
            "kept": self.kept[kept:],
            "prompts": self.prompts[kept:],
        }

    def recall(self, added: dict[str, list[Any]]) -> None:
        """Add what `since` gave in a command that was interrupted."""
        for name, values in added.items():
            getattr(self, name).extend(values)

    def means(self) -> dict[str, dict[str, float]]:
        """The mean score, with its interval, of all responses drawn and of those kept."""
        return {
            "drawn_score": intervals.mean(self.drawn, self.drawn_prompts),
            "kept_score": intervals.mean(self.kept, self.prompts),
        }

    def bound(self) -> str:
        """The bound on the KL divergence from the model, as a clause."""
        at = "" if self.temperature == 1 else f" at temperature {self.temperature:g}"
        return (
            f"the best of {self.n} is at most {kl_bound(self.n):.3g} nats per response from the "
            f"model{at} (log n - (n - 1)/n)"
        )

    def summary(self) -> str:
        """The mean scores and the bound, as one line for the terminal."""

        def shown(m: dict[str, Any]) -> str:
            return f"{m['value']:.4g} [{m['low']:.4g}, {m['high']:.4g}]"

        means = self.means()
        return (
            f"mean score {shown(means['drawn_score'])} of all {len(self.drawn):,} drawn, "
            f"{shown(means['kept_score'])} of the {len(self.kept):,} kept; "
            f"{self.bound()}"
        )
