"""Seconds, processor seconds and memory until a run's first step, with a million rows of SFT or
100,000 pairs of DPO.

    python benchmarks/million_rows.py --model MODEL [--method dpo] [--rows 1000000] [--form chat]

MODEL is a small model with a real tokenizer. The rows are of words drawn at random, about 60
characters each. A checkpoint at every step would be the first to be measured, so the run is stopped
at its first line of metrics. The memory is that of all processes together, measured every tenth of
a second: resident memory, and the part of it that is not shared with other processes (pss).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the a little girl boy dog cat was happy sad went to park play ball and they saw big tree"


def write_rows(path: Path, form: str, count: int) -> None:
    """A file of rows in one of the forms."""
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(draw.choices(WORDS.split(), k=n))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, answer = words(6), words(7)
            row = {
                "completion": lambda a=asked, b=answer: {"prompt": a, "completion": f" {b}."},
                "text": lambda a=asked, b=answer: {"text": f"{a} {b}."},
                "chat": lambda a=asked, b=answer: {
                    "messages": [
                        {"role": "user", "content": a},
                        {"role": "assistant", "content": b},
                    ]
                },
                "pairs": lambda a=asked, b=answer: {
                    "prompt": a,
                    "chosen": f" {b}",
                    "rejected": f" {words(6)}",
                },
            }[form]()
            file.write(json.dumps(row) + "\n")


def memory(first: int) -> tuple[int, int]:
    """Bytes of resident memory, and of pss, of a process and its children."""
    resident = shared = 0
    for pid in [first, *children(first)]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
        resident += int(values.get("Rss", 0)) * 1024
        shared += int(values.get("Pss", 0)) * 1024
    return resident, shared


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def measure(command: list[str], run: Path) -> dict[str, float]:
    """Start a command, wait for the first line of its metrics, and end it."""
    began, peak, own = time.monotonic(), 0, 0
    process = subprocess.Popen(command)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        resident, shared = memory(process.pid)
        peak, own = max(peak, resident), max(own, shared)
        time.sleep(0.1)
    seconds = time.monotonic() - began
    if process.poll() is None:
        process.kill()
    process.wait()
    if not metrics.exists() or not metrics.stat().st_size:
        raise SystemExit("the run ended before its first step")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds to the first step": round(seconds, 1),
        "processor seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak memory of all processes, GB": round(peak / 1e9, 2),
        "peak pss of all processes, GB": round(own / 1e9, 2),
        "peak memory of the largest, GB": round(used.ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    """Write rows, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--form", choices=("completion", "text", "chat"), default="completion")
    parser.add_argument("flags", nargs="*", help="further flags of the method, after --")
    options = parser.parse_args()
    rows = options.rows or (1_000_000 if options.method == "sft" else 100_000)
    form = "pairs" if options.method == "dpo" else options.form
    template = ["--rows.chat-template", "chatml"] if form == "chat" else []
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "rows.jsonl", Path(folder) / "run"
        write_rows(data, form, rows)
        command = [sys.executable, "-m", "fiducial", options.method, "--model", options.model]
        command += ["--data", str(data), "--out", str(run), *template, *options.flags]
        found = measure(command, run)
        megabytes = data.stat().st_size / 1e6
    print(f"{options.method}, {rows:,} rows ({form}, {megabytes:.0f} MB), {os.cpu_count()} cores")
    for name, value in found.items():
        print(f"  {name}: {value:g}")


if __name__ == "__main__":
    main()
