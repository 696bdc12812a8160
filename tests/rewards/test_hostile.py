"""Reward functions that hang, crash, exit, fork, or fill the memory: each ends in time with its
name and its row, and the run that asked it is as it was.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

from fiducial.cli import main
from fiducial.errors import InputError, RunError
from fiducial.rewards import apart, running
from fiducial.rewards.judge import Judge
from fiducial.rewards.load import load_reward, load_rewards
from fiducial.rewards.types import Responses
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import RunSettings, WorkerSettings
from fiducial.train.processes import Processes
from support import write_jsonl

LIMITS = WorkerSettings(seconds=0.3, gigabytes=0.25)
SLOW = WorkerSettings(seconds=30.0, gigabytes=0.25)
"""For functions that reach another limit first, also on a busy machine."""
HOSTILE = """
import ctypes, os, random, signal, sys, threading, time

def loop(completions):
    while True:
        pass

def sleep(completions):
    time.sleep(60)  # @sleep

def loops_at_one(completions):
    while "bad" in completions:
        pass
    return [1.0] * len(completions)

def holds_the_lock(completions):  # in C, where no thread of Python gets its turn
    return 7 ** 10**9  # @holds_the_lock

def allocates(completions):
    kept = []
    while True:
        kept.append(b"x" * 10**7)

def allocates_elsewhere(completions):
    if os.fork() == 0:
        allocates(completions)
    time.sleep(60)

def forks(completions):  # a chain of at most 20, each in a session of its own
    for _ in range(20):
        if os.fork():
            break
        os.setsid()
        with open(FILE, "a") as file:
            file.write(f"{os.getpid()}\\n")
    time.sleep(60)

def leaves_a_child(completions):  # whose own parent has ended, and with a session of its own
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            with open(FILE, "a") as file:
                file.write(f"{os.getpid()}\\n")
            time.sleep(60)
        os._exit(0)
    time.sleep(0.1)
    sys.exit(0)

def segfault(completions):
    ctypes.string_at(0)  # @segfault

def kills_itself(completions):
    os.kill(os.getpid(), signal.SIGKILL)

def leaves(completions):
    os._exit(0)

def exits(completions):
    sys.exit(0)  # @exits

def recursion(completions):
    return recursion(completions)  # @recursion

def says_nothing(completions):
    raise ValueError  # @says_nothing

class Silent(Exception):
    def __str__(self):
        raise KeyError("no")

def cannot_say(completions):
    raise Silent  # @cannot_say

class Base(BaseException):
    pass

def base(completions):
    raise Base("of all")  # @base

def interrupted(completions):
    raise KeyboardInterrupt  # @interrupted

def too_few(completions):
    return [1.0]

def nan(completions):
    return [1.0, float("nan")]

def nested(completions):
    return [[1.0], [2.0]]

def text(completions):
    return "12"

def unpicklable(completions):
    return lambda: 0

class Odd:
    def __float__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # the worker lives through it
        sys.exit(0)  # @odd
    def __repr__(self):
        raise KeyError("no")

def odd(completions):
    return [Odd(), Odd()]

def kills_its_parent(completions):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)

def closes_everything(completions):
    os.closerange(0, 100)
    time.sleep(60)

def shouts(completions):
    while True:
        print("x" * 10_000)

def async_hang(completions):
    import asyncio
    return asyncio.sleep(60)

