"""A new method is a page and a row: a temporary one appears wherever methods appear, with no other
edit.
"""

import dataclasses
import sys

import pytest

from fiducial import verbs
from fiducial.cli import main
from fiducial.report import figures

PAGE = '''
"""A method that learns nothing: its loss falls by itself."""

from fiducial.run import Run
from fiducial.building import Settings
from fiducial.settings import RunSettings


class Dummy(Settings):
    """Dummy: count down."""

    out: str | None = None
    """The run folder."""
    steps: int = 3
    """Number of steps to count."""
    seed: int = 0
    """Random seed; nothing is random."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    run: RunSettings = RunSettings(checkpoint_every=0)


def dummy(settings: Dummy) -> Run[None]:
    with Run("dummy", settings, state=None) as run:
        run.start(settings.steps)
        while run.running():
            loss = 1.0 / (run.step + 1)
            run.end_step({"loss": loss, "margin": 1 - loss}, rows=1, tokens=1)
            run.checkpoint_if_due()
        return run.finish()
'''


@pytest.fixture
def dummy(tmp_path, monkeypatch):
    """The row of a method whose page lies in a folder of its own."""
    (tmp_path / "dummy_page.py").write_text(PAGE)
    monkeypatch.syspath_prepend(tmp_path)
    base = next(row for row in verbs.METHODS if row.name == "dpo")
    row = dataclasses.replace(
        base,
        name="dummy",
        summary="Count down, and learn nothing.",
        settings="dummy_page:Dummy",
        run="dummy_page:dummy",
        title="Dummy method",
        kind="loss",
        decides=("margin", "loss"),
    )
    monkeypatch.setattr(verbs, "METHODS", [*verbs.METHODS, row])
    yield row
    sys.modules.pop("dummy_page", None)


def test_a_new_method_is_on_the_command_line(dummy, capsys):
    assert main(["--help"]) == 0
    assert "Count down, and learn nothing." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["dummy", "--help"])
    assert "Number of steps to count." in capsys.readouterr().out
    assert main(["dumy"]) == 2
    assert "did you mean dummy" in capsys.readouterr().err


def test_a_new_method_runs_and_has_a_page_of_its_own(dummy, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["dummy", "--out", str(out), "--steps", "4"]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Dummy method run: out" in page and "margin" in page
    assert figures.ORANGE in page  # the color of its row
    assert (verbs.title("dummy"), verbs.method("dummy")) == ("Dummy method", dummy)
