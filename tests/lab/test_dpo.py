"""`fiducial dpo`, as shipped, on every comparison of the mild world in proportion to its
probability: from the reference it ends at the optimum.
"""

from pathlib import Path

import numpy as np
import pytest

from fiducial.lab.runs.measured import run
from fiducial.lab.runs.plan import Plan
from fiducial.lab.worlds import exact, policies
from fiducial.lab.worlds.files import write_world
from fiducial.lab.worlds.world import World, bradley_terry, intransitive

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The files of the mild world of each seed, as a user of the commands has them."""
    out = {}
    for seed in SEEDS:
        world, model = policies.mild(seed)
        out[seed] = write_world(world, model, tmp_path_factory.mktemp(f"mild-{seed}"))
    return out


@pytest.fixture(scope="module")
def short_epochs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same with a quarter of the rows: an epoch is shorter, so the noise of its batches
    averages out in fewer steps.
    """
    out = {}
    for seed in SEEDS:
        world, model = policies.mild(seed)
        out[seed] = write_world(world, model, tmp_path_factory.mktemp(f"few-{seed}"), copies=25)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_table_ends_within_a_hundredth_of_the_optimum(short_epochs, tmp_path, seed):
    found = run(
        Plan("dpo", "table", 0.1, 600, seed=seed, points=4), short_epochs[seed], tmp_path / "run"
    )
    assert found.result.path[0].total_variation > 0.4  # it started far away
    assert found.result.total_variation < 0.01
    assert found.result.relative_gap < 0.001


def test_labels_that_no_reward_explains_lead_elsewhere(tmp_path):
    world, model = policies.mild(0)
    folder = write_world(
        world, model, tmp_path / "world", preference=intransitive(world.reward, seed=0, twist=2.0)
    )
    found = run(Plan("dpo", "table", 0.05, 600, points=0), folder, tmp_path / "run")
    assert found.result.total_variation > 0.05


def test_the_comparisons_are_those_of_the_annotators_in_both_orders(folders):
    import json

    world = World.load(folders[0] / "world.npz")
    rows = [json.loads(line) for line in (folders[0] / "pairs.jsonl").read_text().splitlines()]
    preference = bradley_terry(world.reward)
    number = {world.response_text(y): y for y in range(len(world.responses))}
    wins = np.zeros_like(preference)
    for row in rows:
        wins["ab".index(row["prompt"]), number[row["chosen"]], number[row["rejected"]]] += 1
    both = wins + wins.swapaxes(1, 2)
    assert set(both[both > 0]) == {100.0} and (both > 0).sum() == 2 * 15 * 14
    wrong = np.where(both > 0, wins - 100 * preference, 0.0)
    assert np.abs(wrong).max() < 1.5  # rounded
    assert (
        np.abs(wrong.sum(-1))[:, 1:].max() <= 0.5 + 1e-9
    )  # but not in a response's wins over all the others


def test_the_path_begins_at_the_reference_and_holds_what_was_saved_on_the_way(folders, tmp_path):
    found = run(Plan("dpo", "table", 0.05, 40, points=4), folders[0], tmp_path / "run")
    world = World.load(folders[0] / "world.npz")
    assert [p.step for p in found.result.path] == [0, 10, 20, 30, 40]
    assert found.result.path[0].relative_gap == pytest.approx(1.0, abs=1e-12) and found.result.path[
        0
    ].kl == pytest.approx(0.0, abs=1e-12)
    gaps = [p.relative_gap for p in found.result.path]
    assert gaps == sorted(gaps, reverse=True) and found.result.relative_gap == gaps[-1]
    assert found.result.pairs == 40 * 256 and found.result.samples == 0
    saved = policies.logits(policies.load(tmp_path / "run" / "model"), world.prompts, world.tree)
    np.testing.assert_allclose(exact.logprobs(world.tree, saved), np.array(found.final), atol=1e-6)
