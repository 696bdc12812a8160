"""What a check says about a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    ok: the expected gradient has the exact direction, and nothing changes it that should not.
    name: "correct", or the name of the mistake in `fiducial.lab.CATALOGUE`; several names are
    joined by " + ".
    sentence: what is wrong, by how much, and what to do.
    checked: the kind of loss, and what it was compared with.
    cosine: between the expected gradient g and the exact gradient.
    relative_bias: |a g - exact| / |exact| at the best positive factor a.
    scale: the length of g along the exact gradient. A mean over responses of sums over tokens has
    1.
    variance: of one response (pair), E |g_i - g|^2 / |g|^2 of its contribution g_i: the number of
    responses at which the noise is as large as the gradient. Where responses come in groups of G,
    it is G times that of a group, so that all losses compare at the same number of responses.
    gap: the share of the way to the optimum that is left after a short training with this loss: 1
    at the start, 0 at the optimum. None: not trained.
    probes: the invariances that failed, of "padding", "prompt", "order", "copies", "nan".
    remarks: further sentences.
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
