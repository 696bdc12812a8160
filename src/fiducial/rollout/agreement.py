"""Does the sampler draw from the policy that is trained? A few tokens are sampled before the run,
and their log-probabilities compared with the trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import InputError
from ..models.contract import BFLOAT16, FLOAT32, check_roles
from ..models.roles import Policy, Roles
from ..models.trunk import context, plain
from .generated import GenerateSampler
from .local import LocalSampler
from .sampling import Keys, Sampler, SamplingParams
from .trajectory import Trajectory

PROBED = 6
"""Tokens that are sampled for each probed prompt."""


def check_online(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    sampler: Sampler | None,
    names: Mapping[str, str],
    flag: str = "--model",
) -> tuple[Sampler, str]:
    """Compare models and sampler on the run's own prompts, up to the run's longest sequence.

    Args:
        names: as in `check_roles`. flag: the setting that names the policy's model.

    Returns:
        the sampler (one in this process where none is given), and a sentence on what was compared.

    Raises:
        InputError: something differs by more than rounding explains.
    """
    longest = max(map(len, prompts)) + params.max_new_tokens
    checked = check_roles(roles, prompts, longest, names, flag)
    if sampler is not None:
        return sampler, checked
    sampler, said = agreeing_sampler(roles.policy, prompts, params, flag)
    return sampler, f"{checked}; {said}"


def agreeing_sampler(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    flag: str = "--model",
) -> tuple[Sampler, str]:
    """A sampler in this process whose log-probabilities are the trainer's, and a sentence on what
    was compared.

    Our own loop is tried first, then the model's `generate`. The probe has prompts of different
    lengths (so some are padded), one prompt twice, a response that ends before the others, and a
    prompt so long that its last token has the largest position of the run.

    Raises:
        InputError: neither agrees with the trainer.
    """
    limit = context(plain(policy.lm).config)
    ours = LocalSampler(policy, limit)
    gap, reason = _gap(ours, policy, prompts, params, limit)
    if reason is None:
        return ours, f"a sampled token's equals the trainer's to {gap:.1g} nats"
    theirs = GenerateSampler(policy, limit)
    again, why = _gap(theirs, policy, prompts, params, limit)
    kind = type(plain(policy.lm)).__name__
    if why is None:
        return theirs, (
            f"{kind} is sampled through transformers' generate, which is slower, because in the "
            f"fast loop {reason}; a sampled token's equals the trainer's to {again:.1g} nats"
        )
    raise InputError(
        f"{flag}: {kind} cannot be sampled from: in our loop {reason}, and in transformers' "
        f"generate {why}"
    )


def _gap(
    sampler: Sampler,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    limit: int,
) -> tuple[float, str | None]:
    """The largest difference in nats, and what is wrong, or None."""
    count = min(PROBED, params.max_new_tokens)
    asked = replace(
        params,
        max_new_tokens=count,
        temperature=params.temperature or 1.0,
        stop_ids=frozenset(),
    )
    worst, tolerance = 0.0, FLOAT32
    try:
        for some in _probes(prompts, min(limit, _longest(prompts, params)) - count):
            keys = Keys(0, 0, list(range(len(some))), [0] * len(some))
            free = sampler.sample(some, asked, keys)
            ending = free.responses()[0][: 2 if count > 1 else 1][-1]
            stopped = sampler.sample(some, replace(asked, stop_ids=frozenset({ending})), keys)
            if not _same_beginnings(free, stopped):
                return torch.inf, "a response changes when another one ends"
            for trajectory in (free, stopped):
                worst = max(worst, _difference(policy, trajectory))
            if policy.precision is not None:
                tolerance = max(tolerance, BFLOAT16, 2 * _rounding(policy, free))
    except InputError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0][:120]
        return torch.inf, f"there is an error ({type(error).__name__}: {first})"
    if worst <= tolerance:
        return worst, None
    return worst, f"log-probabilities are off by {worst:.2g} nats"


def _longest(prompts: Sequence[Sequence[int]], params: SamplingParams) -> int:
    return max(map(len, prompts)) + params.max_new_tokens


def _probes(prompts: Sequence[Sequence[int]], room: int) -> list[list[list[int]]]:
    """Batches of prompts: short ones together, and one with all the positions of the run."""
    usable = sorted({tuple(p) for p in prompts if p}, key=len)
    first = list(usable[0])[: max(1, room)]
    # two prompts of different lengths, whatever the run's prompts are
    second = list(usable[min(1, len(usable) - 1)])[: max(1, room)]
    if len(second) == len(first) and room > len(first):
        second = [*first, *first][: min(room, len(first) + 2)]
    batches = [[first, second, list(first), list(second)]]
    tokens = [token for prompt in usable for token in prompt]
    long = list(usable[-1])
    while len(long) < room:
        long += tokens[: room - len(long)]
    if len(long) > len(second):
        batches.append([long[: max(1, room)], first])
    return batches


def _same_beginnings(free: Trajectory, stopped: Trajectory) -> bool:
    both = zip(free.responses(ending=True), stopped.responses(ending=True), strict=True)
    return all(one[: len(other)] == other for one, other in both)


@torch.no_grad()
def _difference(policy: Policy, trajectory: Trajectory) -> float:
    device = next(policy.parameters()).device
    ids, mask = trajectory.slice_rows(list(range(len(trajectory))), device)
    trained = policy(ids, mask, trajectory.temperature).logprobs
    sampled = trajectory.logprobs[:, : ids.shape[1]].to(device)
    gap = (trained - sampled).abs()[mask]
    return float(gap.nan_to_num(nan=torch.inf).max())


@torch.no_grad()
def _rounding(policy: Policy, trajectory: Trajectory) -> float:
    """How far bfloat16 moves the trainer's own log-probabilities, in nats."""
    device = next(policy.parameters()).device
    ids, mask = trajectory.slice_rows(list(range(len(trajectory))), device)
    rounded = policy(ids, mask, trajectory.temperature).logprobs[mask]
    precision, policy.precision = policy.precision, None
    try:
        exact = policy(ids, mask, trajectory.temperature).logprobs[mask]
    finally:
        policy.precision = precision
    return float((rounded - exact).abs().max())
