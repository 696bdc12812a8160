"""What multiplies a sequence-level gradient: groups, token weights, corrections for another
sampler; and that padding changes none of it.

Penalties are in test_penalties.py. The exact expectations of the estimators themselves are in
test_sequence.py, whose slow NumPy code these tests use too.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fiducial import losses
from fiducial.core import advantages, corrections, kl
from fiducial.core.loss_aggregation import constant, sequence_mean, token_mean
from test_sequence import EXACT, OTHER, WORLD, off, slow_off_policy, tensor, token_scores
from world import all_responses, distribution, grads, tabular

NAN = math.nan


# ---- 23: groups ----

IDS = [7, 3, 7, -2, 3, 7, 3, 90, 7]  # sizes 4, 3, 1, 1; nowhere side by side
PAIRED = [7, 3, 7, -2, 3, 7, 3, -2, 7]
RETURNS = [0.3, -1.2, 2.0, 0.7, 0.1, -0.4, 1.9, -3.0, 0.25]


def by_group(f, returns, ids):
    """f of each group's returns, back in place."""
    out = np.zeros(len(returns))
    for g in set(ids):
        at = [i for i, j in enumerate(ids) if j == g]
        for i, x in zip(at, f([returns[k] for k in at]), strict=True):
            out[i] = x
    return out


def others(r):
    return [x - sum(y for j, y in enumerate(r) if j != i) / (len(r) - 1) for i, x in enumerate(r)]


def centred(r):
    return [x - sum(r) / len(r) for x in r]


def normalised(r, eps=1e-4):
    if len(r) == 1:
        return [0.0]
    return [
        c / (math.sqrt(sum(d * d for d in centred(r)) / (len(r) - 1)) + eps) for c in centred(r)
    ]


GROUPED = [
    (advantages.leave_one_out, others, PAIRED),
    (advantages.group_mean, centred, IDS),
    (advantages.group_normalised, normalised, IDS),
    (lambda r, g: advantages.group_normalised(r, g, eps=0.5), lambda r: normalised(r, 0.5), IDS),
    (advantages.nonzero_std, lambda r: [max(r) > min(r)] * len(r), IDS),
]
grouped = pytest.mark.parametrize(
    ("function", "slow", "ids"),
    GROUPED,
    ids=["leave_one_out", "group_mean", "group_normalised", "eps", "spread"],
)


@grouped
def test_groups_are_those_of_their_ids_uneven_apart_and_in_any_order(function, slow, ids):
    found, expected = function(tensor(RETURNS), torch.tensor(ids)), by_group(slow, RETURNS, ids)
    np.testing.assert_allclose(found, expected, atol=EXACT)
    order = torch.tensor([5, 0, 8, 3, 1, 7, 2, 6, 4])
    torch.testing.assert_close(
        function(tensor(RETURNS)[order], torch.tensor(ids)[order]), found[order], rtol=0, atol=EXACT
    )
    renamed = torch.tensor([{7: 0, 3: 5, -2: 1, 90: 4}[i] for i in ids])
    torch.testing.assert_close(function(tensor(RETURNS), renamed), found, rtol=0, atol=EXACT)
    assert found.any()


@pytest.mark.parametrize(
    "function", [advantages.leave_one_out, advantages.group_mean, advantages.group_normalised]
)
def test_returns_of_every_token_are_compared_column_by_column(function):
    table, ids = tensor(np.random.default_rng(0).normal(size=(9, 4))), torch.tensor(PAIRED)
    expected = torch.stack([function(table[:, t], ids) for t in range(4)], 1)
    torch.testing.assert_close(function(table, ids), expected, rtol=0, atol=EXACT)


def test_a_response_alone_has_no_others_and_no_spread():
    with pytest.raises(ValueError, match="two responses a group"):
        advantages.leave_one_out(tensor(RETURNS), torch.tensor(IDS))
    alone = torch.tensor([3, 7])
    for function in (advantages.group_mean, advantages.group_normalised, advantages.nonzero_std):
        assert not function(tensor(RETURNS), torch.tensor(IDS))[alone].any()


