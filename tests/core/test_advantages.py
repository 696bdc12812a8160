"""Generalized advantage estimation, against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from fiducial.core.advantages import gae, nonzero_std
from support import noisy, tensor

NAN, INF = math.nan, math.inf


def test_advantages_by_hand():
    # deltas 1 + 2 - 1 = 2, 0 + 4 - 2 = 2, 5 + 0 - 4 = 1; with gamma 1, lambda 1/2: 1, 2 + 1/2, 2 +
    # 5/4
    advantages, returns = gae(
        tensor([[1.0, 0.0, 5.0]]), tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3), gamma=1.0, lam=0.5
    )
    assert advantages[0].tolist() == [3.25, 2.5, 1.0]
    assert returns[0].tolist() == [4.25, 4.5, 5.0]


def test_a_response_of_one_token_in_one_column_earns_its_reward_less_its_value():
    advantages, returns = gae(tensor([[3.0]]), tensor([[1.0]]), torch.ones(1, 1))
    assert (advantages.tolist(), returns.tolist()) == ([[2.0]], [[3.0]])


def test_advantages_keep_their_rows_and_their_type_and_do_not_touch_their_inputs():
    x, mask = noisy()
    v = x.flip(1).nan_to_num(0, 0, 0)
    before = x.clone(), v.clone()
    advantages, _ = gae(x, v, mask)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        gae(x[order], v[order], mask[order])[0], advantages[order], rtol=0, atol=0
    )
    wide = gae(*(F.pad(t, (2, 3), value=NAN) for t in (x, v)), F.pad(mask, (2, 3)))[0]
    torch.testing.assert_close(wide[:, 2:-3], advantages, rtol=0, atol=0)
    torch.testing.assert_close((x, v), before, equal_nan=True)
    assert gae(x.float(), v.float(), mask)[0].dtype == torch.float32


def test_advantages_of_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        gae(torch.ones(2, 3), torch.ones(2, 1), torch.ones(2, 3))


@pytest.mark.parametrize("level", [0.0, 1.0, -40.0, 1e4])
def test_any_difference_beyond_rounding_is_spread(level):
    """A thousandth of the level is spread, a rounding error in float32 is none."""
    step = 1e-3 * max(1.0, abs(level))
    returns = tensor([level, level + step, level, level, level, level * (1 + 1e-7)])
    groups = torch.tensor([5, 5, 2, 2, 7, 7])
    assert nonzero_std(returns, groups).tolist() == [True, True, False, False, False, False]
