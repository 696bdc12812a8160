"""DPO on one and the same case, this project and TRL in turn: rows a second, and the ratio pair by pair.

    python benchmarks/dpo_trl.py --trl-python ENV/bin/python [--bench ../shared/bench] [--pairs 3]

ENV is an environment of its own with `pip install torch==2.13.0 trl==1.16.*`. The case (a random 5.7 M Llama, 256 pairs of varied length) is made by
make_case.py, TRL's side is trl_case.py, both in --bench. One epoch, batch 16, float32, on both sides. Ours counts the reference's pass over all pairs too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import sys, time
from fiducial.config import OptimizerSettings, RowSettings, RunSettings
from fiducial.methods import dpo as page
case, out, rows = sys.argv[1:4]
spent = []
def timed(f, *a):
    t = time.perf_counter()
    value = f(*a)
    spent.append(time.perf_counter() - t)
    return value
inner = page.reference_logprobs
page.reference_logprobs = lambda *a: timed(inner, *a)
run = page.dpo(page.DPO(
    model=f"{case}/model", data=f"{case}/pairs.jsonl", out=out, batch_size=16, learning_rate=1e-4, rows=RowSettings(held_out=0.0, max_length=512),
    optimizer=OptimizerSettings(warmup_steps=0, schedule="linear"), run=RunSettings(samples=0, checkpoint_every=0),
))
seconds = run.train_seconds + spent[0]
print(f"RESULT fiducial dpo: {int(rows) / seconds:.2f} rows/s, {seconds:.1f} s ({spent[0]:.1f} s of it the reference)")
"""


def result(command: list[str], **environment: str) -> tuple[float, str]:
    """Rows a second out of a RESULT line."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return float(lines[0].split(":")[1].split()[0]), lines[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--bench", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "bench")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()
    if not (arguments.bench / "trl_case.py").is_file():
        raise SystemExit(f"there is no trl_case.py in {arguments.bench}: give its folder with --bench")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        case = f"{folder}/case"
        subprocess.run([sys.executable, str(arguments.bench / "make_case.py"), case, "--rows", str(arguments.rows)], check=True)
        for i in range(arguments.pairs):
            cache = {"FIDUCIAL_CACHE": f"{folder}/cache{i}"}  # a fresh one, so that the reference is computed
            ours, line = result([sys.executable, "-c", OURS, case, f"{folder}/run{i}", str(arguments.rows)], **cache)
            theirs, other = result([arguments.trl_python, str(arguments.bench / "trl_case.py"), case, "dpo"])
            ratios.append(ours / theirs)
            print(f"{line}\n{other}\nratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} (of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
