"""What is asked of a sampler, in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..errors import InputError
from ..models.roles import Policy
from ..train.processes import Processes
from .trajectory import Trajectory

SIDE_BY_SIDE = 65_536
"""Prompt and response tokens that a sampler in this process holds at a time."""


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled.

    max_new_tokens: a response that has not ended by then is cut, and says so.
    temperature: divides the logits; 0 takes the most likely token.
    stop_ids: each of these tokens ends a response and belongs to it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Keys:
    """The random streams of a batch: responses with equal keys are sampled equal.

    seed, step: of the whole batch. prompt, sample: the number of the prompt and of the response to
    it, one per response.
    """

    seed: int
    step: int
    prompt: Sequence[int]
    sample: Sequence[int]

    def take(self, rows: Sequence[int]) -> Keys:
        """Only these responses, in this order."""
        prompt, sample = ([x[i] for i in rows] for x in (self.prompt, self.sample))
        return Keys(self.seed, self.step, prompt, sample)


class Sampler(Protocol):
    """Something that samples responses of a policy."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        keys: Keys,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """One response to each prompt (token ids).

        Args:
            on_progress: called with the number of responses that are done.

        Raises:
            InputError: a prompt and its response would not fit the model's context.
        """

    def sync(self, policy: Policy, version: int) -> None:
        """Sample from these weights from now on. `version` counts the updates of the policy."""


def sample_all(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    keys: Keys,
    processes: Processes,
) -> Trajectory:
    """One response to each prompt, the same on every process whatever their number.

    Each process samples its share, and all of them get the whole batch in the order of the prompts.
    """
    if processes.count == 1:
        return sampler.sample(prompts, params, keys)
    mine = list(processes.share(len(prompts)))
    parts: list[tuple[list[int], Trajectory]] = []
    if mine:
        parts = [(mine, sampler.sample([prompts[i] for i in mine], params, keys.take(mine)))]
    parts = processes.gather(parts)
    numbers = [i for rows, _ in parts for i in rows]
    place = {number: k for k, number in enumerate(numbers)}
    return Trajectory.join([t for _, t in parts]).take([place[i] for i in range(len(prompts))])


def sampling_params(
    renderer: Renderer, max_new_tokens: int, temperature: float = 1.0, stop: Sequence[str] = ()
) -> SamplingParams:
    """With everything that ends a response: what the tokenizer, its chat template and the model's
    configs say (`Renderer.ends`), and the tokens named in `stop`.

    Raises:
        InputError: a stop token is not in the vocabulary.
    """
    ids = renderer.ends | {stop_id(renderer, text) for text in stop}
    return SamplingParams(max_new_tokens, temperature, ids)


def stop_id(renderer: Renderer, text: str) -> int:
    """The id of a stop token given as text.

    Raises:
        InputError: it is not one token of the vocabulary.
    """
    tokenizer = renderer.tokenizer
    found = tokenizer.convert_tokens_to_ids(text)
    if found is None or (found == tokenizer.unk_token_id and text != tokenizer.unk_token):
        raise InputError(f"--stop: the tokenizer has no single token {text!r}")
    return int(found)


def fitting_prompt(row: PromptRow, renderer: Renderer, max_new_tokens: int) -> list[int]:
    """The token ids of a row's prompt.

    Raises:
        InputError: prompt and response would not fit the context, or the prompt has no token.
    """
    ids = renderer.prompt(row.prompt, row.where)
    if len(ids) + max_new_tokens > renderer.max_length:
        raise InputError(
            f"{row.where}: the prompt has {len(ids)} tokens and with --max-new-tokens "
            f"{max_new_tokens} exceeds the limit of {renderer.max_length}: sample fewer tokens, "
            "shorten the prompt, or leave such rows out with --rows.on-error skip"
        )
    if not ids:
        raise InputError(f"{row.where}: the prompt has no token to start from")
    return ids


def never_ended(trajectory: Trajectory, params: SamplingParams, renderer: Renderer) -> str:
    """A sentence for the case that all of these responses were cut at the limit; else ""."""
    if bool(trajectory.finished.any()) or not len(trajectory):
        return ""
    names = renderer.tokenizer.convert_ids_to_tokens(sorted(params.stop_ids))
    return (
        f"none of {len(trajectory)} sampled responses ended within {params.max_new_tokens} "
        f"tokens; what ends one is {', '.join(map(str, names))}: give more with --max-new-tokens, "
        "or name the token that ends an answer of this model (--stop; in training --rows.eos-token)"
    )
