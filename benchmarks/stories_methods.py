"""PPO, RLOO and GRPO on stories260K with the word-count reward, from the command line: reward and
KL after equally many sampled responses.

    python benchmarks/stories_methods.py [--bench ../shared/bench] [--model
    ../shared/models/stories260K] [--steps 60] [--only rloo grpo]

60 iterations of 64 responses of up to 64 tokens to 8 prompts (DAPO samples more, in place of groups
without spread), beta 0.05 but for GRPO's own loss, whose beta is another; then `fiducial eval`: 256
fresh responses, 32 a prompt, KL to the model it started from; 95% intervals, clustered by prompt.
The question: 2.3 of 3 at 35 nats or less?
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMON = (
    "--stop",
    "<s>",
    "--batch-size",
    "64",
    "--max-new-tokens",
    "64",
    "--optimizer.schedule",
    "constant",
    "--run.checkpoint-every",
    "0",
)
RUNS = {
    "ppo": ("ppo", "--beta", "0.05", "--learning-rate", "3e-4", "--critic.start", "shared"),
    "rloo": (
        "reinforce",
        "--baseline",
        "rloo",
        "--group-size",
        "8",
        "--beta",
        "0.05",
        "--learning-rate",
        "1e-3",
    ),
    "reinforce++": (
        "reinforce",
        "--baseline",
        "reinforce++",
        "--beta",
        "0.05",
        "--learning-rate",
        "1e-3",
    ),
    "grpo, the paper's beta": (
        "grpo",
        "--variant",
        "grpo",
        "--beta",
        "0.04",
        "--epochs",
        "4",
        "--learning-rate",
        "3e-4",
    ),
    "grpo": (
        "grpo",
        "--variant",
        "grpo",
        "--beta",
        "0.15",
        "--epochs",
        "4",
        "--learning-rate",
        "3e-4",
    ),
    "grpo, k1 in the reward": (
        "grpo",
        "--variant",
        "dr_grpo",
        "--beta",
        "0.05",
        "--epochs",
        "4",
        "--learning-rate",
        "3e-4",
    ),
    "dapo": (
        "grpo",
        "--variant",
        "dapo",
        "--beta",
        "0.05",
        "--epochs",
        "4",
        "--learning-rate",
        "3e-4",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--bench", type=Path, default=shared / "bench")
    parser.add_argument("--model", type=Path, default=shared / "models" / "stories260K")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument(
        "--extra",
        nargs="*",
        default=[],
        help="further flags of the verb, without their dashes: learning-rate=1e-3",
    )
    arguments = parser.parse_args()
    page = arguments.bench / "one_page_ppo.py"
    for needed in (page, arguments.model):
        if not needed.exists():
            raise SystemExit(f"there is no {needed}: give its place with --bench or --model")
    environment = {**os.environ, "PYTHONPATH": str(arguments.bench)}
    told = [sys.executable, "-c", "import json, one_page_ppo as o; print(json.dumps(o.PROMPTS))"]
    prompts = json.loads(
        subprocess.run(told, capture_output=True, text=True, check=True, env=environment).stdout
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "prompts.jsonl"
        rows.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        print(
            f"{'':<24} reward                 KL, nats per response   responses sampled   training"
        )
        for name in arguments.only:
            out = Path(folder) / name.replace(" ", "-")
            verb, *flags = RUNS[name]
            extra = [
                part
                for item in arguments.extra
                for part in (f"--{item.partition('=')[0]}", item.partition("=")[2])
            ]
            start = time.perf_counter()
            fiducial(
                verb,
                "--model",
                arguments.model,
                "--data",
                rows,
                "--reward",
                f"{page}:reward",
                "--out",
                out,
                "--steps",
                arguments.steps,
                "--seed",
                arguments.seed,
                *COMMON,
                *flags,
                *extra,
            )
            seconds = time.perf_counter() - start
            fiducial(
                "eval",
                "--model",
                out / "model",
                "--reference",
                arguments.model,
                "--prompts",
                rows,
                "--judge",
                f"{page}:reward",
                "--samples",
                32,
                "--stop",
                "<s>",
                "--max-new-tokens",
                64,
                "--seed",
                1000,
                "--out",
                out / "eval.json",
            )
            found = json.loads((out / "eval.json").read_text())
            numbers = "   ".join(
                f"{found[k]['value']:5.2f} [{found[k]['low']:5.2f}, {found[k]['high']:5.2f}]"
                for k in ("score", "kl")
            )
            sampled = json.loads((out / "summary.json").read_text())["rows"]
            print(f"{name:<24} {numbers}   {sampled:>17,}   {seconds:6.0f} s", flush=True)


def fiducial(*words: object) -> None:
    """Run the command; its last words are shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "fiducial", *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


if __name__ == "__main__":
    main()
