"""The diagnosis of a loss: its gradient on a population beside the exact one, probes that should
change nothing, and the mistakes that explain the rest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..worlds.world import Array
from .case import PROBES, Case, Change, Closer
from .catalogue import CATALOGUE
from .faults.explain import explain
from .faults.terms import Terms
from .measure import Loss, LossGradient, Measured, measure
from .population import Population
from .readings import constant_within_rows, misreading, uncovered
from .verdict import Verdict

TOLERANCE = 1e-6
"""A smaller relative bias is rounding: float32 passes, bfloat16 does not."""
LOW_PRECISION = 0.01
"""An unexplained relative bias up to this may come from half precision."""
LIKELIHOOD = "likelihood of demonstrations"
"""The only kind of loss in which a mean within each micro-batch can be told from a mean within each
response.
"""

STAYS = 0.2
"""A loss that leaves a larger share of the way to the optimum than this does not learn."""
BOUNDED = (("weights truncated",), ("weights masked",))
OPEN = (
    (),
    ("unknown",),
    ("not clipped",),
    ("not capped",),
    ("depends on the size of the batch",),
    *BOUNDED,
)
"""Names after which other batches are tried, if the case has some."""


def judge(loss: Loss, case: Case, *, train: bool = True) -> Verdict:
    """Measure a loss, and name what is wrong with it."""
    seen = case.gradient(loss)
    if seen.missing:
        return _wrong(case, "no gradient")
    if not seen.finite:
        return _wrong(case, "not finite")
    direction, target = -case.parameters(seen.table), case.exact(case.population)
    found = measure(direction, target)
    leaks = case.leaks(seen)
    typical = math.sqrt(sum(float((g**2).sum()) for g in seen.rows))
    if typical == 0:
        return _wrong(case, "no gradient")
    if np.linalg.norm(direction) < 1e-9 * typical and not leaks:
        return replace(_wrong(case, case.zero), cosine=0.0, relative_bias=1.0, scale=0.0)
    failed = _probe(loss, case, seen)
    if failed is None:
        return _wrong(case, "not deterministic")
    biased = found.relative_bias > TOLERANCE
    names: tuple[str, ...] = ()
    remarks: list[str] = []
    if biased:
        names, remarks = _name_bias(loss, case, seen, direction, leaks, failed)
    elif case.learned == "raw" and (misread := misreading(seen, TOLERANCE)):
        names = (misread,)  # advantages that are exact hide it in the expectation
    elif leaks:
        names = tuple(leaks)
    elif fatal := [f for f in failed if f != "nan"]:
        names = (_probe_name(fatal[0], case),)
    if names in OPEN and case.closer is not None:
        names, closer = _look_closer(case.closer(loss), direction, names)
        remarks += closer
    if not names:
        remarks += _about_scale(found.scale, case) + _about_mixing(loss, case, seen)
    remarks += [
        f"Also: {_probe_sentence(f, case)}"
        for f in failed
        if _probe_name(f, case) not in names and not (names and f == "nan")
    ]
    gap = case.train(loss) if train and case.train is not None else None
    if not names and gap is not None and gap > STAYS:
        names = ("does not learn",)
    sentence = f"The expected gradient has the exact direction, to {found.relative_bias:.0e}."
    if names:
        sentence = _sentence(names, found)
    elif found.relative_bias > TOLERANCE:
        sentence = "The expected gradient has the exact direction, except where the clip acts."
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
    parts = [CATALOGUE[n].explanation for n in names]
    if found is not None and found.relative_bias > TOLERANCE:
        parts.append(
            f"The expected gradient is off by {found.relative_bias:.2%} "
            f"(cosine {found.cosine:.4f})."
        )
    remedies = list(dict.fromkeys(CATALOGUE[n].remedy for n in names if CATALOGUE[n].remedy))
    if remedies:
        parts += ["What to do:", *remedies]
    return " ".join(parts)


# ---- probes ----


def _probe(loss: Loss, case: Case, seen: LossGradient) -> list[str] | None:
    """Names of the invariances that fail; None if two runs on the same batch already differ."""

    def same(other: LossGradient, *, up_to_scale: bool = False) -> bool:
        a, b = case.parameters(seen.table), case.parameters(other.table)
        if not np.isfinite(b).all():
            return False
        if up_to_scale:
            return measure(b, a).relative_bias < TOLERANCE
        return bool(np.linalg.norm(a - b) <= TOLERANCE * np.linalg.norm(a))

    if not same(case.gradient(loss)):
        return None
    failed = [
        name
        for name, (change, _) in PROBES.items()
        if not same(case.gradient(loss, change), up_to_scale=name == "copies")
    ]
    try:
        clean = same(case.gradient(loss, Change(fill="nan")))
    except Exception:  # a loss may refuse NaN wherever it stands
        clean = False
    return failed if clean else [*failed, "nan"]


def _probe_name(probe: str, case: Case) -> str:
    if probe == "nan":
        return "nan"
    return "groups mixed" if probe == "order" and case.group > 1 else PROBES[probe][1]


def _probe_sentence(probe: str, case: Case) -> str:
    if probe == "nan":
        return (
            "NaN where the mask is false reaches the gradient (0 * NaN is NaN). Select with "
            "torch.where in place of multiplying by the mask."
        )
    return CATALOGUE[_probe_name(probe, case)].explanation


# ---- names for a bias ----


def _name_bias(
    loss: Loss,
    case: Case,
    seen: LossGradient,
    direction: Array,
    leaks: list[str],
    failed: list[str],
) -> tuple[tuple[str, ...], list[str]]:
    """The names of the mistakes in a biased gradient, and remarks."""
    if case.learned == "raw" and (misread := misreading(seen, TOLERANCE)):
        return (misread,), []
    known = explain(direction, case.candidates(case.population), case.group)
    if known is not None:
        names = _with_leaks(known.names, leaks, case.leaks(seen, by_row=True), case)
        if "order" in failed:  # a mean over a response does not depend on the order of rows
            means = {"mean of response means": "mean of micro-batch means"}
            names = tuple(means.get(n, n) for n in names)
        if "wrong beta" not in names:
            return names, []
        return names, [f"The penalty has {known.strength:.4g} times the right strength."]
    if leaks and not failed:
        return tuple(leaks), []
    fatal = [f for f in failed if f != "nan"]
    if fatal:
        if fatal[0] == "order" and case.checked == LIKELIHOOD and constant_within_rows(seen):
            return ("mean of micro-batch means",), []
        return (_probe_name(fatal[0], case),), []
    if measure(direction, case.exact(case.population)).relative_bias < LOW_PRECISION:
        return ("low precision",), []
    remarks = [
        f"The bias disappears without {name}: look there."
        for name, change in case.without.items()
        if _exact_without(loss, case, change(case.population))
    ]
    return ("unknown",), remarks + uncovered(seen)


def _with_leaks(
    names: tuple[str, ...], leaks: list[str], anywhere: list[str], case: Case
) -> tuple[str, ...]:
    """Combine what is left out with what is reached: a mask that is shifted leaves out a token at
    one end and includes one at the other. A score or value read at the wrong place reaches others
    anyway.
    """
    out = list(names)
    rest = [x for x in leaks if x not in names and case.learned == "raw"]
    shifted = (
        ("last token left out", "trains on the prompt", "mask one token early"),
        ("first token left out", "trains on padding", "mask one token late"),
    )
    for left_out, included, both in shifted:
        if left_out in out and included in anywhere:
            out[out.index(left_out)] = both
            rest = [x for x in rest if x != included]
    return (*out, *rest)


def _exact_without(loss: Loss, case: Case, population: Population) -> bool:
    target = case.exact(population)
    if np.linalg.norm(target) < 1e-9:
        return False
    seen = case.gradient(loss, population=population)
    return seen.finite and measure(-case.parameters(seen.table), target).relative_bias < TOLERANCE


def _look_closer(
    found: Closer, direction: Array, names: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    """The names of a loss that is right on the population or unexplained there, after a closer
    look, and remarks.
    """
    if found.sure:
        return found.names, list(found.remarks)
    # with one response beyond the bound, the population cannot tell truncated from masked
    if not names or names in BOUNDED or not found.names:
        return found.names or names, list(found.remarks)
    # unexplained: what is left if what was measured had been meant
    if found.case is None:
        return names, list(found.remarks)
    target = found.case.exact(found.case.population)
    if measure(direction, target).relative_bias <= TOLERANCE:
        return found.names, list(found.remarks)
    known = explain(direction, found.case.candidates(found.case.population), found.case.group)
    if known is None:
        return names, list(found.remarks)
    left = known.names if known.names not in BOUNDED else ()
    return tuple(dict.fromkeys(left + found.names)), list(found.remarks)


# ---- remarks on a correct loss ----


def _about_scale(scale: float, case: Case) -> list[str]:
    """What the scale of the gradient says about the group's mean."""
    if case.group == 1 or case.learned != "raw":
        return []
    g, terms = case.group, Terms(case.population)
    tokens = float((terms.probability[..., None] * terms.lengths).sum())
    for natural in (1.0, 1 / tokens):
        if abs(scale / natural / ((g - 1) / g) - 1) < 1e-6:
            return [
                f"The gradient has (G - 1) / G = {(g - 1) / g:.3g} of the exact length, because "
                "the mean of the group includes the response itself. All terms share this factor."
            ]
    return []


def _about_mixing(loss: Loss, case: Case, seen: LossGradient) -> list[str]:
    """A remark if the gradient of the whole batch is not a mixture of those of its halves."""
    halves = np.stack(
        [case.parameters(case.gradient(loss, Change(half=h)).table).ravel() for h in (0, 1)], 1
    )
    whole = case.parameters(seen.table).ravel()
    left = whole - halves @ np.linalg.lstsq(halves, whole, rcond=None)[0]
    if np.linalg.norm(left) <= TOLERANCE * np.linalg.norm(whole):
        return []
    return [
        "Rows depend on one another, as with statistics of the batch. This batch stands for a very "
        "large one; use `unbiased` for small ones."
    ]
