"""Settings of on-policy distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...building import Settings
from ...names import ModelName, RowsName
from ...settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Seed


class Distill(Settings):
    """On-policy distillation: bring a student to a teacher's distribution on the student's own
    samples.
    """

    model: ModelName
    """The student to start from: a folder or a Hub name. Fine-tune an untrained student first,
    since it learns from its own samples.
    """
    teacher: ModelName
    """The model to learn from: a folder or a Hub name. It must have the student's token ids."""
    data: RowsName
    """Rows with a prompt: a file or a Hub name. Other columns are not used."""
    out: str | None = None
    """The run folder. None: runs/distill-1, -2, ..."""
    estimator: Literal["exact", "sampled"] = "exact"
    """exact: the KL of each state over the whole vocabulary (GKD). sampled: log(pi / pi_T) of the
    sampled token (Thinking Machines 2025).
    """
    discount: float = Field(default=0.0, ge=0, le=1)
    """How much of the KL in later states a token pays for, a factor per token. 0: GKD, Thinking
    Machines 2025. 1: the exact gradient, with more variance.
    """
    steps: int = Field(default=100, gt=0)
    """Iterations of sampling and one optimizer step. Thinking Machines 2025: 150."""
    batch_size: int = Field(default=64, gt=0)
    """Responses per iteration, over all processes. 64: our choice; no published value."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate. 1e-5: our choice, as for sft. LoRA and small models need 10 to 100 times
    that.
    """
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a response. 64: our choice, as for ppo."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; it divides the logits of both models. 1: GKD."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response, in addition to the model's own ends."""
    eval_samples: int = Field(default=128, gt=0)
    """Responses to held-out prompts per evaluation. 128: our choice; no published value."""
    seed: Seed = 0
    """Random seed for the order of the prompts and for sampling."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()
