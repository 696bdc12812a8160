"""Rewards from a reward model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.render import Renderer, same_tokens
from ..data.row_types import PromptRow
from ..models.roles import ScoreModel
from ..train.processes import Processes
from .types import Responses, Scored


class ModelReward:
    """The score of a reward model at the last token, minus the mean score of its reference
    completions (`reward_mean` in its config).
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
        self.mean = scorer.facts.mean or 0.0
        self._compared: tuple[Renderer, bool] | None = None

    def same_tokens(self, renderer: Renderer) -> bool:
        """Whether the policy has the same tokens as this model, so that nothing is encoded again.

        A pad token that only this model has does not count as a difference.
        """
        if self._compared is None or self._compared[0] is not renderer:
            self._compared = renderer, same_tokens(self.renderer, renderer)
        return self._compared[1]

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """A model needs no columns, so there is nothing to check."""

    def score(self, responses: Responses) -> Scored:
        """The model's score for each response, on every process."""
        if self.same_tokens(responses.renderer):
            trajectory = responses.trajectory
            both = zip(trajectory.ids.tolist(), trajectory.lengths.tolist(), strict=True)
            rows = [r[:n] for r, n in both]
        else:
            texts = zip(responses.prompts, responses.completions, strict=True)
            rows = [self.renderer.completion(p, c or " ", "response").ids for p, c in texts]
        scores = [s - self.mean for s in self.score_ids(rows)]
        return Scored(scores, {self.name: scores})

    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of token sequences."""
        lengths = [len(r) for r in rows]

        def compute(chosen: list[int]) -> tuple[torch.Tensor, ...]:
            width = max(lengths[i] for i in chosen)
            ids = torch.tensor(
                [[*rows[i], *[0] * (width - lengths[i])] for i in chosen],
                device=self.processes.device,
            )
            return (
                self.scorer(
                    ids, torch.tensor([lengths[i] for i in chosen], device=self.processes.device)
                ),
            )

        (scores,) = self.processes.map_rows([[n] for n in lengths], self.tokens, None, compute)
        return [float(s) for s in scores]
