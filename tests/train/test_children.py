"""Processes that end with their parent, whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fiducial.train import children

POOL = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from fiducial.train import children

if __name__ == "__main__":
    pool = ProcessPoolExecutor(
        2, mp_context=get_context("spawn"), initializer=children.end_with_parent
    )
    several = [pool.submit(time.sleep, 600 * busy) for busy in (0, 1, 1)]
    several[0].result()
    while len(children.descendants(os.getpid())) < 3:  # two, and the tracker of resources
        time.sleep(0.01)
    print(*children.descendants(os.getpid()), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kernel", [True, False])
def test_a_pool_ends_with_its_parent(tmp_path, kernel):
    """Also where the kernel sends no signal, as on other systems than Linux."""
    file = tmp_path / "pool.py"
    file.write_text(
        POOL if kernel else POOL.replace("if __name__", "children.LINUX = False\n\nif __name__")
    )
    parent = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(x) for x in parent.stdout.readline().split()]
    assert len(pids) == 3 and not any(map(gone, pids))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 10
    while not all(map(gone, pids)):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_labs_workers_are_such_a_pool(tmp_path):
    from fiducial.lab.runs.workers import Workers

    with Workers(tmp_path, 1, False) as workers:
        assert workers.pool._initializer is children.end_with_parent


def gone(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] == "Z"


def test_memory_is_that_of_the_whole_family_and_shared_pages_count_once():
    kept = b"x" * 50_000_000
    here, before = os.getpid(), children.memory([os.getpid()], float("inf"))
    assert before > len(kept)
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert pid in children.descendants(here)
        assert children.memory([here, pid], float("inf")) > 1.4 * before
        assert children.memory([here, pid], 0) < 1.3 * before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
