"""What a policy answers to a few prompts before and after training, for the page of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..data.prepare import text_of
from ..data.render import Renderer
from ..data.row_types import Content
from ..models.roles import Policy
from ..models.trunk import context, plain
from ..train.processes import Processes
from ..train.progress import say
from .agreement import agreeing_sampler
from .sampling import Keys, Sampler, SamplingParams, never_ended, sample_all
from .trajectory import Trajectory


def show_samples(
    policy: Policy,
    renderer: Renderer,
    prompts: Sequence[tuple[Content, str]],
    processes: Processes,
    *,
    seed: int,
    params: SamplingParams,
    score: Callable[[Trajectory], Sequence[float]] | None = None,
    sampler: Sampler | None = None,
) -> list[dict[str, Any]]:
    """Lines for samples.jsonl.

    A prompt that leaves no room in the context is left out. Samples before and after training come
    from the same random streams.

    Args:
        prompts: each with its file:line.
        params: a response has fewer tokens at most where the context leaves less room.
        score: gives one score per response.
        sampler: of the policy's responses; None picks one in this process.
    """
    limit = context(plain(policy.lm).config)
    kept = [(p, ids) for p, where in prompts if 0 < len(ids := renderer.prompt(p, where)) < limit]
    room = limit - max((len(ids) for _, ids in kept), default=0)
    if not kept:
        return []
    params = replace(params, max_new_tokens=min(params.max_new_tokens, room))
    numbers = list(range(len(kept)))
    keys = Keys(seed, 0, numbers, [0] * len(kept))
    asked = [ids for _, ids in kept]
    sampler = sampler or agreeing_sampler(policy, asked, params)[0]
    sampled = sample_all(sampler, asked, params, keys, processes)
    if processes.main and (note := never_ended(sampled, params, renderer)):
        say(note)
    scores = score(sampled) if score else [None] * len(kept)
    return [
        {
            "prompt": text_of(p),
            "completion": renderer.decode(r),
            "score": s,
            "tokens": int(n),
            "finished": bool(f),
        }
        for (p, _), r, s, n, f in zip(
            kept,
            sampled.responses(),
            scores,
            sampled.response_lengths,
            sampled.finished,
            strict=True,
        )
    ]
