"""What the demo measures, as the page shows it.

Values are checked when an object is made. Shares lie in 0..1, KL in nats, times in seconds, memory
in bytes. Intervals are 95%.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ..report.numbers import Estimate

STRICT = ConfigDict(extra="forbid")
Link = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.][A-Za-z0-9_./-]*$")]
"""A relative path: no scheme and no leading slash."""


@dataclass(frozen=True, config=STRICT)
class Measured:
    """An estimate with its 95% interval and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, interval: Mapping[str, float]) -> "Measured":
        """From what `core.intervals` returns."""
        return cls(interval["value"], interval["low"], interval["high"], int(interval["n"]))

    @property
    def e(self) -> Estimate:
        """The same for the functions that write numbers."""
        return Estimate(self.value, self.low, self.high, self.n)


@dataclass(frozen=True, config=STRICT)
class Sensitivity:
    """The same method with one setting changed, such as `beta 0.02` or `learning rate x3`."""

    setting: str
    win_rate: Measured
    kl: float  # nats per response


@dataclass(frozen=True, config=STRICT)
class MethodResult:
    """One trained model.

    key: the run's folder. method: its name in the table of methods, which gives title and color.
    gold: mean true value on held-out prompts. proxy: mean score of the reward model on the same
    responses, in the units of gold. win_rate: share of held-out prompts on which its true value
    beats SFT's, ties counted as one half. models_held: the models in memory while training, such as
    policy, reference, critic, reward model. responses_sampled: by the policy while it was trained.
    distinct: share of different ones among all pairs of neighboring words in its samples.
    """

    key: str
    method: str
    gold: Measured
    proxy: Measured
    win_rate: Measured | None  # None for SFT itself
    kl: Measured | None  # nats per response against SFT; None for SFT itself
    kl_token: float | None  # nats per token against SFT; None for SFT itself
    length: float  # mean tokens of a response
    models_held: tuple[str, ...]
    train_seconds: float
    responses_sampled: int
    online: bool
    peak_memory_bytes: int
    distinct: float
    entropy: float  # nats per token on its own samples
    sensitivity: tuple[Sensitivity, ...]
    report: Link  # relative path of the run's report.html


@dataclass(frozen=True, config=STRICT)
class PathPoint:
    """A method on its way: KL in nats per response, proxy and gold in the same units."""

    step: int
    kl: float
    proxy: float
    gold: float


@dataclass(frozen=True, config=STRICT)
class Reliability:
    """Held-out pairs whose predicted preference is about `predicted`, and the share of them in
    which it was observed.
    """

    predicted: float
    observed: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, config=STRICT)
class RewardModelResult:
    """The learned reward.

    bayes: the accuracy of the true value itself on these labels, which are noisy; nothing can do
    better. length_only: the accuracy of preferring the longer response (or the shorter, if that is
    better). comparisons: the number of training pairs.
    """

    accuracy: Measured
    bayes: float
    length_only: Measured
    comparisons: int
    reliability: tuple[Reliability, ...]
    report: Link


@dataclass(frozen=True, config=STRICT)
class Answer:
    """What one model, named by the key of its result, answered to one prompt."""

    key: str
    text: str
    gold: float
    proxy: float


@dataclass(frozen=True, config=STRICT)
class Sample:
    """One prompt and the answers of all models."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, config=STRICT)
class Comparison:
    """All that was measured. `paths` are by the key of a result; `score_unit` is that of gold and
    proxy; `task` says in a few sentences what the world asks for and what the true value counts.
    """

    methods: tuple[MethodResult, ...]
    reward_model: RewardModelResult
    paths: dict[str, tuple[PathPoint, ...]]
    samples: tuple[Sample, ...]
    score_unit: str
    task: str
    notes: tuple[str, ...]

    def method(self, key: str) -> MethodResult | None:
        """The result with this key."""
        return next((m for m in self.methods if m.key == key), None)


@dataclass(frozen=True, config=STRICT)
class Circumstances:
    """How the comparison was made. `timings` are by stage."""

    seed: int
    command: str
    machine: str
    versions: dict[str, str]
    timings: dict[str, float]