@pytest.mark.parametrize(
    "call",
    [
        lambda: advantages.group_mean(torch.zeros(4), torch.zeros(3, dtype=torch.long)),
        lambda: advantages.nonzero_std(torch.zeros(4), torch.zeros(4, 1)),
        lambda: advantages.remax(torch.zeros(4), torch.zeros(4, 1)),
        lambda: advantages.remax(torch.zeros(4, 3), torch.zeros(3)),
        lambda: advantages.sequence_return(torch.zeros(4, 3), torch.ones(4, 1)),
        lambda: advantages.reward_to_go(torch.zeros(4, 3), torch.ones(4)),
        lambda: corrections.tis(torch.zeros(4, 3), torch.zeros(4, 1), torch.ones(4, 3)),
        lambda: corrections.off_policy_mask(
            torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 1), torch.ones(4, 3), threshold=1.0
        ),
        lambda: kl.penalty(
            torch.zeros(4, 3),
            torch.zeros(4, 3),
            torch.zeros(4, 1),
            torch.ones(4, 3),
            estimator="k2",
        ),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(ValueError, match=r"a row: got|broadcast"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "size"), [(0.1, 7), (0.7, 64), (1000.1, 3), (-1000.1, 64)])
def test_23_equal_rewards_give_a_gradient_of_zero_and_no_nan(value, size, dtype):
    returns, ids = torch.full((2 * size,), value, dtype=dtype), torch.arange(2 * size) % 2
    for function in (advantages.group_mean, advantages.group_normalised, advantages.leave_one_out):
        found = function(returns, ids)
        assert found.dtype == dtype and found.abs().max() < 1e-7
    assert not advantages.nonzero_std(returns, ids).any()
    now = torch.zeros(2 * size, 3, dtype=dtype, requires_grad=True)
    each = advantages.group_normalised(returns, ids)[:, None].expand(-1, 3)
    loss, _ = losses.ppo_clip(now, torch.zeros_like(now), each, torch.ones_like(now))
    assert torch.autograd.grad(loss, now)[0].abs().max() < 1e-7


def test_23_scale_and_shift_of_the_reward_change_nothing_but_by_the_epsilon():
    r, ids = tensor(RETURNS), torch.tensor(IDS)
    plain = advantages.group_normalised(r, ids, eps=0.0)[
        torch.tensor(IDS) != 90
    ]  # 0 / 0 for a response alone
    moved = advantages.group_normalised(2.5 * r + 7, ids, eps=0.0)[torch.tensor(IDS) != 90]
    keep = ~plain.isnan()
    torch.testing.assert_close(moved[keep], plain[keep], rtol=0, atol=EXACT)
    close = advantages.group_normalised(2.5 * r + 7, ids) - advantages.group_normalised(r, ids)
    assert 0 < close.abs().max() < 3e-4


def test_23_two_responses_get_the_sample_deviation_whatever_their_distance():
    for low, high in ((0.0, 1.0), (-3.0, 4.0), (0.0, 1e-4)):
        found = advantages.group_normalised(tensor([low, high]), torch.tensor([0, 0])).tolist()
        expected = (high - low) / 2 / ((high - low) / math.sqrt(2) + 1e-4)
        assert found == pytest.approx([-expected, expected], abs=EXACT)
    assert advantages.group_normalised(
        tensor([0.0, 1e6]), torch.tensor([4, 4])
    ).tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], abs=1e-6)


