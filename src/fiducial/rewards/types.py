"""What a scorer is given, what it returns, and the protocol that all scorers follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.render import Renderer
from ..data.row_types import Content, PromptRow
from ..rollout.trajectory import Trajectory


@dataclass(frozen=True)
class Responses:
    """Sampled responses with all that a scorer may look at.

    prompts, completions: as text or messages, and as text. columns: the other columns of each
    prompt's row. trajectory: the tokens themselves. renderer: of the policy that sampled them.
    where: file:line of each prompt's row, if it came from one.
    """

    prompts: list[Content]
    completions: list[str]
    columns: list[dict[str, Any]]
    trajectory: Trajectory
    renderer: Renderer
    where: list[str] = field(default_factory=list)

    @staticmethod
    def of(rows: Sequence[PromptRow], trajectory: Trajectory, renderer: Renderer) -> Responses:
        """`rows` are the prompt rows, one per response."""
        return Responses(
            [r.prompt for r in rows],
            [renderer.decode(ids) for ids in trajectory.responses()],
            [getattr(r, "columns", {}) for r in rows],
            trajectory,
            renderer,
            [r.where for r in rows],
        )

    def take(self, rows: Sequence[int]) -> Responses:
        """Only these responses, in this order."""
        return Responses(
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            [self.columns[i] for i in rows] if self.columns else [],
            self.trajectory.take(rows),
            self.renderer,
            [self.where[i] for i in rows] if self.where else [],
        )


@dataclass(frozen=True)
class Scored:
    """The scores of N responses.

    scores: the weighted total of each response.
    parts: the scores of each scorer, by its name.
    steps: [N, T] the part of the total that is earned at single tokens (by process rewards,
        weighted), at those tokens; None: all of it is paid at the end.
    """

    scores: list[float]
    parts: dict[str, list[float]]
    steps: Tensor | None = None

    def take(self, rows: Sequence[int]) -> Scored:
        """Only these responses, in this order."""
        parts = {name: [part[i] for i in rows] for name, part in self.parts.items()}
        steps = None if self.steps is None else self.steps[list(rows)]
        return Scored([self.scores[i] for i in rows], parts, steps)

    @staticmethod
    def join(several: Sequence[Scored]) -> Scored:
        """The responses of all of them, one after the other."""
        parts = {name: [x for s in several for x in s.parts[name]] for name in several[0].parts}
        steps = [s.steps for s in several if s.steps is not None]
        width = max((x.shape[1] for x in steps), default=0)
        wide = torch.cat([F.pad(x, (0, width - x.shape[1])) for x in steps]) if steps else None
        return Scored([x for s in several for x in s.scores], parts, wide)

    def metrics(self) -> dict[str, float]:
        """The mean of each part, where there are several."""
        if len(self.parts) < 2:
            return {}
        short = {n: n.rpartition(":")[2].rstrip("/").rpartition("/")[2] for n in self.parts}
        return {f"reward/{short[n]}": sum(s) / len(s) for n, s in self.parts.items()}


class Scorer(Protocol):
    """Something that scores responses: a function, a model, a judge, or several of them."""

    @property
    def name(self) -> str:
        """What metrics and messages call it."""

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Refuse, before any work, prompt rows that lack what this scorer reads.

        Raises:
            InputError: names the row's file:line and the column.
        """

    def score(self, responses: Responses) -> Scored:
        """One finite score per response, the same on every process.

        Raises:
            RunError: the scorer failed; the message names it and the response.
        """
