"""Is the model computed right? What a trainer says of a run's own first rows is compared with what
the model says of them in plain `transformers`, before anything is trained.

Each check raises an InputError, or returns the largest difference it saw.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .roles import Policy, Roles, ScoreModel
from .trunk import accepts, autocast, evaluating, plain, text_config

FLOAT32 = 1e-4
"""Largest difference of a log-probability, in nats, that rounding in float32 explains."""
BFLOAT16 = 1e-3
"""The same in bfloat16 where the model's own rounding, which is measured, is smaller."""
KEPT = 64
"""Positions of a row whose logits are compared: the last ones, which have the longest context."""


def check_roles(
    roles: Roles,
    rows: Sequence[Sequence[int]],
    longest: int,
    names: Mapping[str, str],
    flag: str = "--model",
) -> str:
    """Check every role of a run on two of its rows (see `probe_rows`).

    Args:
        names: the folder or Hub name of each role: model, and critic and teacher where there are.
        flag: the setting that names the model.

    Returns:
        half a sentence about what was compared.

    Raises:
        InputError: something differs by more than rounding explains.
    """
    probed = probe_rows(rows, longest)
    gaps = []
    if roles.trains_policy:
        gaps.append(check_policy(roles.policy, probed, names["model"], flag))
        if roles.has_reference:
            check_start(roles, probed)
    else:
        gaps.append(check_scorer(roles.scorer, probed, names["model"], flag))
    for role, module in roles.trained().items():
        check_gradient(module, probed[1], names["critic" if role == "critic" else "model"], flag)
    if roles.critic is not None:
        gaps.append(check_scorer(roles.critic, probed, names["critic"], "--critic.start"))
    if roles.has_teacher:
        gaps.append(check_policy(roles.teacher, probed, names["teacher"], "--teacher"))
    what = "log-probabilities" if roles.trains_policy else "scores"
    said = (
        f"{what} equal plain transformers' to {max(gaps):.1g} "
        f"(rows of {len(probed[0]):,} and {len(probed[1]):,} tokens)"
    )
    model = plain(roles.policy.lm if roles.trains_policy else roles.scorer.model)
    return "; ".join([said, *unheeded(model)])


def unheeded(model: Any) -> list[str]:
    """What the makers of a model ask for in training and this package does not do, in sentences."""
    config, found = text_config(model.config), []
    if getattr(config, "output_router_logits", False):
        weight = getattr(config, "router_aux_loss_coef", None)
        found.append(f"the router's auxiliary loss (weight {weight}) is not trained")
    adapted = any("lora_" in name for name, _ in model.named_parameters())
    if adapted and any(p.dim() == 3 for name, p in model.named_parameters() if "expert" in name):
        found.append("the experts are one fused tensor and have no adapters")
    return found


