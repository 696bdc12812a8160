"""Settings of PPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...building import Settings
from ...names import ModelName, RowsName, ScorerName
from ...settings import (
    KLSettings,
    LoraSettings,
    OptimizerSettings,
    RowSettings,
    RunSettings,
    ScoreSettings,
    Seed,
    WorkerSettings,
    check_minibatches,
)


class CriticSettings(Settings):
    """The value model."""

    start: Literal["auto", "reward", "policy", "shared"] = "auto"
    """Start from the reward model (Stiennon et al. 2020), from the policy with a new head, or share
    the policy's trunk with a new head. auto: reward where its scores alone are the rewards,
    otherwise policy.
    """
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the critic. None: the policy's."""
    coefficient: float = Field(default=0.1, gt=0)
    """Weight of the value loss. 0.1: Ziegler et al. 2019."""
    clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from its old value in one iteration, in units of reward. None: no
    clipping. 0.2: Ziegler et al. 2019.
    """


class PtxSettings(Settings):
    """PPO-ptx: a language-modeling loss mixed in against forgetting."""

    data: RowsName | None = None
    """Rows with text, messages, or prompt and completion: a file or a Hub name. None: off."""
    coefficient: float = Field(default=27.8, gt=0)
    """Weight of that loss. 27.8: InstructGPT."""
    batch_size: int = Field(default=8, gt=0)
    """Rows per optimizer step. 8: our choice; no published value."""


class PPO(Settings):
    """PPO: sample, score, and improve the policy, with a critic and a KL penalty to a frozen
    reference.
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
    """The run folder. None: runs/ppo-1, -2, ..."""
    steps: int = Field(default=100, gt=0)
    """Iterations of sampling and improving. InstructGPT: 500 iterations of 512 responses."""
    batch_size: int = Field(default=64, gt=0)
    """Responses per iteration, over all processes. InstructGPT: 512."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps per epoch, over parts of the batch whose sizes differ by at most one
    response. 1: Ziegler et al. 2019; Huang et al. 2024 (N+).
    """
    epochs: int = Field(default=4, gt=0)
    """Passes over the responses of an iteration. 4: Ziegler et al. 2019."""
    learning_rate: float = Field(default=3e-6, gt=0)
    """Peak learning rate. 3e-6: Huang et al. 2024 (N+). LoRA and small models need 10 to 100 times
    that.
    """
    beta: float = Field(default=0.05, ge=0)
    """KL coefficient. 0: no KL penalty. 0.05: Stiennon et al. 2020; Huang et al. 2024 (N+).
    InstructGPT: 0.02.
    """
    clip: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may move from 1 and still gain. 0.2: Schulman et al.
    2017.
    """
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token. 1: InstructGPT."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda. 0.95: Ziegler et al. 2019."""
    whiten: bool = True
    """Scale the advantages of an iteration to mean 0 and standard deviation 1. Ziegler et al. 2019.
    """
    target_kl: float | None = Field(default=None, gt=0)
    """Stop the epochs of an iteration once the policy is this many nats per token from the policy
    that sampled. None: off. Spinning Up: 0.015.
    """
    max_new_tokens: int = Field(default=64, gt=0)
    """Largest number of tokens in a response. Ziegler et al. 2019: 24 to 75."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; it divides the logits in every log-probability too. 1: InstructGPT."""
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
    critic: CriticSettings = CriticSettings()
    score: ScoreSettings = ScoreSettings()
    worker: WorkerSettings = WorkerSettings()
    ptx: PtxSettings = PtxSettings()
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings(eval_every=10)

    @model_validator(mode="after")
    def _fit(self) -> PPO:
        check_minibatches(self.minibatches, self.batch_size)
        self.score.check_length_buffer(self.max_new_tokens)
        self.kl.check_target(self.beta)
        return self
