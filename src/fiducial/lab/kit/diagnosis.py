"""What is wrong with a loss: its gradient on a population beside the exact one, probes that should
change nothing, and the mistakes that explain the rest.

A `Case` says what kind of loss is looked at; `judge` gives the `Verdict`. The kinds are in
`fiducial.lab.kit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..worlds import exact
from ..worlds.world import Array
from . import faults
from .catalogue import CATALOGUE
from .faults import Candidate
from .population import Batch, Outside, PairBatch, Population, Rows, layout

Loss = Callable[[Any], Any]
"""From a Batch or PairBatch to a scalar tensor, or to a tuple that begins with one."""

TOLERANCE = 1e-6
"""A relative bias below this is rounding: float32 passes, bfloat16 does not."""
ROUNDING = 0.01
"""Up to here an unexplained bias may be that of half precision."""


@dataclass(frozen=True)
class Verdict:
    """What is known of a loss.

    ok: its expected gradient has the exact direction, and nothing changes it that should not.
    name: "correct", or the mistake, of `fiducial.lab.CATALOGUE`; several are joined by " + ".
    sentence: what is wrong, by how much, and what to do.
    checked: what it was held against.
    cosine: of its expected gradient and the exact one.
    relative_bias: |a g - exact| / |exact| at the best positive factor a.
    scale: the length of g along the exact gradient: 1 for a mean over responses of sums over
    tokens. variance: E |g_i - g|^2 / |g|^2 of what one response (group, pair) adds to the gradient:
    how many it takes for noise as large as the gradient. gap: what a short training with this loss
    leaves of the way to the optimum: 1 where it began, 0 at the optimum. None: not trained. probes:
    the invariances that failed: padding, order, copies, prompt, nan. remarks: more sentences.
    """

    ok: bool
    name: str
    sentence: str
    checked: str
    cosine: float = math.nan
    relative_bias: float = math.nan
    scale: float = math.nan
    variance: float = math.nan
    gap: float | None = None
    probes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{'ok   ' if self.ok else 'WRONG'}  {self.checked}: {self.name}",
            self.sentence,
            *self.remarks,
        ]
        if not math.isnan(self.cosine):
            gap = "" if self.gap is None else f", gap after a short training {self.gap:.3f}"
            lines.append(
                f"cosine {self.cosine:.4f}, relative bias {self.relative_bias:.1e}, scale "
                f"{self.scale:.4g}, variance {self.variance:.3g}{gap}"
            )
        return "\n       ".join(lines)


# ---- a loss on one batch ----


@dataclass(frozen=True)
class Change:
    """How the plain batch is changed: more padding, other nonsense there, other prompts, another
    order, every row again, every second row (or group).
    """

    widen: int = 0
    fill: Outside = "nonsense"
    garbled: bool = False
    order: bool = False
    copies: int = 1
    half: int | None = None


PROBES: dict[str, tuple[Change, str]] = {
    "padding": (Change(widen=2, fill="other"), "padding counts"),
    "prompt": (Change(garbled=True), "reads the prompt's tokens"),
    "order": (Change(order=True), "depends on the order of rows"),
    "copies": (Change(copies=2), "copies count"),
}


@dataclass(frozen=True, eq=False)
class Look:
    """Value and gradient of a loss on one batch.

    table: [E, ...] gradient by every row of the learned table: states, complete responses,
    positions inside prompts, columns behind the end. sides: the batch, or the chosen and the
    rejected half. each: their gradients [N, W, ...] row by row, node [N, W] the row of the table.
    """

    value: float
    table: Array
    sides: tuple[Batch, ...]
    each: tuple[Array, ...]
    node: tuple[Rows, ...]
    nothing: bool

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.value) and np.isfinite(self.table).all())


def scalar(found: Any) -> Tensor:
    """The loss in what a function returned. ValueError if there is none."""
    loss = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(loss, Tensor):
        raise ValueError(
            "a loss must return a scalar tensor, or a tuple that begins with one, not "
            f"{type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"a loss must return a scalar tensor, not one of shape {list(loss.shape)}: sum it or "
            "average it"
        )
    return loss.reshape(())


def look(loss: Loss, batch: Batch | PairBatch, what: str) -> Look:
    """The loss and its gradient by "raw" logits, "values" or "scores"."""
    sides = (batch,) if isinstance(batch, Batch) else (batch.chosen, batch.rejected)
    leaves = [getattr(s, what) for s in sides]
    value = scalar(loss(batch))
    found = (
        torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        if value.requires_grad
        else [None] * len(leaves)
    )
    each = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    size = max(int(s.node.max()) for s in sides) + 2
    # a value in column t is of the state that position t - 1 is in; in front of the first column
    # there is none
    node = [
        torch.cat([torch.full_like(s.node[:, :1], size - 1), s.node[:, :-1]], 1)
        if what == "values"
        else s.node
        for s in sides
    ]
    table = torch.zeros((size, *each[0].shape[2:]), dtype=torch.float64)
    for n, g in zip(node, each, strict=True):
        table.index_add_(0, n.reshape(-1), g.double().reshape(-1, *g.shape[2:]))
    return Look(
        float(value.detach()),
        table.numpy(),
        sides,
        tuple(g.double().numpy() for g in each),
        tuple(n.numpy() for n in node),
        all(g is None for g in found),
    )


@dataclass(frozen=True)
class Measured:
    """A direction held against the exact one; see `Verdict`."""

    cosine: float
    relative_bias: float
    scale: float


def measure(found: Array, target: Array) -> Measured:
    """Two gradients of the same shape."""
    g, t = found.ravel(), target.ravel()
    gg, gt, tt = float(g @ g), float(g @ t), float(t @ t)
    if gg < 1e-24 * tt:
        return Measured(0.0, 1.0, 0.0)
    best = max(gt / gg, 0.0)
    return Measured(
        gt / math.sqrt(gg * tt), float(np.linalg.norm(best * g - t)) / math.sqrt(tt), gt / tt
    )


# ---- what is checked ----


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of loss.

    what: the tensor that is learned. exact: minus the exact gradient of the loss that is meant.
    make: the population as a batch. candidates: mistakes, each with its gradient. train: from a
    loss to the gap that it leaves. parts: populations in which one thing is missing; where the bias
    is gone there, it was in that thing.
    """

    checked: str
    what: str
    population: Population
    exact: Callable[[Population], Array]
    make: Callable[[Population, Change], Any]
    candidates: Callable[[Population], Iterator[Candidate]]
    train: Callable[[Loss], float] | None
    parts: dict[str, Callable[[Population], Population]] = field(default_factory=dict)
    group: int = 1
    zero: str = "zero in expectation"

    def look(
        self, loss: Loss, change: Change | None = None, population: Population | None = None
    ) -> Look:
        return look(loss, self.make(population or self.population, change or Change()), self.what)

    def parameters(self, table: Array) -> Array:
        """Of [..., E, ...] rows those that are learned: [P, S, V] logits, [P, S] values, or [P, S +
        Y] scores.
        """
        world = self.population.world
        where, prompts = layout(world.prompts, world.horizon), len(world.prompts)
        if self.what == "scores":
            inner, own = (
                table[: where.states].reshape(prompts, -1),
                table[where.states : where.ends].reshape(prompts, -1),
            )
            return np.concatenate([inner, own], 1)
        return table[: where.states].reshape(prompts, -1, *table.shape[1:])

    def leaks(self, seen: Look, *, by_row: bool = False) -> list[str]:
        """Where a gradient reaches what is no token of the policy's, on balance or in any row."""
        where = layout(self.population.world.prompts, self.population.world.horizon)
        size = np.abs(seen.table).reshape(len(seen.table), -1).max(1)
        if by_row:
            size = np.zeros(len(size))
            for node, g in zip(seen.node, seen.each, strict=True):
                np.maximum.at(size, node, np.abs(g).reshape(*node.shape, -1).max(-1))
        reached = size > 1e-10 * size.max()
        front = [len(reached) - 1] if self.what == "values" else []
        inside = np.r_[where.ends : where.prompts, front].astype(int)
        behind = np.r_[
            where.ends if self.what == "scores" else where.states : where.ends,
            where.prompts : len(reached) - len(front),
        ]
        return [
            n
            for n, at in (("trains on the prompt", inside), ("trains on padding", behind))
            if reached[at].any()
        ]

    def variance(self, seen: Look) -> float:
        """Every response (group, pair) of the population is as likely as every other."""
        units, learned = None, None
        for g, node in zip(seen.each, seen.node, strict=True):
            n = len(g)
            table = np.zeros((n, len(seen.table), int(np.prod(g.shape[2:]))))
            np.add.at(table, (np.arange(n)[:, None], node), g.reshape(n, g.shape[1], -1))
            units = table if units is None else units + table
        assert units is not None
        units = units.reshape(-1, self.group, *units.shape[1:]).sum(1)
        learned = units[:, : self._learned_rows]
        whole = learned.sum(0)
        return float((learned**2).sum() * len(learned) / (whole**2).sum() - 1)

    @property
    def _learned_rows(self) -> int:
        where = layout(self.population.world.prompts, self.population.world.horizon)
        return where.ends if self.what == "scores" else where.states


