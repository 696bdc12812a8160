"""A file that an interrupted command left is gone on with: whatever stopped it, the finished file
has the bytes of one that was never stopped.
"""

import errno
import functools
import itertools
import json
import os
import random
import signal
from pathlib import Path

import pytest

from fiducial.cli import main
from fiducial.data.sources import records
from fiducial.errors import InputError, RunError
from fiducial.use import answering
from fiducial.use import output as writing
from fiducial.use.collect import collect
from fiducial.use.generate import generate
from fiducial.use.label_steps import label_steps
from fiducial.use.settings import Collect, Generate, LabelSteps
from support import write_jsonl

JUDGE = """
def score(prompts, completions, **columns):
    return [float(len(c)) for c in completions]

def no_x(prompts, completions, **columns):
    return [float("x" not in c) for c in completions]

def flat(prompts, completions, **columns):
    return [0.0 for c in completions]
"""
TEXTS = ("the cat", "a dog", "in the end", "on the mat", "one two")
VERBS = {
    "collect": (Collect, collect, {"samples": 4}),
    "generate": (Generate, generate, {"samples": 2, "best_of": 2}),
    "label-steps": (LabelSteps, label_steps, {"samples": 2, "completions": 2, "separator": "e"}),
}
verbs = pytest.mark.parametrize("verb", VERBS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(answering, "BLOCK", 8)  # two prompts


@pytest.fixture
def files(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": p} for p in TEXTS))
    return tmp_path


@pytest.fixture
def go(files, make):
    """go("collect", "a.jsonl", resume=True): run a verb in this process."""
    model = make("llama", initializer_range=0.12)

    def run(verb, out, **changes):
        cls, function, usual = VERBS[verb]
        judge = f"{files}/judge.py:{'no_x' if verb == 'label-steps' else 'score'}"
        values = {"model": model, "prompts": str(files / "prompts.jsonl"), "max_new_tokens": 8}
        values |= {"score" if verb == "generate" else "judge": judge, "out": str(files / out)}
        return function(cls(**(values | usual | changes)))

    return run


def progress(path):
    return Path(f"{path}.progress.jsonl")


def left(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".py" and p.is_file())


def killed(work, at, share):
    """Runs `work` in a process that is killed within its write number `at`, after a share of its
    bytes.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    signal.alarm(60)
    count, append = itertools.count(), writing.Output._append

    def torn(path, data):
        if next(count) == at:
            append(path, data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, data)

    writing.Output._append = staticmethod(torn)
    try:
        os.close(2)
        work()
    finally:
        os._exit(0)


@verbs
def test_a_killed_command_that_is_gone_on_with_writes_the_same_bytes(go, files, verb, capsys):
    """SIGKILL within a write: of the first line, of rows, of what tells of them; twice in a row."""
    counts = go(verb, "whole.jsonl")
    whole, said = (files / "whole.jsonl").read_bytes(), capsys.readouterr().err
    assert whole.count(b"\n") >= 5 and left(files) == ["prompts.jsonl", "whole.jsonl"]
    chance = random.Random(verb)
    for at in (1, 3, chance.choice((2, 4, 5, 6))):
        out = files / f"{at}.jsonl"
        assert killed(functools.partial(go, verb, out), at, chance.random())
        assert progress(out).exists()
        if at == 3:
            assert killed(functools.partial(go, verb, out, resume=True), 1, 0.5)
        assert go(verb, out, resume=True) == counts
        assert out.read_bytes() == whole and not progress(out).exists()
        *_, last = capsys.readouterr().err.splitlines()
        assert last.replace(str(out), str(files / "whole.jsonl")) == said.splitlines()[-1]


def test_a_kill_before_the_first_line_leaves_nothing_that_is_taken_for_finished(go, files):
    out = files / "a.jsonl"
    assert killed(lambda: go("collect", out), 0, 0.5)
    with pytest.raises(InputError, match=r"is unfinished.*--resume"):
        go("collect", out)
    with pytest.raises(InputError, match="is damaged"):
        go("collect", out, resume=True)


def test_a_torn_end_and_a_file_that_lost_its_end_are_made_again(go, files):
    go("collect", "whole.jsonl")
    whole, out = (files / "whole.jsonl").read_bytes(), files / "a.jsonl"
    assert killed(lambda: go("collect", out), 6, 0.3)  # two blocks are told, the third is not
    os.truncate(out, out.stat().st_size // 3)  # now less than both
    with open(progress(out), "ab") as file:
        file.write(b'{"prompts": 5, "bytes')
    go("collect", out, resume=True)
    assert out.read_bytes() == whole


@verbs
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_block_and_says_how_to_go_on(
    go, files, verb, number, monkeypatch, capsys
):
    if number != signal.SIGINT and verb != "collect":
        pytest.skip("the signals are handled in one place")
    go(verb, "whole.jsonl")
    out, inner = files / "a.jsonl", writing.Output.add

    def signalled(self, rows, prompts, *rest):
        if self.prompts == 0:
            signal.raise_signal(number)
        inner(self, rows, prompts, *rest)

    monkeypatch.setattr(writing.Output, "add", signalled)
    before = signal.getsignal(number)
    with pytest.raises(RunError) as error:
        go(verb, out)
    assert signal.getsignal(number) is before
    first = int(str(error.value).split("first ")[1].split(" of")[0])
    assert 0 < first < len(TEXTS)
    assert str(error.value) == (
        f"stopped; the rows of the first {first} of 5 prompts are safe in {out}; go on with: "
        f"fiducial {verb} --out {out} --resume"
    )
    assert "stopping after this block of prompts" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(answering, "BLOCK", 8)
    assert main([verb, "--out", str(out), "--resume"]) == 0  # just as it was said
    assert out.read_bytes() == (files / "whole.jsonl").read_bytes()
    assert f"going on with {out} after {first} of 5 prompts" in capsys.readouterr().err


def test_a_block_is_about_a_minute_of_work_and_its_borders_change_nothing(go, files, monkeypatch):
    """A model that reads few tokens in a minute has a prompt a block; a fast one 8 responses."""
    blocks, inner = [], writing.Output.add
    monkeypatch.setattr(writing.Output, "add", lambda s, *a: blocks.append(a[1]) or inner(s, *a))
    for out, tokens, expected in (
        ("slow.jsonl", 50, [1, 2, 3, 4, 5]),
        ("fast.jsonl", 10**9, [2, 4, 5]),
    ):
        blocks.clear()
        monkeypatch.setattr(answering, "tokens_in_a_minute", lambda policy, n=tokens: n)
        go("collect", out)
        assert blocks == expected
    assert (files / "slow.jsonl").read_bytes() == (files / "fast.jsonl").read_bytes()


def interrupted(go, out, monkeypatch, **changes):
    """A file of `collect` with its first block."""
    inner = writing.Output.add

    def stop(self, *given):
        inner(self, *given)
        raise RunError("the judge is out of order")

    with monkeypatch.context() as patch:
        patch.setattr(writing.Output, "add", stop)
        with pytest.raises(RunError, match=r"out of order; the rows of the first 2 of 5 prompts"):
            go("collect", out, **changes)


def test_what_differs_from_the_beginning_is_refused_by_name(go, files, monkeypatch, make):
    out = files / "a.jsonl"
    template = files / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    changes = {"rows": {"chat_template": str(template)}}
    interrupted(go, out, monkeypatch, **changes)
    bytes_before = out.read_bytes(), progress(out).read_bytes()

    def refused(said, **more):
        with pytest.raises(InputError, match=said):
            go("collect", out, **({"resume": True} | changes | more))
        assert (out.read_bytes(), progress(out).read_bytes()) == bytes_before

    refused("seed, temperature|temperature, seed", seed=1, temperature=0.5)
    refused("model differ", model=make("gpt2"))
    refused(r"is unfinished: go on with --resume", resume=False)

    def changed(path, said):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        refused(said)
        path.write_bytes(before)

    changed(files / "judge.py", "--judge is not what .*a.jsonl was begun with")
    changed(files / "prompts.jsonl", "--prompts is not what")
    changed(template, "--rows.chat-template is not what")
    model = Path(json.loads(bytes_before[1].splitlines()[0])["settings"]["model"])
    changed(model / "tokenizer_config.json", "--model is not what")
    edited = bytes_before[0].replace(b'"prompt": "the', b'"prompt": "THE', 1)
    out.write_bytes(edited)
    with pytest.raises(InputError, match="were changed since they were written"):
        go("collect", out, resume=True, **changes)
    out.write_bytes(bytes_before[0])
    go("collect", out, resume=True, **changes)
    with pytest.raises(InputError, match="is finished"):
        go("collect", out, resume=True, **changes)
    with pytest.raises(InputError, match=r"b.jsonl does not exist"):
        go("collect", "b.jsonl", resume=True)
    with pytest.raises(InputError, match="needs --out"):
        generate(Generate(model=str(model), prompts=str(files / "prompts.jsonl"), resume=True))


def test_an_unfinished_file_is_no_data(go, files, monkeypatch):
    out = files / "a.jsonl"
    interrupted(go, out, monkeypatch)
    with pytest.raises(InputError, match=r"has not finished: go on .* or remove a.jsonl.progress"):
        records(str(out))
    progress(out).unlink()
    assert len(list(records(str(out)))) == out.read_bytes().count(b"\n")


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_full_disk_is_a_sentence_and_what_was_written_is_safe(go, files, monkeypatch, at):
    go("collect", "whole.jsonl")
    out, count, inner = files / "a.jsonl", itertools.count(), writing.Output._append

    def full(path, data):
        if next(count) == at:
            inner(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Output, "_append", staticmethod(full))
        with pytest.raises(RunError) as error:
            go("collect", out)
    assert str(out) in str(error.value) and "No space left on device" in str(error.value)
    if at > 2:
        assert "prompts are safe in" in str(error.value) and "--resume" in str(error.value)
        go("collect", out, resume=True)
    else:  # nothing was told of yet, so the same command works again
        assert left(files) == ["prompts.jsonl", "whole.jsonl"]
        go("collect", out)
    assert out.read_bytes() == (files / "whole.jsonl").read_bytes()


def test_what_wrote_nothing_leaves_nothing(go, files, monkeypatch):
    with pytest.raises(InputError, match="preferred no response"):
        go("collect", "a.jsonl", judge=f"{files}/judge.py:flat")
    with pytest.raises(InputError, match="there is no file"):
        go("collect", "a.jsonl", judge=f"{files}/none.py:f")
    assert left(files) == ["prompts.jsonl"]


def test_a_file_is_written_by_one_process(go, files, monkeypatch):
    refused = []

    def again(self, *given):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}.*another file"):
            go("collect", files / "a.jsonl", resume=True)
        refused.append(1)

    monkeypatch.setattr(writing.Output, "add", again)
    go("generate", "a.jsonl", best_of=None, score=None)
    assert len(refused) == 2  # and let go of
    assert left(files) == ["a.jsonl", "prompts.jsonl"]
