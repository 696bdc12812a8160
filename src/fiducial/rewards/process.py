r"""Process rewards: a score for each step of a response, read at the end of the step. Lightman et
al. 2023 (arXiv 2305.20050).

In reinforcement learning a step is rewarded at its last token, with the amount by which it changes
the score, where the score of no steps is 0:

.. math:: r_t = PRM(x, y_{\le t}) - PRM(x, y_{\le t-1})

The rewards of a response therefore add up to the score of the whole response. If the scores
themselves were the rewards, responses with many steps would be rewarded for their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from ..data.render import Rendered, Renderer
from ..data.row_types import PromptRow
from ..data.steps import Steps
from ..models.roles import ScoreModel
from ..settings import Tokens
from ..train.processes import Processes
from .reading import Reader
from .types import Responses, Scored

Aggregate = Literal["last", "min", "product"]
AGGREGATES: tuple[Aggregate, ...] = ("last", "min", "product")


def aggregate(steps: Sequence[float], how: Aggregate) -> float:
    """The score of a solution, from the probabilities (in (0, 1)) that each step is right.

    Args:
        how: "product": the probability that all steps are right if they are independent, as in
            Lightman et al. 2023; solutions with many steps score lower. "min": the score of the
            weakest step, about as good in their comparison. "last": the score of the last step,
            as an outcome reward model would give.

    Raises:
        ValueError: there is no step, or `how` is none of these.
    """
    if not steps:
        raise ValueError("a solution without steps has no score")
    if how == "last":
        return steps[-1]
    if how == "min":
        return min(steps)
    if how == "product":
        return math.prod(steps)
    raise ValueError(f"how must be one of {', '.join(AGGREGATES)}, not {how!r}")


def differences(steps: Sequence[float], how: Aggregate = "last") -> list[float]:
    """The amount that each step adds to the score of the steps before it; no steps score 0.

    The amounts add up to `aggregate(steps, how)`.
    """
    totals = [aggregate(steps[: k + 1], how) for k in range(len(steps))]
    return [now - before for now, before in zip(totals, [0.0, *totals[:-1]], strict=True)]


class ProcessReward:
    """A process reward model.

    The score of a step is sigma(logit) at its end. The score of a response combines those of its
    steps, as `aggregate` in the model's config says.
    """

    def __init__(
        self,
        name: str,
        scorer: ScoreModel,
        renderer: Renderer,
        tokens: Tokens,
        processes: Processes,
    ) -> None:
        self.name, self.scorer, self.tokens, self.processes = name, scorer, tokens, processes
        self.reader = Reader(name, renderer)
        steps = scorer.facts.steps
        assert steps is not None, f"{name} is no process reward model"
        self.how: Aggregate = cast(Aggregate, steps.aggregate)
        self.finder = Steps(renderer, steps.separator)
        self._policy: tuple[Renderer, Steps] | None = None

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Refuse prompts that the chat template cannot render, and a model that would be computed
        otherwise than in plain transformers.
        """
        self.reader.check_rows(rows)
        self.reader.check_model(self.scorer, rows)

    def steps(self, batch: Responses) -> list[list[float]]:
        """For each response the scores of its steps, each in (0, 1)."""
        rows = self.reader.read(batch)
        return self.score_ids([r.ids for r in rows], [self._ends(r) for r in rows])

    def _ends(self, row: Rendered) -> list[int]:
        """The columns with which the steps end; a response without a token ends with its prompt."""
        columns = [t for t, mine in enumerate(row.mask) if mine]
        if not columns:
            return [len(row) - 1]
        return [columns[k] for k in self.finder.ends([row.ids[t] for t in columns])]

    def score_ids(
        self, rows: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """sigma(logit) of token sequences at the tokens whose numbers are in `ends`."""
        width = max(len(r) for r in rows)

        def compute(chosen: list[int]) -> tuple[Tensor, ...]:
            wide = max(len(rows[i]) for i in chosen)
            ids, after = (
                torch.zeros((len(chosen), wide), dtype=torch.long),
                torch.zeros((len(chosen), wide), dtype=torch.bool),
            )
            for k, i in enumerate(chosen):
                ids[k, : len(rows[i])] = torch.tensor(rows[i])
                after[k, list(ends[i])] = True
            return (
                self.scorer(ids.to(self.processes.device), after=after.to(self.processes.device)),
            )

        (scores,) = self.processes.map_rows([[len(r)] for r in rows], self.tokens, width, compute)
        return [scores[i, list(e)].double().sigmoid().tolist() for i, e in enumerate(ends)]

    def score(self, responses: Responses) -> Scored:
        """The score of each response, in (0, 1), and the amount that each of its steps adds to it.

        The amount of a step is placed at its last token. If the policy did not choose that token,
        it is placed at the last token before it that the policy chose. The amounts of a response
        add up to its score.

        If the policy has another tokenizer, the steps end at other tokens and are matched by their
        number. If fewer ends are found among the policy's tokens, the last one gets the rest.
        """
        scored, trajectory = self.steps(responses), responses.trajectory
        earned = torch.zeros(trajectory.ids.shape, dtype=torch.float64)
        finder = self._finder_of(responses.renderer)
        chosen = trajectory.mask.tolist()
        both = zip(scored, trajectory.responses(ending=True), strict=True)
        for i, (steps, response) in enumerate(both):
            start, ends = int(trajectory.prompt_lengths[i]), finder.ends(response)
            for k, value in enumerate(differences(steps, self.how)):
                column = start + ends[min(k, len(ends) - 1)]
                earned[i, _chosen_column(chosen[i], column)] += value
        scores = [aggregate(steps, self.how) for steps in scored]
        return Scored(scores, {self.name: scores}, earned)

    def _finder_of(self, renderer: Renderer) -> Steps:
        """Finds steps in the policy's tokens."""
        if self._policy is None or self._policy[0] is not renderer:
            self._policy = renderer, Steps(renderer, self.finder.separator)
        return self._policy[1]


def _chosen_column(mask: Sequence[bool], column: int) -> int:
    """The last column up to `column` that the policy chose, or else the first that it chose."""
    before = [t for t in range(column + 1) if mask[t]]
    return before[-1] if before else mask.index(True)
