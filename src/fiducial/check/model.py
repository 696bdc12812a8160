"""One real step on the longest rows: is the gradient finite and not zero, where does it go, and how
long does it take?
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..data.findings import Finding
from ..errors import RunError
from ..methods.distill import Ready
from ..methods.setup import Prepared, PreparedOnline
from ..models.roles import Policy, Roles
from ..models.trunk import plain, text_config
from ..rollout.trajectory import Trajectory
from ..train.processes import Processes
from ..train.step import Stepper
from .losses import costs, offline_loss, sampled_loss

SECONDS = 8.0
"""Time for the measured batch; a slower model is measured on fewer rows."""
AT_ZERO = ("lora_A",)
"""Weights whose gradient is 0 before the first step by construction: the other factor is 0."""


@dataclass(frozen=True)
class Step:
    """A measured step.

    loss: mean loss of the batch. sequences, tokens: of the batch, without padding. forward,
    backward, update: seconds. grad_norm: over all roles that are trained, before clipping. slope:
    sum of the absolute values of the gradient. usual: mean tokens of an element of the run.
    """

    loss: float
    sequences: int
    tokens: int
    forward: float
    backward: float
    update: float
    grad_norm: float
    slope: float
    usual: float = 0.0

    @property
    def per_token(self) -> float:
        """Seconds of forward and backward pass per token."""
        return (self.forward + self.backward) / max(1, self.tokens)


def offline_step(
    ready: Prepared[Any], settings: Any, processes: Processes
) -> tuple[Step, list[Finding]]:
    """A step of a method that learns from rows, on as many of the longest as one micro-batch may
    hold.
    """
    items, roles, device = ready.train.items, ready.roles, processes.device
    every = [costs(item, roles) for item in items]
    order = sorted(range(len(every)), key=lambda i: -max(every[i]))[: settings.batch_size]
    sizes = [every[i] for i in order]
    fit = 1
    while fit < len(order) and max(sizes[0]) * sum(map(len, sizes[: fit + 1])) <= (
        settings.run.tokens
    ):
        fit += 1

    def loss(count: int) -> tuple[Tensor, int, int]:
        chosen = [items[i] for i in order[:count]]
        some = sizes[:count]
        value = offline_loss(chosen, roles, settings, device)
        return value, sum(map(len, some)), sum(map(sum, some))

    step, found = _measured(loss, fit, roles, settings, ready.total, processes)
    return replace(step, usual=sum(map(sum, every)) / len(every)), found


def online_step(
    trajectory: Trajectory, ready: PreparedOnline | Ready, settings: Any, processes: Processes
) -> tuple[Step, list[Finding]]:
    """A step of a method that learns from samples, on the longest of these."""
    lengths = trajectory.lengths.tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    fit = max(1, min(len(order), settings.run.tokens // lengths[order[0]]))

    def loss(count: int) -> tuple[Tensor, int, int]:
        rows = order[:count]
        value = sampled_loss(trajectory, rows, ready.roles, settings, processes.device)
        return value, count, sum(lengths[i] for i in rows)

    step, found = _measured(loss, fit, ready.roles, settings, settings.steps, processes)
    return replace(step, usual=sum(lengths) / len(lengths)), found


def _measured(
    loss: Callable[[int], tuple[Tensor, int, int]],
    fit: int,
    roles: Roles,
    settings: Any,
    total: int,
    processes: Processes,
) -> tuple[Step, list[Finding]]:
    """Forward and backward pass of one element, then of `fit` of them if that takes no longer than
    `SECONDS`, and one update of the optimizer.
    """
    trained = roles.trained()

    def timed(count: int) -> Step:
        for module in trained.values():
            module.zero_grad(set_to_none=True)
        start = time.monotonic()
        value, sequences, tokens = loss(count)
        number = float(value.detach())  # it also waits for an accelerator
        middle = time.monotonic()
        value.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for m in trained.values() for p in m.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(g.float().pow(2).sum()) for g in grads))
        backward = time.monotonic() - middle
        slope = sum(float(g.float().abs().sum()) for g in grads)
        return Step(number, sequences, tokens, middle - start, backward, 0.0, norm, slope)

    step = timed(1)
    if step.forward + step.backward < SECONDS / 4:
        step = timed(1)  # the first pass of a process is slower than all others
    if fit > 1 and (step.forward + step.backward) * fit < SECONDS:
        step = timed(fit)
    findings = gradient_findings(step, trained)
    start = time.monotonic()
    if not any(f.level == "error" for f in findings):
        findings += _update(trained, settings, total, processes)
    return replace(step, update=time.monotonic() - start), findings


def _update(
    trained: dict[str, nn.Module], settings: Any, total: int, processes: Processes
) -> list[Finding]:
    """One step of the run's own optimizer. The weights that it moves are thrown away."""
    try:
        for module in trained.values():
            rate = settings.learning_rate
            Stepper(module, rate, settings.optimizer, max(1, total), processes).step(0)
    except RunError as error:
        return [Finding("error", "gradient-not-finite", str(error))]
    return []