def judge(loss: Loss, case: Case, *, train: bool = True) -> Verdict:
    """Look, measure, and name what is wrong."""
    seen = case.look(loss)
    if seen.nothing:
        return _wrong(case, "no gradient")
    if not seen.finite:
        return _wrong(case, "not finite")
    direction, target = -case.parameters(seen.table), case.exact(case.population)
    found = measure(direction, target)
    leaks = case.leaks(seen)
    typical = math.sqrt(sum(float((g**2).sum()) for g in seen.each))
    if np.linalg.norm(direction) < 1e-9 * typical and not leaks:
        return replace(_wrong(case, case.zero), cosine=0.0, relative_bias=1.0, scale=0.0)
    failed = _probe(loss, case, seen)
    if "random" in failed:
        return _wrong(case, "random")
    biased = found.relative_bias > TOLERANCE
    names: tuple[str, ...] = ()
    remarks: list[str] = []
    if biased:
        names, remarks = _explain(loss, case, seen, direction, leaks, failed)
    elif leaks:
        names = tuple(leaks)
    elif fatal := [f for f in failed if f != "nan"]:
        names = (_probe_name(fatal[0], case),)
    if not names:
        remarks += _about_scale(found.scale, case) + _about_company(loss, case, seen)
    remarks += [
        f"Also: {_probe_sentence(f, case)}."
        for f in failed
        if _probe_name(f, case) not in names and not (names and f == "nan")
    ]
    gap = case.train(loss) if train and case.train is not None else None
    sentence = (
        _sentence(names, found)
        if names
        else f"The expected gradient has the exact direction, to {found.relative_bias:.0e}."
    )
    return Verdict(
        not names,
        " + ".join(names) or "correct",
        sentence,
        case.checked,
        found.cosine,
        found.relative_bias,
        found.scale,
        case.variance(seen),
        gap,
        tuple(failed),
        tuple(remarks),
    )


