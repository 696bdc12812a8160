"""What a run prints while it works, where there is no terminal for a bar."""

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
