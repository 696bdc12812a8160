"""The processes of one run, through Accelerate. A single process is a group of size one and has no
code path of its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from ..data.batches import micro_batches
from ..errors import LaunchError
from ..settings import Tokens
from . import launch

T = TypeVar("T")

# accelerate warns that tied weights are saved once, which is what should happen
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def _on_cpu(count: int) -> bool:
    """Whether the processes must be told to meet on the CPU.

    Accelerate joins the processes of a launcher on an accelerator by itself, on a CPU only if it is
    told to: without that each would be alone. Apple's GPU has no collectives.
    """
    if count == 1:
        return False
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is None or device.type == "mps"


@dataclass(frozen=True)
class Micro:
    """A micro-batch of this process.

    `weight` is 0 if this process has no rows left and only takes part in the collectives. Its row
    is then a filler that must not count.
    """

    rows: list[int]
    weight: float


class Processes:
    """What a method needs from its process group: the index and share of this process, and sums."""

    def __init__(self, timeout_minutes: float = 10.0) -> None:
        """Join the other processes, if a launcher started any.

        Raises:
            LaunchError: it cannot be given what it was asked for.
        """
        self.dirty = False  # an optimizer has stepped since the last recorded step
        self.budget: int | None = None  # what --run.tokens auto has found
        wanted = launch.asked()
        launch.check_engine()
        patience = InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))
        try:
            self.accelerator = Accelerator(cpu=_on_cpu(wanted.count), kwargs_handlers=[patience])
        except (RuntimeError, ValueError) as error:
            if wanted.count == 1:
                raise
            raise LaunchError(
                f"{wanted.variable} asks for {wanted.count} processes, and process {wanted.index} "
                f"did not find the others: {error}"
            ) from error
        launch.check_given(wanted, self.count)

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

    def plan(self, costs: Sequence[Sequence[int]], tokens: Tokens) -> list[Micro]:
        """This process's micro-batches of a step; every process has the same number of them.

        Args:
            costs: for each element of the step the lengths of its sequences.
            tokens: padded tokens per micro-batch.
        """
        if tokens == "auto":
            assert self.budget is not None, "preparing a run settles --run.tokens auto"
            tokens = self.budget
        mine = micro_batches(costs, tokens, self.count)[self.index]
        return [Micro(rows or [0], 1.0 if rows else 0.0) for rows in mine]

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over the processes.

        It also joins a batch in which each row was filled by one process and is 0 on the others.
        """
        return (
            x if self.count == 1 else self.accelerator.reduce(x.to(self.device), "sum").to(x.device)
        )

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, joined in the order of the processes."""
        return items if self.count == 1 else gather_object(items)

    def share(self, n: int) -> range:
        """The numbers below n that belong to this process."""
        return range(self.index, n, self.count)

    def wait(self) -> None:
        """Waits until every process has come here."""
        self.accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return (
            flag
            if self.count == 1
            else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)
        )

    def map_rows(
        self,
        costs: Sequence[Sequence[int]],
        tokens: Tokens,
        width: int | None,
        compute: Callable[[list[int]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """The results of `compute` for all rows, in micro-batches that the processes share.

        Args:
            costs: the lengths of each row's sequences.
            tokens: padded tokens per micro-batch.
            width: the second dimension of the results, [rows, width]; None for results [rows].
            compute: takes row numbers and returns tensors [rows, at most width] or [rows]. It runs
                without gradients.

        Returns:
            The tensors for all rows, on the CPU of every process. Columns that `compute` did not
            return are 0.
        """
        n = len(costs)
        outs: list[Tensor] = []
        with torch.no_grad():
            for micro in self.plan(costs, tokens):
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
        return tuple(self.sum(out) for out in outs)


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error says that another process of the group is gone, or was waited for in
    vain.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def accumulate(items: Iterable[T], processes: Processes, *modules: Any) -> Iterator[T]:
    """Yields the micro-batches of one step; gradients are exchanged with the last one only."""
    items = list(items)
    for i, item in enumerate(items):
        with contextlib.ExitStack() as stack:
            if i + 1 < len(items) and processes.count > 1:
                for module in modules:
                    stack.enter_context(processes.accelerator.no_sync(module))
            yield item
