"""How much memory a run will need: what it computes at a time, and the plan that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A micro-batch: its number of rows, their padded length in tokens, and how many tokens of each
    row are labels.
    """

    rows: int
    width: int
    labels: int

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.rows * self.width


@dataclass(frozen=True)
class Sampling:
    """Responses that are sampled side by side: their number, that of different prompts, the longest
    prompt in tokens, and the tokens of the longest response.
    """

    rows: int
    prompts: int
    width: int
    new: int


@dataclass(frozen=True)
class Models:
    """The models of a run: folders or Hub names.

    scored: the model that is trained has a scalar head and is no policy. reference: whether a
    frozen reference is read. critic: where one starts, `load.SHARED` for a head on the policy.
    rewards: reward models that score responses. exact: the teacher is compared over the whole
    vocabulary. trust: whether Python code of the folders may run.
    """

    trained: str
    scored: bool = False
    reference: bool = False
    critic: str | None = None
    teacher: str | None = None
    exact: bool = True
    rewards: tuple[str, ...] = ()
    trust: bool = False


@dataclass(frozen=True)
class Work:
    """The largest pieces of what a run computes.

    tokens: the budget of padded tokens, from which the micro-batches follow. first: the largest
    first micro-batch of an optimizer step, which finds no gradients there. later: the largest of
    all others; None if every step has one micro-batch. probe: the length in tokens of the two rows
    that are compared at the start. once: whether the run has only one optimizer step. copies:
    gradients held a second time, by processes that exchange them. shared: a row holds a beginning
    once and two continuations.
    """

    tokens: int
    first: Shape
    later: Shape | None
    probe: int
    sampling: Sampling | None = None
    once: bool = False
    copies: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Plan:
    """The memory of a run in bytes.

    phases: of each phase of the run the largest amount at a time, by what it is for. process: what
    the process holds besides tensors: Python, its libraries and the rows.
    """

    tokens: int
    phases: Mapping[str, Mapping[str, int]]
    process: int

    @property
    def peak(self) -> int:
        """The largest amount at a time."""
        return self.process + max(sum(uses.values()) for uses in self.phases.values())

    @property
    def busiest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    def fits(self, limit: int) -> bool:
        """Whether the peak is below a limit in bytes, with a tenth to spare."""
        return self.peak <= 0.9 * limit

    def lines(self) -> list[str]:
        """A small table: what is held at the peak, and the peak of every phase."""
        held = {"process (Python, libraries, rows)": self.process, **self.phases[self.busiest]}
        rows = [(use, size) for use, size in held.items() if size]
        width = max(len(use) for use, _ in rows)
        out = [f"memory at the peak, in {self.busiest}, with --run.tokens {self.tokens}:"]
        out += [f"  {use:<{width}}  {in_words(size):>9}" for use, size in rows]
        others = ", ".join(
            f"{name} {in_words(self.process + sum(uses.values()))}"
            for name, uses in self.phases.items()
        )
        return [*out, f"  {'together':<{width}}  {in_words(self.peak):>9}", f"by phase: {others}"]


def in_words(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"
