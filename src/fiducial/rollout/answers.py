"""The in-process sampler of a policy, the prompts it is given, and what it says to a few of them,
for the page of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..data.prepare import text_of
from ..data.render import Renderer
from ..data.rows import Content, PromptRow
from ..errors import InputError
from ..models.load import context, plain
from ..models.roles import Policy
from ..train.processes import Processes
from .sampler import LocalSampler
from .shared import sample_all
from .trajectory import Trajectory


def local_sampler(
    policy: Policy,
    renderer: Renderer,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
) -> LocalSampler:
    """The in-process sampler of a policy; `stop` adds tokens, by their text, that end a response
    beside EOS.

    Raises:
        InputError: a stop token is not in the vocabulary.
    """
    ids = {renderer.eos}
    for text in stop:
        ids.add(stop_id(renderer, text))
    return LocalSampler(
        policy.lm, max_new_tokens, frozenset(ids), context(plain(policy.lm).config), temperature
    )


def stop_id(renderer: Renderer, text: str) -> int:
    """The id of a stop token given as text."""
    found = renderer.tokenizer.convert_tokens_to_ids(text)
    if found is None or (
        found == renderer.tokenizer.unk_token_id and text != renderer.tokenizer.unk_token
    ):
        raise InputError(f"--stop: the tokenizer has no single token {text!r}")
    return int(found)


def fitting_prompt(row: PromptRow, renderer: Renderer, max_new_tokens: int) -> list[int]:
    """The prompt's ids.

    Raises:
        InputError: the response would not fit behind it, or it has no token to start from.
    """
    ids = renderer.prompt(row.prompt, row.where)
    if len(ids) + max_new_tokens > renderer.max_length:
        raise InputError(
            f"{row.where}: the prompt is {len(ids)} tokens and with --max-new-tokens "
            f"{max_new_tokens} exceeds the limit of "
            f"{renderer.max_length}: sample fewer tokens, shorten the prompt, or leave such rows "
            "out with --rows.on-error skip"
        )
    if not ids:
        raise InputError(f"{row.where}: the prompt has no token to start from")
    return ids


def show(
    policy: Policy,
    renderer: Renderer,
    prompts: Sequence[tuple[Content, str]],
    processes: Processes,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    score: Callable[[Trajectory], Sequence[float]] | None = None,
) -> list[dict[str, Any]]:
    """Lines for samples.jsonl; a prompt that leaves no room in the context is left out. Before and
    after draw from the same random streams.
    """
    limit = context(plain(policy.lm).config)
    kept = [(p, ids) for p, where in prompts if 0 < len(ids := renderer.prompt(p, where)) < limit]
    room = limit - max((len(ids) for _, ids in kept), default=0)
    if not kept:
        return []
    sampler = local_sampler(
        policy,
        renderer,
        max_new_tokens=min(max_new_tokens, room),
        temperature=temperature,
        stop=stop,
    )
    numbers = list(range(len(kept)))
    sampled = sample_all(
        sampler,
        [ids for _, ids in kept],
        processes,
        seed=seed,
        step=0,
        prompt=numbers,
        sample=[0] * len(kept),
    )
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
