"""One optimizer step: accumulate, check, clip and update. The learning rate is a function of the
step number, so no scheduler has to be saved.
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
    """The learning rate of step `step` (counted from 0) of `total`."""
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    if settings.schedule == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


class Stepper:
    """A module and its optimizer.

    The module must be called as `stepper.module`, so that gradients are summed over the processes.
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
        """Adds the gradient of a micro-batch's part of the loss: its sum over the global count.

        Wrapped modules average gradients over the processes. The loss is multiplied by the number
        of processes, so that the average becomes the sum.
        """
        self.processes.accelerator.backward(loss * self.processes.count)

    def step(self, number: int) -> dict[str, float]:
        """Updates the weights.

        Returns:
            the norm of the gradient before clipping, and the learning rate.

        Raises:
            RunError: the gradient is not finite. The weights are unchanged.
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
                f"{bad[0] if bad else 'none'}: lower --learning-rate, or look for a faulty row "
                "among those of this step"
            )
        self.processes.dirty = True
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "learning_rate": lr}
