"""One kind of loss: its population, its exact gradient, and the mistakes that are looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..worlds.world import Array
from .batch import Batch, PairBatch
from .faults.explain import Candidate
from .layout import Filler, Layout, layout
from .measure import Learned, Loss, LossGradient, loss_gradient
from .population import Population


@dataclass(frozen=True)
class Change:
    """A change to the plain batch.

    widen: more columns of padding. fill: other numbers where the mask is false. garbled: other
    tokens in the prompts. order: another order of the rows (or groups). copies: every row so many
    times. half: only every second row (or group), starting with this one.
    """

    widen: int = 0
    fill: Filler = "nonsense"
    garbled: bool = False
    order: bool = False
    copies: int = 1
    half: int | None = None


PROBES: dict[str, tuple[Change, str]] = {
    "padding": (Change(widen=2, fill="other"), "depends on padding"),
    "prompt": (Change(garbled=True), "depends on the prompt's tokens"),
    "order": (Change(order=True), "depends on the order of rows"),
    "copies": (Change(copies=2), "depends on the size of the batch"),
}
"""Changes that should not change the gradient, and the name of the mistake if they do."""


@dataclass(frozen=True, eq=False)
class Closer:
    """What other batches than the population's show.

    names: mistakes. remarks: what was measured. sure: the names also explain what was unexplained
    on the population. case: the case of a loss with what was measured, in which the mistakes that
    are left can be named.
    """

    names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    sure: bool = False
    case: Case | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of loss.

    checked: its title. learned: the tensor that is learned. exact: minus the exact gradient of the
    intended loss. make: the population as a batch. candidates: mistakes, each with its gradient.
    train: from a loss to the gap that it leaves. without: populations that lack one thing; if the
    bias is gone there, it was in that thing. group: rows per group. zero: the name of the mistake
    if the expected gradient is zero. closer: looks at a loss whose gradient on the population is
    right or unexplained.
    """

    checked: str
    learned: Learned
    population: Population
    exact: Callable[[Population], Array]
    make: Callable[[Population, Change], Batch | PairBatch]
    candidates: Callable[[Population], Iterator[Candidate]]
    train: Callable[[Loss], float] | None
    without: dict[str, Callable[[Population], Population]] = field(default_factory=dict)
    group: int = 1
    zero: str = "zero in expectation"
    closer: Callable[[Loss], Closer] | None = None

    def gradient(
        self, loss: Loss, change: Change | None = None, population: Population | None = None
    ) -> LossGradient:
        """The gradient of a loss on the population, or on a changed one."""
        batch = self.make(population or self.population, change or Change())
        return loss_gradient(loss, batch, self.learned)

    @property
    def layout(self) -> Layout:
        world = self.population.world
        return layout(world.prompts, world.horizon)

    def parameters(self, table: Array) -> Array:
        """The learned rows of a table [E, ...]: [P, S, V] logits, [P, S] values, or [P, S + Y]
        scores.
        """
        where, prompts = self.layout, len(self.population.world.prompts)
        states = table[: where.states]
        if self.learned == "scores":
            own = table[where.states : where.ends].reshape(prompts, -1)
            return np.concatenate([states.reshape(prompts, -1), own], 1)
        return states.reshape(prompts, -1, *table.shape[1:])

    def leaks(self, seen: LossGradient, *, by_row: bool = False) -> list[str]:
        """Where the gradient reaches what is not a token of the policy: summed over rows, or with
        `by_row` in any single row.
        """
        where = self.layout
        size = np.abs(seen.table).reshape(len(seen.table), -1).max(1)
        if by_row:
            size = np.zeros(len(size))
            for node, g in zip(seen.node, seen.rows, strict=True):
                np.maximum.at(size, node, np.abs(g).reshape(*node.shape, -1).max(-1))
        reached = size > 1e-10 * size.max()
        front = [len(reached) - 1] if self.learned == "values" else []
        inside = np.r_[where.ends : where.prompts, front].astype(int)
        padding = np.r_[
            where.ends if self.learned == "scores" else where.states : where.ends,
            where.prompts : len(reached) - len(front),
        ]
        found = {"trains on the prompt": inside, "trains on padding": padding}
        return [name for name, at in found.items() if reached[at].any()]

    def variance(self, seen: LossGradient) -> float:
        """The variance of Verdict. All responses (groups, pairs) of the population are equally
        likely, and a group of G counts as G responses.
        """
        ends = self.layout.ends if self.learned == "scores" else self.layout.states

        each, width = len(seen.rows[0]) // self.group, self.group * seen.node[0].shape[1]
        g = np.concatenate([x.reshape(each, width, -1) for x in seen.rows], 1)
        node = np.concatenate([x.reshape(each, width) for x in seen.node], 1)
        g = np.where(node[..., None] < ends, g, 0.0)
        # the squared length of the sum of a unit's rows, rows of one node added first
        products = np.einsum("nik,njk->nij", g, g, optimize=True)
        squares = products[node[:, :, None] == node[:, None, :]].sum()
        mean = seen.table[:ends] / len(g)
        return self.group * float(squares / len(g) / (mean**2).sum() - 1)
