"""The sections of settings that methods share. This module imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from . import kl_choice
from .building import Settings
from .kl_choice import Penalty, Placement
from .names import RowsName

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A random seed, which every generator takes."""
Decay = Annotated[float, Field(ge=0, lt=1)]
"""The share of a running mean that stays at each step."""
MONTH = 43_200
"""Minutes."""
Tokens = int | Literal["auto"]
"""Padded tokens per micro-batch."""

Aggregate = Literal["last", "min", "product"]
"""How the scores of the steps of a solution become one score."""


class RowSettings(Settings):
    """How rows are read, rendered to tokens and split."""

    max_length: int | None = Field(default=None, gt=1)
    """Largest number of tokens in a row, prompt and response together. None: the model's context.
    """
    on_long: Literal["truncate", "error"] = "truncate"
    """What happens to a response beyond max_length: it is cut at its end and counted, or the
    command stops. A prompt that leaves no room for a response always stops it.
    """
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a bad row: the command stops and names its file and line, or the row is
    counted and written to skipped.jsonl.
    """
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a conversation are trained on: all of them, or the last."""
    chat_template: str | None = None
    """`chatml` or a Jinja file, for a tokenizer without a template. None: the tokenizer's own."""
    eos_token: str | None = None
    """The token that is learned as the end of plain text. None: the tokenizer's EOS token.
    Responses also end where the chat template ends a turn, and at what the model's configs name.
    """
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts kept for evaluation and never trained on. Our choice; no published
    value. ppo, reinforce and grpo train on all prompts: measure them with `fiducial eval`.
    """
    eval_data: RowsName | None = None
    """Rows to evaluate on, in place of the held-out share: a file or a Hub name."""


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), through peft."""

    r: int = Field(default=0, ge=0)
    """Rank of the adapters. 0: no adapters; all weights are trained."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / r. 16: our choice."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that get an adapter. None: every linear layer of the transformer."""

    @model_validator(mode="after")
    def _has_a_rank(self) -> LoraSettings:
        if self.target_modules is not None and self.r == 0:
            raise ValueError(
                "--lora.target-modules without --lora.r: no adapter has rank 0; give --lora.r 16"
            )
        return self


