"""`fiducial report RUN`: the page of a run, written again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..building import POSITIONAL, Settings
from ..errors import InputError
from .page import write_report


class Report(Settings):
    """Report: write the page of a run again from the files in its folder."""

    run: Annotated[str, POSITIONAL]
    """The run folder."""


def report(settings: Report) -> Path:
    """The path of the page."""
    folder = Path(settings.run)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.yaml")
    return write_report(folder)
