"""The processes of one run, through Accelerate. One process is the case of a world of size one: no
code path of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from ..data.batches import micro_batches
from .progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Micro:
    """A micro-batch of this process. `weight` is 0 for one that only keeps step with the other
    processes; its rows are then a filler.
    """

    rows: list[int]
    weight: float


class Processes:
    """What a method needs of a process group: who am I, my share, sums over all."""

    def __init__(self, timeout_minutes: float = 10.0) -> None:
        self.dirty = False  # an optimizer has stepped since the last recorded step
        self.accelerator = Accelerator(
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))]
        )

    @property
    def index(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def plan(self, costs: Sequence[Sequence[int]], tokens: int) -> list[Micro]:
        """This process's micro-batches of a step whose elements have the given sequence lengths; as
        many on every process.
        """
        mine = micro_batches(costs, tokens, self.count)[self.index]
        return [Micro(rows or [0], 1.0 if rows else 0.0) for rows in mine]

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over the processes. With rows that one process each has filled and zeros
        elsewhere it puts a batch together.
        """
        return (
            x if self.count == 1 else self.accelerator.reduce(x.to(self.device), "sum").to(x.device)
        )

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, joined in their order."""
        return items if self.count == 1 else gather_object(items)

    def share(self, n: int) -> range:
        """The numbers below n that are this process's."""
        return range(self.index, n, self.count)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """True if it is on any process."""
        return (
            flag
            if self.count == 1
            else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)
        )

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The main process goes through the block before the others."""
        with self.accelerator.main_process_first():
            yield

    def map_rows(
        self,
        costs: Sequence[Sequence[int]],
        tokens: int,
        width: int | None,
        compute: Callable[[list[int]], tuple[Tensor, ...]],
        title: str | None = None,
    ) -> tuple[Tensor, ...]:
        """`compute(rows)` for all rows, without gradients, cut into micro-batches and shared by the processes.

        Args:
            costs: lengths of each row's sequences.
            width: of the results' second dimension, [rows, width]; None for results [rows].
                `compute` may return narrower ones.
            compute: row numbers -> values [rows, at most width] or [rows], in nats, tokens, scores.
            title: what to call it on the screen; None shows nothing.

        Returns:
            The values of all rows, on the CPU, on every process; what was not computed is 0.
        """
        n = len(costs)
        outs: list[Tensor] = []
        plan = self.plan(costs, tokens)
        with (
            torch.no_grad(),
            Progress(
                title or "", sum(len(m.rows) for m in plan), show=self.main and title is not None
            ) as bar,
        ):
            for micro in plan:
                values = compute(micro.rows)
                outs = outs or [
                    torch.zeros((n,) if width is None else (n, width), dtype=v.dtype)
                    for v in values
                ]
                if micro.weight:
                    for out, value in zip(outs, values, strict=True):
                        out[
                            (micro.rows,) if width is None else (micro.rows, slice(value.shape[1]))
                        ] = value.cpu()
                bar.advance(by=len(micro.rows))
        return tuple(self.sum(out) for out in outs)


def accumulate(items: Iterable[T], processes: Processes, *modules: Any) -> Iterator[T]:
    """Micro-batches of one step; gradients cross the processes with the last one only."""
    items = list(items)
    for i, item in enumerate(items):
        with contextlib.ExitStack() as stack:
            if i + 1 < len(items) and processes.count > 1:
                for module in modules:
                    stack.enter_context(processes.accelerator.no_sync(module))
            yield item
