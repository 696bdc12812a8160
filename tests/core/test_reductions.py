"""Masked sums, masked means and whitening, against NumPy and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fiducial.core.reductions import masked_mean, masked_sum, same_shape, select, whiten
from support import noisy, tensor

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("seed", range(3))
def test_masked_sum_and_mean_are_those_of_the_selected(seed):
    x, mask = noisy(seed)
    kept = x[mask].numpy()
    assert masked_sum(x, mask).item() == pytest.approx(kept.sum(), abs=1e-12)
    assert masked_mean(x, mask).item() == pytest.approx(kept.mean(), abs=1e-12)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_a_mask_may_be_of_zeros_and_ones(kind):
    x, mask = noisy()
    assert masked_mean(x, mask.to(kind)).item() == masked_mean(x, mask).item()


def test_what_stands_on_padding_has_no_gradient_not_even_nan():
    x, mask = noisy()
    functions = (
        lambda x: masked_sum(x, mask) ** 2,
        lambda x: masked_mean(x, mask) ** 2,
        lambda x: select(x, mask).exp().sum(),
        lambda x: (whiten(x, mask) ** 3).sum(),
    )
    for f in functions:
        x = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(x), x)
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].isfinite().all() and gradient[mask].any()


def test_a_mean_over_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        masked_mean(torch.ones(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="nothing"):
        whiten(torch.ones(2, 2), torch.zeros(2, 2))


def test_shapes_that_would_broadcast_are_refused_by_name():
    with pytest.raises(ValueError, match=r"x \[2\], mask \[2, 1\].*broadcast"):
        masked_sum(torch.ones(2), torch.ones(2, 1))
    with pytest.raises(ValueError, match="broadcast"):
        same_shape(a=torch.ones(3), b=torch.ones(1))
    same_shape(a=torch.ones(3), b=torch.zeros(3))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [True, False])
def test_whitening_is_numpys_with_the_population_deviation(seed, shift):
    x, mask = noisy(seed)
    kept = x[mask].numpy()
    expected = (kept - kept.mean()) / kept.std() + (0 if shift else kept.mean())
    found = whiten(x, mask, shift_mean=shift)
    np.testing.assert_allclose(found[mask], expected, rtol=1e-7)
    assert (found[~mask] == 0).all()


def test_whitening_keeps_equal_values_finite_and_by_hand():
    assert (whiten(tensor([[2.0, 2.0, 2.0]]), torch.ones(1, 3)) == 0).all()
    assert whiten(tensor([[2.0, 2.0]]), torch.ones(1, 2), shift_mean=False)[
        0
    ].tolist() == pytest.approx([2.0, 2.0])
    assert whiten(tensor([[1.0, 3.0, 99.0]]), tensor([[1, 1, 0]]))[0].tolist() == pytest.approx(
        [-1.0, 1.0, 0.0]
    )


def test_whitening_does_not_see_how_much_padding_there_is():
    x, mask = noisy()
    wide = whiten(F.pad(x, (0, 5), value=NAN), F.pad(mask, (0, 5)))
    torch.testing.assert_close(wide[:, :-5], whiten(x, mask), rtol=1e-12, atol=1e-12)
    assert (wide[:, -5:] == 0).all()
