"""Sampling from any causal language model in this process: batched, with a key-value cache, and
padded on the left.

Each response draws from a random stream of its own (`draw.py`). Only the log-probability of the
chosen token is kept at each step, never the stack of scores.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import InputError
from ..models.roles import Policy
from ..models.trunk import (
    autocast,
    context,
    evaluating,
    logits,
    plain,
    text_config,
    trunk,
    windowed,
)
from .draw import choose, streams
from .sampling import SIDE_BY_SIDE, Keys, Sampler, SamplingParams
from .trajectory import Trajectory


def local_sampler(policy: Policy) -> Sampler:
    """A sampler of `policy` in this process. It holds the live weights."""
    return LocalSampler(policy, context(plain(policy.lm).config))


@contextlib.contextmanager
def _threads(model: Any, rows: int) -> Iterator[None]:
    """One thread where a token's work is too small to be shared and threads sleep between tasks:
    waking a second one would cost more than it does.
    """
    before = torch.get_num_threads()
    sleepy = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    small = sleepy and rows * sum(p.numel() for p in model.parameters()) < 3e8 and before > 1
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class LocalSampler:
    """Samples from a policy in this process, on whatever device it is.

    context: number of positions that the model has; prompt and response must fit.
    tokens: prompt and response tokens that are sampled side by side, the memory knob.
    """

    policy: Policy
    context: int
    tokens: int = SIDE_BY_SIDE
    pad_id: int = 0

    def sync(self, policy: Policy, version: int) -> None:
        """Nothing to do: the policy that is trained is the one that is sampled from."""
        assert policy.lm is self.policy.lm, "a local sampler cannot change its model"

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
            InputError: a prompt and its response would not fit the model's context.
        """
        refuse_unfit(prompts, params.max_new_tokens, self.context)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        lm, precision, start = self.policy.lm, self.policy.precision, 0
        device = plain(lm).get_input_embeddings().weight.device
        while start < len(order):
            width = len(prompts[order[start]]) + params.max_new_tokens
            rows = order[start : start + max(1, self.tokens // width)]
            uniforms = streams(keys, rows, params.max_new_tokens)
            with autocast(precision, device), evaluating(lm), _threads(plain(lm), len(rows)):
                ids, lps = self._batch(
                    [prompts[i] for i in rows], params, torch.from_numpy(uniforms)
                )
            for i, r, lp in zip(rows, ids, lps, strict=True):
                responses[i], logprobs[i] = r, lp
            start += len(rows)
            if on_progress:
                on_progress(start)
        finished = [r[-1] in params.stop_ids for r in responses]
        return Trajectory.build(
            prompts,
            responses,
            logprobs,
            finished,
            keys.prompt,
            keys.sample,
            params.temperature,
            self.pad_id,
        )

    def _batch(
        self, prompts: list[Sequence[int]], params: SamplingParams, uniforms: Tensor
    ) -> tuple[list[list[int]], list[list[float]]]:
        model = plain(self.policy.lm)
        max_new_tokens = params.max_new_tokens
        device = model.get_input_embeddings().weight.device
        n, width = len(prompts), max(len(p) for p in prompts)
        uniforms = uniforms.to(device)
        unique = {
            p: i for i, p in enumerate(dict.fromkeys(tuple(p) for p in prompts))
        }  # a prompt is read once for all its samples
        ids = torch.full((len(unique), width), self.pad_id, dtype=torch.long)
        real = torch.zeros((len(unique), width + max_new_tokens), dtype=torch.bool)
        for p, i in unique.items():
            ids[i, width - len(p) :] = torch.tensor(p)
            real[i, width - len(p) :] = True
        ids, real = ids.to(device), real.to(device)
        positions = (real[:, :width].long().cumsum(1) - 1).clamp(min=0)
        padded = not bool(real[:, :width].all())
        real[:, width:] = True

        body, config = trunk(model), text_config(model.config)
        cache = DynamicCache(config=config)
        hidden = body(
            input_ids=ids,
            attention_mask=real[:, :width].long() if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        copies = torch.tensor([unique[tuple(p)] for p in prompts], device=device)
        if len(unique) < n:
            cache.batch_select_indices(copies)
        hidden, real, position = hidden[copies], real[copies], positions[copies, -1:]

        stops = torch.tensor(sorted(params.stop_ids), device=device)
        active = torch.arange(n, device=device)  # row of the batch -> row of the output
        tokens = torch.full((n, max_new_tokens), -1, dtype=torch.long, device=device)
        kept = torch.zeros((n, max_new_tokens), device=device)
        done = torch.zeros(n, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            z = logits(self.policy.lm, hidden, self.policy.precision).float()
            chosen, logprob = choose(z, uniforms[:, t], params.temperature)
            tokens[active, t] = torch.where(done, -1, chosen)
            kept[active, t] = logprob
            done = done | torch.isin(chosen, stops)
            left = int((~done).sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= 0.8 * len(active):  # the finished leave the batch
                stay = (~done).nonzero()[:, 0]
                cache.batch_select_indices(stay)
                active, chosen, real, position, uniforms, done = (
                    x[stay] for x in (active, chosen, real, position, uniforms, done)
                )
            position = position + 1
            hidden = body(
                input_ids=chosen[:, None],
                attention_mask=self._mask(config, real[:, : width + t + 1]) if padded else None,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        lengths = (tokens >= 0).sum(1).tolist()
        rows, values = tokens.tolist(), kept.tolist()
        return [r[:k] for r, k in zip(rows, lengths, strict=True)], [
            v[:k] for v, k in zip(values, lengths, strict=True)
        ]

    @staticmethod
    def _mask(config: Any, real: Tensor) -> Tensor:
        """For one new token the mask is the row of real keys; said in four dimensions it is taken
        as it is, which spares building it a step.
        """
        everywhere = not windowed(config) and config._attn_implementation == "sdpa"
        return real[:, None, None, :] if everywhere else real.long()


def refuse_unfit(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    """Checks that each prompt has a token and leaves room for its response.

    Raises:
        InputError: one does not.
    """
    longest = max(len(p) for p in prompts)
    if longest + max_new_tokens > context:
        raise InputError(
            f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens} exceed "
            f"the model's context of {context}: sample fewer tokens or shorten the prompts"
        )
    if min(len(p) for p in prompts) == 0:
        raise InputError(
            "a prompt is empty: this tokenizer has no BOS token to start from, so give at "
            "least one token"
        )
