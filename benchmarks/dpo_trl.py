"""DPO on one and the same case, this project and TRL in turn: rows a second, and the ratio pair by
pair.

    python benchmarks/dpo_trl.py --trl-python ENV/bin/python [--bench ../shared/bench] [--pairs 3]

ENV is an environment of its own with `pip install torch==2.13.0 trl==1.16.*`. The case (a random
5.7 M Llama, 256 pairs of varied length) is made by make_case.py, TRL's side is trl_case.py, both in
--bench. One epoch, batch 16, float32, on both sides. Ours is given with the reference's pass over
all pairs, which TRL makes within its steps, and for the steps alone (what summary.json says; the
pass is cached on disk).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import sys, time
from fiducial.settings import OptimizerSettings, RowSettings, RunSettings
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
    model=f"{case}/model",
    data=f"{case}/pairs.jsonl",
    out=out,
    batch_size=16,
    learning_rate=1e-4,
    rows=RowSettings(held_out=0.0, max_length=512),
    optimizer=OptimizerSettings(warmup_steps=0, schedule="linear"),
    run=RunSettings(samples=0, checkpoint_every=0),
))
seconds = run.train_seconds + spent[0]
whole, alone = int(rows) / seconds, int(rows) / run.train_seconds
print(f"RESULT fiducial dpo: {whole:.2f} rows/s, {seconds:.1f} s; steps alone {alone:.2f} rows/s")
"""


def result(command: list[str], **environment: str) -> tuple[list[float], str]:
    """Rows a second (ours: all in all, and of the steps alone) out of a RESULT line."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return [float(x) for x in re.findall(r"([0-9.]+) rows/s", lines[0])], lines[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", required=True)
    parser.add_argument(
        "--bench", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "bench"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()
    if not (arguments.bench / "trl_case.py").is_file():
        raise SystemExit(
            f"there is no trl_case.py in {arguments.bench}: give its folder with --bench"
        )
    ratios: dict[str, list[float]] = {"with the reference's pass": [], "steps alone": []}
    with tempfile.TemporaryDirectory() as folder:
        case = f"{folder}/case"
        subprocess.run(
            [
                sys.executable,
                str(arguments.bench / "make_case.py"),
                case,
                "--rows",
                str(arguments.rows),
            ],
            check=True,
        )
        for i in range(arguments.pairs):
            cache = {
                "FIDUCIAL_CACHE": f"{folder}/cache{i}"
            }  # a fresh one, so that the reference is computed
            ours, line = result(
                [sys.executable, "-c", OURS, case, f"{folder}/run{i}", str(arguments.rows)], **cache
            )
            (theirs,), other = result(
                [arguments.trl_python, str(arguments.bench / "trl_case.py"), case, "dpo"]
            )
            for (_, values), rows in zip(ratios.items(), ours, strict=True):
                values.append(rows / theirs)
            print(f"{line}\n{other}", flush=True)
    for name, values in ratios.items():
        print(
            f"{name}: median ratio {statistics.median(values):.2f} (of {len(values)} pairs, "
            f"{min(values):.2f} to {max(values):.2f})"
        )


if __name__ == "__main__":
    main()
