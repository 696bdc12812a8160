"""Confidence intervals, against published values and textbook formulas."""

import math

import numpy as np
import pytest

from fiducial.core import intervals

INF = math.inf


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


def test_a_ratio_is_of_the_totals_with_the_interval_of_the_delta_method():
    # 6 nats over 4 tokens; residuals 2 - 1.5, 1 - 1.5, 3 - 3 and their squares 1/4, 1/4, 0:
    # half = z sqrt(3/2 * 1/2) / 4
    found = intervals.ratio([2.0, 1.0, 3.0], [1, 1, 2])
    half = 1.959963984540054 * math.sqrt(0.75) / 4
    assert (found["value"], found["n"]) == (1.5, 3)
    assert (found["low"], found["high"]) == pytest.approx((1.5 - half, 1.5 + half), rel=1e-12)
    # the first two of one prompt: their residuals cancel, and the third has none
    paired = intervals.ratio([2.0, 1.0, 3.0], [1, 1, 2], ["a", "a", "b"])
    assert (paired["low"], paired["value"], paired["high"]) == (1.5, 1.5, 1.5)
    for nothing in (intervals.ratio([], []), intervals.ratio([0.0], [0])):
        assert all(math.isnan(nothing[name]) for name in ("value", "low", "high"))
