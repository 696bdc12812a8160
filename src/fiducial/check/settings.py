"""The settings of `fiducial check`, which can be read without torch."""

from __future__ import annotations

import warnings
from typing import Annotated

from ..building import POSITIONAL, Settings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", 'Field name "json"')  # an old method of pydantic's models

    class Check(Settings):
        """Check: can this run learn, and how long will it take? Give the verb with its own flags,
        as if it were run: `fiducial check dpo --model ... --data ...`. The rows are read and shown
        as they are trained on, the model is loaded and compared with plain transformers, one real
        step is computed on the longest rows, and the rewards score real samples. No run is opened
        and nothing is written. `fiducial check dpo --help` lists the flags of dpo.

        Exit codes: 0 nothing that forbids the run; 1 an error was found: the run would start, and
        fail or learn nothing; 2 the verb itself would refuse to start.
        """

        verb: Annotated[str, POSITIONAL]
        """The verb that trains, with its own flags after it: sft, reward, prm, ppo, reinforce,
        grpo, dpo or distill.
        """
        json: bool = False  # type: ignore[assignment]
        """Print all findings and numbers as one JSON object."""
