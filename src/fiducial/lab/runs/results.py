"""What the lab's runs return, and `LabResults`: everything that the page shows and that `lab.json`
holds.

KL is in nats per response, times are in seconds, a gap is a share of J(optimum) - J(reference).
None means that a number was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..study.results import (
    AnnotatorRow,
    BestOfN,
    Credit,
    DecisionProcess,
    DerivationStep,
    Frontier,
    GradientEstimator,
    KLTable,
    Missing,
    Num,
    Overoptimization,
    Recovered,
    SparseAnswer,
)


@dataclass(frozen=True)
class WorldFacts:
    """The facts of a world that is small enough to enumerate. `words`: one sentence that says what
    it is for.
    """

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
class PathPoint:
    """A policy during training, measured exactly. `samples`: responses sampled by then; `gold`: the
    true reward, where a proxy is trained on.
    """

    step: int
    kl: Num
    reward: Num
    relative_gap: Num
    samples: float = 0
    total_variation: Num = None
    gap: Num = None
    gold: Num = None


@dataclass(frozen=True)
class RunResult:
    """Where one run ended. `kl_optimum`: that of the world it was trained on, because each seed has
    a world of its own.
    """

    seed: int
    relative_gap: Num
    gap: Num = None
    total_variation: Num = None
    kl: Num = None
    reward: Num = None
    gold: Num = None
    samples: float = 0
    pairs: float = 0
    seconds: Num = None
    kl_optimum: Num = None
    path: list[PathPoint] = field(default_factory=list)


@dataclass(frozen=True)
class MeasuredRun:
    """One run with the log-probabilities [P, Y] behind its numbers: `trail` has those of each point
    of the path, `final` those of the end.
    """

    result: RunResult
    trail: list[list[list[float]]]
    final: list[list[float]]
    credit: Credit | None = None


@dataclass(frozen=True)
class MethodResult:
    """A method with one kind of policy in one world, all seeds. `estimator`: the name of the row in
    `estimators` that stands behind it; without one, the only row that has the method's name.
    """

    method: str
    name: str
    policy: str
    world: str
    runs: list[RunResult]
    setting: str = ""
    cause: str | None = None
    estimator: str | None = None


@dataclass(frozen=True)
class Change:
    """A method with one part exchanged. `nearest`: the known optimum that it ended nearest to, and
    `distance`: the total variation to that. `cut`: share of responses at the length limit.
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
class Sensitivity:
    """The relative gap: one row per beta, one column per learning rate."""

    method: str
    name: str
    policy: str
    world: str
    learning_rates: list[float]
    betas: list[float]
    relative_gap: list[list[Num]]
    setting: str = ""


@dataclass(frozen=True, kw_only=True)
class Studies:
    """The sections that need no run. A section that was not computed is None."""

    frontier: Frontier | None = None
    setting: DecisionProcess | None = None
    sparse: list[SparseAnswer] | None = None
    derivation: list[DerivationStep] | None = None
    recovered: Recovered | None = None
    missing: Missing | None = None
    labels: list[AnnotatorRow] | None = None
    kl: KLTable | None = None
    estimators: list[GradientEstimator] | None = None
    best_of_n: BestOfN | None = None
    overoptimisation: list[Overoptimization] | None = None


@dataclass(frozen=True, kw_only=True)
class LabResults(Studies):
    """All that the page shows. `timings`: seconds per stage."""

    form: str
    seed: int
    command: str
    machine: str
    versions: dict[str, str]
    timings: dict[str, float]
    worlds: list[WorldFacts] | None = None
    methods: list[MethodResult] | None = None
    sensitivity: list[Sensitivity] | None = None
    parts: list[Change] | None = None
    lengths: list[Change] | None = None
    credit: Credit | None = None

    def world(self, key: str) -> WorldFacts | None:
        """The facts of a world by its key."""
        return next((w for w in self.worlds or [] if w.key == key), None)
