"""One optimizer step: accumulate, check, clip, update. The learning rate is a function of the step
number, so there is no scheduler to save.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..settings import OptimizerSettings
from .processes import Processes


def learning_rate(step: int, total: int, peak: float, settings: OptimizerSettings) -> float:
    """The rate of step `step` (from 0) of `total`."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    if settings.schedule == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


class Stepper:
    """A module and its optimizer. Call the module through `stepper.module`, so that gradients cross
    the processes.
    """

    def __init__(
        self,
        module: nn.Module,
        peak: float,
        settings: OptimizerSettings,
        total: int,
        processes: Processes,
    ) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=peak,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.module: Any
        self.module, self.optimizer = processes.accelerator.prepare(module, optimizer)
        self.peak, self.settings, self.total, self.processes = peak, settings, total, processes

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss: its sum over the global count.

        The launcher's wrappers average gradients over processes where a sum is wanted, hence the
        factor.
        """
        self.processes.accelerator.backward(loss * self.processes.count)

    def step(self, number: int) -> dict[str, float]:
        """Update the weights; the gradient's norm before clipping and the rate.

        Raises:
            RunError: the gradient is not finite. The weights are as they were.
        """
        lr = learning_rate(number, self.total, self.peak, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(
            self.processes.accelerator.clip_grad_norm_(
                self.module.parameters(), self.settings.max_grad_norm
            )
        )
        if not math.isfinite(norm):
            bad = [
                n
                for n, p in self.module.named_parameters()
                if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            raise RunError(
                f"the gradient is not finite in {len(bad)} tensors, first "
                f"{bad[0] if bad else 'none'}: lower --learning-rate, or look for the row"
            )
        self.processes.dirty = True
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "learning_rate": lr}
