"""Metrics of a step: sums over micro-batches and processes, divided once by the global count."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .processes import Processes


class Meter:
    """Sums of metrics, each with its count. Metrics whose names end in `/max` are maxima."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, sums: Mapping[str, Tensor], count: float) -> None:
        """Adds the sums of a micro-batch over `count` tokens, rows or pairs."""
        for name, value in sums.items():
            value = value.detach().double()
            if name.endswith("/max"):
                self._sums[name] = (
                    torch.maximum(self._sums[name], value) if name in self._sums else value
                )
            else:
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0.0) + count

    def take(self) -> dict[str, float]:
        """Means (or maxima) over all processes. The meter is then empty."""
        mine = {name: (float(v), self._counts.get(name)) for name, v in self._sums.items()}
        self._sums, self._counts = {}, {}
        out: dict[str, float] = {}
        everyone = self.processes.gather([mine])
        for name in dict.fromkeys(n for one in everyone for n in one):
            parts = [one[name] for one in everyone if name in one]
            counts = [c for _, c in parts if c is not None]
            if not counts:
                out[name] = max(v for v, _ in parts)
            elif sum(counts) > 0:
                out[name] = sum(v for v, _ in parts) / sum(counts)
        return out
