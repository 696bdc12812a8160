"""One process at a time in a run folder, and signals that stop a run as Ctrl-C does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fiducial.errors import InputError
from fiducial.train.lock import NAME, Lock
from fiducial.train.stopping import Stopping

HOLDER = """
import sys, time
from pathlib import Path
from fiducial.train.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env=env
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_pid_of_the_first(holder, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} is in use by process {holder.pid}: wait"):
        Lock(tmp_path)


def test_a_killed_process_leaves_no_lock(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / NAME).is_file()
    lock = Lock(tmp_path)
    assert (tmp_path / NAME).read_text() == f"{os.getpid()}\n"
    lock.release()
    assert not (tmp_path / NAME).exists()


def test_a_lock_is_free_again_after_its_release_and_not_before(tmp_path):
    first = Lock(tmp_path)
    with pytest.raises(InputError, match=f"process {os.getpid()}"):
        Lock(tmp_path)
    first.release()
    Lock(tmp_path).release()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_the_same_again_stops_at_once(number):
    before, said = signal.getsignal(number), []
    with Stopping(said.append) as stopping:
        assert not stopping.wanted
        os.kill(os.getpid(), number)
        time.sleep(0)  # the handler runs between two instructions
        assert stopping.wanted and len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(0)
    assert signal.getsignal(number) is before


def test_a_launcher_s_sigterm_after_ctrl_c_is_the_same_wish():
    said = []
    with Stopping(said.append) as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert stopping.wanted and len(said) == 1


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping(lambda text: None) as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
            assert not stopping.wanted
    finally:
        signal.signal(signal.SIGHUP, before)
