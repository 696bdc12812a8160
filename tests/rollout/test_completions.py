"""Repetition against a count by hand and a slow reference, prompts and given tokens left out."""

import pytest
import torch

from fiducial.rollout.completions import completion_metrics, repetition
from fiducial.rollout.trajectory import Segment, Trajectory


def slowly(ids: torch.Tensor, mask: torch.Tensor) -> float:
    shares = []
    for row, chosen in zip(ids.tolist(), mask.tolist(), strict=True):
        grams = [tuple(row[t : t + 4]) for t in range(len(row) - 3) if all(chosen[t : t + 4])]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def test_it_is_the_share_of_four_tokens_in_a_row_that_stood_in_the_response_before() -> None:
    once, again = [1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7]  # three sequences each; two repeated
    both = torch.tensor([once, again])
    assert repetition(both, torch.ones_like(both) > 0) == pytest.approx((0 + 2 / 3) / 2)
    assert repetition(both[:, :3], both[:, :3] > 0) == 0.0  # nothing that long
    assert repetition(both, both < 0) == 0.0


def test_it_equals_the_slow_reference_whatever_the_vocabulary() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 3, (6, 30), generator=generator) * (1 + 80_000 * (seed % 2))
        mask = torch.rand(6, 30, generator=generator) < 0.9
        assert repetition(ids, mask) == pytest.approx(slowly(ids, mask))


def test_the_prompt_and_what_a_tool_said_do_not_count() -> None:
    said = [1, 2, 3, 4]
    rows = [[Segment(said * 3), Segment(said, [0.0] * 4), Segment(said), Segment(said, [0.0] * 4)]]
    found = completion_metrics(Trajectory.from_segments(rows, [True], [0], [0], 1.0))
    assert found == {
        "completions/mean_length": 8.0,
        "completions/finished": 1.0,
        "completions/repetition": 0.5,
    }
