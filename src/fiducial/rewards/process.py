r"""Process rewards: a score for each step of a response, read where the step ends. Lightman et al.
2023 (arXiv 2305.20050).

In reinforcement learning a step earns what it adds, :math:`r_t = PRM(x, y_{\le t}) - PRM(x, y_{\le
t-1})` at its last token, where PRM of nothing is 0: the rewards of a response add up to the score
of the whole. Paying the scores themselves would pay for many steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..data.render import Renderer, same_tokens
from ..data.steps import Steps
from ..models.roles import Scorer, plain
from ..train.processes import Processes

if TYPE_CHECKING:
    from .load import Responses

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
        self, name: str, scorer: Scorer, renderer: Renderer, tokens: int, processes: Processes
    ) -> None:
        self.name, self.scorer, self.renderer, self.tokens, self.processes = (
            name,
            scorer,
            renderer,
            tokens,
            processes,
        )
        config = plain(scorer.model).config.process_reward
        self.how: Aggregate = config.get("aggregate", "last")
        self.finder = Steps(renderer, config["separator"])
        self._policy: tuple[Renderer, bool, Steps] | None = None

    def __call__(self, batch: Responses) -> list[float]:
        """The score of each whole response, in (0, 1)."""
        return [aggregate(steps, self.how) for steps in self.steps(batch)]

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

    def earned(self, batch: Responses) -> tuple[list[float], Tensor]:
        """The score of each response, and [N, T] what its steps add to it, at their last tokens: a
        row adds up to its score.

        A tokenizer of another make finds the ends of the same steps in other places: they are
        matched by number, and should the tokens show fewer ends than this model has scored, what is
        left over comes with the last one.
        """
        scored = self.steps(batch)
        out = torch.zeros(batch.trajectory.ids.shape, dtype=torch.float64)
        finder = self._of(batch.renderer)[1]
        for i, (steps, response) in enumerate(
            zip(scored, batch.trajectory.responses(ending=True), strict=True)
        ):
            start, ends = int(batch.trajectory.prompt_lengths[i]), finder.ends(response)
            for k, value in enumerate(differences(steps, self.how)):
                out[i, start + ends[min(k, len(ends) - 1)]] += value
        return [aggregate(steps, self.how) for steps in scored], out

    def _of(self, renderer: Renderer) -> tuple[bool, Steps]:
        """Whether the policy's tokens are this model's, and the finder of steps among them."""
        if self._policy is None or self._policy[0] is not renderer:
            self._policy = (
                renderer,
                same_tokens(self.renderer, renderer),
                Steps(renderer, self.finder.separator),
            )
        return self._policy[1:]
