"""What a scorer is given, what it returns, and the protocol that all scorers follow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.prepare import messages_of
from ..data.render import Renderer
from ..data.row_types import Content, PromptRow
from ..errors import RunError
from ..rollout.trajectory import Trajectory
from .values import TrainerState as TrainerState


@dataclass(frozen=True)
class Responses:
    """Sampled responses with all that a scorer may look at.

    prompts, completions: as text or messages, and as text. columns: the other columns of each
    prompt's row. trajectory: the tokens themselves. renderer: of the policy that sampled them.
    where: file:line of each prompt's row, if it came from one. state: of the run in training; None
    outside of it.
    """

    prompts: list[Content]
    completions: list[str]
    columns: list[dict[str, Any]]
    trajectory: Trajectory
    renderer: Renderer
    where: list[str] = field(default_factory=list)
    state: TrainerState | None = None

    @staticmethod
    def of(
        rows: Sequence[PromptRow],
        trajectory: Trajectory,
        renderer: Renderer,
        state: TrainerState | None = None,
    ) -> Responses:
        """`rows` are the prompt rows, one per response."""
        return Responses(
            [r.prompt for r in rows],
            [renderer.decode(ids) for ids in trajectory.responses()],
            [getattr(r, "columns", {}) for r in rows],
            trajectory,
            renderer,
            [r.where for r in rows],
            state,
        )

    def as_rows(self) -> list[dict[str, Any]]:
        """For each response prompt, completion, tokens and finished, as files of rows hold them."""
        columns = zip(
            self.prompts,
            self.completions,
            self.trajectory.response_lengths.tolist(),
            self.trajectory.finished.tolist(),
            strict=True,
        )
        return [
            {"prompt": messages_of(p), "completion": c, "tokens": n, "finished": f}
            for p, c, n, f in columns
        ]

    def token_ids(self) -> list[dict[str, Any]]:
        """The columns by which a file keeps the tokens that were sampled, for each response."""
        mark = self.renderer.fingerprint
        sampled = self.trajectory.responses(ending=True)
        return [{"completion_ids": ids, "tokenizer": mark} for ids in sampled]

    def take(self, rows: Sequence[int]) -> Responses:
        """Only these responses, in this order."""
        return Responses(
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            [self.columns[i] for i in rows] if self.columns else [],
            self.trajectory.take(rows),
            self.renderer,
            [self.where[i] for i in rows] if self.where else [],
            self.state,
        )


@dataclass(frozen=True)
class Scored:
    """The scores of N responses.

    scores: the weighted total of each response; None where no scorer judges it.
    parts: the scores of each scorer, by its name; None where it does not judge the response.
    steps: [N, T] the part of the total that is earned at single tokens (by process rewards,
        weighted), at those tokens; None: all of it is paid at the end.
    logged: the values of metrics that functions logged, by name.
    columns: what functions logged of each response, by name.
    """

    scores: Sequence[float | None]
    parts: Mapping[str, Sequence[float | None]]
    steps: Tensor | None = None
    logged: Mapping[str, Sequence[float]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def floats(self, where: Sequence[str] = ()) -> list[float]:
        """The scores, where each response must have one.

        Args:
            where: file:line of the row of each response.

        Raises:
            RunError: no scorer judges one of the responses.
        """
        for i, score in enumerate(self.scores):
            if score is None:
                names = ", ".join(self.parts)
                raise RunError(
                    f"{where[i] if where else f'response {i}'}: no reward judges the response to "
                    f"this row ({names} returned None): add a reward that does, or remove the row"
                )
        return [score for score in self.scores if score is not None]

    def take(self, rows: Sequence[int]) -> Scored:
        """Only these responses, in this order."""
        parts = {name: [part[i] for i in rows] for name, part in self.parts.items()}
        steps = None if self.steps is None else self.steps[list(rows)]
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        return Scored([self.scores[i] for i in rows], parts, steps, self.logged, columns)

    @staticmethod
    def join(several: Sequence[Scored]) -> Scored:
        """The responses of all of them, one after the other."""
        parts = {name: [x for s in several for x in s.parts[name]] for name in several[0].parts}
        steps = [s.steps for s in several if s.steps is not None]
        width = max((x.shape[1] for x in steps), default=0)
        wide = torch.cat([F.pad(x, (0, width - x.shape[1])) for x in steps]) if steps else None
        names = {name: None for s in several for name in s.columns}
        columns = {
            name: [x for s in several for x in s.columns.get(name, [None] * len(s.scores))]
            for name in names
        }
        scores = [x for s in several for x in s.scores]
        return Scored(scores, parts, wide, all_logged(several), columns)

    def metrics(self) -> dict[str, float]:
        """The mean of each part where there are several, over the responses that it judges, and
        the share of responses that it does not judge where there is one; and the mean of what
        functions logged.
        """
        out = {name: sum(values) / len(values) for name, values in self.logged.items()}
        if len(self.parts) < 2:
            return out
        for name, short in _short_names(list(self.parts)).items():
            judged = [s for s in self.parts[name] if s is not None]
            if judged:
                out[f"reward/{short}"] = sum(judged) / len(judged)
            if without := len(self.parts[name]) - len(judged):
                out[f"reward/{short}/not_judged"] = without / len(self.parts[name])
        return out


def all_logged(several: Sequence[Scored]) -> dict[str, list[float]]:
    """What the functions of several scorers or batches logged, by name."""
    names = {name: None for s in several for name in s.logged}
    return {name: [x for s in several for x in s.logged.get(name, ())] for name in names}


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The shortest ends of the names that differ: the function, or the last folders."""
    pieces = {name: re.split("[/:]", name.rstrip("/")) for name in names}
    for size in range(1, max(map(len, pieces.values())) + 1):
        short = {name: "/".join(p[-size:]) for name, p in pieces.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


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
        """One finite score per response, or None where the scorer does not judge it, the same on
        every process.

        Raises:
            RunError: the scorer failed; the message names it and the response.
        """
