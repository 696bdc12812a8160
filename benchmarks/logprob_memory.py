"""Peak memory of the log-probability step on a vocabulary of 128k: in chunks as the package does
it, against holding the logits. Forward and backward.

    python benchmarks/logprob_memory.py [--tokens 4096] [--vocabulary 131072] [--hidden 64]

Each side runs in a process of its own; what stood before the step (Python, torch, weights, hidden
states and the space of their gradients) is taken off.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SIDE = """
import sys, torch
from fiducial.core.logprobs import chosen_logprobs
side, n, v, h = sys.argv[1], *map(int, sys.argv[2:5])
torch.manual_seed(0)
hidden = torch.randn(n, h, requires_grad=True)
head = torch.nn.Linear(h, v, bias=False)
labels = torch.randint(0, v, (n,))
(head(hidden[:8]).sum() * 0).backward()

def status(key):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(key)).split()[1]) / 1024

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
if side == "chunks":
    value = chosen_logprobs(hidden, labels, head, v)[0].sum()
else:
    value = head(hidden).log_softmax(-1).gather(-1, labels[:, None]).sum()
value.backward()
print(f"RESULT {status('VmHWM') - before} {float(value.detach())}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=64)
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this needs Linux, where a process can reset its own peak memory")
    sizes = [str(x) for x in (arguments.tokens, arguments.vocabulary, arguments.hidden)]
    peak = {}
    for side in ("chunks", "logits"):
        out = subprocess.run(
            [sys.executable, "-c", SIDE, side, *sizes], capture_output=True, text=True, check=True
        ).stdout.split()
        peak[side] = float(out[1])
        print(
            f"{side}: {peak[side]:,.0f} MiB above the start, sum of log-probabilities "
            f"{float(out[2]):.6g}",
            flush=True,
        )
    print(f"chunks take {peak['chunks'] / peak['logits']:.3f} of holding the logits")


if __name__ == "__main__":
    main()
