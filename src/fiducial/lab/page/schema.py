"""What the lab's page is given: `lab.json` as classes. A key that the page does not know at the
top, or a missing one below, is an error that names it.

Numbers are exact unless they come from a run; KL in nats per response, times in seconds, gaps as
shares of J(optimum) - J(reference). None: not measured. A section that was not computed is absent
or None.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ...errors import InputError

Num = float | None


@dataclass(frozen=True)
class World:
    """A world small enough to enumerate. `words` says in one sentence what it is for."""

    key: str
    words: str
    prompts: int
    responses: int
    vocabulary: int
    horizon: int
    beta: float
    kl_optimum: Num
    objective_reference: Num
    objective_optimum: Num


@dataclass(frozen=True)
class Step:
    """A run on its way, measured exactly."""

    step: int
    kl: Num
    reward: Num
    relative_gap: Num
    samples: float = 0
    total_variation: Num = None


@dataclass(frozen=True)
class Result:
    """Where one seed of a method ended. `kl_optimum`: of the world that it was trained on, where
    each seed has its own.
    """

    seed: int
    relative_gap: Num
    gap: Num = None
    total_variation: Num = None
    kl: Num = None
    reward: Num = None
    samples: float = 0
    pairs: float = 0
    seconds: Num = None
    kl_optimum: Num = None
    path: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """A method with a policy in a world. `estimator`: the name of the row in `estimators` that
    stands behind it; else the only one with its name.
    """

    method: str
    name: str
    policy: str
    world: str
    runs: list[Result]
    setting: str = ""
    cause: str | None = None
    estimator: str | None = None


@dataclass(frozen=True)
class Optimum:
    kl: float
    reward: float
    beta: float


@dataclass(frozen=True)
class Chosen:
    """Best of n: exact KL, its bound, mean reward, and how often it beats one draw."""

    n: int
    kl: Num
    bound: Num = None
    reward: Num = None
    win_rate: Num = None
    win_bound: Num = None


@dataclass(frozen=True)
class Frontier:
    """The best mean reward at every KL, a point a beta."""

    world: str
    beta: list[float]
    kl: list[float]
    reward: list[float]
    optimum: Optimum
    best_of_n: list[Chosen] = field(default_factory=list)
    slope_error: Num = None
    variance_error: Num = None


@dataclass(frozen=True)
class Decision:
    """One token of the worked response. `pi` is the optimum's probability."""

    state: str
    action: str
    pi: float
    ref: float
    log_ratio: float
    reward: float
    value: float
    q: float


@dataclass(frozen=True)
class Setting:
    """One response of one prompt, and the numbers of every formula about it."""

    prompt: str
    response: str
    probability: float
    reward: float
    steps: list[Decision]
    sum_log_ratio: float
    expected_reward: float
    kl: float
    beta: float
    objective: float
    beta_log_z: float
    z: list[float]
    probabilities_sum: float


@dataclass(frozen=True)
class Answer:
    """One answer to a reward that comes only at the end, both sides of its formula."""

    key: Literal["arm", "steps", "paid"]
    left: float
    right: float
    difference: float


@dataclass(frozen=True)
class Derivation:
    """A step from the objective to DPO, both sides computed."""

    key: Literal["objective", "partition", "optimal_policy", "reward", "cancels"]
    title: str
    words: str
    left_name: str
    right_name: str
    difference: Num
    rows: list[tuple[str, Num, Num]]


@dataclass(frozen=True)
class Recovered:
    """Minimising DPO's loss over all pairs."""

    loss: Num
    entropy: Num
    largest_logprob_error: Num
    gradient_at_optimum: Num


@dataclass(frozen=True)
class Start:
    start: str
    loss: Num
    total_variation: Num
    probability: Num


@dataclass(frozen=True)
class Complete:
    loss: Num
    total_variation: Num


@dataclass(frozen=True)
class Missing:
    """One response that no pair holds, and where DPO ends from several starts."""

    world: str
    prompt: str
    never_compared: str
    starts: list[Start]
    words: str = ""
    optimum_probability: Num = None
    complete: Complete | None = None


@dataclass(frozen=True)
class Annotator:
    name: str
    bayes_accuracy: Num
    entropy: Num
    total_variation: Num
    relative_gap: Num
    words: str = ""


@dataclass(frozen=True)
class Value:
    kl: float
    forward: float


@dataclass(frozen=True)
class KLEstimator:
    """As a loss it is differentiated; as a reward it is a number."""

    name: str
    mean: Num
    bias: Num
    std: Num
    loss_gradient: str
    cosine_loss: Num = None
    relative_error_loss: Num = None
    cosine_reward: Num = None
    relative_error_reward: Num = None