"""
TIME = r"did not return within 0\.3 s and was stopped"  # as LIMITS say
SAID = {
    "loop": TIME + r" \(r\.py:[56]\): mend it, or raise --worker\.seconds",
    "sleep": TIME + r" AT",
    "holds_the_lock": TIME + r" AT",
    "allocates": r"used 0\.\d+ GB of memory, more than the 0\.25 GB that it may, and was stopped",
    "allocates_elsewhere": r"used 0\.\d+ GB of memory.* raise --worker\.gigabytes",
    "forks": TIME,
    "leaves_a_child": "raised SystemExit: 0",
    "segfault": r"crashed: its process was ended by the signal SIGSEGV AT",
    "kills_itself": r"crashed: .* SIGKILL, as the system does where memory runs out",
    "leaves": "ended its own process with exit code 0: it must return instead",
    "exits": r"raised SystemExit: 0 AT",
    "recursion": r"raised RecursionError: maximum recursion depth exceeded.* AT",
    "says_nothing": r"raised ValueError AT",
    "cannot_say": r"raised Silent: \(its message cannot be read: KeyError\) AT",
    "base": r"raised Base: of all AT",
    "interrupted": r"raised KeyboardInterrupt AT",
    "too_few": "returned 1 numbers for 2 responses",
    "nan": r"returned nan for response 1 \(rows\.jsonl:2\)",
    "nested": r"returned \[1\.0\] for response 0 \(rows\.jsonl:1\)",
    "text": "returned a str where a list of 2 numbers",
    "unpicklable": "returned a function where a list of 2 numbers",
    "odd": r"raised SystemExit: 0 AT",
    "kills_its_parent": "broke the connection to its own process: it must leave alone its parent",
    "closes_everything": "broke the connection to its own process",
    "shouts": TIME,
    "async_hang": TIME,
}


def responses(*completions):
    n = len(completions)
    trajectory = Trajectory.build(
        [[7, 8]] * n, [[10, 2]] * n, [[0.0] * 2] * n, [True] * n, range(n), [0] * n, 1.0
    )
    where = [f"rows.jsonl:{i + 1}" for i in range(n)]
    renderer = SimpleNamespace(fingerprint="f")
    return Responses(["p"] * n, [*completions], [{}] * n, trajectory, renderer, where)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "r.py"
    path.write_text(HOSTILE + f"FILE = {str(path) + '.pids'!r}\n")
    return path


def load(name, limits=LIMITS, **keywords):
    return load_reward(str(name), RunSettings(), Processes(), worker=limits, **keywords)


def children():
    """The processes that this one has started, and theirs."""
    from fiducial.train.children import descendants

    return set(descendants(os.getpid()))


def state():
    """What a function could do to the process that asks it."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    return handlers, os.getcwd(), dict(os.environ), [*sys.path], random.getstate(), sys.stdout


def gone(pid):
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text()
        return text.rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.parametrize("name", SAID)
def test_each_ends_in_time_with_the_function_and_the_row(file, name, monkeypatch):
    monkeypatch.setattr(apart, "SEARCH", 0.0)  # of single rows: in a test of its own
    before, ours = state(), children()
    part = load(f"{file}:{name}", LIMITS if TIME in SAID[name] else SLOW)
    began = time.monotonic()
    with pytest.raises(RunError) as caught:
        part.score(responses("aa", "b"))
    assert time.monotonic() - began < 20
    message = str(caught.value)
    assert f"the reward function {file}:{name} " in message and len(message) < 600
    (line,) = [i for i, x in enumerate(HOSTILE.splitlines(), 1) if x.endswith(f"# @{name}")] or [0]
    assert re.search(SAID[name].replace("AT", rf"\(r\.py:{line}\)"), message), message
    assert "rows.jsonl:" in message and "\n" not in message
    del part, caught
    assert state() == before and children() <= ours
    if name in ("forks", "leaves_a_child"):
        pids = [int(x) for x in Path(f"{file}.pids").read_text().split()]
        assert pids and all(map(gone, pids))


