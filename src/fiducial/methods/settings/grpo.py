"""Settings of GRPO, and its variants as plain data."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from ...building import Settings
from ...kl_choice import Penalty
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
    check_minibatches,
)

Advantage = Literal["grpo", "dr_grpo", "rloo"]
Loss = Literal["ppo_clip", "gspo", "cispo"]
LossAggregation = Literal["sequence_mean", "token_mean", "constant"]


class Parts(NamedTuple):
    """What a variant is made of; each part is the setting of the same name, but for `penalty`,
    which is the estimator of the KL.
    """

    advantage: Advantage
    loss: Loss
    loss_aggregation: LossAggregation
    clip: float
    clip_high: float | None
    cap: float
    beta: float
    penalty: Penalty
    resample: int


VARIANTS: dict[str, Parts] = {
    "grpo": Parts("grpo", "ppo_clip", "sequence_mean", 0.2, None, 5.0, 0.04, "forward_k3", 0),
    "dr_grpo": Parts("dr_grpo", "ppo_clip", "constant", 0.2, None, 5.0, 0.0, "k1", 0),
    "dapo": Parts("grpo", "ppo_clip", "token_mean", 0.2, 0.28, 5.0, 0.0, "k1", 8),
    "gspo": Parts("grpo", "gspo", "sequence_mean", 3e-4, 4e-4, 5.0, 0.0, "k1", 0),
    "cispo": Parts("grpo", "cispo", "token_mean", 0.2, None, 5.0, 0.0, "k1", 0),
}
"""The papers' values. A variant whose paper has no KL penalty uses k1 in the reward if --beta asks
for one.
"""


class GRPO(Settings):
    """GRPO and its variants: sample groups of responses, score them, and move the policy toward the
    better ones of each group.
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
    """The run folder. None: runs/grpo-1, -2, ..."""
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    """Sets advantage, loss, loss_aggregation, clip, clip_high, cap, resample and beta to its
    paper's values, except those that are given.
    """
    advantage: Advantage | None = None
    """Subtract the group's mean and divide by its standard deviation, subtract its mean alone, or
    subtract the mean of the others (rloo). None: dr_grpo for dr_grpo, grpo for all others.
    """
    loss: Loss | None = None
    """How the probability ratio enters the loss. With one optimizer step per iteration all three
    are the same. None: ppo_clip; for gspo and cispo their own.
    """
    loss_aggregation: LossAggregation | None = None
    """Equal weight per response (None for grpo, gspo), per token (dapo, cispo), or per token over a
    constant, max_new_tokens (dr_grpo).
    """
    clip: float | None = Field(default=None, gt=0)
    """How far a ratio may fall below 1 and still gain. None: 0.2; for gspo 0.0003. cispo ignores
    it.
    """
    clip_high: float | None = Field(default=None, gt=0)
    """How far a ratio may rise above 1 and still gain. None: as clip; for dapo 0.28, for gspo
    0.0004.
    """
    cap: float | None = Field(default=None, gt=0)
    """Largest weight per token, for cispo only. None: 5, as in ScaleRL (arXiv 2510.13786) and TRL.
    """
    resample: int | None = Field(default=None, ge=0)
    """Largest number of rounds in which prompts whose responses all score the same are replaced.
    None: 0; for dapo 8 (our choice; the paper has no limit).
    """
    off_policy_mask: float | None = Field(default=None, gt=0)
    """Leave out a response with negative advantage once the policy has made it this many nats per
    token less likely. None: off. DeepSeek-V3.2 (arXiv 2512.02556).
    """
    steps: int = Field(default=100, gt=0)
    """Iterations of sampling and improving. DeepSeekMath: one pass over 144,000 questions."""
    batch_size: int = Field(default=64, gt=0)
    """Responses per iteration, over all processes. DeepSeekMath: 1,024."""
    group_size: int = Field(default=8, gt=1)
    """Responses per prompt; batch_size must be a multiple of it. DeepSeekMath: 64; R1 and DAPO: 16.
    """
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps per epoch. Only in the first step of an iteration is every ratio 1.
    DeepSeekMath: 1; DAPO: 16; GSPO: 4.
    """
    epochs: int = Field(default=1, gt=0)
    """Passes over the responses of an iteration. 1: DeepSeekMath."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate. 1e-6: DeepSeekMath, DAPO. LoRA and small models need 10 to 1,000 times
    that.
    """
    beta: float | None = Field(default=None, ge=0)
    """KL coefficient. None: 0, no KL penalty; for grpo 0.04."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a response. DeepSeekMath: 1,024."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; it divides the logits in every log-probability too. 1: DAPO."""
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

    @model_validator(mode="before")
    @classmethod
    def _as_the_variant(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given is the variant's, so that config.yaml holds what was run."""
        parts = VARIANTS.get(str(values.get("variant", "grpo")))
        if parts is None:
            return values
        return values | {
            k: v for k, v in parts._asdict().items() if k != "penalty" and values.get(k) is None
        }

    @model_validator(mode="after")
    def _fit(self) -> GRPO:
        if self.batch_size % self.group_size:
            raise ValueError(
                f"--batch-size {self.batch_size} is not a multiple of --group-size "
                f"{self.group_size}: every prompt gets a whole group"
            )
        check_minibatches(self.minibatches, self.batch_size)
        self.score.check_length_buffer(self.max_new_tokens)
        self.kl.check_target(self.parts.beta)
        return self

    @property
    def parts(self) -> Parts:
        """The parts that are used."""
        _, penalty = self.kl.resolve(VARIANTS[self.variant].penalty)
        return Parts(
            **{k: getattr(self, k) for k in Parts._fields if k != "penalty"}, penalty=penalty
        )
