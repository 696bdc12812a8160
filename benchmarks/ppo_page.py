"""PPO on stories260K, this project and a one-page PPO in turn, at the same settings: seconds an
iteration, and the ratio pair by pair.

    python benchmarks/ppo_page.py [--bench ../shared/bench] [--pairs 3] [--iterations 12] [--critic
    shared]

64 responses of 64 tokens, 4 epochs of one batch, AdamW 3e-4, beta 0.05, a value head on the
policy's trunk. Loading is not counted on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import sys
from fiducial.settings import OptimizerSettings, RunSettings
from fiducial.methods.ppo import PPO, ppo
from fiducial.methods.settings.ppo import CriticSettings
model, prompts, reward, out, steps, critic = sys.argv[1:7]
run = ppo(PPO(
    model=model,
    data=prompts,
    reward=(reward,),
    out=out,
    steps=int(steps),
    learning_rate=3e-4,
    beta=0.05,
    stop=("<s>",),
    critic=CriticSettings(start=critic, clip=None),
    optimizer=OptimizerSettings(schedule="constant"),
    run=RunSettings(samples=0, checkpoint_every=0),
))
print(f"RESULT {run.train_seconds} {run.metrics['reward']} {run.metrics['objective/kl']}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--bench", type=Path, default=shared / "bench")
    parser.add_argument("--model", type=Path, default=shared / "models" / "stories260K")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--critic", default="shared", choices=["shared", "policy"])
    arguments = parser.parse_args()
    page = arguments.bench / "one_page_ppo.py"
    if not page.is_file():
        raise SystemExit(
            f"there is no one_page_ppo.py in {arguments.bench}: give its folder with --bench"
        )
    environment = {**os.environ, "PYTHONPATH": str(arguments.bench)}
    prompts = subprocess.run(
        [sys.executable, "-c", "import json, one_page_ppo as o; print(json.dumps(o.PROMPTS))"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    n, ratios = arguments.iterations, []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "prompts.jsonl"
        rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in json.loads(prompts)))
        for i in range(arguments.pairs):
            command = [
                sys.executable,
                "-c",
                OURS,
                arguments.model,
                rows,
                f"{page}:reward",
                f"{folder}/run{i}",
                n,
                arguments.critic,
            ]
            done = subprocess.run(
                [str(c) for c in command], capture_output=True, text=True, env=environment
            )
            found = re.search(r"RESULT (\S+) (\S+) (\S+)", done.stdout)
            if not found:
                raise SystemExit(done.stderr[-2000:])
            ours, reward, kl = (float(x) for x in found.groups())
            other = subprocess.run(
                [sys.executable, str(page), "--iterations", str(n)],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            ).stdout
            last = re.findall(r"iteration (\d+): reward (\S+) kl (\S+) nats, (\S+) s", other)[-1]
            theirs = float(last[3])
            ratios.append(theirs / ours)
            print(
                f"fiducial {ours / n:.3f} s an iteration (reward {reward:.2f}, {kl:.1f} nats)   "
                f"one page {theirs / n:.3f} s (reward {last[1]}, {last[2]} nats)"
                f"   one page / fiducial {ratios[-1]:.2f}",
                flush=True,
            )
    print(
        f"median: the one page takes {statistics.median(ratios):.2f} times as long (of "
        f"{len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
