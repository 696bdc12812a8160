"""Settings of the verbs that use a model: collect, label-steps, generate and eval. Nothing here
imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..building import Settings
from ..names import ModelName, RowsName, ScorerName
from ..settings import Aggregate, RowSettings, Seed, WorkerSettings


class Collect(Settings):
    """Collect preferences: sample responses, have a judge compare them, and write rows with prompt,
    chosen and rejected.
    """

    moved: ClassVar[Mapping[str, str]] = {
        "steps": "steps are labeled by a verb of their own: fiducial label-steps --completions N"
    }

    model: ModelName
    """The model that answers: a folder or a Hub name."""
    prompts: RowsName
    """Rows with a prompt: a file or a Hub name."""
    judge: ScorerName
    """A reward model's folder, file.py:function (a reward as in TRL, or a comparison (prompts,
    first, second) -> list of bool), or exact_match, numeric_answer, format or length.
    """
    out: str
    """The .jsonl file to write."""
    samples: int = Field(default=4, gt=1)
    """Responses per prompt. InstructGPT: 4 to 9."""
    pairs: Literal["all", "extremes"] = "all"
    """Which pairs of the K responses to a prompt are written: all K(K-1)/2, or the best against the
    worst.
    """
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a response."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response, in addition to the model's own ends."""
    seed: Seed = 0
    """Random seed for sampling."""
    resume: bool = False
    """Go on with the unfinished file that --out names, after the last block that was written."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    rows: RowSettings = RowSettings()
    worker: WorkerSettings = WorkerSettings()


class LabelSteps(Settings):
    """Label steps: sample solutions, split each into steps, complete it several times from the end
    of each step, and let a judge score every completion.

    A step is labeled right if at least one of its completions ends right. So the model can recover
    from there; the step itself need not be valid. The rows hold prompt, completions, labels and
    rates, as `fiducial prm` reads them.
    """

    model: ModelName
    """The model that answers: a folder or a Hub name."""
    prompts: RowsName
    """Rows with a prompt: a file or a Hub name."""
    judge: ScorerName
    """What scores a completion: a reward model's folder, file.py:function with TRL's signature, or
    exact_match, numeric_answer, format or length.
    """
    out: str
    """The .jsonl file to write."""
    samples: int = Field(default=4, gt=0)
    """Solutions per prompt. 4: our choice; no published value."""
    completions: int = Field(default=8, gt=0)
    """Completions from the end of each step. 8: Math-Shepherd (Wang et al. 2024)."""
    separator: str = "\n"
    """The text that ends a step. A new line: Lightman et al. 2023."""
    threshold: float = 0.5
    """Lowest score of the judge at which a completion is right. 0.5 fits scores of 0 and 1, and
    probabilities; for a Bradley-Terry reward model 0 is the usual choice.
    """
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a solution."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    stop: tuple[str, ...] = ()
    """Tokens that end a solution, in addition to the model's own ends."""
    seed: Seed = 0
    """Random seed for sampling."""
    resume: bool = False
    """Go on with the unfinished file that --out names, after the last block that was written."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    rows: RowSettings = RowSettings()
    worker: WorkerSettings = WorkerSettings()

    @model_validator(mode="after")
    def _steps_of_text(self) -> LabelSteps:
        if not self.separator:
            raise ValueError(
                "--separator '': every token would be a step, and rows of text cannot say where "
                "tokens end. Give the text that ends a step, or train `fiducial prm --separator "
                "''` on outcomes (rows with prompt, completion, label)"
            )
        return self


class Generate(Settings):
    """Generate: answer a file of prompts. With --best-of N --score NAME each response is the best
    of N, which raises the reward without training.
    """

    model: ModelName
    """The model that answers: a folder or a Hub name."""
    prompts: RowsName
    """Rows with a prompt: a file or a Hub name."""
    out: str | None = None
    """The .jsonl file to write. None: print to the terminal."""
    samples: int = Field(default=1, gt=0)
    """Responses per prompt."""
    best_of: int | None = Field(default=None, gt=0)
    """Sample this many for each response and keep the one with the highest --score; of equal
    scores, the first sampled. None: off.
    """
    score: ScorerName | None = None
    """What chooses the best of n: a reward model's folder, file.py:function with TRL's signature,
    or exact_match, numeric_answer, format or length.
    """
    aggregate: Aggregate | None = None
    """How a process reward model makes one score of the scores of the steps. None: as the model was
    saved.
    """
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a response."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature. 0: always take the most likely token."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response, in addition to the model's own ends."""
    seed: Seed = 0
    """Random seed for sampling."""
    resume: bool = False
    """Go on with the unfinished file that --out names, after the last block that was written."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    rows: RowSettings = RowSettings()
    worker: WorkerSettings = WorkerSettings()


class Evaluate(Settings):
    """Evaluate a model: win rate over a baseline by a judge, mean score, KL to a reference, and
    length, with 95% intervals.
    """

    model: ModelName
    """The model to measure: a folder or a Hub name."""
    prompts: RowsName
    """Rows with a prompt, best held out from training: a file or a Hub name."""
    judge: ScorerName | None = None
    """A reward model's folder, file.py:function (a reward or a comparison, see `fiducial collect
    --help`), or exact_match, numeric_answer, format or length.
    """
    baseline: ModelName | None = None
    """The model to compare with, by the judge: a folder or a Hub name."""
    reference: ModelName | None = None
    """The model to measure the KL to: a folder or a Hub name."""
    out: str | None = None
    """The .json file for the numbers. None: print them only."""
    samples: int = Field(default=1, gt=0)
    """Responses per prompt."""
    best_of: int | None = Field(default=None, gt=0)
    """Sample this many for each response of the model (not of the baseline) and measure the one
    with the highest --score. None: off.
    """
    score: ScorerName | None = None
    """What chooses the best of n, as --reward. If the judge is also the score, the result is
    optimistic.
    """
    aggregate: Aggregate | None = None
    """How a process reward model as --score makes one score of the scores of the steps. None: as
    the model was saved.
    """
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a response."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response, in addition to the model's own ends."""
    seed: Seed = 0
    """Random seed for sampling."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    rows: RowSettings = RowSettings()
    worker: WorkerSettings = WorkerSettings()