def probe_rows(rows: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """Two rows to compare on: one as long as the run's longest, and the shortest.

    Args:
        rows: token ids of rows of the run.
        longest: number of tokens of the longest sequence that the run may see. Where no row is so
            long, the longest row is continued with the tokens of the rows.
    """
    usable = sorted((r for r in rows if len(r) > 1), key=len)
    if not usable:
        usable = [[*rows[0], *rows[0]]]
    long = list(usable[-1])[:longest]
    tokens = cycle(token for row in usable for token in row)
    long += islice(tokens, longest - len(long))
    return [long, list(usable[0])]


@torch.no_grad()
def check_policy(policy: Policy, rows: Sequence[Sequence[int]], name: str, flag: str) -> float:
    """Compare log-probabilities of two rows in one padded batch with those of each row alone in the
    model's own forward pass.

    Returns:
        the largest difference, in nats.

    Raises:
        InputError: they differ by more than rounding, or the model cannot read these rows.
    """
    model, device = plain(policy.lm), next(policy.parameters()).device
    check_lengths(model.config, max(map(len, rows)), name, flag)
    kind = type(model).__name__
    ids, mask = _padded(rows, device)

    def alone(precision: torch.dtype | None) -> Tensor:
        with evaluating(model), _computing_in(precision, model, device):
            return torch.cat([_plain_logprobs(model, row, device) for row in rows])

    ours = _tried(lambda: policy(ids, mask).logprobs[mask], kind, name, flag)
    theirs = _tried(lambda: alone(policy.precision), kind, name, flag)
    gap, tolerance = _largest(ours, theirs), FLOAT32
    if policy.precision is not None:
        rounding = _largest(theirs, _tried(lambda: alone(None), kind, name, flag))
        tolerance = max(BFLOAT16, 2 * rounding)
    if not gap <= tolerance:
        raise InputError(
            f"{flag}: {kind} of {name} gives other log-probabilities here than in plain "
            f"transformers: they differ by up to {gap:.2g} nats on rows of "
            f"{' and '.join(str(len(r)) for r in rows)} tokens, which is more than the "
            f"{tolerance:.2g} that rounding explains. This architecture cannot be used"
        )
    return gap


@torch.no_grad()
def check_scorer(scorer: ScoreModel, rows: Sequence[Sequence[int]], name: str, flag: str) -> float:
    """Compare the scores of two rows in one padded batch with those of each row alone in plain
    `transformers`.

    Returns:
        the largest difference, in units of the score.

    Raises:
        InputError: they differ by more than rounding, or the model cannot read these rows.
    """
    model, device = plain(scorer.model), next(scorer.parameters()).device
    check_lengths(model.config, max(map(len, rows)), name, flag)
    kind = type(model).__name__
    pad = getattr(text_config(model.config), "pad_token_id", None)
    # transformers reads the score at the last token that is no padding
    rows = [[*r[:-1], r[-1] if r[-1] != pad else _another(r, pad)] for r in rows]

    ids, _ = _padded(rows, device)
    lengths = torch.tensor([len(r) for r in rows], device=device)

    def alone(precision: torch.dtype | None) -> Tensor:
        with evaluating(model), _computing_in(precision, model, device):
            each = [model(input_ids=torch.tensor([r], device=device)).logits for r in rows]
        return torch.cat(each)[:, 0].float()

    ours = _tried(lambda: scorer(ids, lengths), kind, name, flag)
    theirs = _tried(lambda: alone(scorer.precision), kind, name, flag)
    gap, tolerance = _largest(ours, theirs), FLOAT32 * max(1.0, float(theirs.abs().max()))
    if scorer.precision is not None:
        rounding = _largest(theirs, _tried(lambda: alone(None), kind, name, flag))
        tolerance = max(BFLOAT16, 2 * rounding)
    if not gap <= tolerance:
        raise InputError(
            f"{flag}: {kind} of {name} gives other scores here than in plain transformers: they "
            f"differ by up to {gap:.2g} on rows of {' and '.join(str(len(r)) for r in rows)} "
            f"tokens, where rounding explains {tolerance:.2g}. This architecture cannot be used"
        )
    return gap


def check_gradient(module: nn.Module, row: Sequence[int], name: str, flag: str) -> None:
    """Checks that the weights that are trained get a gradient. None is left.

    Args:
        row: token ids of one row, a short one.

    Raises:
        InputError: the architecture cannot be trained here.
    """
    ids, mask = _padded([row], next(module.parameters()).device)

    def backward() -> None:
        said = module(ids, mask).logprobs if isinstance(module, Policy) else module(ids)
        said.sum().backward()

    model = plain(getattr(module, "lm", None) or getattr(module, "model", module))
    _tried(backward, type(model).__name__, name, flag)
    trained = [p for p in module.parameters() if p.requires_grad]
    if all(p.grad is None for p in trained):
        raise InputError(f"{flag}: no weight of {name} gets a gradient, so it cannot be trained")
    module.zero_grad(set_to_none=True)


@torch.no_grad()
def check_start(roles: Roles, rows: Sequence[Sequence[int]]) -> None:
    """Checks that KL(policy, reference) is exactly 0 before the first step, in any precision.

    Raises:
        InputError: policy and reference differ, so the KL penalty would begin from a wrong value.
    """
    policy = roles.policy
    ids, mask = _padded(rows, next(policy.parameters()).device)
    gap = _largest(policy(ids, mask).logprobs, roles.reference(ids, mask))
    if gap != 0:
        raise InputError(
            "policy and reference differ before the first step, by up to "
            f"{gap:.2g} nats per token, although both are the model of --model; without "
            "--run.precision bfloat16 and --run.gradient-checkpointing they may agree"
        )


def check_lengths(config: Any, longest: int, name: str, flag: str) -> None:
    """Checks that no position encoding changes within the run's lengths.

    With LongRoPE and dynamic scaling the encoding of every position depends on the longest row of
    a batch, so a row's log-probabilities would depend on its neighbors.

    Raises:
        InputError: a sequence may be longer than the length at which the encoding changes.
    """
    config = text_config(config)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    for one in several:
        kind = one.get("rope_type", one.get("type"))
        if kind not in ("longrope", "dynamic"):
            continue
        limit = one.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = int(limit or getattr(config, "max_position_embeddings", None) or longest)
        if longest > limit:
            raise InputError(
                f"{flag}: {name} changes its position encoding ({kind}) for sequences of more than "
                f"{limit} tokens, and this run may have {longest}: give --rows.max-length {limit}, "
                "or fewer --max-new-tokens"
            )


@contextlib.contextmanager
def _computing_in(
    precision: torch.dtype | None, model: Any, device: torch.device
) -> Iterator[None]:
    """A model's forward pass in this precision; None for float32, in which layers whose weights are
    kept in bfloat16 multiply too.
    """
    linear: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kept = [m for m in linear if precision is None and m.weight.dtype == torch.bfloat16]
    for layer in kept:
        layer.forward = functools.partial(_wide, layer)
    try:
        with autocast(precision, device):
            yield
    finally:
        for layer in kept:
            del layer.forward


def _wide(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(x, layer.weight.float(), bias)


def _plain_logprobs(model: Any, row: Sequence[int], device: torch.device) -> Tensor:
    """The model's own log-probabilities of the last tokens of one row, as transformers computes
    them without anything of ours.
    """
    ids = torch.tensor([row], device=device)
    kept = min(len(row) - 1, KEPT)
    if accepts(model, "logits_to_keep"):
        logits = model(input_ids=ids, logits_to_keep=kept + 1).logits
    else:
        logits = model(input_ids=ids).logits
    logp = logits[0, -kept - 1 : -1].float().log_softmax(-1)
    out: Tensor = logp.gather(-1, ids[0, -kept:, None])[:, 0]
    return out


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [N, T], and a mask of the last tokens of each row."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], device=device)
    mask = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    for i, r in enumerate(rows):
        mask[i, len(r) - min(len(r) - 1, KEPT) : len(r)] = True
    return ids, mask


def _largest(one: Tensor, other: Tensor) -> float:
    """The largest difference; two minus infinities are equal, and NaN is a difference."""
    gap = torch.where(one == other, 0.0, (one - other).abs())
    return float(gap.nan_to_num(nan=torch.inf).max())


def _another(row: Sequence[int], pad: int) -> int:
    return next((token for token in row if token != pad), (pad + 1) % 2)


def _tried(compute: Callable[[], Any], kind: str, name: str, flag: str) -> Any:
    """What `compute` returns; an architecture that raises is refused."""
    try:
        return compute()
    except InputError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"{flag}: {kind} of {name} cannot read the rows of this run, so it cannot be used: "
            f"{type(error).__name__}: {first}"
        ) from error
