"""Sampling through the model's own `generate` and its own cache: slower than `local.py`, for
architectures whose state our loop does not keep.

Prompts are sampled in groups of equal length, so nothing is padded, and a response that has ended
waits until its group has. The tokens are drawn as in `local.py`, from the same streams.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from ..models.roles import Policy
from ..models.trunk import autocast, evaluating, plain
from .draw import choose, streams
from .local import refuse_unfit
from .sampling import SIDE_BY_SIDE, Keys, SamplingParams
from .trajectory import Trajectory


@dataclass(frozen=True)
class GenerateSampler:
    """Samples from a policy in this process with `transformers`' loop.

    context: number of positions that the model has; prompt and response must fit.
    tokens: prompt and response tokens that are sampled side by side, the memory knob.
    """

    policy: Policy
    context: int
    tokens: int = SIDE_BY_SIDE

    def sync(self, policy: Policy, version: int) -> None:
        """Nothing to do: the policy that is trained is the one that is sampled from."""
        assert policy.lm is self.policy.lm, "a sampler in this process cannot change its model"

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        keys: Keys,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """One response to each prompt (token ids).

        Raises:
            InputError: a prompt is empty, or it and its response would not fit the context.
        """
        refuse_unfit(prompts, params.max_new_tokens, self.context)
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        order, done = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), 0
        for length, same in itertools.groupby(order, key=lambda i: len(prompts[i])):
            size = max(1, self.tokens // (length + params.max_new_tokens))
            for rows in _pieces(list(same), size):
                uniforms = streams(keys, rows, params.max_new_tokens)
                ids, lps = self._group(
                    [prompts[i] for i in rows], params, torch.from_numpy(uniforms)
                )
                for i, r, lp in zip(rows, ids, lps, strict=True):
                    responses[i], logprobs[i] = r, lp
                done += len(rows)
                if on_progress:
                    on_progress(done)
        finished = [r[-1] in params.stop_ids for r in responses]
        return Trajectory.build(
            prompts, responses, logprobs, finished, keys.prompt, keys.sample, params.temperature
        )

    def _group(
        self, prompts: list[Sequence[int]], params: SamplingParams, uniforms: Tensor
    ) -> tuple[list[list[int]], list[list[float]]]:
        model = plain(self.policy.lm)
        device = model.get_input_embeddings().weight.device
        ids = torch.tensor([list(p) for p in prompts], device=device)
        drawn = _Drawn(uniforms.to(device), params.temperature)
        asked = GenerationConfig(
            do_sample=False,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=sorted(params.stop_ids) or None,
            pad_token_id=0,
        )
        with autocast(self.policy.precision, device), evaluating(model), _own_settings(model):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=asked,
                logits_processor=[drawn],
            )
        tokens, logprobs = (torch.stack(x, 1).tolist() for x in (drawn.tokens, drawn.logprobs))
        lengths = [
            next((t + 1 for t, token in enumerate(row) if token in params.stop_ids), len(row))
            for row in tokens
        ]
        return [r[:n] for r, n in zip(tokens, lengths, strict=True)], [
            r[:n] for r, n in zip(logprobs, lengths, strict=True)
        ]


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves `generate` no choice but the token that was drawn from the response's stream."""

    def __init__(self, uniforms: Tensor, temperature: float) -> None:
        self.uniforms, self.temperature = uniforms, temperature
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniforms[:, len(self.tokens)]
        chosen, logprob = choose(scores.float(), uniform, self.temperature)
        self.tokens.append(chosen)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


@contextlib.contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Without the model's generation settings, such as a penalty for repetition, which `generate`
    would add to ours.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _pieces(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
