"""The lab's page: the methods beside the exact optimum of worlds small enough to enumerate, and
every formula beside its number.

`write_lab_page(folder, data)` takes a plain dictionary (as read from JSON) with the fields of
`fiducial.report.lab_schema.Lab`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ...report.figures import Figure
from ...report.numbers import MINUS, count, duration, number
from ...report.render import write_page
from .answer import (
    NEAR,
    SHORT,
    gaps,
    known,
    lab_alarms,
    lab_answer,
    middle,
    of_world,
    off,
    one_loss,
    samples_needed,
    seeds,
    share,
    sparse_world,
)
from .figures import (
    best_of_n_figure,
    credit_figures,
    frontier_figures,
    gap_figures,
    heat_figure,
    here,
    label,
    positions_figure,
    proxy_figures,
    setting_of,
    sparse_figures,
)
from .mathml import formula
from .schema import (
    KL,
    Change,
    Credit,
    Estimator,
    Lab,
    Missing,
    Num,
    Place,
    Setting,
    Trained,
    read_lab,
)

NONE = "\u2014"

Cell = str | tuple[str, str]  # the second is set small below the first
Head = str | tuple[str, str]

FORMULAS = {
    "objective": r"J(\pi) = \E[r(x,y)] - \beta \KL(\pi\parallel\pi_\ref) \break = \beta \E[\log Z(x)] - \beta \KL(\pi\parallel\pi^*)",
    "partition": r"Z(x) = \sum_y \pi_\ref(y|x) e^{r(x,y)/\beta} \break = e^{V(s_0)/\beta}, \quad V(s) = \beta \log\sum_a \pi_\ref(a|s) e^{Q(s,a)/\beta}",
    "optimal_policy": r"\pi^*(y|x) = \frac{1}{Z(x)} \pi_\ref(y|x) e^{r(x,y)/\beta}",
    "reward": r"r(x,y) = \beta \log\frac{\pi^*(y|x)}{\pi_\ref(y|x)} + \beta \log Z(x)",
    "cancels": r"P(y\succ y'|x) = \sigma(r(x,y) - r(x,y')) "
    r"\break = \sigma\left( \beta \log\frac{\pi^*(y|x)}{\pi_\ref(y|x)} - \beta "
    r"\log\frac{\pi^*(y'|x)}{\pi_\ref(y'|x)} \right)",
    "loss": r"L(\pi) = -\E[\log\sigma(\beta h)], \quad h = \log\frac{\pi(y_w|x)}{\pi_\ref(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_\ref(y_l|x)}",
    "loss_gradient": r"\nabla L(\pi) = -\beta \E[\sigma(-\beta h) \break (\nabla\log\pi(y_w|x) - \nabla\log\pi(y_l|x))]",
    "chain": r"\pi_\ref(y|x) = \prod_t \pi_\ref(y_t|s_t), \quad s_t = (x, y_{<t})",
    "log_ratio": r"\log\frac{\pi^*(y|x)}{\pi_\ref(y|x)} = \sum_t \log\frac{\pi^*(y_t|s_t)}{\pi_\ref(y_t|s_t)}",
    "optimum_objective": r"J(\pi^*) = \E[r(x,y)] - \beta \KL(\pi^*\parallel\pi_\ref)",
    "optimum_partition": r"J(\pi^*) = \E[\beta \log Z(x)]",
    "soft_value": r"V(s_0) = \beta \log Z(x), \quad Z(x) = \sum_y \pi_\ref(y|x) e^{r(x,y)/\beta}",
    "sums": r"\sum_y \pi^*(y|x) = 1",
    "advantage": r"\beta \log\frac{\pi^*(a|s)}{\pi_\ref(a|s)} = Q(s,a) - V(s)",
    "arm": r"\nabla J(\pi) = \E[(r(x,y) - \beta \log\frac{\pi(y|x)}{\pi_\ref(y|x)}) \nabla\log\pi(y|x)] "
    r"\break = \E[\sum_t (Q(s_t,a_t) - V(s_t)) \nabla\log\pi(a_t|s_t)]",
    "steps": r"\sum_t (V(s_{t+1}) - V(s_t)) = r(x,y) - \beta \log Z(x)",
    "paid": r"V(s) = \beta \log\sum_a \pi_\ref(a|s) e^{(r(s,a) + V(s'))/\beta}, \quad V(s_0) = \beta \log Z(x), \quad r(x,y) = \sum_t r(s_t,a_t)",
    "slope": r"\frac{\d \E[r]}{\d \KL} = \beta",
    "variance": r"\frac{\d \E[r]}{\d (1/\beta)} = \Var(r)",
    "k": r"k_1 = -\log\rho, \quad k_2 = \frac{1}{2} (\log\rho)^2, \quad k_3 = \rho - 1 - \log\rho, \quad \rho = \pi_\ref / \pi, \quad y\sim\pi",
    "best_of_n": r"\KL(\pi_n\parallel\pi_\ref) \le \log n - \frac{n-1}{n}, \quad P(\text{win}) \le \frac{n}{n+1}",
    "fit": r"\E[r] \approx d (\alpha - \beta d) \text{ or } d (\alpha - \beta \log d), \quad d = \sqrt{\KL}",
}

SPARSE = {
    "arm": "The response as one arm of a bandit (REINFORCE, RLOO): on average its gradient is that of the decision process. Their lengths, at a policy "
    "half-way to the optimum; the difference is that of their entries.",
    "steps": "Or a reward for each step (a process reward): a perfect one pays the change in V, which for the response above adds up to its reward less the "
    "value of the prompt.",
    "paid": "Where every step earns a reward of its own, the same recursion holds: here with random ones, for the same prompt.",
}

GRADIENTS = {
    "0": "0",
    "KL(pi||ref)": "∇KL(π‖ref)",
    "KL(ref||pi)": "∇KL(ref‖π)",
    "none of the two": "neither",
}


@dataclass(frozen=True)
class Identity:
    """A formula and its two sides as numbers; `left` and `right` are None where only the difference
    is known.
    """

    formula: str  # a key of FORMULAS
    words: str
    difference: Num
    left: Num = None
    right: Num = None


def side(x: Num) -> str:
    """A side of an identity: six digits, because the two are read against each other."""
    if x is None:
        return NONE
    if not math.isfinite(x):
        return "not finite"
    text = (
        "0"
        if x == 0
        else f"{x:.2e}".replace("e-0", "e-")
        if abs(x) < 1e-4
        else f"{x:#.6g}".rstrip(".")
    )
    return text.replace("-", MINUS)


def table(
    head: Sequence[Head], rows: Sequence[Sequence[Cell]], *, left: Sequence[int] = ()
) -> dict[str, Any]:
    """A table of the template: heads (with a unit below), rows, and the columns of words, which are
    set left.
    """
    return {"head": list(head), "rows": [list(row) for row in rows], "left": [0, *left]}


# ---- methods


def _methods(lab: Lab) -> dict[str, Any] | None:
    if not lab.methods:
        return None
    order = [w.key for w in lab.worlds or []]
    methods = sorted(
        lab.methods,
        key=lambda m: (
            order.index(m.world) if m.world in order else len(order),
            m.policy != "table",
            m.name,
        ),
    )
    behind = {id(m): _behind(lab, m) for m in methods}
    head: list[Head] = [
        "Method, policy",
        "World",
        ("Gap left", f"% of J(optimum) {MINUS} J(ref); median, seeds"),
        ("Total variation", "from the optimum"),
        ("KL", "nats per response; that of the optimum"),
        ("Responses sampled", "pairs seen"),
        "Time of a run",
    ]
    named = any(behind.values())
    rows = []
    for m in methods:
        row = _method_row(lab, m)
        e = behind[id(m)]
        if named:
            row.append((f"{known(e.relative_bias)}; {known(e.variance)}", e.name) if e else NONE)
        rows.append(row)
    return table(
        [*head, *([("Its gradient", "relative bias; variance of a sample")] if named else [])],
        rows,
        left=(1,),
    )


def _causes(lab: Lab) -> list[str]:
    """Why methods stopped short, of those that are no alarm."""
    return [
        f"{label(m)}, {m.world}, {share(max(gaps(m)))} short: {m.cause}"
        for m in lab.methods or []
        if m.cause and gaps(m) and max(gaps(m)) <= SHORT
    ]


def _method_row(lab: Lab, m: Trained) -> list[Cell]:
    run, ends, world = (
        middle(m.runs) or (m.runs[0] if m.runs else None),
        gaps(m),
        lab.world(m.world),
    )
    if run is None:
        return [(label(m), m.setting), m.world, "no run", NONE, NONE, NONE, NONE]
    gap: Cell = share(median(ends)) if ends else "not measured"
    if len(ends) > 1:
        gap = (str(gap), ", ".join(share(x) for x in ends) if len(ends) <= 4 else seeds(ends))
    best = (
        run.kl_optimum
        if run.kl_optimum is not None
        else world.kl_optimum
        if world and of_world(world, run)
        else None
    )
    kl: Cell = (known(run.kl), f"optimum {number(best)}") if best is not None else known(run.kl)
    used: Cell = (
        (count(run.samples), f"{count(run.pairs)} pairs") if run.pairs else count(run.samples)
    )
    return [
        (label(m), m.setting),
        m.world,
        gap,
        known(run.total_variation),
        kl,
        used,
        duration(run.seconds) if run.seconds is not None else NONE,
    ]


def _behind(lab: Lab, m: Trained) -> Estimator | None:
    """The estimator whose expectation the method follows: the one it names, or the only one that
    carries its name.
    """
    found = [
        e
        for e in lab.estimators or []
        if (e.name == m.estimator if m.estimator else m.name.lower() in e.name.lower())
    ]
    return found[0] if len(found) == 1 else None  # of several it is not known which


# ---- the setting


def identities(s: Setting) -> list[Identity]:
    """Every formula of the setting with its two sides, from the numbers of one response under the
    optimum.
    """
    ref, pi = math.prod(d.ref for d in s.steps), math.prod(d.pi for d in s.steps)
    steps = sum(d.log_ratio for d in s.steps)
    value = s.steps[0].value if s.steps else s.beta_log_z
    z = (
        min(s.z, key=lambda one: abs(s.beta * math.log(one) - value))
        if s.z
        else math.exp(value / s.beta)
    )  # the one of this prompt
    mean = sum(s.beta * math.log(one) for one in s.z) / len(s.z) if s.z else s.beta_log_z
    optimum, reward = (
        s.probability * math.exp(s.reward / s.beta) / z,
        s.beta * s.sum_log_ratio + s.beta * math.log(z),
    )
    objective = s.expected_reward - s.beta * s.kl
    worst = max(s.steps, key=lambda d: abs(s.beta * d.log_ratio - (d.q - d.value)), default=None)
    out = [
        Identity(
            "chain",
            "The probability of a response is the product of its tokens' probabilities.",
            abs(s.probability - ref),
            s.probability,
            ref,
        ),
        Identity(
            "log_ratio",
            "Log-ratios of tokens add up to the log-ratio of the response.",
            abs(s.sum_log_ratio - steps),
            s.sum_log_ratio,
            steps,
        ),
        Identity(
            "optimum_objective",
            "The objective: mean reward less β times the KL.",
            abs(s.objective - objective),
            s.objective,
            objective,
        ),
        Identity(
            "optimum_partition",
            "At the optimum it is β log Z, the mean over prompts.",
            abs(s.objective - mean),
            s.objective,
            mean,
        ),
        Identity(
            "soft_value",
            "The soft value of the first state is β log Z of the prompt.",
            abs(value - s.beta * math.log(z)),
            value,
            s.beta * math.log(z),
        ),
        Identity(
            "optimal_policy",
            "The optimum re-weights the reference.",
            abs(pi - optimum),
            pi,
            optimum,
        ),
        Identity(
            "sums",
            "The optimum is a distribution.",
            abs(s.probabilities_sum - 1),
            s.probabilities_sum,
            1.0,
        ),
        Identity(
            "reward",
            "Turned round: the reward, written by the optimum.",
            abs(s.reward - reward),
            s.reward,
            reward,
        ),
    ]
    if worst is not None:
        left, right = s.beta * worst.log_ratio, worst.q - worst.value
        words = "Token by token: β times the log-ratio is the soft advantage (here the token with the largest difference)."
        out.append(Identity("advantage", words, abs(left - right), left, right))
    return out


def _worked(s: Setting) -> dict[str, Any]:
    head: list[Head] = [
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


# ---- what the labels do


def _missing(lab: Lab, m: Missing) -> dict[str, Any]:
    best = number(m.optimum_probability) if m.optimum_probability is not None else NONE
    rows: list[list[Cell]] = [
        [s.start, known(s.loss), known(s.total_variation), known(s.probability)] for s in m.starts
    ]
    if m.complete:
        rows.append(
            ["all pairs compared", known(m.complete.loss), known(m.complete.total_variation), NONE]
        )
    words = (
        f"In the {m.world} world no pair holds the response {m.never_compared!r} to the prompt "
        f"{m.prompt!r}. "
        + (
            "The starts below reach the same loss at different policies: the minimiser is not "
            "unique, and the data cannot choose."
            if one_loss(lab)
            else "The starts below do not reach one loss at different policies, so this run does not show that the minimiser is not unique."
        )
    )
    return {
        "words": f"{words} {m.words}".rstrip(),
        "table": table(
            [
                "Start",
                ("Loss", "nats per pair"),
                ("Total variation", "from the optimum"),
                ("Probability of it", f"at the minimiser; optimum {best}"),
            ],
            rows,
        ),
    }


def _labels(lab: Lab) -> dict[str, Any] | None:
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
    head: list[Head] = [
        "Annotator",
        ("Bayes accuracy", "share of labels"),
        ("Entropy", "nats per label"),
        ("Total variation", "minimiser from the optimum"),
        ("Gap left", "%"),
    ]
    return table(head, rows)


# ---- KL


def _kl_tables(kl: KL) -> dict[str, Any]:
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
    head: list[Head] = [
        "Estimator",
        ("Mean", "nats"),
        ("Bias", "nats"),
        ("Deviation", "nats, one sample"),
        ("As a loss", "its gradient is"),
        ("As a loss", "cosine"),
        ("As a loss", "relative error"),
        ("In the reward", "cosine"),
        ("In the reward", "relative error"),
    ]
    out: dict[str, Any] = {"estimators": table(head, rows, left=(4,))}
    if kl.schulman:
        out["schulman"] = table(
            [
                ("Shift", "deviations"),
                ("k1", "deviation / KL"),
                ("k2", "deviation / KL"),
                ("k3", "deviation / KL"),
                ("k2", "bias / KL"),
            ],
            [
                [setting_of(s.shift), known(s.k1), known(s.k2), known(s.k3), known(s.bias_k2)]
                for s in kl.schulman
            ],
        )
    return out


def _estimators(lab: Lab) -> dict[str, Any] | None:
    if not lab.estimators:
        return None
    yes = {True: "exact", False: "not exact", None: NONE}
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
    head: list[Head] = [
        "Estimator",
        "Estimates",
        "Expectation",
        ("Cosine", "with what it estimates"),
        ("Relative bias", "of its expectation"),
        ("Scale", "length / length"),
        ("Variance", "one sample, / |gradient|²"),
    ]
    return table(head, rows, left=(1, 2))


def _best_of_n(lab: Lab) -> dict[str, Any]:
    assert lab.best_of_n is not None
    rows: list[list[Cell]] = [
        [
            str(r.n),
            known(r.kl),
            known(r.bound),
            known(r.reward),
            known(r.win_rate),
            known(r.win_bound),
        ]
        for r in lab.best_of_n.rows
    ]
    head: list[Head] = [
        "n",
        ("KL", "nats, exact"),
        ("Bound", "nats"),
        ("E[r]", "points"),
        ("Win rate", "over one draw"),
        ("Bound", "n/(n+1)"),
    ]
    out: dict[str, Any] = {"rows": table(head, rows)}
    if lab.best_of_n.ideal:
        ideal: list[list[Cell]] = [
            [str(r.n), known(r.kl), known(r.bound)] for r in lab.best_of_n.ideal
        ]
        out["ideal"] = table(["n, without ties", ("KL", "nats, exact"), ("Bound", "nats")], ideal)
    return out


def _proxies(lab: Lab) -> dict[str, Any]:
    def at(place: Place | None) -> Cell:
        return (number(place.gold), f"at {number(place.root_kl)}") if place else NONE

    rows: list[list[Cell]] = []
    for c in lab.overoptimisation or []:
        fit = c.fit or c.rl_fit
        form = "d(alpha - beta d)" if c.fit else "d(alpha - beta log d)"
        fitted: Cell = (
            (f"{number(fit.alpha)}; {number(fit.beta)}", form.replace("-", MINUS)) if fit else NONE
        )
        rows.append(
            [
                (c.title, c.words),
                at(c.peak),
                at(c.last),
                "yes" if c.turns_over else "no",
                fitted,
                known(fit.rmse) if fit else NONE,
            ]
        )
    head: list[Head] = [
        "Proxy",
        ("Peak", "points, at √nats"),
        ("Last", "points, at √nats"),
        "Turns over",
        ("Fit", "alpha; beta"),
        ("Error of the fit", "root mean square, points"),
    ]
    return table(head, rows)


AT = 0.05
"""Total variation below which a policy counts as being at an optimum."""


def _arrived(c: Change) -> Cell:
    near = c.distance is not None and c.distance < AT
    return (
        c.nearest if near else "none that is known",
        f"{known(c.distance)} from it"
        if near
        else f"nearest: {c.nearest}, {known(c.distance)} away",
    )


def _parts(parts: list[Change]) -> dict[str, Any]:
    rows: list[list[Cell]] = [
        [(c.name, c.words), share(c.relative_gap), known(c.total_variation), _arrived(c)]
        for c in parts
    ]
    return table(
        [
            "What is run",
            ("Gap left", "%"),
            ("Total variation", "from the optimum"),
            ("Ended at the optimum of", "total variation"),
        ],
        rows,
        left=(3,),
    )


def _lengths(rows: list[Change]) -> dict[str, Any]:
    cells: list[list[Cell]] = [
        [
            (c.name, c.words),
            share(c.relative_gap),
            known(c.total_variation),
            (known(c.cut), f"optimum {known(c.cut_optimum)}"),
            _arrived(c),
        ]
        for c in rows
    ]
    head: list[Head] = [
        "What is run",
        ("Gap left", "%"),
        ("Total variation", "from the optimum"),
        ("Cut at the limit", "share of responses"),
        ("Ended at the optimum of", "total variation"),
    ]
    return table(head, cells, left=(4,))


def _credit(c: Credit) -> dict[str, Any]:
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


def _needed(lab: Lab) -> dict[str, Any] | None:
    """The world of sparse rewards: responses sampled until the gap stayed below a tenth, and what
    is left at the end.
    """
    methods = here(lab, sparse_world(lab) or "")
    if not methods:
        return None
    far = math.inf
    rows: list[list[Cell]] = []
    for m in sorted(methods, key=lambda m: median(samples_needed(m) or [far])):
        needed, ends = samples_needed(m), gaps(m)
        used: Cell = (
            (count(median(needed)), ", ".join(count(n) for n in needed))
            if needed
            else "not in every seed"
        )
        rows.append([label(m), used, (share(median(ends)), seeds(ends)) if ends else "no run"])
    head: list[Head] = [
        "Method, policy",
        ("Responses sampled", f"until the gap stayed within {share(NEAR)}; median of the seeds"),
        ("Gap left", "at the end"),
    ]
    return table(head, rows)


def _worlds(lab: Lab) -> dict[str, Any] | None:
    if not lab.worlds:
        return None
    rows: list[list[Cell]] = [
        [
            (w.key, w.words),
            count(w.prompts),
            count(w.responses),
            count(w.vocabulary),
            count(w.horizon),
            setting_of(w.beta),
            known(w.kl_optimum),
            known(w.objective_reference),
            known(w.objective_optimum),
        ]
        for w in lab.worlds
    ]
    head: list[Head] = [
        "World",
        "Prompts",
        ("Responses", "to a prompt"),
        ("Vocabulary", "tokens"),
        ("Longest response", "tokens"),
        ("β", "points per nat"),
        ("KL of the optimum", "nats"),
        ("J(ref)", "points"),
        ("J(optimum)", "points"),
    ]
    return table(head, rows)


def _sections(lab: Lab) -> dict[str, Any]:
    """What the template prints: tables and formulas, None for a section without data."""
    setting = lab.setting
    recovered, r = [], lab.recovered
    if r:
        difference = (
            abs(r.loss - r.entropy) if r.loss is not None and r.entropy is not None else None
        )
        at = r.gradient_at_optimum
        recovered = [
            Identity(
                "loss",
                "At its minimum the loss is the entropy of the labels (right): nothing is left to "
                "learn.",
                difference,
                r.loss,
                r.entropy,
            ),
            Identity(
                "loss_gradient",
                "At the optimum the gradient is 0: its largest entry (left).",
                at,
                at,
                0.0,
            ),
        ]
    f = lab.frontier
    slopes = (
        [
            Identity(
                "slope",
                "The slope of the frontier is β: the largest relative difference along it.",
                f.slope_error,
            ),
            Identity(
                "variance",
                "And it climbs by the variance of the reward: the largest relative difference.",
                f.variance_error,
            ),
        ]
        if f
        else []
    )
    return {
        "methods": _methods(lab),
        "causes": _causes(lab),
        "setting": setting,
        "worked": _worked(setting) if setting else None,
        "identities": identities(setting) if setting else [],
        "sparse": [
            Identity(a.key, SPARSE[a.key], a.difference, a.left, a.right) for a in lab.sparse or []
        ],
        "slopes": [i for i in slopes if i.difference is not None],
        "derivation": [
            {
                "key": d.key,
                "title": d.title,
                "words": d.words,
                "difference": off(d.difference),
                "table": table(
                    ["", d.left_name, d.right_name],
                    [[name, side(a), side(b)] for name, a, b in d.rows],
                ),
            }
            for d in lab.derivation or []
        ],
        "recovered": [i for i in recovered if i.difference is not None],
        "logprob_error": off(r.largest_logprob_error) if r else None,
        "missing": _missing(lab, lab.missing) if lab.missing else None,
        "labels": _labels(lab),
        "kl": _kl_tables(lab.kl) if lab.kl else None,
        "kl_value": (number(lab.kl.value.kl), number(lab.kl.value.forward)) if lab.kl else None,
        "estimators": _estimators(lab),
        "best_of_n": _best_of_n(lab) if lab.best_of_n else None,
        "proxies": _proxies(lab) if lab.overoptimisation else None,
        "worlds": _worlds(lab),
        "parts": _parts(lab.parts) if lab.parts else None,
        "lengths": _lengths(lab.lengths) if lab.lengths else None,
        "parts_seed": lab.parts[0].seed if lab.parts else None,
        "lengths_seed": lab.lengths[0].seed if lab.lengths else None,
        "cut_share": share(lab.lengths[0].cut_optimum) if lab.lengths else None,
        "credit": _credit(lab.credit) if lab.credit else None,
        "needed": _needed(lab),
        "heats": [
            table(
                ["β", *(f"learning rate {setting_of(x)}" for x in s.learning_rates)],
                [
                    [setting_of(b), *(share(x) for x in row)]
                    for b, row in zip(s.betas, s.relative_gap, strict=False)
                ],
            )
            for s in lab.sensitivity or []
        ],
    }


def _figures(lab: Lab) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if lab.frontier:
        figures["frontier"], *others = frontier_figures(lab)
        figures |= {f"ways{i}": one for i, one in enumerate(others)}
    if lab.credit:
        figures |= {f"credit{i}": one for i, one in enumerate(credit_figures(lab.credit))}
    series = {"arms": sparse_figures(lab)}
    series |= {
        "gap": gap_figures(lab),
        "proxy": proxy_figures(lab.overoptimisation or []),
        "heat": [heat_figure(s) for s in lab.sensitivity or []],
    }
    for name, many in series.items():
        figures |= {f"{name}{i}": one for i, one in enumerate(many)}
    if lab.kl and lab.kl.per_position:
        figures["positions"] = positions_figure(lab.kl)
    if lab.best_of_n and lab.best_of_n.rows:
        figures["best_of_n"] = best_of_n_figure(lab.best_of_n)
    return figures


def write_lab_page(folder: Path, data: dict[str, Any]) -> Path:
    """Writes `index.html` into `folder`, plotly's script beside it, and returns its path."""
    lab = read_lab(data)
    figures = _figures(lab)
    sections = _sections(lab)
    checked = [
        (f"The formula {i.words.rstrip('.')!r}", i.difference)
        for i in [*sections["identities"], *sections["sparse"]]
    ]
    return write_page(
        Path(folder),
        "index.html",
        "lab.html.j2",
        {"figures": figures},
        title="Alignment methods beside an exactly known optimum",
        sentences=lab_answer(lab),
        alarms=lab_alarms(lab, checked),
        figures=figures,
        formulas={key: formula(tex) for key, tex in FORMULAS.items()},
        side=side,
        off=off,
        command=lab.command,
        **sections,
        facts=[
            ("Form", lab.form),
            ("Seed", str(lab.seed)),
            ("Time, all stages", duration(sum(lab.timings.values()))),
            ("Machine", lab.machine),
            ("Versions", ", ".join(f"{k} {v}" for k, v in lab.versions.items())),
        ],
        timings=[(stage, duration(seconds)) for stage, seconds in lab.timings.items()],
        templates=Path(__file__).parent,
    )
