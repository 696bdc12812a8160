"""Settings of reward models."""

from __future__ import annotations

from pydantic import Field, model_validator

from ...building import Settings
from ...names import ModelName, RowsName
from ...settings import (
    LoraSettings,
    OptimizerSettings,
    RowSettings,
    RunSettings,
    Seed,
    check_one_length,
)


class RewardModel(Settings):
    """Reward model: learn from preference pairs which of two responses people prefer."""

    model: ModelName
    """The model to start from, usually the SFT model: a folder or a Hub name. If it already has a
    scalar head, the head is kept.
    """
    data: RowsName
    """Rows with prompt, chosen and rejected, and optionally margin: a file or a Hub name. All pairs
    of one prompt are trained as one element.
    """
    out: str | None = None
    """The run folder. None: runs/reward-1, -2, ..."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the prompts. 1: InstructGPT."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, in place of epochs."""
    batch_size: int = Field(default=64, gt=0)
    """Prompts per optimizer step, over all processes. 64: InstructGPT."""
    learning_rate: float = Field(default=9e-6, gt=0)
    """Peak learning rate. 9e-6: InstructGPT, 6B. LoRA and small models need 10 to 100 times that.
    """
    centering: float = Field(default=0.0, ge=0)
    """Weight of a loss that pulls the scores toward mean 0. 0: off. Eisenstein et al. 2023 (arXiv
    2312.09244): 0.01.
    """
    reference_data: RowsName | None = None
    """Rows with prompt and completion whose mean score becomes 0, as in Huang et al. 2024 (N+).
    None: 512 responses of the training pairs, drawn at random.
    """
    seed: Seed = 0
    """Random seed for the new head and for the order of the prompts."""
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
    def _fit(self) -> RewardModel:
        check_one_length(self.steps, self.epochs, usual=1.0)
        return self