def test_advantages_by_hand():
    groups = torch.tensor([0, 0, 1, 1, 1])
    assert advantages.leave_one_out(tensor([1.0, 4.0, 0.0, 3.0, 6.0]), groups).tolist() == [
        -3,
        3,
        -4.5,
        0,
        4.5,
    ]
    assert advantages.group_mean(tensor([1.0, 4.0, 0.0, 3.0, 6.0]), groups).tolist() == [
        -1.5,
        1.5,
        -3,
        0,
        3,
    ]
    assert advantages.group_normalised(
        tensor([1.0, 4.0, 0.0, 3.0, 6.0]), groups, eps=0.0
    ).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, -1, 0, 1])
    assert advantages.remax(tensor([1.0, 4.0]), tensor([2.0, 5.0])).tolist() == [-1, -1]
    rewards, mask = tensor([[NAN, 1.0, 2.0, NAN, 4.0]]), torch.tensor([[0, 1, 1, 0, 1]])
    assert advantages.sequence_return(rewards, mask).tolist() == [7] and advantages.reward_to_go(
        rewards, mask
    ).tolist() == [[0, 7, 6, 0, 4]]
    assert advantages.whitened(tensor([[1.0, 3.0, NAN]]), torch.tensor([[1, 1, 0]])).tolist() == [
        pytest.approx([-1, 1, 0])
    ]


# ---- token weights ----


def test_token_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert sequence_mean(mask).tolist() == [
        pytest.approx([1 / 6, 1 / 6, 1 / 6, 0]),
        [0, 0.5, 0, 0],
        [0, 0, 0, 0],
    ]  # over the two that have a token
    assert token_mean(mask).tolist() == [[0.25, 0.25, 0.25, 0], [0, 0.25, 0, 0], [0, 0, 0, 0]]
    assert constant(mask, 5).tolist() == [
        pytest.approx([1 / 15] * 3 + [0]),
        pytest.approx([0, 1 / 15, 0, 0]),
        [0, 0, 0, 0],
    ]
    for found in (sequence_mean(mask), token_mean(mask)):
        assert found.sum().item() == pytest.approx(1)
    for f in (sequence_mean, token_mean, lambda m: constant(m, 5)):
        assert not f(torch.zeros(2, 3)).any()
        torch.testing.assert_close(f(mask.flip(0)), f(mask).flip(0))


# ---- padding: NaN and width change nothing ----


def padded_case():
    rng = np.random.default_rng(1)
    mask = torch.tensor(rng.random((5, 6)) < 0.6)
    mask[0, 0], mask[3] = True, False
    values = [tensor(rng.normal(size=(5, 6))) for _ in range(4)]
    return [torch.where(mask, v, NAN) for v in values], mask


MASKED = {
    "to_go": lambda v, m: advantages.reward_to_go(v[0], m),
    "whole": lambda v, m: advantages.sequence_return(v[0], m),
    "whitened": lambda v, m: advantages.whitened(v[0], m),
    "sequence_mean": lambda v, m: sequence_mean(m),
    "token_mean": lambda v, m: token_mean(m),
    "constant": lambda v, m: constant(m, 9),
    **{name: lambda v, m, f=f: f(v[0], v[1], m) for name, f in corrections.CORRECTIONS.items()},
    "stale": lambda v, m: corrections.off_policy_mask(v[0], v[1], v[2], m, threshold=0.1),
    **{
        f"penalty {e}": lambda v, m, e=e: kl.penalty(v[0], v[1], v[2], m, estimator=e)
        for e in ("k2", "k2_tokens", "weighted_k3", "forward_k3")
    },
}


@pytest.mark.parametrize("what", MASKED)
def test_what_stands_on_padding_and_how_much_there_is_changes_nothing(what):
    values, mask = padded_case()
    found = MASKED[what](values, mask)
    clean = MASKED[what]([v.nan_to_num(0.3) for v in values], mask)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert found.isfinite().all() and found.any() and (found.dim() == 1 or not found[~mask].any())
    wide = MASKED[what]([F.pad(v, (2, 3), value=NAN) for v in values], F.pad(mask, (2, 3)))
    torch.testing.assert_close(
        wide if wide.dim() == 1 else wide[:, 2:-3], found, rtol=0, atol=1e-15
    )
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        MASKED[what]([v[order] for v in values], mask[order]), found[order], rtol=0, atol=1e-15
    )


