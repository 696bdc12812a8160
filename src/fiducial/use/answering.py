"""What the verbs of this room share: prompts in, responses out, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..data.prepare import joined, load
from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..data.sources import records
from ..errors import InputError
from ..models.load import exists, load_policy
from ..models.roles import Policy, Roles
from ..rewards.types import Responses
from ..rollout.agreement import check_online
from ..rollout.sampling import (
    Keys,
    Sampler,
    SamplingParams,
    fitting_prompt,
    never_ended,
    sample_all,
)
from ..settings import LoraSettings, RowSettings, RunSettings
from ..train.machine import tokens_in_a_minute
from ..train.processes import Processes
from ..train.progress import Progress, say
from ..train.renderer import load_renderer

BLOCK = 512
"""Responses sampled at a time, at most: progress is shown, and files are written, block by block.
"""


@dataclass(frozen=True)
class Model:
    """A policy with prompts that it can answer.

    rows, ids: the prompt rows and their token ids.
    """

    name: str
    renderer: Renderer
    policy: Policy
    sampler: Sampler
    processes: Processes
    rows: list[PromptRow]
    ids: list[list[int]]

    @staticmethod
    def open(
        name: str,
        prompts: str,
        rows: RowSettings,
        processes: Processes,
        *,
        max_new_tokens: int,
        flag: str = "--model",
        trust: bool = False,
    ) -> Model:
        """Load a model and render the prompts for it; each must leave room for a response.

        Raises:
            InputError: a row or the model cannot be used; `flag` names the model's setting.
        """
        exists(name, flag)
        try:
            records(prompts)  # opens the file and reads nothing yet
        except InputError as error:
            raise InputError(f"--prompts: {error}") from error
        renderer = load_renderer(name, rows, flag=flag, trust=trust)

        def render(row: PromptRow) -> list[int]:
            return fitting_prompt(row, renderer, max_new_tokens)

        ids, kept, note = load(prompts, rows, (PromptRow,), render)
        if (note := joined(note, renderer.take_notes(len(kept)))) and processes.main:
            say(f"{prompts}: {note}")
        policy = load_policy(
            name, LoraSettings(), RunSettings(), renderer.tokenizer, flag=flag, trust=trust
        )
        policy = policy.to(processes.device)
        params = SamplingParams(max_new_tokens)
        roles, names = Roles(policy=policy), {"model": name}
        sampler, _ = check_online(roles, ids, params, None, names, flag)
        return Model(name, renderer, policy, sampler, processes, kept, ids)

    def blocks(
        self, samples: int, *, sampled: int, max_new_tokens: int, title: str, start: int = 0
    ) -> Iterator[list[int]]:
        """The numbers of the prompts, each `samples` times, a block at a time, with progress.

        A block takes about a minute at most. Its borders depend on the model, the prompts and the
        settings alone: where work was interrupted, and how fast the machine is, change no result.

        Args:
            sampled: all responses that are sampled for a prompt. start: prompts that are done.
        """
        width = max_new_tokens + sum(map(len, self.ids)) // len(self.ids)
        responses = min(BLOCK, tokens_in_a_minute(self.policy) // width)
        size, total = max(1, responses // sampled), len(self.rows)
        done, show = start * samples, self.processes.main
        with Progress(title, total * samples, start=done, show=show) as bar:
            for first in range(start, total, size):
                prompts = range(first, min(first + size, total))
                yield [i for i in prompts for _ in range(samples)]
                bar.advance(by=len(prompts) * samples)

    def answer(
        self, samples: int, params: SamplingParams, *, seed: int, title: str, start: int = 0
    ) -> Iterator[tuple[list[int], Responses]]:
        """Blocks of (row numbers, responses), with progress, from the prompt `start` on.

        All samples of a prompt are in one block.
        """
        limit = params.max_new_tokens
        for numbers in self.blocks(
            samples, sampled=samples, max_new_tokens=limit, title=title, start=start
        ):
            keys = Keys(seed, 0, numbers, [k % samples for k in range(len(numbers))])
            prompts = [self.ids[i] for i in numbers]
            sampled = sample_all(self.sampler, prompts, params, keys, self.processes)
            rows = [self.rows[i] for i in numbers]
            note = never_ended(sampled, params, self.renderer) if numbers[0] == 0 else ""
            if note and self.processes.main:
                say(note)
            yield numbers, Responses.of(rows, sampled, self.renderer)
