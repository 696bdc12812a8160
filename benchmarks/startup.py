"""Seconds to import the package and to print the help, beside a bare interpreter: medians of runs
in turn.

python benchmarks/startup.py [--runs 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python, nothing imported": ["-c", "pass"],
    "import fiducial": ["-c", "import fiducial"],
    "fiducial --help": ["-m", "fiducial", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(
            f"{name}: {statistics.median(values):.3f} s (median of {runs}, {min(values):.3f} to "
            f"{max(values):.3f})"
        )


if __name__ == "__main__":
    main()
