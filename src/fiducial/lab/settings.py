"""The settings of `fiducial lab`. They are read without torch, so that --help and typing mistakes
are answered at once.
"""

from __future__ import annotations

from pydantic import Field

from ..building import Settings
from ..settings import Seed


class Lab(Settings):
    """Lab: run every method on worlds whose optimum is known exactly, measure how far from it each
    one stops, and write a page with the whole derivation.
    """

    out: str | None = None
    """Folder for all output. Default: lab-run, lab-run-2, ..."""
    full: bool = False
    """Run the full form: three seeds of everything, the transformer on the large worlds too, and a
    finer grid. It takes about 20 minutes on two cores; the quick form takes about 5.
    """
    seed: Seed = 0
    """Random seed of the worlds and of the runs; the two seeds after it are used too."""
    processes: int | None = Field(None, gt=0)
    """Number of runs side by side. Default: one per core, at most eight."""
    resume: bool = False
    """Keep the runs in --out that are finished, and make the others."""