class OptimizerSettings(Settings):
    """AdamW and the schedule of its learning rate."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's two moments. 0.9 and 0.95: InstructGPT."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of AdamW's second moment. 1e-8: PyTorch's default."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of matrices (embeddings and linear layers), not of norms and biases.
    0: InstructGPT.
    """
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after warm-up: constant, linear to zero, or a cosine to a tenth of the peak
    (InstructGPT).
    """
    warmup_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps over which the learning rate rises linearly to its peak. None: 0; for dpo
    150 (the paper), but at most a tenth of the run.
    """
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a larger gradient is scaled down to it. 1: the usual value."""


class RunSettings(Settings):
    """Memory, precision, checkpoints and evaluation."""

    tokens: Tokens = 8192
    """Padded tokens per micro-batch. Lower it if memory runs out; the result does not change. auto:
    as many as fit into memory. 8192: our choice.
    """
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory that a process may use, in units of 10^9 bytes: auto and the warning at the start go
    by it. None: what it uses already, and what is free.
    """
    checkpoint_every: int = Field(default=100, ge=0)
    """Steps between checkpoints, beside those of checkpoint_minutes. 0: none by steps. The last
    step always has one, and so has the step after which a run is stopped.
    """
    checkpoint_minutes: float = Field(default=10.0, ge=0, le=MONTH)
    """Minutes after which a checkpoint is made whatever the step. 0: none by time. 10: our choice;
    no published value.
    """
    keep_checkpoints: int = Field(default=2, gt=0)
    """Number of recent checkpoints to keep. The one with the lowest held-out loss is kept too."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens when a gradient is NaN or infinite: the run stops, or this update is left out
    and counted. Either way the batch is kept in bad-batch.safetensors and bad-batch.jsonl.
    """
    changed_inputs: Literal["refuse", "accept"] = "refuse"
    """What --resume does where data, a model, the tokenizer or a reward has other bytes than when
    the run began: it refuses, or goes on and says so.
    """
    nonfinite_limit: int = Field(default=3, ge=0)
    """Updates in a row that on_nonfinite skip leaves out before the run stops. 3: our choice; no
    published value.
    """
    eval_every: int = Field(default=50, ge=0)
    """Steps between evaluations on the held-out rows, for methods that keep some. 0: only at the
    end.
    """
    samples: int = Field(default=8, ge=0)
    """Number of prompts answered before and after training, for the run's page."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass. Weights and optimizer state stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    timeout_minutes: float = Field(default=10.0, gt=0, le=MONTH)
    """How long one process waits for the others before all of them stop with an error."""
    on_alarm: Literal["warn", "stop", "off"] = "warn"
    """When the numbers of a run look wrong: warn says so and writes it to alarms.jsonl, stop saves
    a checkpoint as well and ends the run, off judges nothing. warn: our choice.
    """

    @field_validator("tokens", mode="before")
    @classmethod
    def _a_number_or_auto(cls, value: Any) -> Any:
        if value == "auto":
            return value
        text = "" if isinstance(value, bool) else str(value).strip()
        if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) > 0):
            raise PydanticCustomError("tokens", "input should be a whole number above 0, or auto")
        return int(text)


class WorkerSettings(Settings):
    """Where a reward function or a judge from a Python file runs: in a process of its own, with
    limits.
    """

    seconds: float = Field(default=480.0, gt=0, le=MONTH * 60)
    """Longest time of one call of the function, or of loading its file. 480: our choice. A judge
    behind an endpoint needs minutes, and other processes wait for ten (--run.timeout-minutes).
    """
    gigabytes: float | None = Field(default=None, gt=0)
    """Most memory that the function may use, with all processes that it starts. None: half of the
    machine's memory. Our choice. Measured on Linux only.
    """
    in_process: bool = False
    """Call the function in the process of the command, without limits: for a function that needs
    what is in that process, such as its process group of torch.
    """


def check_minibatches(minibatches: int, batch_size: int) -> None:
    """Refuse more optimizer steps over a batch than it has responses.

    Raises:
        ValueError: with what to do.
    """
    if minibatches > batch_size:
        raise ValueError(
            f"--minibatches {minibatches} of a --batch-size of {batch_size}: every minibatch needs "
            f"a response of its own; give at most {batch_size}"
        )


def check_one_length(steps: int | None, epochs: float, usual: float) -> None:
    """Refuse a length in steps beside one in epochs that is not the default, `usual`.

    Raises:
        ValueError: with what to do.
    """
    if steps is not None and epochs != usual:
        raise ValueError(f"--steps {steps} and --epochs {epochs:g}: give one of them")


class KLSettings(Settings):
    """The KL penalty to the reference: where it acts, its estimator, and how beta adapts."""

    placement: Placement | None = None
    """Where the penalty acts: in the reward of each token, or as a term of the loss, unaffected by
    the scaling of the advantages. None: where the estimator is right.
    """
    estimator: Penalty | None = None
    """k1 in the reward and k2 in the loss are exact; the others are losses of known bias. None: k1;
    for the grpo variant forward_k3. With beta 0 it only measures the KL.
    """
    target: float | None = Field(default=None, gt=0)
    """KL in nats per response that beta is adapted to hold. None: beta stays. Ziegler et al. 2019:
    6 for style, none for summaries.
    """
    horizon: int = Field(default=10_000, gt=0)
    """Responses over which an error of 20% changes beta by a factor of about 1.2. 10,000: Ziegler
    et al. 2019.
    """

    @model_validator(mode="after")
    def _check(self) -> KLSettings:
        kl_choice.check(self.placement, self.estimator)
        return self

    def check_target(self, beta: float) -> None:
        """Refuse a target that cannot be held: a beta of 0 stays 0 however it is multiplied.

        Raises:
            ValueError: with what to do.
        """
        if self.target is not None and beta == 0:
            raise ValueError(
                f"--kl.target {self.target:g} with a beta of 0: the target is held by multiplying "
                "beta, so give a --beta above 0 to start from"
            )

    def reads_reference(self, beta: float) -> bool:
        """Whether a run with this beta needs the reference: for a penalty, or to measure the KL."""
        return beta > 0 or self.estimator is not None

    def resolve(self, default: Penalty = "k1") -> tuple[Placement, Penalty]:
        """Placement and estimator; `default` is the method's own estimator."""
        return kl_choice.resolve(self.placement, self.estimator, default)

    def next_beta(self, beta: float, nats: float | None, responses: int) -> float:
        """The coefficient for the next iteration, after `responses` with a mean KL of `nats`.

        Without a target it is `beta` itself, and so it is without a reference, where `nats` is
        None.
        """
        if self.target is None or nats is None:
            return beta
        return kl_choice.adapt(
            beta, nats, target=self.target, episodes=responses, horizon=self.horizon
        )


