"""Rewards from a reward model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..models.roles import ScoreModel
from ..settings import Tokens
from ..train.processes import Processes
from .reading import Reader
from .types import Responses, Scored


class ModelReward:
    """The score of a reward model at the last token, minus the mean score of its reference
    completions (`reward_mean` in its config).

    Where its config has the range of the scores of responses that it was not trained on
    (`reward_low`, `reward_high`), it logs the share of responses outside of it.
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
        self.mean = scorer.facts.mean or 0.0
        self.range = (scorer.facts.low, scorer.facts.high)

    def same_tokens(self, renderer: Renderer) -> bool:
        """Whether the policy has the same tokens as this model."""
        return self.reader.same_tokens(renderer)

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Refuse prompts that the chat template cannot render, and a model that would be computed
        otherwise than in plain transformers.
        """
        self.reader.check_rows(rows)
        self.reader.check_model(self.scorer, rows)

    def score(self, responses: Responses) -> Scored:
        """The model's score for each response, on every process."""
        raw = self.score_ids([r.ids for r in self.reader.read(responses)])
        scores = [s - self.mean for s in raw]
        low, high = self.range
        if low is None or high is None:
            return Scored(scores, {self.name: scores})
        outside = [float(not low <= s <= high) for s in raw]
        return Scored(scores, {self.name: scores}, logged={"calibration/outside": outside})

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