def _wrong(case: Case, name: str) -> Verdict:
    return Verdict(False, name, _sentence((name,), None), case.checked)


def _sentence(names: tuple[str, ...], found: Measured | None) -> str:
    what = "; ".join(CATALOGUE[n].words for n in names)
    todo = "; ".join(CATALOGUE[n].remedy for n in names if CATALOGUE[n].remedy)
    biased = found is not None and found.relative_bias > TOLERANCE
    size = (
        f" The expected gradient is off by {found.relative_bias:.2%} (cosine {found.cosine:.4f})."
        if found is not None and biased
        else ""
    )
    return f"{what[0].upper()}{what[1:]}.{size}" + (f" What to do: {todo}." if todo else "")


# ---- diagnosis ----


def _probe(loss: Loss, case: Case, seen: Look) -> list[str]:
    """Names of the invariances that fail; "random" alone if there is no saying."""

    def same(other: Look, *, up_to_scale: bool = False) -> bool:
        a, b = case.parameters(seen.table), case.parameters(other.table)
        if not np.isfinite(b).all():
            return False
        if up_to_scale:
            return measure(b, a).relative_bias < TOLERANCE
        return bool(np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(a))

    if not same(case.look(loss)):
        return ["random"]
    failed = [
        name
        for name, (change, _) in PROBES.items()
        if not same(case.look(loss, change), up_to_scale=name == "copies")
    ]
    try:
        clean = same(case.look(loss, Change(fill="nan")))
    except Exception:  # a loss may well refuse what is not a number, wherever it stands
        clean = False
    return failed if clean else [*failed, "nan"]


