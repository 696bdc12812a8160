"""Which rows make a step, and how a step is cut: the three numbers are independent."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiducial.data.batches import Batches, micro_batches, pad, stream
from fiducial.data.render import Rendered

costs = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=30)


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 9))
def test_every_row_comes_once_an_epoch(rows, size, seed):
    batches = Batches(rows, size, seed)
    for epoch in range(2):
        steps = [batches[epoch * batches.per_epoch + i] for i in range(batches.per_epoch)]
        assert sorted(row for step in steps for row in step) == list(range(rows))
        lengths = [len(s) for s in steps]
        assert (
            max(lengths) <= size and max(lengths) - min(lengths) <= 1
        )  # no small batch is left over
        assert len(steps) == -(-rows // size)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
def test_an_epoch_is_cut_into_as_many_parts_as_asked(rows, parts, seed):
    parts = min(rows, parts)
    batches = Batches.cut(rows, parts, seed)
    epoch = list(batches.epochs(1, 1))
    assert len(epoch) == parts == batches.per_epoch
    assert sorted(row for step in epoch for row in step) == list(range(rows))
    lengths = [len(step) for step in epoch]
    assert max(lengths) - min(lengths) <= 1 <= min(lengths)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 40), st.integers(0, 9))
def test_the_rows_of_the_first_steps_are_those_that_they_read(rows, size, steps, seed):
    batches = Batches(rows, size, seed)
    assert batches.rows(steps) == sorted({row for step in range(steps) for row in batches[step]})


def test_the_step_number_is_the_whole_cursor():
    batches, again = Batches(10, 4, 3), Batches(10, 4, 3)
    seen = [batches[i] for i in range(9)]
    assert [again[i] for i in reversed(range(9))] == seen[::-1]  # in any order, with no state
    assert seen[:3] != seen[3:6] != seen[6:9]  # a new order in each epoch
    assert Batches(10, 4, 4)[0] != seen[0]
    assert [len(batches[i]) for i in range(3)] == [3, 3, 4]


def test_the_order_is_the_same_for_any_batch_size():
    whole = Batches(10, 10, 7)[0]
    assert [row for i in range(4) for row in Batches(10, 3, 7)[i]] == whole


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_a_stream_is_one_walk_wherever_it_is_cut(rows, start, count, seed):
    walk = stream(rows, 0, start + count, seed)
    assert stream(rows, start, count, seed) == walk[start:]
    whole = stream(rows, 0, 3 * rows, seed)
    assert Counter(row for row, _ in whole) == dict.fromkeys(range(rows), 3)
    assert (
        len(set(whole)) == 3 * rows
    )  # (row, epoch) occurs once, because it keys the random stream of a response


@given(costs, st.integers(1, 200), st.integers(1, 4))
def test_micro_batches_lose_no_row_keep_the_budget_and_are_as_many_on_every_process(
    costs, tokens, processes
):
    shares = micro_batches(costs, tokens, processes)
    assert len(shares) == processes and len({len(s) for s in shares}) == 1
    assert sorted(i for share in shares for micro in share for i in micro) == list(
        range(len(costs))
    )
    for share in shares:
        for micro in share:
            padded = max((max(costs[i]) for i in micro), default=0) * sum(
                len(costs[i]) for i in micro
            )
            assert padded <= tokens or len(micro) == 1


def test_micro_batches_put_similar_lengths_together():
    [cut] = micro_batches([[2], [40], [3], [39], [2]], 80)
    assert sorted(map(sorted, cut)) == [[0, 2, 4], [1, 3]]


def test_a_large_budget_is_one_micro_batch_and_a_small_one_is_one_row_each():
    assert [sorted(m) for m in micro_batches([[5], [9], [7]], 10**6)[0]] == [[0, 1, 2]]
    assert sorted(map(tuple, micro_batches([[5], [9], [7]], 1)[0])) == [(0,), (1,), (2,)]


def test_one_row_on_two_processes_leaves_one_with_nothing():
    assert micro_batches([[5]], 100, 2) == [[[0]], [[]]]


def test_padding_is_on_the_right_and_the_mask_is_carried():
    batch = pad([Rendered([4, 5, 0], [False, True, True], ""), Rendered([6, 7], [False, True], "")])
    assert batch.ids.tolist() == [[4, 5, 0], [6, 7, 0]] and batch.lengths.tolist() == [3, 2]
    assert batch.mask.tolist() == [[False, True, True], [False, True, False]]
    assert torch.equal(pad([Rendered([1], [True], "")]).ids, torch.tensor([[1]]))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_which_rows_make_a_step_depends_on_neither_memory_nor_processes(processes):
    """The plan only cuts a step; its rows are chosen before."""
    rows = Batches(20, 7, 1)[1]
    for tokens in (1, 30, 10**6):
        shares = micro_batches([[3 + i % 5] for i in rows], tokens, processes)
        assert {rows[i] for share in shares for micro in share for i in micro} == set(rows)
