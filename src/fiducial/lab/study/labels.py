"""What DPO learns from labels that are not what its derivation assumes: pairs never compared,
annotators who err, a file in place of a population.

Its loss is minimised by L-BFGS over tables (`fiducial.lab.derivation.fit`), so that what is missing
from the optimum is the labels' doing and nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..worlds import exact
from ..worlds.world import Array, World, bradley_terry, flipped, intransitive, length_biased
from .derivation import STEPS, fit

# ---- a response never compared ----


def missing(world: World) -> dict[str, Any]:
    """DPO from true labels of all pairs but those with one response: which policy it ends at
    depends on where it started.

    The response is the optimum's likeliest to the first prompt. The loss knows only differences of
    log-probability between compared responses, so any probability of that one, the others keeping
    their proportions, has the same loss.
    """
    best, ref = exact.optimum(world)[0], exact.reference(world)
    preference, weights = bradley_terry(world.reward), exact.pair_weights(world).copy()
    complete = fit(world, preference, weights, world.reference)
    y = int(best[0].argmax())
    weights[0, y, :] = weights[0, :, y] = 0.0
    weights /= weights.sum() / 2
    rng = np.random.default_rng(0)
    starts = {
        "from the reference": world.reference,
        "from a random policy": world.reference + rng.normal(size=world.reference.shape),
        "from another": world.reference + rng.normal(size=world.reference.shape),
        "from the optimum": exact.logits_of(world.tree, best),
    }
    rows = []
    for name, start in starts.items():
        found = fit(world, preference, weights, start)
        rows.append(
            {
                "start": name,
                "loss": found.loss,
                "total_variation": exact.total_variation(found.logp, best),
                "start_probability": float(np.exp(exact.logprobs(world.tree, start)[0, y])),
                "probability": float(np.exp(found.logp[0, y])),
            }
        )
    first = rows[0]
    return {
        "world": world.name,
        "words": f"Training from the reference moves its probability from {first['start_probability']:.3f} to {first['probability']:.3f}, the optimum's is "
        f"{np.exp(best[0, y]):.3f}; no label says which is right.",
        "prompt": world.prompt_text(0),
        "never_compared": world.response_text(y),
        "reference_probability": float(np.exp(ref[0, y])),
        "optimum_probability": float(np.exp(best[0, y])),
        "starts": rows,
        "complete": {
            "loss": complete.loss,
            "total_variation": exact.total_variation(complete.logp, best),
        },
    }


# ---- annotators ----


@dataclass(frozen=True)
class Measured:
    """DPO's minimiser on an annotator's labels."""

    loss: float
    entropy: float
    kl: float
    """KL(minimiser, reference), nats."""
    kl_optimum: float
    length: float
    """Tokens of a mean response."""
    length_optimum: float
    gap: exact.Gap


@dataclass(frozen=True)
class Annotator:
    """Who labels the pairs, and what one sentence says of the policy DPO makes of it."""

    name: str
    preference: Array
    """[P, Y, Y] probability that the second axis's response is preferred to the third's."""
    words: Callable[[Measured], str]
    label_smoothing: float = 0.0


FLIPS, SMOOTHING, NATS_PER_TOKEN, SCALE, TWIST, LABELS = 0.1, 0.1, 0.5, 3.0, 1.5, 1000


def annotators(world: World, seed: int = 0, *, labels: int = LABELS) -> list[dict[str, Any]]:
    """A row an annotator: how well the labels could be predicted at best, and how far DPO's
    minimiser is from the optimum of the true reward.

    `relative_gap` is 1 for the reference and 0 for the optimum, and more than 1 for what is worse
    than no training.
    """
    true = bradley_terry(world.reward)
    wrong = flipped(true, FLIPS)
    known = [
        Annotator("Bradley-Terry, true labels", true, _true),
        Annotator("one label in ten flipped", wrong, _flipped),
        Annotator("one in ten flipped, label smoothing 0.1", wrong, _smoothed, SMOOTHING),
        Annotator(
            "half a nat for every token more",
            length_biased(world.reward, world.tree.lengths, NATS_PER_TOKEN),
            _long,
        ),
        Annotator("three times too sure", bradley_terry(world.reward, SCALE), _sure),
        Annotator(
            "preferences that run in circles", intransitive(world.reward, seed, TWIST), _circles
        ),
    ]
    weights = exact.pair_weights(world)
    rows = []
    for annotator in known:
        measured = _measure(
            world, annotator.preference, weights, label_smoothing=annotator.label_smoothing
        )
        rows.append(
            _row(annotator.name, annotator.preference, weights, measured, annotator.words(measured))
        )
    return [*rows, _file(world, true, weights, seed, labels)]


def _measure(
    world: World, preference: Array, weights: Array, *, label_smoothing: float = 0.0
) -> Measured:
    found = fit(world, preference, weights, world.reference, label_smoothing=label_smoothing)
    best, ref, lengths = (
        exact.optimum(world)[0],
        exact.reference(world),
        np.broadcast_to(world.tree.lengths.astype(float), world.reward.shape),
    )
    # with label smoothing the loss is the cross-entropy of smoothed labels, whose own entropy is
    # the least it could be
    entropy = exact.label_entropy(flipped(preference, label_smoothing), weights)
    return Measured(
        found.loss,
        entropy,
        exact.kl(found.logp, ref),
        exact.kl(best, ref),
        exact.expected(found.logp, lengths),
        exact.expected(best, lengths),
        exact.gap(world, found.logp),
    )


def _row(
    name: str, preference: Array, weights: Array, measured: Measured, words: str
) -> dict[str, Any]:
    return {
        "name": name,
        "bayes_accuracy": exact.bayes_accuracy(preference, weights),
        "entropy": exact.label_entropy(preference, weights),
        "total_variation": measured.gap.total_variation,
        "relative_gap": measured.gap.relative,
        "loss": measured.loss,
        "excess": measured.loss - measured.entropy,
        "kl": measured.kl,
        "length": measured.length,
        "words": words,
    }


def _nearer(m: Measured) -> str:
    return f"{m.kl:.2f} nats from the reference, the optimum {m.kl_optimum:.2f}"


def _true(m: Measured) -> str:
    return f"DPO's minimiser is the optimum, and its loss the entropy of the labels, {m.loss:.4f} nats."


def _flipped(m: Measured) -> str:
    return f"Differences in reward look smaller than they are: the minimiser lies {_nearer(m)}."


def _smoothed(m: Measured) -> str:
    return f"Smoothing undoes no flips but adds as many again: {_nearer(m)}."


def _long(m: Measured) -> str:
    return f"Responses of the minimiser have {m.length:.2f} tokens on average, those of the optimum {m.length_optimum:.2f}."


def _sure(m: Measured) -> str:
    return f"DPO takes certainty for size of reward: the minimiser is the optimum of three times the reward, {_nearer(m)}."


def _circles(m: Measured) -> str:
    return f"No reward explains them: at its least the loss is {m.loss - m.entropy:.3f} nats above the entropy of the labels."


# ---- a file ----


def sampled(preference: Array, labels: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[P, Y, Y] how often the second axis's response won against the third's, in so many labels of
    pairs drawn evenly from all.
    """
    prompts, size = preference.shape[:2]
    first, second = np.triu_indices(size, 1)
    p, pair = rng.integers(prompts, size=labels), rng.integers(len(first), size=labels)
    i, j = first[pair], second[pair]
    won = rng.random(labels) < preference[p, i, j]
    wins = np.zeros(preference.shape, dtype=np.int64)
    np.add.at(wins, (p, np.where(won, i, j), np.where(won, j, i)), 1)
    return wins