class ScoreSettings(Settings):
    """What is done to a score before it becomes a reward."""

    normalise: Literal["none", "first", "batch"] = "none"
    """Subtract the mean of the scores and divide by their standard deviation: those of the first
    batch whose scores differ (Ziegler et al. 2019), or those of each batch if its scores differ.
    """
    clip: float | None = Field(default=None, gt=0)
    """Largest absolute score, after normalization. None: no clipping. PPO-max (Zheng et al. 2023,
    arXiv 2307.04964) clips.
    """
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the score of a response that was cut at the limit, as in TRL. Huang et al.
    2024 (N+) set that score to -1 instead.
    """
    length_buffer: int = Field(default=0, ge=0)
    """Last tokens below the limit over which a length penalty grows linearly. 0: off. DAPO (arXiv
    2503.14476, eq. 13): 4,096 of 20,480.
    """
    length_penalty: float = Field(default=1.0, gt=0)
    """Largest length penalty, subtracted from the score of a response at its limit. 1: DAPO."""

    def check_length_buffer(self, max_new_tokens: int) -> None:
        """Raises: ValueError: the length penalty would begin before the response does."""
        if self.length_buffer > max_new_tokens:
            raise ValueError(
                f"--score.length-buffer {self.length_buffer} with --max-new-tokens "
                f"{max_new_tokens}: the buffer is the last tokens below the limit, "
                "so it cannot be longer than the limit itself"
            )


class LongSettings(Settings):
    """Long responses, and a sampler that differs from the trainer. Off by default."""

    mask_truncated: bool = False
    """Leave responses that were cut at the limit out of the loss (DAPO's overlong filter). Their
    reward is noise, but leaving them out changes the objective.
    """
    correction: Literal["none", "tis", "icepop", "sequence_tis", "sequence_mis"] = "none"
    """Importance weights for a sampler that differs from the trainer: per token (tis, icepop), or
    per response (sequence_tis, sequence_mis), which is the exact correction.
    """
    cap: float = Field(default=2.0, gt=1)
    """Largest weight. Truncated weights (tis) are clipped at it; masked ones (icepop, mis) are
    dropped beyond it. 2: veRL; TRL: 3.
    """
    floor: float = Field(default=0.5, ge=0, lt=1)
    """Smallest weight that icepop keeps. 0.5: the inverse of the cap. Our choice; no published
    value.
    """


class TrainingSettings(Protocol):
    """What the settings of every method have."""

    @property
    def out(self) -> str | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def resume(self) -> bool: ...

    @property
    def run(self) -> RunSettings: ...

    @property
    def optimizer(self) -> OptimizerSettings: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class CommonSettings(Protocol):
    """The settings that all methods have."""

    @property
    def model(self) -> str: ...

    @property
    def data(self) -> str: ...

    @property
    def rows(self) -> RowSettings: ...

    @property
    def lora(self) -> LoraSettings: ...

    @property
    def run(self) -> RunSettings: ...

    @property
    def seed(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def trust_remote_code(self) -> bool: ...


class OfflineSettings(CommonSettings, Protocol):
    """The settings of a method that learns from rows."""

    @property
    def epochs(self) -> float: ...

    @property
    def steps(self) -> int | None: ...


class OnlineSettings(CommonSettings, Protocol):
    """The settings of a method that learns from its own samples and their rewards."""

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def reward(self) -> tuple[str, ...]: ...

    @property
    def reward_weights(self) -> tuple[float, ...] | None: ...

    @property
    def score(self) -> ScoreSettings: ...

    @property
    def worker(self) -> WorkerSettings: ...

    @property
    def steps(self) -> int: ...
