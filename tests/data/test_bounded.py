"""Chat templates that loop, fill the memory or reach for attributes."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from fiducial.data import bounded, templates
from fiducial.data.bounded import TimeUp
from fiducial.data.row_types import Message
from fiducial.data.templates import ChatTemplate, set_chat_template
from fiducial.errors import InputError
from support import make_tokenizer, write_jsonl

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWS = (
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
HOSTILE = {
    "loops": (LOOPS, "did not end within 0.4 s: it loops"),
    "power": ("{{ (6 + messages|length) ** (10 ** 9) }}", "did not end within 0.4 s: it loops"),
    "product": ("{{ 'a' * 10 ** 10 }}", "needs more than 256 MiB of memory"),
    "grows": (GROWS, "needs more than 256 MiB of memory"),
    "filter": ("{{ 'a'|center(10 ** 10) }}", "needs more than 256 MiB of memory"),
    "attribute": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "refuses these messages: access to attribute '__class__' of 'str' object is unsafe.",
    ),
    "endless macro": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "refuses these messages: maximum recursion depth exceeded",
    ),
    "torn": ("{% for m in %}", "refuses these messages: Expected an expression"),
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Bounds that fit a test."""
    for module in (bounded, templates):
        monkeypatch.setattr(module, "SECONDS", 0.4)
        monkeypatch.setattr(module, "MEMORY", 2**28)
    monkeypatch.setattr(bounded, "TICK", 0.1)
    bounded._clock._disarm()
    yield
    bounded._clock._disarm()


def template(text):
    """The template, used only where a message says "bad"; otherwise chatml."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.name_or_path = "runs/hostile"
    ordinary = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'bad' %}" + text + "{% else %}" + ordinary + "{% endif %}"
    )
    return ChatTemplate.of(tokenizer, frozenset([2]))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_row_that_makes_a_template_run_wild_is_refused_in_time(name):
    text, said = HOSTILE[name]
    if name == "torn":
        found = template("")
        found.tokenizer.chat_template = text
    else:
        found = template(text)
        assert "bat" in found.render((Message("user", "bat"),), "rows.jsonl:1")
    handler, limit = signal.getsignal(signal.SIGTERM), resource.getrlimit(resource.RLIMIT_AS)
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        found.render((Message("user", "bad"),), "rows.jsonl:2")
    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert message.startswith("rows.jsonl:2: the chat template ") and said in message
    assert "of the tokenizer in runs/hostile" in message and "\n" not in message
    assert signal.getsignal(signal.SIGTERM) is handler
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


def test_one_that_always_loops_is_refused_at_once_with_the_setting_that_gave_it(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text(LOOPS)
    tokenizer = make_tokenizer("qwen3")
    set_chat_template(tokenizer, str(file))
    began = time.monotonic()
    said = f"^a short conversation: .*--rows.chat-template {file}.* did not end within 0.4 s"
    with pytest.raises(InputError, match=said):
        ChatTemplate.of(tokenizer, frozenset([2]))
    assert time.monotonic() - began < 10


def test_a_command_refuses_it(models, tmp_path, capsys):
    from fiducial.cli import main

    file = tmp_path / "t.jinja"
    file.write_text(GROWS)
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}]
    words = ["sft", "--model", models["qwen3"], "--data", write_jsonl(tmp_path / "d.jsonl", rows)]
    words += ["--rows.chat-template", str(file), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert f"(--rows.chat-template {file}) needs more than 256 MiB" in capsys.readouterr().err


def test_in_another_thread_too():
    found, said = template(LOOPS), []

    def render():
        try:
            found.render((Message("user", "bad"),), "rows.jsonl:2")
        except InputError as error:
            said.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(10)
    assert "did not end within 0.4 s" in said[0]


def test_the_timer_is_there_only_while_it_is_needed():
    assert bounded.bounded(lambda: 3) == 3 and signal.getitimer(signal.ITIMER_VIRTUAL)[1] > 0
    until = time.process_time() + 5
    while signal.getitimer(signal.ITIMER_VIRTUAL)[1] and time.process_time() < until:
        pass  # no call: after two ticks it is gone
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[1] == 0
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
    with pytest.raises(TimeUp):  # and there again
        bounded.bounded(loop)


def loop():
    while True:
        pass


def test_a_process_that_grew_since_its_size_was_read_may_still_allocate(monkeypatch):
    monkeypatch.setattr(bounded, "FRESH", 1e9)
    bounded._limit._read = time.monotonic()
    bounded._limit._size = 0  # as if everything had come since
    assert len(bounded.bounded(lambda: bytearray(2**27))) == 2**27
    with pytest.raises(MemoryError):
        bounded.bounded(lambda: bytearray(2**29))


def test_a_forked_process_is_bounded_and_the_end_of_one_is_quiet():
    bounded.bounded(int)
    pid = os.fork()
    if pid == 0:
        try:
            bounded.bounded(loop)
        except TimeUp:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    code = "from fiducial.data import bounded; bounded.TICK = 0.001; bounded.bounded(int)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
