"""What a small last batch costs: DPO on the mild world with even batches, as shipped, beside
batches of which the last of an epoch is what is left over.

    python benchmarks/even_batches.py [--seeds 3] [--steps 1600]

10,500 comparisons in batches of 256 leave 4 for the last batch of an epoch, which moves the weights
as far as a whole one. Printed: the total variation to the exact optimum at the end of both runs of
each seed, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from fiducial.data.batches import Batches
from fiducial.lab.runs.measured import run
from fiducial.lab.runs.plan import Plan
from fiducial.lab.worlds import policies
from fiducial.lab.worlds.files import write_world


def ragged(self: Batches, step: int) -> list[int]:
    """Whole batches and what is left over."""
    epoch, place = divmod(step, self.per_epoch)
    order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
    return [int(i) for i in order[place * self.size : (place + 1) * self.size]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1600)
    options = parser.parse_args()
    os.environ.setdefault("FIDUCIAL_CACHE", tempfile.mkdtemp())
    torch.set_num_threads(1)
    ratios = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            world, model = policies.mild(seed)
            files = write_world(world, model, Path(folder) / "world", copies=50)
            plan = Plan("dpo", "table", 0.05, options.steps, seed=seed, points=0)
            even = run(plan, files, Path(folder) / "even").result.total_variation
            with mock.patch.object(Batches, "__getitem__", ragged):
                left = run(plan, files, Path(folder) / "ragged").result.total_variation
        ratios.append(left / even)
        print(
            f"seed {seed}: even {even:.4f}, with a small last batch {left:.4f}, ratio "
            f"{ratios[-1]:.1f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
