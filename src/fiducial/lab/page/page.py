"""The lab's page: the methods beside the exact optimum, and every formula beside its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...report.figures import Figure
from ...report.numbers import duration, number
from ...report.render import write_page
from ..runs.results import LabResults, Sensitivity
from ..study.results import DerivationStep
from . import tables_methods, tables_study
from .alarms import lab_alarms
from .answer import lab_answer
from .figures_methods import frontier_figures, gap_figures, heat_figure, sparse_figures
from .figures_study import best_of_n_figure, credit_figures, positions_figure, proxy_figures
from .formulas import (
    FORMULAS,
    SPARSE,
    Identity,
    identities,
    recovered_identities,
    slope_identities,
)
from .mathml import formula
from .table import Table, table
from .text import as_typed, off, share, side


def write_lab_page(folder: Path, lab: LabResults) -> Path:
    """Write `index.html` into `folder` with plotly's script beside it, and return its path."""
    figures = _figures(lab)
    exact = _identities(lab)
    checked = [
        (f"The formula {i.words.rstrip('.')!r}", i.difference)
        for i in [*exact["identities"], *exact["sparse"]]
    ]
    return write_page(
        folder,
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
        facts=[
            ("Form", lab.form),
            ("Seed", str(lab.seed)),
            ("Time, all stages", duration(sum(lab.timings.values()))),
            ("Machine", lab.machine),
            ("Versions", ", ".join(f"{k} {v}" for k, v in lab.versions.items())),
        ],
        timings=[(stage, duration(seconds)) for stage, seconds in lab.timings.items()],
        templates=Path(__file__).parent,
        **exact,
        **_sections(lab),
    )


def _identities(lab: LabResults) -> dict[str, list[Identity]]:
    """The formulas with both sides as numbers, by the section in which they are shown."""
    return {
        "identities": identities(lab.setting) if lab.setting else [],
        "sparse": [
            Identity(a.key, SPARSE[a.key], a.difference, a.left, a.right) for a in lab.sparse or []
        ],
        "slopes": slope_identities(lab.frontier) if lab.frontier else [],
        "recovered": recovered_identities(lab.recovered) if lab.recovered else [],
    }


def _sections(lab: LabResults) -> dict[str, Any]:
    """The tables and facts that the template prints. None: the section has no data."""
    recovered, lengths = lab.recovered, lab.lengths
    return {
        "methods": tables_methods.methods_table(lab),
        "causes": tables_methods.causes(lab),
        "setting": lab.setting,
        "worked": tables_study.worked_table(lab.setting) if lab.setting else None,
        "derivation": [_derivation(step) for step in lab.derivation or []],
        "logprob_error": off(recovered.largest_logprob_error) if recovered else None,
        "missing": tables_study.missing_section(lab, lab.missing) if lab.missing else None,
        "labels": tables_study.labels_table(lab),
        "kl": tables_study.kl_tables(lab.kl) if lab.kl else None,
        "kl_value": (number(lab.kl.value.kl), number(lab.kl.value.forward)) if lab.kl else None,
        "estimators": tables_study.estimators_table(lab),
        "best_of_n": tables_study.best_of_n_tables(lab.best_of_n) if lab.best_of_n else None,
        "proxies": tables_study.proxies_table(lab) if lab.overoptimisation else None,
        "worlds": tables_methods.worlds_table(lab),
        "parts": tables_methods.parts_table(lab.parts) if lab.parts else None,
        "lengths": tables_methods.lengths_table(lengths) if lengths else None,
        "parts_seed": lab.parts[0].seed if lab.parts else None,
        "lengths_seed": lengths[0].seed if lengths else None,
        "cut_share": share(lengths[0].cut_optimum) if lengths else None,
        "credit": tables_study.credit_section(lab.credit) if lab.credit else None,
        "needed": tables_methods.needed_table(lab),
        "heats": [_heat(s) for s in lab.sensitivity or []],
    }


def _derivation(step: DerivationStep) -> dict[str, Any]:
    return {
        "key": step.key,
        "title": step.title,
        "words": step.words,
        "difference": off(step.difference),
        "table": table(
            ["", step.left_name, step.right_name],
            [[name, side(a), side(b)] for name, a, b in step.rows],
        ),
    }


def _heat(s: Sensitivity) -> Table:
    return table(
        ["β", *(f"learning rate {as_typed(x)}" for x in s.learning_rates)],
        [
            [as_typed(b), *(share(x) for x in row)]
            for b, row in zip(s.betas, s.relative_gap, strict=True)
        ],
    )


def _figures(lab: LabResults) -> dict[str, Figure]:
    """The pictures by their names on the page."""
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
