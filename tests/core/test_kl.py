"""The estimators of the KL divergence and the controller of its coefficient."""

import math

import numpy as np
import pytest
import torch

from fiducial.core import kl


def tensor(x, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(x, dtype=dtype)


def test_estimators_by_hand():
    # pi 1/2, ref 1/4: l = log 2, r = 1/2
    for name, expected in {
        "k1": math.log(2),
        "k2": math.log(2) ** 2 / 2,
        "k3": 0.5 - 1 + math.log(2),
    }.items():
        found = kl.estimate(tensor([[0.5]]).log(), tensor([[0.25]]).log(), estimator=name)
        assert found.item() == pytest.approx(expected, abs=1e-12)
    assert (
        kl.estimate(tensor([[-1.0]]), tensor([[-3.0]])).item() == 2.0
    )  # k1 unless asked otherwise


def test_k3_is_never_negative_and_keeps_its_digits_where_the_two_are_close():
    rng = np.random.default_rng(0)
    l = rng.normal(size=1000) * 10.0 ** rng.integers(-6, 1, size=1000)  # noqa: E741
    k3 = kl.estimate(tensor(l)[None], torch.zeros(1, 1000, dtype=torch.float64), estimator="k3")[0]
    assert (k3 >= 0).all()
    small = np.abs(l) < 1e-3
    np.testing.assert_allclose(
        k3[small], (l**2 / 2 - l**3 / 6 + l**4 / 24)[small], rtol=1e-6, atol=1e-19
    )


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_each_estimator_is_differentiable_on_both_sides(name):
    # in expectation a detached k1 inside k3 would go unnoticed, for its gradient is zero there
    x, y = torch.randn(
        2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: kl.estimate(x, y, estimator=name), (x, y))


def test_estimators_refuse_other_names_and_shapes():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl.estimate(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k4")
    with pytest.raises(ValueError, match="broadcast"):
        kl.estimate(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize(
    ("seen", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.0512),
        (5.7, 1 - 0.05 * 0.0512),
        (12.0, 1 + 0.2 * 0.0512),
        (7.3, 1 + 0.2 * 0.0512),
        (0.0, 1 - 0.2 * 0.0512),
        (-3.0, 1 - 0.2 * 0.0512),
    ],
)
def test_zieglers_controller_moves_beta_in_proportion_and_by_at_most_a_fifth(seen, factor):
    assert kl.adapt(0.15, seen, target=6.0, episodes=512, horizon=10_000) == pytest.approx(
        0.15 * factor, rel=1e-12
    )


def test_the_horizon_is_the_papers_and_a_whole_one_in_pieces_is_the_documented_factor():
    assert kl.adapt(1.0, 100.0, target=6.0, episodes=500) == pytest.approx(1.01)
    assert kl.adapt(1.0, 100.0, target=6.0, episodes=500, horizon=1000) == pytest.approx(1.1)
    beta = 1.0
    for _ in range(20):
        beta = kl.adapt(beta, 100.0, target=6.0, episodes=500)
    assert beta == pytest.approx(1.01**20) and beta == pytest.approx(1.2, abs=0.03)
