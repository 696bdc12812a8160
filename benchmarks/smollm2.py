"""A real chat model through the whole pipeline from the command line: SmolLM2-135M-Instruct, with
adapters, on sums and on GSM8K.

    python benchmarks/smollm2.py MODEL_FOLDER GSM8K_FOLDER

GSM8K_FOLDER holds sft.jsonl and pairs.jsonl with plain prompts; they are written as chat messages
here, as a user of a chat model would have them. Prints a table of command, seconds, peak memory and
a metric before and after, and a few samples; each saved model is loaded in plain transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REWARD = "reward"
LORA = "--lora.r 8 --run.samples 2 --run.tokens 2048"
SHORT = "--rows.max-length 256 --rows.on-error skip"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()))
    arguments = parser.parse_args()
    model, out = arguments.model, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.gsm8k, out)
    learned = "--steps 8 --batch-size 8 --learning-rate 2e-4 --run.eval-every 1 " + SHORT
    sampled = "--learning-rate 1e-4 --max-new-tokens 16 --reward numeric_answer"
    runs = (
        ("sft", f"--data {out}/answers.jsonl {learned} --max-new-tokens 32", "eval/loss"),
        (
            "sft",
            f"--data {out}/answers.jsonl {learned} --max-new-tokens 32 --run.precision bfloat16",
            "eval/loss",
        ),
        ("reward", f"--data {out}/pairs.jsonl {learned}", "eval/accuracy"),
        ("dpo", f"--data {out}/pairs.jsonl {learned} --max-new-tokens 32", "eval/loss"),
        ("ppo", f"--data {out}/sums.jsonl --steps 6 --batch-size 16 --epochs 2 {sampled}", REWARD),
        ("grpo", f"--data {out}/sums.jsonl --steps 10 --batch-size 32 {sampled}", REWARD),
    )
    lines = []
    for number, (verb, flags, metric) in enumerate(runs):
        run = out / f"{number}-{verb}"
        command = f"fiducial {verb} --model {model} {flags} {LORA} --out {run}"
        seconds, memory = timed(command)
        values = [r[metric] for r in rows_of(run / "metrics.jsonl") if metric in r]
        lines.append((command, seconds, memory, metric, values[0], values[-1]))
        moved = f"{metric} {values[0]:.4g} -> {values[-1]:.4g}"
        print(f"{verb}: {seconds:.0f} s, {memory:.2f} GiB, {moved}")
        if verb != "reward":
            for sample in rows_of(run / "samples.jsonl")[-2:]:
                print(f"    {sample['completion'][:160]!r}")
        print(f"    in plain transformers: {loaded(run / 'model', verb)!r}", flush=True)
        policy = run / "model"
    command = (
        f"fiducial eval --model {policy} --prompts {out}/sums.jsonl "
        f"--judge numeric_answer --reference {model} --max-new-tokens 16 --out {out}/eval.json"
    )
    seconds, memory = timed(command)
    lines.append((command, seconds, memory, "", 0.0, 0.0))
    print(table(lines, model, out))


def write_rows(gsm8k: Path, out: Path) -> None:
    """Chat rows: 120 worked answers, 120 pairs, and 64 sums of two digits."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (out / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    answers, pairs = (rows_of(gsm8k / n)[:120] for n in ("sft.jsonl", "pairs.jsonl"))
    for name, rows, keys in (
        ("answers.jsonl", answers, ("completion",)),
        ("pairs.jsonl", pairs, ("chosen", "rejected")),
    ):
        chats = [
            {"prompt": said("user", r["prompt"])} | {k: said("assistant", r[k]) for k in keys}
            for r in rows
        ]
        write(name, chats)
    numbers = random.Random(0)
    sums = [(numbers.randint(1, 9), numbers.randint(1, 9)) for _ in range(64)]
    asked = "What is {} + {}? Answer with the number alone."
    write(
        "sums.jsonl",
        [{"prompt": said("user", asked.format(a, b)), "answer": str(a + b)} for a, b in sums],
    )


def timed(command: str) -> tuple[float, float]:
    """Wall seconds and the largest memory in GiB of a command, which must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command.split()], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def loaded(folder: Path, verb: str) -> str:
    """What a saved model says, loaded without anything of this package."""
    script = (
        "import sys, torch; from transformers import *\n"
        "folder, verb = sys.argv[1:]\n"
        "t = AutoTokenizer.from_pretrained(folder)\n"
        "m = [{'role': 'user', 'content': 'What is 3 + 4? Answer with the number alone.'}]\n"
        "x = t.apply_chat_template(m, add_generation_prompt=True, return_tensors='pt', "
        "return_dict=True)\n"
        "if verb == 'reward':\n"
        "    r = AutoModelForSequenceClassification.from_pretrained(folder)\n"
        "    print(float(r(**x).logits))\n"
        "else:\n"
        "    p = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    y = p.generate(**x, do_sample=False, max_new_tokens=12)\n"
        "    print(t.decode(y[0, x['input_ids'].shape[1]:], skip_special_tokens=True))\n"
    )
    asked = [sys.executable, "-W", "ignore", "-c", script, str(folder), verb]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def table(lines: list[tuple[str, float, float, str, float, float]], model: Path, out: Path) -> str:
    rows = [
        "",
        "| command | seconds | peak memory, GiB | metric | first step | last step |",
        "|---|---|---|---|---|---|",
    ]
    for command, seconds, memory, metric, first, last in lines:
        short = command.replace(f"{out}/", "").replace(str(model), "SmolLM2")
        values = f"{first:.3g} | {last:.3g}" if metric else " | "
        rows.append(f"| `{short}` | {seconds:.0f} | {memory:.2f} | {metric} | {values} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
