"""Settings of REINFORCE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...building import Settings
from ...names import ModelName, RowsName, ScorerName
from ...settings import (
    KLSettings,
    LongSettings,
    LoraSettings,
    OptimizerSettings,
    RowSettings,
    RunSettings,
    ScoreSettings,
    Seed,
    WorkerSettings,
)


class Reinforce(Settings):
    """REINFORCE: sample, score, and improve the policy without a critic. The baseline makes it
    RLOO, ReMax or REINFORCE++.
    """

    model: ModelName
    """The policy to start from: a folder or a Hub name. A frozen copy of it is the reference."""
    data: RowsName
    """Rows with a prompt: a file or a Hub name. Other columns are passed to the reward function."""
    reward: tuple[ScorerName, ...] = ()
    """A reward model's folder, file.py:function with TRL's signature, or exact_match,
    numeric_answer, format or length. Several rewards are added up.
    """
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward. None: 1 each."""
    out: str | None = None
    """The run folder. None: runs/reinforce-1, -2, ..."""
    baseline: Literal["none", "mean", "remax", "rloo", "reinforce++"] = "rloo"
    """What is subtracted from a return: nothing, a running mean, the greedy response's score, the
    mean of the group's others, or the batch's mean. rloo: Ahmadian et al. 2024.
    """
    credit: Literal["sequence_return", "reward_to_go"] | None = None
    """What a token is credited with: the return of the whole response, or the reward from that
    token on (for process rewards). None: sequence_return; for reinforce++ reward_to_go.
    """
    steps: int = Field(default=100, gt=0)
    """Iterations of sampling and one optimizer step. Ahmadian et al. 2024: 600 on Anthropic HH."""
    batch_size: int = Field(default=64, gt=0)
    """Responses per iteration, over all processes. Ahmadian et al. 2024: 512 and 256."""
    group_size: int = Field(default=4, gt=0)
    """Responses per prompt; batch_size must be a multiple of it. Only rloo needs more than 1.
    Ahmadian et al. 2024: 2 and 4.
    """
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate. 1e-6: Ahmadian et al. 2024. LoRA and small models need 10 to 1,000 times
    that.
    """
    beta: float = Field(default=0.03, ge=0)
    """KL coefficient. 0: no KL penalty. 0.03: Ahmadian et al. 2024."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a response. Ahmadian et al. 2024: 53 and 128."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; it divides the logits in every log-probability too. 1: the objective
    without change.
    """
    stop: tuple[str, ...] = ()
    """Tokens that end a response, in addition to the model's own ends."""
    seed: Seed = 0
    """Random seed for the order of the prompts and for sampling."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings (auto_map), where it needs any. Only for
    models whose authors you trust.
    """
    kl: KLSettings = KLSettings()
    score: ScoreSettings = ScoreSettings()
    worker: WorkerSettings = WorkerSettings()
    long: LongSettings = LongSettings()
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings(eval_every=10)

    @model_validator(mode="after")
    def _fit(self) -> Reinforce:
        if self.baseline == "rloo" and self.group_size < 2:
            raise ValueError(
                "--group-size 1 with --baseline rloo: a single response has no others to be "
                "compared with; give at least 2"
            )
        if self.batch_size % self.group_size:
            raise ValueError(
                f"--batch-size {self.batch_size} is not a multiple of --group-size "
                f"{self.group_size}: every prompt gets a whole group"
            )
        self.score.check_length_buffer(self.max_new_tokens)
        self.kl.check_target(self.beta)
        return self
