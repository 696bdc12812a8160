"""`fiducial dpo`, as shipped, with a transformer on every comparison of the mild world.

It is the longest test, so it has a file, and with it a worker, of its own.
"""

import pytest

from fiducial.lab.runs.measured import run
from fiducial.lab.runs.plan import Plan
from fiducial.lab.worlds import policies
from fiducial.lab.worlds.files import write_world


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_transformer_ends_within_a_twentieth_of_the_optimum(tmp_path, seed):
    world, model = policies.mild(seed)
    folder = write_world(world, model, tmp_path / "world", copies=25)
    plan = Plan("dpo", "transformer", 1e-3, 1200, seed=seed, points=2)
    found = run(plan, folder, tmp_path / "run")
    assert found.result.path[0].total_variation > 0.4
    assert found.result.total_variation < 0.05