def gradient_findings(step: Step, trained: dict[str, nn.Module]) -> list[Finding]:
    """What the gradients of a step say."""
    numbers = {"loss": step.loss, "grad_norm": step.grad_norm, "tokens": step.tokens}
    batch = f"the longest batch ({step.sequences:,} sequences, {step.tokens:,} tokens)"
    if not math.isfinite(step.loss) or not math.isfinite(step.grad_norm):
        what = "loss" if not math.isfinite(step.loss) else "gradient"
        value = step.loss if what == "loss" else step.grad_norm
        return [
            Finding(
                "error",
                "gradient-not-finite",
                f"the {what} of {batch} is {value}",
                "use --run.precision float32, or look for broken weights in the model's folder",
                numbers,
            )
        ]
    rounding = abs(step.loss) < 1e-6 and step.grad_norm < 1e-5
    if step.grad_norm == 0 or rounding:
        return [
            Finding(
                "error",
                "no-gradient",
                f"the gradient of {batch} is 0, so nothing would be learned from it",
                "look at what is learned from: a teacher that is the student itself, or answers "
                "that do not differ",
                numbers,
            )
        ]
    said = f"the gradient of {batch} is finite, its norm {step.grad_norm:.3g}"
    found = [Finding("note", "gradient", f"{said}, the loss {step.loss:.4g}", numbers=numbers)]
    for role, module in trained.items():
        still = {name: p.numel() for name, p in module.named_parameters() if _still(name, p)}
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if role == "critic" or not still:  # a head at 0 gives its trunk no gradient at first
            continue
        share = sum(still.values()) / count
        kinds = ", ".join(list(dict.fromkeys(kind(name) for name in still))[:4])
        found.append(
            Finding(
                "warning" if share > 0.5 else "note",
                "weights-without-gradient",
                f"{len(still)} tensors ({share:.1%} of the weights of the {role} that train) got "
                f"no gradient from {batch}: {kinds}",
                "look whether they are meant to train" if share > 0.5 else "",
                {"tensors": len(still), "share": share, "names": list(still)[:20]},
            )
        )
    return found


def _still(name: str, p: nn.Parameter) -> bool:
    if not p.requires_grad or any(part in name for part in AT_ZERO):
        return False
    return p.grad is None or not bool(p.grad.any())


def kind(name: str) -> str:
    """The name of a weight without the numbers of layers and the wrappers around the model."""
    name = re.sub(r"^(lm|model)\.(base_model\.model\.)?", "", name)
    return re.sub(r"\.\d+\.", ".*.", name).replace(".default", "")


def weights(roles: Roles) -> dict[str, dict[str, Any]]:
    """For each role that trains: number of weights, of those that train, and the kinds of these by
    their number.
    """
    found: dict[str, dict[str, Any]] = {}
    for role, module in roles.trained().items():
        kinds: Counter[str] = Counter()
        count = 0
        for name, p in module.named_parameters():
            count += p.numel()
            if p.requires_grad:
                kinds[kind(name)] += p.numel()
        trained = kinds.total()
        found[role] = {
            "weights": count,
            "trained": trained,
            "share": trained / count,
            "kinds": dict(kinds.most_common()),
        }
    return found


def model_findings(note: str, roles: Roles) -> list[Finding]:
    """What was compared when the model was loaded, and what trains."""
    checked = re.search("checked: (.*)", note)
    found = [Finding("note", "model-contract", checked[1])] if checked else []
    for role, about in weights(roles).items():
        told = f"{about['trained']:,} of {about['weights']:,} weights of the {role} train"
        found.append(Finding("note", "trained-weights", f"{told} ({about['share']:.2%})"))
    model = plain(roles.policy.lm if roles.trains_policy else roles.scorer.model)
    if dropped := dict(_dropout(text_config(model.config))):
        names = ", ".join(f"{name} {value:g}" for name, value in dropped.items())
        told = f"the model's config asks for dropout ({names}); it is off in training here"
        found.append(Finding("note", "dropout-off", told, numbers=dropped))
    return found


def chance(step: Step, policy: Policy) -> list[Finding]:
    """Whether a language model is worse than one that knows nothing."""
    worst = math.log(policy.vocabulary)
    if step.loss <= worst + 1:
        return []
    return [
        Finding(
            "warning",
            "worse-than-chance",
            f"the model's loss on the longest rows is {step.loss:.3g} nats per token, where "
            f"choosing among its {policy.vocabulary:,} tokens at random has {worst:.3g}: model and "
            "tokenizer may not belong together",
            "look whether the folder of --model holds the tokenizer that the model was trained "
            "with",
            {"loss": step.loss, "chance": worst},
        )
    ]


def _dropout(config: Any) -> Iterator[tuple[str, float]]:
    for name, value in config.to_dict().items():
        noisy = name.endswith(("dropout", "pdrop", "drop_path_rate"))
        if noisy and isinstance(value, float) and value:
            yield name, value