def _probe_name(probe: str, case: Case) -> str:
    if probe == "nan":
        return "nan"
    return "groups mixed" if probe == "order" and case.group > 1 else PROBES[probe][1]


def _probe_sentence(probe: str, case: Case) -> str:
    if probe == "nan":
        return "NaN where the mask is false reaches the gradient (0 * NaN is NaN): select with torch.where instead of multiplying"
    return CATALOGUE[_probe_name(probe, case)].words


def _explain(
    loss: Loss, case: Case, seen: Look, direction: Array, leaks: list[str], failed: list[str]
) -> tuple[tuple[str, ...], list[str]]:
    """Names for a biased gradient, and remarks."""
    if case.what == "raw" and (misread := reading(seen)):
        return (misread,), []
    known = faults.explain(direction, case.candidates(case.population), case.group)
    if known is not None:
        names = _with_leaks(known.names, leaks, case.leaks(seen, by_row=True), case)
        if "order" in failed:  # nothing that a response's own length does depends on the order
            names = tuple("mean of micro-batch means" if n == "mean of means" else n for n in names)
        return names, [
            f"The penalty acts with {known.strength:.4g} times its strength."
        ] if "wrong beta" in names else []
    if leaks and not failed:
        return tuple(leaks), []
    order = [f for f in failed if f != "nan"]
    if order:
        if order[0] == "order" and case.checked == LIKELIHOOD and constant_within_rows(seen):
            return ("mean of micro-batch means",), []
        return (_probe_name(order[0], case),), []
    if measure(direction, case.exact(case.population)).relative_bias < ROUNDING:
        return ("rounding",), []
    gone = [
        name
        for name, part in case.parts.items()
        if _exact_without(loss, case, part(case.population))
    ]
    return ("unknown",), [
        f"The bias is gone without {name}: look there." for name in gone
    ] + coverage(seen)


def _with_leaks(
    names: tuple[str, ...], leaks: list[str], anywhere: list[str], case: Case
) -> tuple[str, ...]:
    """A mask that is shifted leaves something out at one end and takes something in at the other.
    What is read at the wrong place leaks by itself.
    """
    out, rest = list(names), [x for x in leaks if x not in names and case.what == "raw"]
    shifted = (
        ("last token left out", "trains on the prompt", "mask one early"),
        ("first token left out", "trains on padding", "mask one late"),
    )
    for left_out, taken, both in shifted:
        if left_out in out and taken in anywhere:
            out[out.index(left_out)] = both
            rest = [x for x in rest if x != taken]
    return (*out, *rest)


def _exact_without(loss: Loss, case: Case, population: Population) -> bool:
    target = case.exact(population)
    if np.linalg.norm(target) < 1e-9:
        return False
    seen = case.look(loss, population=population)
    return seen.finite and measure(-case.parameters(seen.table), target).relative_bias < TOLERANCE


def _about_scale(scale: float, case: Case) -> list[str]:
    """What a scale says, where it says something."""
    if case.group == 1 or case.what != "raw":
        return []
    g, tokens = (
        case.group,
        float(
            (
                faults.Terms(case.population).likely[..., None]
                * faults.Terms(case.population).lengths
            ).sum()
        ),
    )
    for natural in (1.0, 1 / tokens):
        if abs(scale / natural / ((g - 1) / g) - 1) < 1e-6:
            return [
                f"Its length is (G - 1) / G = {(g - 1) / g:.3g} of the exact one: the mean of the "
                "group includes the response itself. All terms share it."
            ]
    return []


