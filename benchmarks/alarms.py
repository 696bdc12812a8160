"""The alarms of the demo's stages, for several seeds: which are raised, and at which step.

    python benchmarks/alarms.py [--seeds 0 1 2] [--keep FOLDER]
    python benchmarks/alarms.py demo-run demo-run-2

Without folders, it trains every stage of the demo but its comparison: five to eight minutes per
seed on two cores. The healthy stages must raise none. Two are not healthy by design: PPO without
the KL penalty, and PPO at three times the learning rate, whose updates are too large.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import yaml

from fiducial.demo.pipeline import STAGES, Stages, train
from fiducial.demo.settings import Demo
from fiducial.demo.world import StoryWorld
from fiducial.report.alarms import alarms

DESERVED = {"ppo_no_kl", "ppo_fast"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    false = 0
    if options.folders:
        for folder in options.folders:
            false += judge(folder)
    else:
        with tempfile.TemporaryDirectory() as aside:
            for seed in options.seeds:
                folder = (options.keep or Path(aside)) / f"seed-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                train(folder, StoryWorld(seed), Demo(seed=seed), Stages())
                false += judge(folder)
    print(f"\nalarms of healthy stages: {false}")
    sys.exit(false > 0)


def judge(folder: Path) -> int:
    """Prints the alarms of every stage; returns the number of those of healthy ones."""
    print(f"\n{folder}")
    false = 0
    for stage in STAGES:
        path = folder / stage / "metrics.jsonl"
        if not path.is_file():
            continue
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        config = yaml.safe_load((folder / stage / "config.yaml").read_text(encoding="utf-8"))
        found = alarms(rows, config)
        said = ", ".join(f"{a.name} ({a.step or 'at the end'})" for a in found)
        print(f"  {stage:12} {len(rows):4} records  {said or 'none'}")
        false += 0 if stage in DESERVED else len(found)
    return false


if __name__ == "__main__":
    main()
