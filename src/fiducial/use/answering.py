"""What collect, generate and eval share: prompts in, judged responses out, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.prepare import load, messages_of
from ..data.render import Renderer
from ..data.rows import PromptRow
from ..errors import InputError, RunError
from ..models.load import load_policy, load_renderer
from ..models.roles import Policy
from ..rewards.load import FunctionReward, ModelReward, Responses, load_function, load_reward
from ..rewards.process import ProcessReward
from ..rollout.answers import local_sampler
from ..rollout.shared import sample_all
from ..settings import LoraSettings, RowSettings, RunSettings
from ..train.processes import Processes
from ..train.progress import Progress

BLOCK = 512
"""Responses sampled at a time: what is done is shown, and written, block by block."""


@dataclass
class Model:
    """A policy ready to answer."""

    name: str
    renderer: Renderer
    policy: Policy
    processes: Processes
    rows: list[PromptRow] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)

    @staticmethod
    def open(
        name: str, prompts: str, rows: RowSettings, processes: Processes, *, reserve: int
    ) -> Model:
        """Load a model and render the prompts for it; each must leave `reserve` tokens for the answer."""
        renderer = load_renderer(name, rows)

        def render(row: PromptRow) -> list[int]:
            ids = renderer.prompt(row.prompt, row.where)
            if len(ids) + reserve > renderer.max_length or not ids:
                raise InputError(
                    f"{row.where}: the prompt is {len(ids)} tokens and with --max-new-tokens "
                    f"{reserve} exceeds the limit of {renderer.max_length}"
                )
            return ids

        ids, kept, _ = load(prompts, rows, (PromptRow,), render)
        policy = load_policy(name, LoraSettings(), RunSettings(), renderer.tokenizer).to(
            processes.device
        )
        return Model(name, renderer, policy, processes, kept, ids)

    def answer(
        self,
        samples: int,
        *,
        max_new_tokens: int,
        temperature: float,
        stop: Sequence[str],
        seed: int,
        title: str,
    ) -> Iterator[tuple[list[int], Responses]]:
        """Blocks of (row numbers, responses), all samples of a prompt in one block, with progress."""
        sampler = local_sampler(
            self.policy,
            self.renderer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
        )
        per_block = max(1, BLOCK // samples)
        with Progress(title, len(self.rows) * samples, show=self.processes.main) as bar:
            for start in range(0, len(self.rows), per_block):
                numbers = [
                    i
                    for i in range(start, min(start + per_block, len(self.rows)))
                    for _ in range(samples)
                ]
                sampled = sample_all(
                    sampler,
                    [self.ids[i] for i in numbers],
                    self.processes,
                    seed=seed,
                    step=0,
                    prompt=numbers,
                    sample=[k % samples for k in range(len(numbers))],
                )
                yield numbers, Responses.of([self.rows[i] for i in numbers], sampled, self.renderer)
                bar.advance(by=len(numbers))


class Judge:
    """Decides between responses of one prompt: by scores (a reward model, or a function with TRL's
    signature), or by comparing two directly.

    A function that has parameters `first` and `second` compares: `def judge(prompts, first, second,
    **columns) -> list[bool]`, true where the first is the better one. Equal scores are a tie.
    """

    def __init__(self, name: str, run: RunSettings, processes: Processes) -> None:
        import inspect

        self.name, self.processes = name, processes
        self.scorer: FunctionReward | ModelReward | ProcessReward | None = None
        self.compare: Callable[..., Any] | None = None
        if ":" in name:
            function = load_function(name, "--judge")
            if {"first", "second"} <= set(inspect.signature(function).parameters):
                self.compare = function
                return
        self.scorer = load_reward(name, run, processes, "--judge")

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """An InputError if a row lacks what a reward of the package reads."""
        if isinstance(self.scorer, FunctionReward):
            self.scorer.check_rows(rows)

    def scores(self, responses: Responses) -> list[float] | None:
        """A score a response, or None for a judge that only compares."""
        return self.scorer(responses) if self.scorer else None

    def prefers_first(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]
    ) -> list[bool]:
        """For a judge that compares: true where the first response is preferred."""
        assert self.compare is not None
        try:
            out = list(
                self.compare(
                    prompts=[messages_of(p) for p in prompts],
                    first=list(first),
                    second=list(second),
                )
            )
        except Exception as error:
            raise RunError(
                f"the judge {self.name} raised {type(error).__name__}: {error}"
            ) from error
        if len(out) != len(first) or any(not isinstance(x, (bool, int)) for x in out):
            raise RunError(
                f"the judge {self.name} must return one true or false for each of {len(first)} "
                "comparisons"
            )
        return [bool(x) for x in out]
