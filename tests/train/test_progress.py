"""What a run prints while it works, where there is no terminal for a bar."""

import io

from fiducial.train import progress
from fiducial.train.progress import Progress


def test_a_line_every_fifteen_seconds_and_none_on_the_other_processes(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("dpo", 50, start=10) as bar, Progress("other", 50, show=False) as other:
        for _ in range(10):
            now[0] += 4.0
            for one in (bar, other):
                one.advance({"loss": 0.51234})
    # after 16 s and 4 steps, and after 32 s and 8: at 4 s a step 36 and 32 steps are left
    assert capsys.readouterr().err.splitlines() == [
        "dpo: 14/50, about 144 s left  loss 0.5123",
        "dpo: 18/50, about 128 s left  loss 0.5123",
    ]


def test_a_terminal_gets_a_bar_with_its_numbers(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("dpo", 5, start=1) as bar:
        for _ in range(2):
            bar.advance({"loss": 0.51234})
        bar.bar.refresh()
    said = terminal.getvalue()
    assert "dpo" in said and "1/5" in said and "3/5" in said and "loss 0.5123" in said
    assert "\x1b[?25l" in said and said.count("\x1b[?25h") == 1  # the cursor is given back


def test_reading_is_shown_with_the_time_left_if_it_takes_more_than_two_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.reading("reading f.jsonl") as told, progress.reading("x", show=False) as other:
        for share in (0.1, 0.2, 0.25, 0.3, 1.0):
            now[0] += 1.0 if share < 1 else 7.0
            told(share)
            other(share)
    # after 3 s a quarter is read
    assert capsys.readouterr().err.splitlines() == [
        "reading f.jsonl (percent): 25/100, about 9 s left  ",
    ]
    with progress.reading("reading f.jsonl") as told:
        told(1.0)
    assert capsys.readouterr().err == ""
