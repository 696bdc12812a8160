"""The tables about what is computed without a run: the decision process, labels, KL, estimators."""

from __future__ import annotations

from typing import Any

from ...report.numbers import MINUS, count, number
from ..runs.results import LabResults
from ..study.results import BestOfN, Credit, CurvePoint, DecisionProcess, KLTable, Missing
from .reading import one_loss
from .table import Cell, Table, table
from .text import DASH, as_typed, known, share

GRADIENTS = {
    "0": "0",
    "KL(pi||ref)": "∇KL(π‖ref)",
    "KL(ref||pi)": "∇KL(ref‖π)",
    "none of the two": "neither",
}


def worked_table(s: DecisionProcess) -> Table:
    """One response, token by token."""
    head: list[Cell] = [
        ("State s", "prompt and tokens so far"),
        ("Action a", "the next token"),
        ("π*(a|s)", "probability"),
        ("ref(a|s)", "probability"),
        ("log π*/ref", "nats"),
        ("Reward", "points"),
        ("V(s)", "points"),
        ("Q(s, a)", "points"),
    ]
    return table(
        head,
        [
            [
                d.state,
                d.action,
                *(known(x) for x in (d.pi, d.ref, d.log_ratio, d.reward, d.value, d.q)),
            ]
            for d in s.steps
        ],
        left=(1,),
    )


def missing_section(lab: LabResults, m: Missing) -> dict[str, str | Table]:
    """Where DPO ends when one response is never compared."""
    best = number(m.optimum_probability) if m.optimum_probability is not None else DASH
    rows: list[list[Cell]] = [
        [s.start, known(s.loss), known(s.total_variation), known(s.probability)] for s in m.starts
    ]
    if m.complete:
        rows.append(
            ["all pairs compared", known(m.complete.loss), known(m.complete.total_variation), DASH]
        )
    words = (
        f"In the {m.world} world no pair holds the response {m.never_compared!r} to the prompt "
        f"{m.prompt!r}. "
        + (
            "The starts below reach the same loss at different policies: the minimizer is not "
            "unique, and the data cannot decide between them."
            if one_loss(lab)
            else "The starts below do not reach one loss at different policies, so this run does "
            "not show that the minimizer is not unique."
        )
    )
    return {
        "words": f"{words} {m.words}".rstrip(),
        "table": table(
            [
                "Start",
                ("Loss", "nats per pair"),
                ("Total variation", "from the optimum"),
                ("Its probability", f"at the minimizer; optimum {best}"),
            ],
            rows,
        ),
    }


def labels_table(lab: LabResults) -> Table | None:
    """One row per annotator."""
    if not lab.labels:
        return None
    rows: list[list[Cell]] = [
        [
            (a.name, a.words) if a.words else a.name,
            known(a.bayes_accuracy),
            known(a.entropy),
            known(a.total_variation),
            share(a.relative_gap),
        ]
        for a in lab.labels
    ]
    head: list[Cell] = [
        "Annotator",
        ("Bayes accuracy", "share of labels"),
        ("Entropy", "nats per label"),
        ("Total variation", "minimizer from the optimum"),
        ("Gap left", "%"),
    ]
    return table(head, rows)


def kl_tables(kl: KLTable) -> dict[str, Table]:
    """The estimators of the KL, and their values between two Gaussians."""
    rows: list[list[Cell]] = [
        [
            e.name,
            known(e.mean),
            known(e.bias),
            known(e.std),
            GRADIENTS.get(e.loss_gradient, e.loss_gradient),
            known(e.cosine_loss),
            known(e.relative_error_loss),
            known(e.cosine_reward),
            known(e.relative_error_reward),
        ]
        for e in kl.estimators
    ]
    head: list[Cell] = [
        "Estimator",
        ("Mean", "nats"),
        ("Bias", "nats"),
        ("Standard deviation", "nats, one sample"),
        ("As a loss", "its gradient is"),
        ("As a loss", "cosine"),
        ("As a loss", "relative error"),
        ("In the reward", "cosine"),
        ("In the reward", "relative error"),
    ]
    out: dict[str, Table] = {"estimators": table(head, rows, left=(4,))}
    if kl.schulman:
        out["schulman"] = table(
            [
                ("Shift", "standard deviations"),
                ("k1", "standard deviation / KL"),
                ("k2", "standard deviation / KL"),
                ("k3", "standard deviation / KL"),
                ("k2", "bias / KL"),
            ],
            [
                [as_typed(s.shift), known(s.k1), known(s.k2), known(s.k3), known(s.bias_k2)]
                for s in kl.schulman
            ],
        )
    return out


