"""Settings of process reward models."""

from __future__ import annotations

from pydantic import Field, model_validator

from ...building import Settings
from ...names import ModelName, RowsName
from ...settings import (
    Aggregate,
    LoraSettings,
    OptimizerSettings,
    RowSettings,
    RunSettings,
    Seed,
    check_one_length,
)


class PRM(Settings):
    """Process reward model: learn from labeled steps of solutions, or from the outcomes of whole
    solutions alone, whether a solution is right so far.
    """

    model: ModelName
    """The model to start from, usually the SFT model: a folder or a Hub name. If it already has a
    scalar head, the head is kept.
    """
    data: RowsName
    """Rows with prompt, completions and labels (steps, as `fiducial label-steps` writes them), or
    with prompt, completion and label (outcomes): a file or a Hub name.
    """
    out: str | None = None
    """The run folder. None: runs/prm-1, -2, ..."""
    separator: str = "\n"
    """The text that ends a step. A new line: Lightman et al. 2023. Empty: every token is a step, as
    for the verifiers of Cobbe et al. 2021.
    """
    aggregate: Aggregate = "last"
    """How the saved model scores a whole solution: by its last step, its lowest step, or the
    product of all steps (Lightman et al. 2023). last: our choice.
    """
    epochs: float = Field(default=2.0, gt=0)
    """Passes over the solutions. 2: Lightman et al. 2023; Cobbe et al. 2021 for verifiers."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, in place of epochs."""
    batch_size: int = Field(default=64, gt=0)
    """Solutions per optimizer step, over all processes. 64: our choice; no published value."""
    learning_rate: float = Field(default=9e-6, gt=0)
    """Peak learning rate. 9e-6: InstructGPT's reward model. LoRA and small models need 10 to 100
    times that.
    """
    seed: Seed = 0
    """Random seed for the new head and for the order of the solutions."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings(schedule="cosine")
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _fit(self) -> PRM:
        check_one_length(self.steps, self.epochs, usual=2.0)
        return self