def test_penalties_have_no_gradient_at_padding_and_corrections_none_at_all():
    values, mask = padded_case()
    for estimator in ("k2", "k2_tokens", "weighted_k3", "forward_k3"):
        now = values[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(
            kl.penalty(now, values[1], values[2], mask, estimator=estimator).sum(), now
        )
        assert (grad[~mask] == 0).all() and grad[mask].all() and grad.isfinite().all()
    for function in corrections.CORRECTIONS.values():
        assert not function(values[0].clone().requires_grad_(), values[1], mask).requires_grad


# ---- corrections: the sampler is another policy ----


def test_corrections_by_hand():
    w = tensor([[0.4, 3.0, 1.5, NAN], [0.5, 0.8, NAN, NAN]])  # products 1.8 and 0.4
    mask, logp = ~w.isnan(), w.log()
    none = torch.zeros_like(w)
    assert corrections.tis(logp, none, mask, cap=2.0).tolist() == [
        pytest.approx([0.4, 2, 1.5, 0]),
        pytest.approx([0.5, 0.8, 0, 0]),
    ]
    assert corrections.icepop(logp, none, mask, cap=2.0, floor=0.45).tolist() == [
        pytest.approx([0, 0, 1.5, 0]),
        pytest.approx([0.5, 0.8, 0, 0]),
    ]
    assert corrections.sequence_tis(logp, none, mask, cap=1.2).tolist() == [
        pytest.approx([1.2, 1.2, 1.2, 0]),
        pytest.approx([0.4, 0.4, 0, 0]),
    ]
    assert corrections.sequence_mis(logp, none, mask, cap=1.2).tolist() == [
        [0, 0, 0, 0],
        pytest.approx([0.4, 0.4, 0, 0]),
    ]
    far = tensor([[1000.0]])  # e^1000 overflows
    assert [f(far, 0 * far, far, cap=2.0).item() for f in corrections.CORRECTIONS.values()] == [
        2,
        0,
        2,
        0,
    ]


def corrected(weights, advantage: np.ndarray) -> np.ndarray:
    """E over the sampler's responses of the weighted gradient, by the shipped functions. Sampler:
    OTHER; trained: WORLD.policy.
    """
    every, policy = all_responses(), tabular(WORLD.policy)
    now = policy(every.ids, every.mask).logprobs
    theirs = tabular(OTHER)(every.ids, every.mask).logprobs.detach()
    each = (tensor(distribution(OTHER)) * tensor(advantage))[:, None] * weights(
        now, theirs, every.mask
    )
    return -grads(losses.reinforce_sum(now, each, every.mask)[0], policy).numpy()


def only(x: float, keep: bool) -> float:
    return x if keep else 0.0


# shipped, slow (ratios of a response's tokens to the weight of each), the relative error of its
# expectation in this world
CORRECTED = {
    "none": (lambda now, theirs, mask: mask.double(), lambda r: [1.0] * len(r), 0.5667),
    "token, endless cap": (lambda *x: corrections.tis(*x, cap=math.inf), lambda r: r, 0.3088),
    "token tis, cap 2": (
        lambda *x: corrections.tis(*x, cap=2.0),
        lambda r: [min(x, 2.0) for x in r],
        0.3119,
    ),
    "icepop, 0.5 to 2": (corrections.icepop, lambda r: [only(x, 0.5 <= x <= 2) for x in r], 0.3766),
    "sequence, endless cap": (
        lambda *x: corrections.sequence_tis(*x, cap=math.inf),
        lambda r: [math.prod(r)] * len(r),
        0.0,
    ),
    "sequence tis, cap 1.2": (
        lambda *x: corrections.sequence_tis(*x, cap=1.2),
        lambda r: [min(math.prod(r), 1.2)] * len(r),
        0.2205,
    ),
    "sequence tis, cap 3": (
        lambda *x: corrections.sequence_tis(*x, cap=3.0),
        lambda r: [min(math.prod(r), 3.0)] * len(r),
        0.0244,
    ),
    "sequence mis, cap 3": (
        lambda *x: corrections.sequence_mis(*x, cap=3.0),
        lambda r: [only(math.prod(r), math.prod(r) <= 3)] * len(r),
        0.2244,
    ),
}


def goal() -> np.ndarray:
    """Grad E[R] at the trained policy."""
    pi, score = distribution(WORLD.policy), token_scores(WORLD.policy)
    return sum(p * r * sum(g) for p, r, g in zip(pi, WORLD.reward, score, strict=True))


@pytest.mark.parametrize("what", CORRECTED)
def test_each_correction_leaves_the_bias_of_a_slow_loop_and_only_the_sequence_ratio_leaves_none(
    what,
):
    weights, slow, measured = CORRECTED[what]
    found = corrected(weights, WORLD.reward)
    np.testing.assert_allclose(
        found, slow_off_policy(lambda a, r: slow(r), WORLD.reward), atol=EXACT
    )
    if what == "sequence, endless cap":
        np.testing.assert_allclose(found, goal(), atol=EXACT)
    assert off(found, goal()) == pytest.approx(measured, abs=5e-5)


def test_the_corrections_in_order_of_what_they_leave():
    bias = {
        what: off(corrected(weights, WORLD.reward), goal())
        for what, (weights, _, _) in CORRECTED.items()
    }
    assert (
        bias["sequence, endless cap"]
        < EXACT
        < bias["sequence tis, cap 3"]
        < bias["sequence tis, cap 1.2"]
        < bias["none"]
    )
    assert bias["sequence tis, cap 3"] < bias["token, endless cap"] < bias["none"]


def test_a_constant_baseline_leaves_the_bias_of_token_ratios_and_gives_the_sequence_ratio_none():
    mean = float(distribution(OTHER) @ WORLD.reward)
    token, whole = (
        corrected(CORRECTED[w][0], WORLD.reward - mean)
        for w in ("token, endless cap", "sequence, endless cap")
    )
    np.testing.assert_allclose(whole, goal(), atol=EXACT)
    assert off(token, goal()) > 0.1


def test_where_the_sampler_is_the_policy_every_weight_is_one():
    every = all_responses()
    now = tabular(WORLD.policy)(every.ids, every.mask).logprobs.detach()
    for function in corrections.CORRECTIONS.values():
        torch.testing.assert_close(
            function(now, now, every.mask), every.mask.double(), rtol=0, atol=0
        )


def test_stale_by_hand():
    # nats a token that the policy has fallen: 0.5, 0.5, 0.1, and a rise
    fallen = tensor([[0.9, 0.1, NAN], [0.9, 0.1, NAN], [0.1, NAN, NAN], [-2.0, -1.0, -0.5]])
    mask, old = ~fallen.isnan(), tensor([[-1.0] * 3] * 4)
    advantage = tensor([[-1.0, -1.0, 9.0], [1.0, 1.0, -9.0], [-1.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
    found = corrections.off_policy_mask(
        (old - fallen).requires_grad_(), old, advantage, mask, threshold=0.4
    )
    assert found.tolist() == [
        [False] * 3,
        [True, True, False],
        [True, False, False],
        [True] * 3,
    ]  # fell and is worse; is better; fell little; rose
    assert found.dtype == torch.bool
    assert (
        corrections.off_policy_mask(old - fallen, old, advantage, mask, threshold=0.6).tolist()
        == mask.tolist()
    )


def test_a_response_exactly_at_the_threshold_is_kept_and_only_a_worse_one_is_left_out():
    """A quarter of a nat per token less likely; an advantage of 0 in sum is not negative."""
    old = torch.zeros(3, 2, dtype=torch.float64)
    new, mask = old - 0.25, torch.ones(3, 2, dtype=torch.bool)
    advantages = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [2.0, -1.0]]).double()
    for threshold, kept in ((0.25, [True] * 3), (0.125, [False, True, True])):
        found = corrections.off_policy_mask(new, old, advantages, mask, threshold=threshold)
        assert found.all(1).tolist() == kept and found.any(1).tolist() == kept
