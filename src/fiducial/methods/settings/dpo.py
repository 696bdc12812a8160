"""Settings of DPO."""

from __future__ import annotations

from typing import Literal

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

MANY_PAIRS = 20_000
"""A pass of the reference over more pairs than this may take far longer than the first steps."""


class DPO(Settings):
    """Direct preference optimization: learn from preference pairs without a reward model and
    without sampling.
    """

    model: ModelName
    """The policy to start from: a folder or a Hub name. A frozen copy of it is the reference."""
    data: RowsName
    """Rows with prompt, chosen and rejected: a file or a Hub name."""
    out: str | None = None
    """The run folder. None: runs/dpo-1, -2, ..."""
    beta: float = Field(default=0.1, gt=0)
    """KL coefficient: the implicit reward is beta * log(pi / pi_ref). 0.1: the paper, appendix B
    (0.5 for summarization).
    """
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of wrong labels (conservative DPO, Mitchell 2023). 0: the paper."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs. 1: overfitting often begins within the first (Rafailov et al. 2024,
    arXiv 2406.02900).
    """
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, in place of epochs."""
    batch_size: int = Field(default=64, gt=0)
    """Pairs per optimizer step, over all processes. 64: the paper."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate, after warm-up. 1e-6: the paper. LoRA and small models need 10 to 100
    times that.
    """
    reference_pass: Literal["auto", "first", "each_step"] = "auto"
    """When the reference reads the pairs: all before the first step, or those of each step (without
    LoRA it is then a copy in memory). auto: each_step beyond 20,000 pairs. Our choice.
    """
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a sample response on the run's page."""
    seed: Seed = 0
    """Random seed for the order of the pairs and for sampling."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings(betas=(0.9, 0.999), schedule="constant")
    run: RunSettings = RunSettings()

    def reads_reference_at_each_step(self, pairs: int) -> bool:
        """Whether the reference reads the pairs of each step, in a run that reads so many."""
        return self.reference_pass == "each_step" or (
            self.reference_pass == "auto" and pairs > MANY_PAIRS
        )

    @model_validator(mode="after")
    def _fit(self) -> DPO:
        check_one_length(self.steps, self.epochs, usual=1.0)
        return self