@dataclass(frozen=True)
class Schulman:
    """Two Gaussians `shift` apart: deviations relative to the true KL."""

    shift: float
    k1: Num
    k2: Num
    k3: Num
    bias_k2: Num = None


@dataclass(frozen=True)
class KL:
    value: Value
    estimators: list[KLEstimator]
    schulman: list[Schulman] = field(default_factory=list)
    per_position: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator's expectation against what it estimates; variance of one sample relative
    to the square of the gradient's length.
    """

    name: str
    estimates: str
    cosine: Num
    relative_bias: Num
    scale: Num = None
    variance: Num = None
    exact: bool | None = None
    words: str = ""


@dataclass(frozen=True)
class BestOfN:
    world: str
    rows: list[Chosen]
    ideal: list[Chosen] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    kl: list[float]
    proxy: list[float]
    gold: list[float]


@dataclass(frozen=True)
class Place:
    root_kl: float
    gold: float


@dataclass(frozen=True)
class Fit:
    alpha: float
    beta: float
    rmse: Num = None


@dataclass(frozen=True)
class Overoptimisation:
    """A proxy climbed, and the true value meanwhile.

    path: a trained policy on the same axes, drawn where it begins where the curve begins.
    fit: d(alpha - beta d). rl_fit: d(alpha - beta log d). error: standard errors of gold, where it
    was sampled.
    """

    key: str
    title: str
    words: str
    curve: Curve
    turns_over: bool
    path: Curve | None = None
    peak: Place | None = None
    last: Place | None = None
    fit: Fit | None = None
    rl_fit: Fit | None = None
    error: list[float] | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Relative gap, a row a beta and a column a learning rate."""

    method: str
    name: str
    policy: str
    world: str
    learning_rates: list[float]
    betas: list[float]
    relative_gap: list[list[Num]]
    setting: str = ""


@dataclass(frozen=True)
class Change:
    """A method with a part exchanged. `nearest`: whose optimum it ended nearest to, and the total
    variation to that; `cut`: share of responses at the limit.
    """

    name: str
    words: str
    relative_gap: Num
    total_variation: Num
    nearest: str
    distance: Num
    cut: Num
    cut_optimum: Num
    seed: int = 0


@dataclass(frozen=True)
class Told:
    """One response, token by token: the exact advantage and that of each method. Numbers of tokens
    count from 0.
    """

    response: str
    right: bool
    decisive: list[int]
    changed: list[int]
    probability: float
    exact: list[float]
    methods: dict[str, list[float]]


@dataclass(frozen=True)
class Credited:
    """A method's advantages against the exact ones, over all tokens of all responses."""

    key: str
    name: str
    words: str
    correlation: Num
    relative_error: Num
    variance: Num


@dataclass(frozen=True)
class Credit:
    """Which token deserves the credit, at a policy on its way. `samples`: that it had learned from
    by then.
    """

    world: str
    prompt: str
    step: int
    samples: int
    responses: list[Told]
    rows: list[Credited]


@dataclass(frozen=True)
class Lab:
    """All that the page shows. `timings` in seconds by stage."""

    form: str
    seed: int
    command: str
    machine: str
    versions: dict[str, str]
    timings: dict[str, float]
    worlds: list[World] | None = None
    methods: list[Trained] | None = None
    frontier: Frontier | None = None
    setting: Setting | None = None
    sparse: list[Answer] | None = None
    derivation: list[Derivation] | None = None
    recovered: Recovered | None = None
    missing: Missing | None = None
    labels: list[Annotator] | None = None
    kl: KL | None = None
    estimators: list[Estimator] | None = None
    best_of_n: BestOfN | None = None
    overoptimisation: list[Overoptimisation] | None = None
    sensitivity: list[Sensitivity] | None = None
    parts: list[Change] | None = None
    lengths: list[Change] | None = None
    credit: Credit | None = None

    def world(self, key: str) -> World | None:
        return next((w for w in self.worlds or [] if w.key == key), None)


def read_lab(data: dict[str, Any]) -> Lab:
    """Checks a dictionary against the schema. Below the top, keys that the page does not show are
    passed over: the file holds more than the page.
    """
    unknown = sorted(set(data) - {one.name for one in fields(Lab)})
    if unknown:
        raise InputError(
            "the lab's data have a part that the page does not know: "
            f"{', '.join(map(repr, unknown))}"
        )
    try:
        return TypeAdapter(Lab).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"the lab's data do not fit the page at {place!r}: {first['msg']}"
        ) from error
