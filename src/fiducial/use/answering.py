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
from ..train.processes import Processes
from ..train.progress import Progress, say
from ..train.renderer import load_renderer

BLOCK = 512
"""Responses sampled at a time: progress is shown, and files are written, block by block."""


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
        renderer = load_renderer(name, rows, flag=flag)

        def render(row: PromptRow) -> list[int]:
            return fitting_prompt(row, renderer, max_new_tokens)

        ids, kept, note = load(prompts, rows, (PromptRow,), render)
        if (note := joined(note, renderer.take_notes(len(kept)))) and processes.main:
            say(f"{prompts}: {note}")
        policy = load_policy(name, LoraSettings(), RunSettings(), renderer.tokenizer, flag=flag)
        policy = policy.to(processes.device)
        params = SamplingParams(max_new_tokens)
        roles, names = Roles(policy=policy), {"model": name}
        sampler, _ = check_online(roles, ids, params, None, names, flag)
        return Model(name, renderer, policy, sampler, processes, kept, ids)

    def answer(
        self, samples: int, params: SamplingParams, *, seed: int, title: str
    ) -> Iterator[tuple[list[int], Responses]]:
        """Blocks of (row numbers, responses), with progress.

        All samples of a prompt are in one block.
        """
        per_block = max(1, BLOCK // samples)
        with Progress(title, len(self.rows) * samples, show=self.processes.main) as bar:
            for start in range(0, len(self.rows), per_block):
                end = min(start + per_block, len(self.rows))
                numbers = [i for i in range(start, end) for _ in range(samples)]
                keys = Keys(seed, 0, numbers, [k % samples for k in range(len(numbers))])
                prompts = [self.ids[i] for i in numbers]
                sampled = sample_all(self.sampler, prompts, params, keys, self.processes)
                rows = [self.rows[i] for i in numbers]
                note = never_ended(sampled, params, self.renderer) if start == 0 else ""
                if note and self.processes.main:
                    say(note)
                yield numbers, Responses.of(rows, sampled, self.renderer)
                bar.advance(by=len(numbers))
