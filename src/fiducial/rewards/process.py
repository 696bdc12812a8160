r"""Process rewards: a score for each step of a response, read where the step ends. Lightman et al.
2023 (arXiv 2305.20050).

In reinforcement learning a step earns what it adds, :math:`r_t = PRM(x, y_{\le t}) - PRM(x, y_{\le
t-1})` at its last token, where PRM of nothing is 0: the rewards of a response add up to the score
of the whole. Paying the scores themselves would pay for many steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from ..data.render import Renderer, same_tokens
from ..data.row_types import PromptRow
from ..data.steps import Steps
from ..models.roles import ScoreModel
from ..train.processes import Processes
from .types import Responses, Scored

Aggregate = Literal["last", "min", "product"]
AGGREGATES: tuple[Aggregate, ...] = ("last", "min", "product")


def aggregate(steps: Sequence[float], how: Aggregate) -> float:
    """One score from those of the steps, each the chance that it is right, in (0, 1).

    product: the chance that every step is right if they were independent, Lightman et al. 2023;
    long solutions have more factors and score lower. min: the weakest step; about as good in their
    comparison. last: the last step's, which alone is an outcome model's question.

    Raises:
        ValueError: there is no step, or no such way.
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
    """What each step adds to the score of what was said before it; nothing said scores 0. They add
    up to `aggregate(steps, how)`.
    """
    totals = [aggregate(steps[: k + 1], how) for k in range(len(steps))]
    return [now - before for now, before in zip(totals, [0.0, *totals[:-1]], strict=True)]


class ProcessReward:
    """A process reward model: sigma(score) at the end of each step, and for the whole what
    `aggregate` in its config makes of them.
    """

    def __init__(
        self, name: str, scorer: ScoreModel, renderer: Renderer, tokens: int, processes: Processes
    ) -> None:
        self.name, self.scorer, self.renderer, self.tokens, self.processes = (
            name,
            scorer,
            renderer,
            tokens,
            processes,
        )
        steps = scorer.facts.steps
        assert steps is not None, f"{name} is no process reward model"
        self.how: Aggregate = cast(Aggregate, steps.aggregate)
        self.finder = Steps(renderer, steps.separator)
        self._policy: tuple[Renderer, bool, Steps] | None = None

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """A model reads nothing but the prompt."""

    def steps(self, batch: Responses) -> list[list[float]]:
        """The scores of the steps of each response, each in (0, 1)."""
        rows: list[list[int]] = []
        ends: list[list[int]] = []
        if self._of(batch.renderer)[0]:
            trajectory = batch.trajectory
            for ids, start, response in zip(
                trajectory.ids.tolist(),
                trajectory.prompt_lengths.tolist(),
                trajectory.responses(ending=True),
                strict=True,
            ):
                rows.append(ids[:start] + response)
                ends.append([start + k for k in self.finder.ends(response)])
        else:
            for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
                rendered = self.renderer.completion(prompt, completion or " ", "response")
                columns = [t for t, mine in enumerate(rendered.mask) if mine]
                rows.append(rendered.ids)
                ends.append(
                    [columns[k] for k in self.finder.ends([rendered.ids[t] for t in columns])]
                )
        return self.score_ids(rows, ends)

    def score_ids(
        self, rows: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """sigma(score) of token sequences after the tokens numbered in `ends`."""
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
        """The score of each whole response, in (0, 1), and what its steps add to it.

        A step earns its part at its last token; where that token was given to the policy, at the
        last one before it that the policy chose. The parts of a row add up to its score. Another
        tokenizer finds the ends of the same steps at other tokens: they are matched by number, and
        where the policy's tokens show fewer ends, the last one earns the rest.
        """
        scored, trajectory = self.steps(responses), responses.trajectory
        earned = torch.zeros(trajectory.ids.shape, dtype=torch.float64)
        finder = self._of(responses.renderer)[1]
        chosen = trajectory.mask.tolist()
        both = zip(scored, trajectory.responses(ending=True), strict=True)
        for i, (steps, response) in enumerate(both):
            start, ends = int(trajectory.prompt_lengths[i]), finder.ends(response)
            for k, value in enumerate(differences(steps, self.how)):
                column = start + ends[min(k, len(ends) - 1)]
                earned[i, _chosen_column(chosen[i], column)] += value
        scores = [aggregate(steps, self.how) for steps in scored]
        return Scored(scores, {self.name: scores}, earned)

    def _of(self, renderer: Renderer) -> tuple[bool, Steps]:
        """Whether the policy's tokens are this model's, and the finder of steps among them."""
        if self._policy is None or self._policy[0] is not renderer:
            self._policy = (
                renderer,
                same_tokens(self.renderer, renderer),
                Steps(renderer, self.finder.separator),
            )
        return self._policy[1:]


def _chosen_column(mask: Sequence[bool], column: int) -> int:
    """The last column up to `column` that the policy chose; the first one it chose if none is."""
    before = [t for t in range(column + 1) if mask[t]]
    return before[-1] if before else mask.index(True)
