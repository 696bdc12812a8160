"""Sampling with all processes: each samples its share, all get the whole, in the order of the
prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..train.processes import Processes
from .sampler import Sampler
from .trajectory import Trajectory


def sample_all(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    processes: Processes,
    *,
    seed: int,
    step: int,
    prompt: Sequence[int],
    sample: Sequence[int],
    **keywords: Any,
) -> Trajectory:
    """One response to each prompt, the same on every process whatever their number."""
    if processes.count == 1:
        return sampler(prompts, seed=seed, step=step, prompt=prompt, sample=sample, **keywords)
    mine = list(processes.share(len(prompts)))
    parts: list[tuple[int, list[int], list[float], bool]] = []
    if mine:
        one = sampler(
            [prompts[i] for i in mine],
            seed=seed,
            step=step,
            prompt=[prompt[i] for i in mine],
            sample=[sample[i] for i in mine],
            **keywords,
        )
        logprobs = [lp[m].tolist() for lp, m in zip(one.logprobs, one.mask, strict=True)]
        parts = list(
            zip(mine, one.responses(ending=True), logprobs, one.finished.tolist(), strict=True)
        )
    parts = sorted(processes.gather(parts))
    _, responses, kept, finished = zip(*parts, strict=True)
    return Trajectory.build(
        prompts, responses, kept, finished, prompt, sample, getattr(sampler, "temperature", 1.0)
    )
