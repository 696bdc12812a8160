"""Settings of supervised fine-tuning."""

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


class SFT(Settings):
    """Supervised fine-tuning: teach a model to answer as the demonstrations do."""

    model: ModelName
    """The model to start from: a folder or a Hub name."""
    data: RowsName
    """Rows with text, messages, or prompt and completion: a file or a Hub name."""
    out: str | None = None
    """The run folder. None: runs/sft-1, -2, ..."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the rows. 1: Huang et al. 2024 (N+). InstructGPT took 16 and chose among them by
    reward.
    """
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, in place of epochs."""
    batch_size: int = Field(default=32, gt=0)
    """Rows per optimizer step, over all processes. 32: InstructGPT."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate. InstructGPT: 9.65e-6. LoRA and small models need 10 to 100 times that."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a sample response on the run's page."""
    seed: Seed = 0
    """Random seed for the order of the rows and for sampling."""
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
    def _fit(self) -> SFT:
        check_one_length(self.steps, self.epochs, usual=1.0)
        return self
