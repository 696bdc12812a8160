"""What the pictures of the lab's page share: curves, colors, families of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...report.figures import method_colour
from ..runs.results import MethodResult
from ..study.results import Num
from .text import label

DASHES = {"table": "solid", "transformer": "dash"}


def curve(
    name: str, x: Sequence[float], y: Sequence[Num], color: str, **more: Any
) -> dict[str, Any]:
    """One curve, as the page's script takes it."""
    return {
        "name": name,
        "x": list(x),
        "y": list(y),
        "color": color,
        "dash": "solid",
        "mode": "lines",
        "faint": False,
        **more,
    }


FAMILIES: dict[str, tuple[str, ...]] = {
    "One method of each kind": ("dpo", "ppo", "rloo", "grpo"),
    "REINFORCE by baseline": (
        "reinforce_none",
        "reinforce_mean",
        "remax",
        "rloo",
        "reinforce_pp",
    ),
    "GRPO and its variants": ("grpo", "dr_grpo", "dapo", "gspo", "cispo"),
    "Process rewards": ("ppo", "ppo_steps", "rloo", "rloo_steps"),
}
"""One picture per family: twelve paths in one picture could not be told apart."""


def families(methods: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    """The methods by family. Methods of no family go to the first one; families that show no new
    method are left out.
    """
    known = {key for keys in FAMILIES.values() for key in keys}
    out: dict[str, list[MethodResult]] = {}
    shown: set[str] = set()
    for i, (name, keys) in enumerate(FAMILIES.items()):
        own = [m for m in methods if m.method in keys or (i == 0 and m.method not in known)]
        if {m.method for m in own} - shown and (i == 0 or len({m.method for m in own}) > 1):
            out[name] = own
            shown |= {m.method for m in own}
    return out


def keys_of(methods: Sequence[MethodResult]) -> list[tuple[str, str, str]]:
    """A legend: names, colors, and the style class of the dash."""
    return list(
        dict.fromkeys(
            (label(m), method_colour(m.method), "" if DASHES.get(m.policy) == "solid" else "dash")
            for m in methods
        )
    )
