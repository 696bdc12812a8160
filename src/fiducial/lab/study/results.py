"""What the studies return: one dataclass per section of the page.

Numbers are exact unless they come from a run. KL is in nats per response; a gap is a share of
J(optimum) - J(reference). None means that a number was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Num = float | None


# ---- the decision process ----


@dataclass(frozen=True)
class Decision:
    """One token of the worked response; `pi` is its probability under the optimum."""

    state: str
    action: str
    pi: float
    ref: float
    log_ratio: float
    reward: float
    value: float
    q: float


@dataclass(frozen=True)
class DecisionProcess:
    """One response to one prompt, and the numbers of every formula about it."""

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
class SparseAnswer:
    """One answer to a reward that comes only at the end: both sides of its formula."""

    key: Literal["arm", "steps", "paid"]
    left: float
    right: float
    difference: float


# ---- the derivation ----


@dataclass(frozen=True)
class DerivationStep:
    """One step from the objective to DPO. A row is a label and the two sides."""

    key: Literal["objective", "partition", "optimal_policy", "reward", "cancels"]
    title: str
    words: str
    left_name: str
    right_name: str
    difference: Num
    rows: list[tuple[str, Num, Num]]


@dataclass(frozen=True)
class Recovered:
    """What minimizing DPO's loss over all pairs recovers of the optimum."""

    loss: Num
    entropy: Num
    largest_logprob_error: Num
    gradient_at_optimum: Num


# ---- the frontier and best-of-n ----


@dataclass(frozen=True)
class Optimum:
    """The optimum of a world as a point of the frontier."""

    kl: float
    reward: float
    beta: float


@dataclass(frozen=True)
class BestOfNRow:
    """Best-of-n for one n: its exact KL, the bound of that, its mean reward, and how often it beats
    one draw.
    """

    n: int
    kl: Num
    bound: Num = None
    reward: Num = None
    win_rate: Num = None
    win_bound: Num = None


@dataclass(frozen=True)
class BestOfN:
    """`ideal`: rewards without ties over many equally likely responses."""

    world: str
    rows: list[BestOfNRow]
    ideal: list[BestOfNRow] = field(default_factory=list)


@dataclass(frozen=True)
class Frontier:
    """The largest mean reward at each KL: one point per beta."""

    world: str
    beta: list[float]
    kl: list[float]
    reward: list[float]
    optimum: Optimum
    best_of_n: list[BestOfNRow] = field(default_factory=list)
    slope_error: Num = None
    variance_error: Num = None


# ---- labels ----


@dataclass(frozen=True)
class Start:
    """Where DPO ends from one start, when one response was never compared. The probabilities are
    those of that response, before and after.
    """

    start: str
    loss: Num
    total_variation: Num
    probability: Num
    start_probability: Num = None


@dataclass(frozen=True)
class Complete:
    """Where DPO ends when all pairs were compared."""

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
    reference_probability: Num = None
    optimum_probability: Num = None
    complete: Complete | None = None


@dataclass(frozen=True)
class AnnotatorRow:
    """An annotator's labels, and the policy that DPO makes of them. `excess`: the loss beyond the
    entropy of the labels; `length`: mean tokens per response of the minimizer.
    """

    name: str
    bayes_accuracy: Num
    entropy: Num
    total_variation: Num
    relative_gap: Num
    words: str = ""
    loss: Num = None
    excess: Num = None
    kl: Num = None
    length: Num = None


# ---- estimators ----


@dataclass(frozen=True)
class KLValue:
    """KL(pi, ref), and `forward`: KL(ref, pi)."""

    kl: float
    forward: float


@dataclass(frozen=True)
class KLEstimator:
    """An estimator of the KL: as a loss it is differentiated, in the reward it is a number."""

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
    """Two Gaussians whose means are `shift` apart: standard deviation of each estimator, and bias
    of k2, relative to the true KL.
    """

    shift: float
    k1: Num
    k2: Num
    k3: Num
    bias_k2: Num = None


@dataclass(frozen=True)
class KLTable:
    """The estimators of the KL, and the KL of each token position."""

    value: KLValue
    estimators: list[KLEstimator]
    schulman: list[Schulman] = field(default_factory=list)
    per_position: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class GradientEstimator:
    """The expectation of a gradient estimator against what it estimates. `variance` is that of one
    response (pair), relative to the squared length of the gradient; `exact`: computed by
    enumeration, not sampled.
    """

    name: str
    estimates: str
    cosine: Num
    relative_bias: Num
    scale: Num = None
    variance: Num = None
    exact: bool | None = None
    words: str = ""


# ---- over-optimization ----


@dataclass(frozen=True)
class Curve:
    """Mean proxy and mean true (gold) reward along the KL."""

    kl: list[float]
    proxy: list[float]
    gold: list[float]


@dataclass(frozen=True)
class CurvePoint:
    """The true reward at one root of the KL."""

    root_kl: float
    gold: float


@dataclass(frozen=True)
class GaoFit:
    """Coefficients of a fit, and its error in units of reward."""

    alpha: float
    beta: float
    rmse: Num = None


@dataclass(frozen=True)
class Overoptimization:
    """A proxy is optimized; what becomes of the true reward.

    fit: gold as d (alpha - beta d). rl_fit: gold as d (alpha - beta log d).
    error: standard errors of gold, where it was sampled.
    path: a trained policy on the same axes, drawn if it begins where the curve begins.
    """

    key: str
    title: str
    words: str
    curve: Curve
    turns_over: bool
    path: Curve | None = None
    peak: CurvePoint | None = None
    last: CurvePoint | None = None
    fit: GaoFit | None = None
    rl_fit: GaoFit | None = None
    error: list[float] | None = None


# ---- credit ----


@dataclass(frozen=True)
class CreditedResponse:
    """One response, token by token: the exact advantage, and that of each method. Positions of
    tokens count from 0.
    """

    response: str
    right: bool
    decisive: list[int]
    changed: list[int]
    probability: float
    exact: list[float]
    methods: dict[str, list[float]]


@dataclass(frozen=True)
class CreditRow:
    """A method's advantages against the exact ones, over all tokens of all responses."""

    key: str
    name: str
    words: str
    correlation: Num
    relative_error: Num
    variance: Num


@dataclass(frozen=True)
class Credit:
    """Which token deserves the credit, at a policy half-way through training. `samples`: responses
    that it had learned from by then.
    """

    world: str
    prompt: str
    step: int
    samples: int
    responses: list[CreditedResponse]
    rows: list[CreditRow]
