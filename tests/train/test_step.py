"""One optimizer step: its rate by hand, its update by NumPy, and what a NaN leaves alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fiducial.errors import RunError
from fiducial.settings import OptimizerSettings
from fiducial.train.processes import Processes
from fiducial.train.step import Stepper, learning_rate, warmup_steps


def rates(total: int, schedule: str, warmup: int) -> list[float]:
    return [learning_rate(step, total, 8.0, schedule, warmup) for step in range(total)]


def test_rates_by_hand():
    # the rise begins above 0 and ends at the peak; the fall begins after it, at the peak
    assert rates(6, "constant", 4) == [2, 4, 6, 8, 8, 8]
    assert rates(6, "linear", 2) == [4, 8, 8, 6, 4, 2]
    assert rates(4, "linear", 0) == [8, 6, 4, 2]
    assert rates(3, "constant", 0) == [8, 8, 8]
    # halfway between the peak and a tenth of it; a quarter of the way, 1/2 + sqrt(2)/4 of the fall
    found = rates(6, "cosine", 2)
    fall = 7.2 * (0.5 + math.sqrt(2) / 4)
    assert found == pytest.approx([4, 8, 8, 0.8 + fall, 4.4, 0.8 + 7.2 - fall])
    assert learning_rate(6, 6, 8.0, "cosine", 2) == pytest.approx(0.8)
    assert learning_rate(9, 6, 8.0, "cosine", 2) == pytest.approx(0.8)  # and stays there
    assert learning_rate(9, 6, 8.0, "linear", 2) == 0


@pytest.mark.parametrize(
    ("asked", "total", "usual", "steps"),
    [
        (None, 5000, 150, 150),
        (None, 1500, 150, 150),
        (None, 1490, 150, 149),  # a tenth of a shorter run
        (None, 9, 150, 0),
        (None, 5000, 0, 0),
        (0, 5000, 150, 0),
        (20, 20, 150, 20),  # what is asked for is done, however long
        (400, 1000, 150, 400),
    ],
)
def test_warm_up_is_as_asked_or_a_tenth_of_the_run_at_most(asked, total, usual, steps):
    assert warmup_steps(OptimizerSettings(warmup_steps=asked), total, usual) == steps


def test_a_warm_up_that_is_longer_than_the_run_is_said(capsys):
    for warmup, said in ((20, ""), (25, "ends at 80% of its peak")):
        Stepper(nn.Linear(1, 1), 0.1, OptimizerSettings(warmup_steps=warmup), 20, Processes())
        told = capsys.readouterr().err
        assert said in told and bool(said) == bool(told)


class Toy(nn.Module):
    """A table, a matrix, a norm's scale and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(4, 3), nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.embedding(ids))).pow(2).sum()


def adamw(weights, gradients, rates, *, betas, eps, decay, limit):
    """Loshchilov and Hutter 2019, algorithm 2, on all weights by name; the norm is clipped first.

    decay: the weight decay by name.
    """
    first = {k: np.zeros_like(w) for k, w in weights.items()}
    second = {k: np.zeros_like(w) for k, w in weights.items()}
    for t, (rate, gradient) in enumerate(zip(rates, gradients, strict=True), start=1):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, limit / norm)
        for k, g in gradient.items():
            g = g * scale
            first[k] = betas[0] * first[k] + (1 - betas[0]) * g
            second[k] = betas[1] * second[k] + (1 - betas[1]) * g**2
            m, v = first[k] / (1 - betas[0] ** t), second[k] / (1 - betas[1] ** t)
            weights[k] = weights[k] - rate * (m / (np.sqrt(v) + eps) + decay[k] * weights[k])
    return weights


def numbers(named) -> dict[str, np.ndarray]:
    return {k: v.detach().double().numpy().copy() for k, v in named}


def test_an_update_is_adamw_with_its_decay_on_matrices_alone():
    module = Toy()
    settings = OptimizerSettings(
        betas=(0.7, 0.8), eps=1e-3, weight_decay=0.3, warmup_steps=2, max_grad_norm=5.0
    )
    stepper = Stepper(module, 0.1, settings, 4, Processes())
    start, gradients, found = numbers(module.named_parameters()), [], []
    for step in range(4):
        stepper.backward(stepper.module(torch.tensor([0, 2])))
        gradients.append({k: p.grad.double().numpy().copy() for k, p in module.named_parameters()})
        found.append(stepper.step(step))
        assert all(p.grad is None for p in module.parameters())  # nothing is left for the next
    norms = [math.sqrt(sum((g**2).sum() for g in one.values())) for one in gradients]
    assert [f["grad_norm"] for f in found] == pytest.approx(norms, rel=1e-5)
    assert norms[0] > 5.0 > norms[-1]  # one that is clipped, and one that is not
    assert [f["learning_rate"] for f in found] == pytest.approx([0.05, 0.1, 0.1, 0.05])
    decay = {k: 0.3 * (k in ("embedding.weight", "linear.weight")) for k in start}
    expected = adamw(
        start,
        gradients,
        [0.05, 0.1, 0.1, 0.05],
        betas=(0.7, 0.8),
        eps=1e-3,
        decay=decay,
        limit=5.0,
    )
    for name, value in numbers(module.named_parameters()).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    module = Toy()
    stepper = Stepper(module, 0.1, OptimizerSettings(), 4, Processes())
    before = numbers(module.named_parameters())
    stepper.backward(stepper.module(torch.tensor([1])) * math.nan)
    with pytest.raises(RunError, match=r"not finite in 5 tensors, first embedding.weight"):
        stepper.step(0)
    assert stepper.processes.dirty is False
    for name, value in numbers(module.named_parameters()).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_frozen_weight_is_not_touched_by_decay():
    module = Toy()
    module.embedding.weight.requires_grad_(False)
    before = module.embedding.weight.clone()
    stepper = Stepper(module, 0.1, OptimizerSettings(weight_decay=0.5), 4, Processes())
    stepper.backward(stepper.module(torch.tensor([1])))
    stepper.step(0)
    assert torch.equal(module.embedding.weight, before)