IMPORTS = {
    "hangs": ("while True: pass", r"cannot be loaded: its file did not return within 0\.3 s"),
    "exits": ("import sys\nsys.exit(0)", r"cannot be run: SystemExit: 0 \(r\.py:2\)"),
    "leaves": ("import os\nos._exit(0)", "its file ended its own process with exit code 0"),
    "base": ("class E(BaseException): pass\nraise E", r"cannot be run: E \(r\.py:2\)"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_a_file_that_harms_when_it_is_imported_is_refused(tmp_path, name):
    code, said = IMPORTS[name]
    (tmp_path / "r.py").write_text(code)
    with pytest.raises(InputError, match=f"^--reward: .*r.py.* {said}"):
        load(f"{tmp_path}/r.py:f", LIMITS if name == "hangs" else SLOW)


def test_the_row_at_which_a_function_hangs_is_found(file):
    part = load(f"{file}:loops_at_one")
    said = r"^rows.jsonl:3: the reward function .* did not .*; it does so with this row alone$"
    with pytest.raises(RunError, match=said):
        part.score(responses("a", "b", "bad", "c"))
    # a fresh worker serves whoever goes on
    assert part.score(responses("a")).scores == [1.0]


GOOD = """
import atexit, os, signal, sys, threading, time

calls = 0
started = time.monotonic()

def counts(prompts, completions, kind, log_metric=None, log_extra=None):
    global calls
    calls += 1
    prompts.clear(); kind.clear(); completions.append("x")
    sys.path.clear(); os.chdir("/"); os.environ.clear()
    log_metric("calls", calls)
    log_extra("me", [os.getpid()] * 2)
    return [float(calls)] * 2

def leaves_threads(completions):
    threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
    return [1.0] * len(completions)

def waits(completions):
    began = time.monotonic()
    time.sleep(0.3)
    return [began, time.monotonic()]

waits_too = waits

def imports(completions):
    return [float("torch" in sys.modules), float("transformers" in sys.modules)]

def shouts(completions):
    print("first words")
    for _ in range(3000):
        print("x" * 1000)
    print("last words", file=sys.stderr)
    sys.stdout = None
    return [1.0] * len(completions)

def prints(completions):
    print("x" * 40_000)
    return [1.0]

def forks(completions):
    os.fork()
    return [float(os.getpid() % 7)] * len(completions)

def reads(completions):
    return [1.0 if sys.stdin.read() == "" else 0.0] * len(completions)

def pool(completions):
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as some:
        return some.map(float, range(len(completions)))

def slow_at(prompts, first, second):
    while "b" in second:
        pass
    return [True] * len(first)
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "r.py"
    path.write_text(GOOD)
    return path


def test_a_worker_keeps_its_state_and_ours_stays_as_it_is(good):
    before, ours = state(), children()
    part = load(f"{good}:counts", SLOW, training=True)
    asked = Responses(
        ["p"] * 2,
        ["a", "b"],
        [{"kind": ["x"]}, {"kind": ["y"]}],
        responses("a", "b").trajectory,
        SimpleNamespace(),  # type: ignore[arg-type]
        ["f:1", "f:2"],
    )
    scored = [part.score(asked) for _ in range(3)]
    assert [s.scores for s in scored] == [[1.0] * 2, [2.0] * 2, [3.0] * 2]
    assert scored[2].logged == {"calls": [3.0]}
    (pid,) = {p for s in scored for p in s.columns["me"]}
    assert pid != os.getpid() and asked.columns == [{"kind": ["x"]}, {"kind": ["y"]}]
    assert asked.completions == ["a", "b"]
    os.kill(pid, signal.SIGTERM)  # as a scheduler does to all processes of a job
    assert part.score(asked).scores == [4.0] * 2
    del part
    assert state() == before and children() <= ours and gone(pid)


def test_threads_that_never_end_keep_nobody_waiting(good):
    part = load(f"{good}:leaves_threads", SLOW)
    assert part.score(responses("a")).scores == [1.0]
    began = time.monotonic()
    del part
    assert time.monotonic() - began < 2.0


def test_functions_work_at_the_same_time(good):
    names = [f"{good}:waits", f"{good}:waits_too"]
    parts = load_rewards(names, None, RunSettings(), Processes(), SLOW)
    (one, two) = parts.score(responses("a", "b")).parts.values()
    assert max(one[0], two[0]) < min(one[1], two[1])  # type: ignore[operator,type-var]


def test_a_worker_imports_nothing_heavy(good):
    assert load(f"{good}:imports", SLOW).score(responses("a", "b")).scores == [0.0, 0.0]


def test_a_module_is_found_where_the_command_would_find_it(tmp_path, monkeypatch):
    (tmp_path / "only_here_17.py").write_text("def f(completions):\n    return [2.0]\n")
    (tmp_path / "json.py").write_text("raise KeyError('not the json of the library')\n")
    monkeypatch.syspath_prepend(tmp_path / "nowhere")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    assert load("only_here_17:f", SLOW).score(responses("a")).scores == [2.0]


def test_what_a_function_prints_reaches_the_user_up_to_a_bound(good, capsys):
    part = load(f"{good}:shouts", SLOW)
    assert part.score(responses("a")).scores == [1.0]
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("first words\nxxx") and len(err) < 66_000
    assert f"--reward {good}:shouts printed more than 65,536 bytes in one call" in err
    part = load(f"{good}:prints", SLOW)
    for _ in range(3):  # each call has a bound of its own
        part.score(responses("a"))
        assert capsys.readouterr().err.count("x") == 40_000


def test_debug_shows_where_the_users_code_failed(file):
    with pytest.raises(RunError) as caught:
        load(f"{file}:says_nothing", SLOW).score(responses("a"))
    text = "".join(traceback.format_exception(caught.value))
    assert f'File "{file}", line' in text and "in says_nothing\n" in text


def test_a_copy_that_a_function_forks_answers_nothing(good):
    part = load(f"{good}:forks", SLOW)
    assert len({tuple(part.score(responses("a")).scores) for _ in range(4)}) == 1


def test_a_function_may_read_nothing_and_have_processes_of_its_own(good):
    assert load(f"{good}:reads", SLOW).score(responses("a")).scores == [1.0]
    assert load(f"{good}:pool", SLOW).score(responses("a", "b")).scores == [0.0, 1.0]


def test_in_process_calls_it_here(good):
    part = load(f"{good}:imports", WorkerSettings(in_process=True))
    assert part.score(responses("a", "b")).scores == [1.0, 1.0]


def test_a_judge_that_compares_is_stopped_with_its_row(good):
    judge = Judge.open(f"{good}:slow_at", RunSettings(), Processes(), LIMITS)
    assert judge.prefers_first(["p"], ["a"], ["c"]) == [True]
    with pytest.raises(RunError, match=r"^f:2: the judge .*slow_at did not return within 0.3 s"):
        judge.prefers_first(["p", "p"], ["a", "a"], ["c", "b"], ["f:1", "f:2"])


def test_more_processes_than_allowed_are_ended(file, monkeypatch):
    monkeypatch.setattr(apart, "SEARCH", 0.0)
    start = "from fiducial.rewards import keeper; keeper.PROCESSES = 5; keeper.main(*a)"
    monkeypatch.setattr(running, "START", running.START.replace(running.MAIN, start))
    part = load(f"{file}:forks", SLOW)
    with pytest.raises(RunError, match=r"had \d+ processes at once and was stopped"):
        part.score(responses("a"))


PARENT = """
from fiducial.rewards.questions import Question
from fiducial.rewards.running import Worker
from fiducial.settings import WorkerSettings

worker = Worker(WorkerSettings(), "title")
worker.request(({name!r}, "--reward"), 60)
worker.reply()
worker.request(Question("f", {{"completions": ["a"]}}, 1), 60)
worker.reply()
"""
HANGS = """
import os, time
def f(completions):
    if os.fork() == 0:
        os.setsid()
    with open({pids!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{os.getppid()}}\\n")
    while True: pass
"""


def test_a_worker_and_its_children_end_with_the_run_whatever_ends_it(tmp_path):
    (tmp_path / "r.py").write_text(HANGS.format(pids=f"{tmp_path}/pids"))
    code = PARENT.format(name=f"{tmp_path}/r.py:f")
    parent = subprocess.Popen([sys.executable, "-c", code])
    pids = tmp_path / "pids"
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4, 60)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    left = {int(x) for x in pids.read_text().split()}
    wait_until(lambda: all(map(gone, left)), 5)


def wait_until(true, seconds):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


# In a run
# ------------------------------------------------------------

LATE = """
import json, os

def f(prompts, completions, trainer_state):
    if trainer_state.global_step == 1:
        while not os.path.exists({ready!r}):
            pass
        with open({seen!r}, "w") as file:
            json.dump(completions, file)
    return [float(len(c)) for c in completions]
"""


def test_a_run_whose_reward_hangs_keeps_what_it_has_and_goes_on(models, tmp_path, capsys):
    reward = tmp_path / "r.py"
    ready, seen = tmp_path / "ready", tmp_path / "seen.json"
    reward.write_text(LATE.format(ready=str(ready), seen=str(seen)))
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the cat"}, {"prompt": "on"}])
    words = ["grpo", "--model", models["llama"], "--data", data, "--reward", f"{reward}:f"]
    words += ["--steps", "3", "--batch-size", "4", "--group-size", "2", "--max-new-tokens", "4"]
    words += ["--worker.seconds", "0.5", "--run.samples", "1", "--out", str(tmp_path / "run")]
    run = tmp_path / "run"
    assert main(words) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"fiducial: step 2: {data}:1: the reward function {reward}:f did not")
    assert (
        f"the 4 responses that were not scored are in {run}/unscored.jsonl; " in last
        and "; go on with" in last
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 1
    assert (run / "checkpoints" / "checkpoint-1").is_dir()
    rows = [json.loads(x) for x in (run / "unscored.jsonl").read_text().splitlines()]
    assert [r["where"] for r in rows] == [f"{data}:{i}" for i in (1, 1, 2, 2)]
    assert all(r["completion_ids"] and r["tokenizer"] and r["step"] == 2 for r in rows)
    # the same responses are sampled again
    ready.touch()
    assert main([*words, "--resume"]) == 0
    assert json.loads(seen.read_text()) == [r["completion"] for r in rows]