def _about_company(loss: Loss, case: Case, seen: Look) -> list[str]:
    """Whether the gradient of the whole is a mixture of those of its halves."""
    halves = np.stack(
        [case.parameters(case.look(loss, Change(half=h)).table).ravel() for h in (0, 1)], 1
    )
    whole = case.parameters(seen.table).ravel()
    left = whole - halves @ np.linalg.lstsq(halves, whole, rcond=None)[0]
    if np.linalg.norm(left) <= TOLERANCE * np.linalg.norm(whole):
        return []
    return [
        "Rows depend on one another, as with statistics of the batch. This batch stands for a very "
        "large one: see `unbiased` for small ones."
    ]


READINGS = (
    ("", 1, "tau", True),
    ("labels not shifted", 0, "tau", True),
    ("labels shifted twice", 2, "tau", True),
    ("temperature missing", 1, "1", True),
    ("log-softmax missing", 1, "tau", False),
    ("log-softmax missing", 1, "1", False),
)


def reading(seen: Look) -> str | None:
    """How log-probabilities were read from logits, by the gradient: that of log softmax(z / tau)_y
    is (one-hot_y - softmax(z / tau)) / tau.

    Returns:
        The mistake, or None where they were read as they should be, or not by looking up tokens.
    """
    for name, offset, tau, normalised in READINGS:
        left = total = 0.0
        for side, g in zip(seen.sides, seen.each, strict=True):
            raw, ids = side.raw.detach().numpy(), side.ids.numpy()
            w = ids.shape[1] - offset
            hot = np.eye(raw.shape[-1])[ids[:, offset : offset + w]]
            temperature = side.temperature if tau == "tau" else 1.0
            form = hot - np.exp(exact.log_softmax(raw[:, :w] / temperature)) if normalised else hot
            share = (g[:, :w] * form).sum(-1, keepdims=True) / (form**2).sum(-1, keepdims=True)
            left += float(((g[:, :w] - share * form) ** 2).sum() + (g[:, w:] ** 2).sum())
            total += float((g**2).sum())
        if left < TOLERANCE**2 * total:
            return name or None
    return None


def _coefficients(side: Batch, g: Array) -> Array:
    """[N, W] the loss's derivative by the log-probability of each token, of a loss that looks
    tokens up.
    """
    ids, raw = side.ids.numpy(), side.raw.detach().numpy()
    form = np.eye(raw.shape[-1])[ids[:, 1:]] - np.exp(
        exact.log_softmax(raw[:, :-1] / side.temperature)
    )
    return (
        np.concatenate([np.zeros((len(ids), 1)), (g[:, :-1] * form).sum(-1) / (form**2).sum(-1)], 1)
        * side.temperature
    )


def constant_within_rows(seen: Look) -> bool:
    """Whether all tokens of a response weigh the same, as in a mean of means."""
    for side, g in zip(seen.sides, seen.each, strict=True):
        c, mask = _coefficients(side, g), side.mask.numpy()
        high, low = np.where(mask, c, -np.inf).max(1), np.where(mask, c, np.inf).min(1)
        if (high - low > 1e-9 * np.abs(c).max()).any():
            return False
    return True


def coverage(seen: Look) -> list[str]:
    """Which of the policy's tokens never have a gradient."""
    out = []
    for name in ("first", "last", "EOS"):
        reached = False
        for side, g in zip(seen.sides, seen.each, strict=True):
            if g.ndim < 3:
                return []
            t, columns = side.trajectory, torch.arange(side.ids.shape[1])[None]
            last = t.last & t.finished[:, None] if name == "EOS" else t.last
            at = (columns == t.prompt_lengths[:, None]) if name == "first" else last
            reached |= bool(
                (np.abs(_coefficients(side, g))[at.numpy()] > 1e-12 * np.abs(g).max()).any()
            )
        if not reached:
            out.append(
                f"No response's {name} token has a gradient."
                if name != "EOS"
                else "EOS never has a gradient."
            )
    return out


LIKELIHOOD = "likelihood of demonstrations"
"""The one kind in which a mean within each micro-batch can be told from a mean within each
response.
"""