def estimators_table(lab: LabResults) -> Table | None:
    """One row per gradient estimator."""
    if not lab.estimators:
        return None
    yes = {True: "exact", False: "not exact", None: DASH}
    rows: list[list[Cell]] = [
        [
            (e.name, e.words) if e.words else e.name,
            e.estimates,
            yes[e.exact],
            known(e.cosine),
            known(e.relative_bias),
            known(e.scale),
            known(e.variance),
        ]
        for e in lab.estimators
    ]
    head: list[Cell] = [
        "Estimator",
        "Estimates",
        "Expectation",
        ("Cosine", "with what it estimates"),
        ("Relative bias", "of its expectation"),
        ("Scale", "length / exact length"),
        ("Variance", "of one response or pair / |gradient|²"),
    ]
    return table(head, rows, left=(1, 2))


def best_of_n_tables(best: BestOfN) -> dict[str, Table]:
    """Best-of-n in the world, and without ties."""
    rows: list[list[Cell]] = [
        [
            str(r.n),
            known(r.kl),
            known(r.bound),
            known(r.reward),
            known(r.win_rate),
            known(r.win_bound),
        ]
        for r in best.rows
    ]
    head: list[Cell] = [
        "n",
        ("KL", "nats, exact"),
        ("Bound", "nats"),
        ("E[r]", "points"),
        ("Win rate", "over one draw"),
        ("Bound", "n/(n+1)"),
    ]
    out: dict[str, Table] = {"rows": table(head, rows)}
    if best.ideal:
        ideal: list[list[Cell]] = [[str(r.n), known(r.kl), known(r.bound)] for r in best.ideal]
        out["ideal"] = table(["n, without ties", ("KL", "nats, exact"), ("Bound", "nats")], ideal)
    return out


def proxies_table(lab: LabResults) -> Table:
    """One row per proxy: peak, end and fit of the true reward."""

    def at(place: CurvePoint | None) -> Cell:
        return (number(place.gold), f"at {number(place.root_kl)}") if place else DASH

    rows: list[list[Cell]] = []
    for c in lab.overoptimisation or []:
        fit = c.fit or c.rl_fit
        form = "d(alpha - beta d)" if c.fit else "d(alpha - beta log d)"
        fitted: Cell = (
            (f"{number(fit.alpha)}; {number(fit.beta)}", form.replace("-", MINUS)) if fit else DASH
        )
        rows.append(
            [
                (c.title, c.words),
                at(c.peak),
                at(c.last),
                "yes" if c.turns_over else "no",
                fitted,
                known(fit.rmse) if fit else DASH,
            ]
        )
    head: list[Cell] = [
        "Proxy",
        ("Peak", "points, at √nats"),
        ("End", "points, at √nats"),
        "Turns over",
        ("Fit", "alpha; beta"),
        ("Error of the fit", "root mean square, points"),
    ]
    return table(head, rows)


def credit_section(c: Credit) -> dict[str, Any]:
    """Which token deserves the credit."""
    rows: list[list[Cell]] = [
        [(r.name, r.words), known(r.correlation), known(r.relative_error), known(r.variance)]
        for r in c.rows
    ]
    return {
        "prompt": c.prompt,
        "step": count(c.step),
        "samples": count(c.samples),
        "responses": c.responses,
        "table": table(
            [
                "Advantage",
                ("Correlation", "with the exact one"),
                ("Error", "root mean square, relative"),
                ("Variance", "relative"),
            ],
            rows,
        ),
    }
