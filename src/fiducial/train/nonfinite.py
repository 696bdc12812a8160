"""A gradient that is not finite: the batch is kept for the user to look at, and the run stops or
leaves the update out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import RunError
from .disk import is_of_disk
from .progress import say

NAME = "bad-batch"


class Nonfinite:
    """Remembers the inputs of the step that is being made.

    skipped: updates left out so far.
    """

    def __init__(
        self,
        folder: Path,
        policy: Literal["stop", "skip"],
        limit: int,
        *,
        index: int,
        where: Callable[[], str],
    ) -> None:
        """Args:
        folder: of the run. limit: updates in a row that may be left out. index: of the process.
        where: "step N", for messages.
        """
        self.folder, self.policy, self.limit, self.index = folder, policy, limit, index
        self.where = where
        self.rows: Callable[[], Iterable[Mapping[str, Any]]] = list
        self.skipped = 0
        self.skipped_now = False
        self._in_a_row: list[int] = []
        self._inputs: list[dict[str, Tensor]] = []
        self._over = False  # the update of these inputs was made

    def watch(self, module: nn.Module) -> int:
        """Remember what the module is called with, from one update to the next.

        Returns:
            the number of the module, for `done` and `found`.
        """
        inner = getattr(module, "module", module)
        names = list(inspect.signature(inner.forward).parameters)

        def remember(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():
                return
            if self._over:
                self._inputs, self._over = [], False
            given = dict(zip(names, args, strict=False)) | keywords
            self._inputs.append({k: v for k, v in given.items() if isinstance(v, Tensor)})

        module.register_forward_pre_hook(remember, with_kwargs=True)
        self._in_a_row.append(0)
        return len(self._in_a_row) - 1

    def done(self, number: int) -> None:
        """An update of module `number` was made."""
        self._over = True
        self._in_a_row[number] = 0

    def found(self, number: int, what: str) -> None:
        """The gradient of an update of module `number` is not finite.

        Args:
            what: which tensors, in words.

        Raises:
            RunError: unless the update is to be left out, and not too many were before it.
        """
        dumped = self._dump()
        self._over = True
        self._in_a_row[number] += 1
        if self.policy == "stop":
            raise RunError(
                f"{what}: lower --learning-rate, or look for a faulty row in {dumped}; "
                "--run.on-nonfinite skip leaves such an update out"
            )
        if self._in_a_row[number] > self.limit:
            raise RunError(
                f"{what}, after {self.limit} updates in a row that were left out for that: lower "
                f"--learning-rate, or look for a faulty row in {dumped}"
            )
        self.skipped += 1
        self.skipped_now = True
        if self.index == 0:
            say(f"{self.where()}: {what}; this update is left out, its batch is in {dumped}")

    def _dump(self) -> str:
        """The inputs as tensors, and the rows; where they are, in words."""
        rank = f"-process-{self.index}" if self.index else ""
        path = self.folder / f"{NAME}{rank}.safetensors"
        tensors = {
            f"{number:04}.{name}": value.detach().cpu().contiguous().clone()
            for number, inputs in enumerate(self._inputs)
            for name, value in inputs.items()
        }
        try:
            save_file(tensors, path)
            with open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(dict(row), ensure_ascii=False, default=str) + "\n"
                    for row in self.rows()
                )
        except Exception as error:
            if not is_of_disk(error):
                raise
            return f"the batch of {self.where()} ({path} cannot be written)"
        return f"{path} and {path.with_suffix('.jsonl').name}"
