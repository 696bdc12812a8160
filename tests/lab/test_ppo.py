"""`fiducial ppo`, as shipped, on the mild world: how much of the way to the optimum it leaves; and
what a wrong setting costs is seen.
"""

from pathlib import Path

import numpy as np
import pytest

from fiducial.lab.runs.measured import run
from fiducial.lab.runs.plan import Plan
from fiducial.lab.worlds import policies
from fiducial.lab.worlds.files import write_world

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The files of the mild world of each seed, as a user of the commands has them."""
    out = {}
    for seed in SEEDS:
        world, model = policies.mild(seed)
        out[seed] = write_world(world, model, tmp_path_factory.mktemp(f"mild-{seed}"), copies=1)
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("policy", "rate", "steps"), [("table", 0.05, 150), ("transformer", 2e-3, 75)]
)
def test_it_closes_all_but_a_twentieth_of_the_gap(folders, tmp_path, policy, rate, steps, seed):
    found = run(
        Plan("ppo", policy, rate, steps, seed=seed, points=2), folders[seed], tmp_path / "run"
    )
    assert found.result.samples == steps * 256
    assert found.result.relative_gap < 0.05
    assert found.result.total_variation < 0.05
    assert found.result.kl == pytest.approx(1.25, abs=0.1)


def test_another_beta_has_another_optimum_and_it_is_found(folders, tmp_path):
    for beta, kl in ((0.25, 1.6), (2.0, 0.3)):
        found = run(
            Plan("ppo", "table", 0.05, 100, beta=beta, points=0),
            folders[0],
            tmp_path / f"run-{beta}",
        )
        assert found.result.relative_gap < 0.05
        assert found.result.kl > kl if beta < 0.5 else found.result.kl < kl


def test_too_large_a_learning_rate_is_seen_as_a_gap(folders, tmp_path):
    found = run(Plan("ppo", "table", 5.0, 30, points=0), folders[0], tmp_path / "run")
    assert found.result.relative_gap > 0.2


def test_behind_a_proxy_it_earns_the_proxy_and_loses_the_truth(tmp_path):
    world, model = policies.exploit(0)
    folder = write_world(world, model, tmp_path / "world", copies=1)
    found = run(
        Plan("ppo", "table", 0.05, 100, reward="proxy", points=10), folder, tmp_path / "run"
    )
    golds = [p.gold for p in found.result.path]
    assert found.result.reward > found.result.path[0].reward + 1
    assert golds[-1] < max(golds) and golds[-1] < golds[0]
    assert found.result.relative_gap < 0.05  # of the proxy's own optimum
    assert np.all(np.diff([p.samples for p in found.result.path]) == 10 * 256)
