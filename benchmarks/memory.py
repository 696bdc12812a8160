"""The memory plan against the memory that runs need.

For each of five methods, with all weights and with adapters, on three sizes of model: the plan that
is made before anything is loaded, and the peak of a real run of two optimizer steps in a process of
its own. All rows of a run have one length, so that the worst batch is every batch.

    python benchmarks/memory.py STORIES260K SMOLLM2 [--only large] [--methods sft]

STORIES260K and SMOLLM2 are model folders; the one between them is made here, with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("sft", "reward", "dpo", "ppo", "grpo")
TOKENS = {"small": 2048, "middle": 2048, "large": 256}
MARK = "plan: "


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("small")
    parser.add_argument("large")
    parser.add_argument("--only", nargs="*", default=["small", "middle", "large"])
    parser.add_argument("--methods", nargs="*", default=METHODS)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    rows(folder)
    middle(folder / "middle", asked.small)
    models = {"small": asked.small, "middle": str(folder / "middle"), "large": asked.large}
    print("| model | method | trained | planned, MiB | measured, MiB | planned / measured |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for size in asked.only:
        for method in asked.methods:
            for rank in (0, 8):
                planned, measured = run(method, size, models[size], rank, folder)
                ratios.append(planned / measured)
                what = f"adapters, r {rank}" if rank else "all weights"
                print(
                    f"| {size} | {method} | {what} | {planned / 2**20:,.0f} | "
                    f"{measured / 2**20:,.0f} | {ratios[-1]:.3f} |",
                    flush=True,
                )
    print(f"smallest and largest ratio: {min(ratios):.3f}, {max(ratios):.3f}")


def run(method: str, size: str, model: str, rank: int, folder: Path) -> tuple[int, int]:
    """Bytes: what is planned, and the largest resident size of the process that trains."""
    data = {"sft": "sft", "reward": "pairs", "dpo": "pairs"}.get(method, "prompts")
    out = folder / f"{size}-{method}-{rank}"
    words = f"--model {model} --data {folder / data}.jsonl --out {out} --batch-size 4 --steps 2"
    words += f" --run.tokens {TOKENS[size]} --lora.r {rank} --run.checkpoint-every 0"
    words += " --rows.chat-template chatml --rows.held-out 0 --run.samples 0"
    # a limit that is near lets a process give back what it has freed
    words += " --run.memory-gb 0.01"
    if method in ("ppo", "grpo"):
        words += f" --reward {__file__}:spread --max-new-tokens 32 --epochs 1"
        words += " --group-size 2" if method == "grpo" else ""
    environment = os.environ | {
        "FIDUCIAL_CACHE": str(folder / "cache"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    asked = [sys.executable, __file__, "--run", method, *words.split()]
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        process = subprocess.Popen(asked, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(f"failed: {' '.join(asked)}\n{text}")
    planned = next(line for line in text.splitlines() if line.startswith(MARK))
    return int(planned.removeprefix(MARK)), usage.ru_maxrss * 1024


def child(arguments: list[str]) -> None:
    """Run a method, and print what its plan was before anything was loaded."""
    from fiducial.cli import main as command
    from fiducial.methods import memory

    def settled(needs: Any) -> Any:
        plan = needs.plan()
        print("\n".join(plan.lines()))
        print(f"{MARK}{plan.peak}", flush=True)
        memory.machine.return_freed_memory()
        return needs

    memory.Needs.settled = settled  # type: ignore[method-assign]
    sys.exit(command(arguments))


def spread(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs no memory."""
    return [float(len(text) % 7) for text in completions]


def rows(folder: Path) -> None:
    """Files whose rows have nearly one length."""
    draw = random.Random(0)
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog", "in", "the", "sun")

    def text(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(count))

    def write(name: str, every: list[dict[str, str]]) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in every)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    numbers = range(48)
    write("sft", [{"prompt": f"{i} {text(40)}", "completion": f" {text(80)}"} for i in numbers])
    write(
        "pairs",
        [
            {"prompt": f"{i} {text(40)}", "chosen": f" {text(80)}", "rejected": f" {text(80)}"}
            for i in numbers
        ],
    )
    write("prompts", [{"prompt": f"{i} {text(40)}"} for i in numbers])


def middle(folder: Path, tokenizer: str) -> None:
    """A Llama of 25 million parameters with random weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    names = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=names.bos_token_id,
        eos_token_id=names.eos_token_id,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    names.save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        child(sys.argv[2:])
    else:
        main()
