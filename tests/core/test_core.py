"""The tensor mathematics under everything else, against NumPy and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fiducial.core import intervals, kl
from fiducial.core.advantages import gae
from fiducial.core.logprobs import chosen_logprobs
from fiducial.core.reductions import masked_mean, masked_sum, same_shape, select, whiten

NAN, INF = math.nan, math.inf


def tensor(x, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(x, dtype=dtype)


def noisy(seed: int = 0, rows: int = 4, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with NaN and infinities where the mask is false, and the mask."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, width)) < 0.6
    mask[0, 0], mask[1] = True, False
    x = rng.normal(loc=3, scale=2, size=(rows, width))
    x[~mask] = rng.choice([NAN, INF, -INF], size=(~mask).sum())
    return tensor(x), torch.tensor(mask)


# ---- reductions ----


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


# ---- log-probabilities ----

N, H, V = 10, 6, 17


def problem(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 3, N - 1, N, 10 * N])
def test_chunks_of_any_size_have_the_value_and_the_gradient_of_the_whole(rows, temperature):
    hidden, weight, labels = problem()
    at_once = []

    def head(h: torch.Tensor) -> torch.Tensor:
        at_once.append(len(h))
        return h @ weight.T

    found, entropy = chosen_logprobs(
        hidden, labels, head, V, temperature=temperature, entropy=True, chunk_bytes=rows * V * 4
    )
    assert max(at_once) == min(rows, N)
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    whole = logp[torch.arange(N), labels]
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=1e-12, atol=1e-12)
    assert not entropy.requires_grad
    mine, theirs = (
        torch.autograd.grad((x * upstream).sum(), [hidden, weight]) for x in (found, whole)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_log_probabilities_are_numpys_and_their_gradient_the_finite_difference():
    hidden, weight, labels = problem()
    logits = (hidden @ weight.T).detach().numpy() / 0.7
    slow = [z[y] - math.log(np.exp(z).sum()) for z, y in zip(logits, labels.tolist(), strict=True)]
    found, _ = chosen_logprobs(hidden, labels, lambda h: h @ weight.T, V, temperature=0.7)
    np.testing.assert_allclose(found.detach(), slow, rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda h, w: chosen_logprobs(
            h, labels, lambda x: x @ w.T, V, temperature=0.7, chunk_bytes=3 * V * 4
        )[0],
        (hidden, weight),
    )


def test_the_entropy_of_equal_logits_is_the_log_of_their_number_and_that_of_a_certain_token_zero():
    hidden = tensor([[0.0] * 4, [1000.0, 0.0, 0.0, 0.0]])
    logprobs, entropy = chosen_logprobs(hidden, torch.tensor([2, 0]), lambda h: h, 4, entropy=True)
    assert logprobs.tolist() == pytest.approx([-math.log(4), 0.0])
    assert entropy.tolist() == pytest.approx([math.log(4), 0.0])


def test_float64_is_kept_and_bfloat16_is_raised_to_float32_before_the_softmax():
    hidden, weight, labels = problem()
    assert chosen_logprobs(hidden, labels, lambda h: h @ weight.T, V)[0].dtype == torch.float64
    hidden, weight, labels = problem(torch.bfloat16)
    found, entropy = chosen_logprobs(hidden, labels, lambda h: h @ weight.T, V, entropy=True)
    assert found.dtype == entropy.dtype == torch.float32
    raised = (hidden @ weight.T).double().log_softmax(-1)
    torch.testing.assert_close(found.double(), raised[torch.arange(N), labels], rtol=0, atol=1e-5)


def test_no_label_at_all_is_an_empty_answer_that_still_has_a_gradient():
    hidden = torch.zeros(0, H, requires_grad=True)
    found, entropy = chosen_logprobs(
        hidden, torch.zeros(0, dtype=torch.long), lambda h: h, V, entropy=True
    )
    assert found.shape == entropy.shape == (0,) and found.dtype == torch.float32
    found.sum().backward()
    assert hidden.grad is not None


def test_nothing_is_computed_twice_without_gradients():
    hidden, weight, labels = problem()
    calls = []

    def head(h: torch.Tensor) -> torch.Tensor:
        calls.append(len(h))
        return h @ weight.T

    with torch.no_grad():
        chosen_logprobs(hidden, labels, head, V, chunk_bytes=4 * V * 4)
    assert calls == [4, 4, 2]


# ---- advantages (the slow loop is check 15, in exact/test_policy_gradient.py) ----


def test_advantages_by_hand():
    # deltas 1 + 2 - 1 = 2, 0 + 4 - 2 = 2, 5 + 0 - 4 = 1; with gamma 1, lambda 1/2: 1, 2 + 1/2, 2 +
    # 5/4
    advantages, returns = gae(
        tensor([[1.0, 0.0, 5.0]]), tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3), gamma=1.0, lam=0.5
    )
    assert advantages[0].tolist() == [3.25, 2.5, 1.0]
    assert returns[0].tolist() == [4.25, 4.5, 5.0]


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


# ---- KL ----


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


# ---- intervals ----


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 2, 0.0945, 0.9055),
    ],
)
def test_wilsons_interval_has_its_known_values(successes, n, low, high):
    found = intervals.wilson(successes, n)
    assert found["value"] == successes / n and found["n"] == n
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=5e-5)


def test_wilsons_ends_are_where_the_score_test_just_rejects():
    found = intervals.wilson(37, 120)
    for end in (found["low"], found["high"]):
        assert abs(37 / 120 - end) / math.sqrt(end * (1 - end) / 120) == pytest.approx(
            1.959964, abs=1e-6
        )


def test_of_no_trial_nothing_is_known():
    found = intervals.wilson(0, 0)
    assert math.isnan(found["value"]) and (found["low"], found["high"], found["n"]) == (0.0, 1.0, 0)
    found = intervals.mean([])
    assert math.isnan(found["value"]) and found["n"] == 0
    found = intervals.mean([3.0])
    assert found["value"] == 3.0 and (found["low"], found["high"]) == (-INF, INF)


def test_the_interval_of_independent_values_is_the_textbooks():
    values = np.random.default_rng(0).normal(size=30)
    found = intervals.mean(values.tolist())
    half = 1.959963984540054 * values.std(ddof=1) / math.sqrt(30)
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), rel=1e-12
    )


def test_values_of_one_cluster_count_as_the_one_they_are():
    # mean 1/2; the clusters' sums of residuals are 1 and -1: half = z sqrt(2/1 * 2) / 4 = z / 2
    found = intervals.mean([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])
    assert found["high"] - found["value"] == pytest.approx(1.959963984540054 / 2)
    assert found["value"] - found["low"] == pytest.approx(1.959963984540054 / 2)
    values = np.random.default_rng(0).normal(size=20).tolist()
    alone, copied = intervals.mean(values), intervals.mean(values * 5, list(range(20)) * 5)
    assert copied["high"] == pytest.approx(alone["high"]) and copied["n"] == 100
    assert intervals.mean(values, list(range(20))) == alone
    assert (
        intervals.mean([0.0, 1.0], ["a", "a"])["high"] == INF
    )  # one cluster says nothing of its spread
