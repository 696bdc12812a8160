"""One optimizer step: accumulate, check, clip and update. The learning rate is a function of the
step number, so no scheduler has to be saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..errors import RunError
from ..settings import OptimizerSettings
from .nonfinite import Nonfinite
from .processes import Processes
from .progress import say


def learning_rate(
    step: int, total: int, peak: float, schedule: str, warmup: int, floor: float = 0.1
) -> float:
    """The learning rate of step `step` (counted from 0) of `total`.

    Args:
        warmup: steps of the linear rise; the last of them has the peak.
        floor: the share of the peak that a cosine ends at.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * (floor + (1 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def warmup_steps(settings: OptimizerSettings, total: int, usual: int) -> int:
    """How many of a run's `total` steps the learning rate rises.

    Args:
        usual: the method's own warm-up, where the settings give none; it is limited to a tenth of
            the run, so that a short run is trained at its rate too.
    """
    if settings.warmup_steps is None:
        return min(usual, total // 10)
    return settings.warmup_steps


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: to matrices, embeddings among them, and not to
    vectors (norms, biases). This is the custom since GPT-2.
    """
    return parameter.ndim >= 2


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
        *,
        usual_warmup: int = 0,
        nonfinite: Nonfinite | None = None,
    ) -> None:
        """Args:
        peak: the largest learning rate. total: optimizer steps of the run.
        usual_warmup: the method's warm-up, where the settings give none.
        nonfinite: what happens at a gradient that is not finite; None: the step raises.
        """
        self.warmup = warmup_steps(settings, total, usual_warmup)
        if self.warmup > total and processes.main:
            say(
                f"--optimizer.warmup-steps {self.warmup} in a run of {total} optimizer steps: the "
                f"learning rate ends at {total / self.warmup:.0%} of its peak"
            )
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if decays(p)], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if not decays(p)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=peak,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self.module: Any
        self.module, self.optimizer = processes.accelerator.prepare(module, optimizer)
        self.peak, self.settings, self.total, self.processes = peak, settings, total, processes
        self.nonfinite = nonfinite
        self.number = -1 if nonfinite is None else nonfinite.watch(self.module)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's part of the loss: its sum over the global count.

        Wrapped modules average gradients over the processes. The loss is multiplied by the number
        of processes, so that the average becomes the sum.
        """
        self.processes.accelerator.backward(loss * self.processes.count)

    def step(self, number: int) -> dict[str, float]:
        """Updates the weights.

        Returns:
            the norm of the gradient before clipping, and the learning rate. An update that is left
            out because its gradient is not finite has no norm.

        Raises:
            RunError: the gradient is not finite, and the update is not left out. The weights are
                unchanged.
        """
        lr = learning_rate(number, self.total, self.peak, self.settings.schedule, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with_gradient = [p for p in self.module.parameters() if p.grad is not None]
        total = get_total_norm([p.grad for p in with_gradient if p.grad is not None])
        norm = float(total)
        if not math.isfinite(norm):
            self._left_out(norm)
            return {"learning_rate": lr}
        clip_grads_with_norm_(with_gradient, self.settings.max_grad_norm, total)
        self.processes.dirty = True
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.nonfinite is not None:
            self.nonfinite.done(self.number)
        return {"grad_norm": norm, "learning_rate": lr}

    def _left_out(self, norm: float) -> None:
        bad = [
            n.removeprefix("module.")
            for n, p in self.module.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        what = (
            f"the gradient is not finite in {len(bad)} tensor{'s' * (len(bad) > 1)}, first {bad[0]}"
            if bad
            else f"the norm of the gradient is {norm}"
        )
        if self.nonfinite is None:
            raise RunError(f"{what}: lower --learning-rate")
        self.nonfinite.found(self.number, what)
        self.optimizer.zero_grad(set_to_none=True)