def has_minimum(wins: NDArray[np.int64]) -> bool:
    """Whether a finite policy has the least DPO loss on these labels [P, Y, Y], and only one.

    It does if in every split of a prompt's responses in two, some of each side have won against
    some of the other (Ford 1957): if every response can be reached from every other by wins.
    Otherwise a loss falls for ever as the sides move apart, or does not notice how far apart they
    are.
    """
    reach = (wins > 0) | np.eye(wins.shape[-1], dtype=bool)
    for _ in range(int(np.ceil(np.log2(wins.shape[-1])))):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return bool(reach.all())


def _file(
    world: World, preference: Array, weights: Array, seed: int, labels: int
) -> dict[str, Any]:
    wins = sampled(preference, labels, np.random.default_rng([seed, 6]))
    games = wins + wins.swapaxes(1, 2)
    share = np.divide(wins, games, out=np.full(wins.shape, 0.5), where=games > 0)
    seen = games / labels
    measured = _measure(world, share, seen)
    pairs = int((games > 0).sum()) // 2
    words = f"True labels, but {labels:,} of them, on {pairs:,} pairs: chance alone keeps the minimiser this far from the optimum"
    if not has_minimum(wins):
        words = (
            f"In {labels:,} true labels, some responses only ever won, only ever lost or were not "
            "seen: no one finite policy has the least loss, "
            f"and this is where {STEPS} steps end"
        )
    return _row(f"{labels:,} true labels", preference, weights, measured, f"{words}.")
