"""The package's estimator of the best of n samples against all subsets (check 17 in the design)."""

import itertools
import math

import numpy as np
import pytest
import torch

from fiducial.core.best_of_n import expected_best_of, kl_bound
from fiducial.lab.worlds import exact

EXACT = 1e-12


def brute_best_of(scores, values, n: int) -> float:
    """The mean over all subsets; where several are best, the mean over them."""
    each = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        each.append(np.mean([values[i] for i in subset if scores[i] == top]))
    return float(np.mean(each))


@pytest.mark.parametrize("levels", [2, 4, None])
def test_17_expected_best_of_is_the_mean_over_all_subsets(levels):
    rng = np.random.default_rng(0)
    for size in (1, 2, 6, 9):
        scores = (
            rng.normal(size=size) if levels is None else rng.integers(0, levels, size).astype(float)
        )
        values = rng.normal(size=size)
        for n in range(1, size + 1):
            assert expected_best_of(torch.tensor(scores), torch.tensor(values), n) == pytest.approx(
                brute_best_of(scores, values, n), abs=EXACT
            )
            assert expected_best_of(list(scores), list(scores), n) == pytest.approx(
                brute_best_of(scores, scores, n), abs=EXACT
            )
        assert expected_best_of(list(scores), list(values), 1) == pytest.approx(
            values.mean(), abs=EXACT
        )
        assert expected_best_of(list(scores), list(scores), size) == scores.max()


def test_17_expected_best_of_by_hand():
    assert expected_best_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 2) == pytest.approx((2 + 3 + 3) / 3)
    assert expected_best_of([0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], 2) == pytest.approx(
        1 - 1 / 6
    )  # pass@2 with 2 of 4 right
    assert expected_best_of([5.0, 5.0, 1.0], [10.0, 20.0, 90.0], 2) == pytest.approx(15.0)


def test_17_expected_best_of_is_exact_for_very_many_samples():
    size = 200_000
    ranks = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double() + 1
    for n in (1, 2, 64, 5_000, size - 1, size):
        assert expected_best_of(ranks, ranks, n) == pytest.approx(
            n * (size + 1) / (n + 1), rel=1e-11
        )  # of the largest of n numbers from 1 to N
        assert expected_best_of(ranks % 3, torch.ones(size), n) == pytest.approx(1, abs=1e-11)


def test_17_the_expectation_of_expected_best_of_is_the_reward_of_the_best_of_n():
    rng = np.random.default_rng(0)
    p, gold = rng.dirichlet(np.ones(7)), rng.normal(size=(1, 7))
    score = np.round(gold)
    assert len(set(score[0])) < 7  # some responses share a score
    for n in (1, 2, 3):
        mean = sum(
            math.prod(p[list(drawn)])
            * expected_best_of(score[0, list(drawn)], gold[0, list(drawn)], n)
            for drawn in itertools.product(range(7), repeat=4)
        )
        best = exact.best_of_n(np.log(p)[None], score, n)
        assert mean == pytest.approx(exact.expected(best, gold), abs=EXACT)


@pytest.mark.parametrize(
    ("scores", "values", "n", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], 3, "n must be from 1 to the 2 samples"),
        ([1.0, 2.0], [1.0, 2.0], 0, "n must be from 1"),
        ([], [], 1, "n must be from 1 to the 0"),
        ([1.0, 2.0], [1.0], 1, "equal shapes"),
        ([[1.0, 2.0]], [[1.0, 2.0]], 1, "one score a sample"),
        ([1.0, math.nan], [1.0, 2.0], 1, "must be finite"),
        ([1.0, 2.0], [1.0, math.inf], 1, "must be finite"),
    ],
)
def test_17_expected_best_of_refuses_what_has_no_answer(scores, values, n, message):
    with pytest.raises(ValueError, match=message):
        expected_best_of(scores, values, n)


def test_17_the_bound_of_a_single_sample_is_zero_and_of_none_there_is_none():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5, abs=1e-15)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        kl_bound(0)


def test_17_scores_that_carry_a_gradient_are_numbers_like_others():
    scores = torch.tensor([0.3, 2.0, 1.0], requires_grad=True)
    plain = expected_best_of([0.3, 2.0, 1.0], [1.0, 0.0, 3.0], 2)
    assert expected_best_of(scores, torch.tensor([1.0, 0.0, 3.0]), 2) == plain
