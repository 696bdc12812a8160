"""What DPO learns from labels that break the assumptions of its derivation: pairs that are never
compared, annotators who err, a finite file instead of the population.

The loss is minimized by L-BFGS over tables (`optimize.fit`), so any distance from the optimum is
caused by the labels and not by training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..worlds import exact
from ..worlds.world import Array, World, bradley_terry, flipped, intransitive, length_biased
from .optimize import STEPS, fit
from .results import AnnotatorRow, Complete, Missing, Start

# ---- a response never compared ----


def missing(world: World) -> Missing:
    """DPO on true labels of all pairs except those that hold one response: where it ends depends on
    where it started.

    That response is the optimum's most likely one to the first prompt. The loss depends only on
    differences of log-probability between compared responses, so any probability of that response
    has the same loss, as long as the others keep their proportions.
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
        "from another random policy": world.reference + rng.normal(size=world.reference.shape),
        "from the optimum": exact.logits_of(world.tree, best),
    }
    rows = []
    for name, start in starts.items():
        found = fit(world, preference, weights, start)
        rows.append(
            Start(
                start=name,
                loss=found.loss,
                total_variation=exact.total_variation(found.logp, best),
                start_probability=float(np.exp(exact.logprobs(world.tree, start)[0, y])),
                probability=float(np.exp(found.logp[0, y])),
            )
        )
    first = rows[0]
    return Missing(
        world=world.name,
        words=(
            f"Training from the reference moves its probability from {first.start_probability:.3f} "
            f"to {first.probability:.3f}; the optimum has {np.exp(best[0, y]):.3f}. No label says "
            "which is right."
        ),
        prompt=world.prompt_text(0),
        never_compared=world.response_text(y),
        reference_probability=float(np.exp(ref[0, y])),
        optimum_probability=float(np.exp(best[0, y])),
        starts=rows,
        complete=Complete(complete.loss, exact.total_variation(complete.logp, best)),
    )


# ---- annotators ----


@dataclass(frozen=True)
class Measured:
    """The minimizer of DPO's loss on an annotator's labels."""

    loss: float
    entropy: float
    kl: float
    """KL(minimizer, reference), nats per response."""
    kl_optimum: float
    length: float
    """Mean tokens per response of the minimizer."""
    length_optimum: float
    gap: exact.Gap


@dataclass(frozen=True)
class Annotator:
    """Who labels the pairs, and one sentence about the policy that DPO makes of the labels."""

    name: str
    preference: Array
    """[P, Y, Y] probability that the second axis's response is preferred to the third's."""
    words: Callable[[Measured], str]
    label_smoothing: float = 0.0


FLIPS, SMOOTHING, NATS_PER_TOKEN, SCALE, TWIST, LABELS = 0.1, 0.1, 0.5, 3.0, 1.5, 1000


def annotators(world: World, seed: int = 0, *, labels: int = LABELS) -> list[AnnotatorRow]:
    """One row per annotator: how well the labels can be predicted at best, and how far the
    minimizer of DPO's loss is from the optimum of the true reward.

    `relative_gap` is 0 for the optimum, 1 for the reference, and more than 1 for a policy that is
    worse than the reference.
    """
    true = bradley_terry(world.reward)
    wrong = flipped(true, FLIPS)
    known = [
        Annotator("Bradley-Terry, true labels", true, _true),
        Annotator("one label in ten flipped", wrong, _flipped),
        Annotator("one label in ten flipped, label smoothing 0.1", wrong, _smoothed, SMOOTHING),
        Annotator(
            "half a nat in favor of each extra token",
            length_biased(world.reward, world.tree.lengths, NATS_PER_TOKEN),
            _long,
        ),
        Annotator("three times overconfident", bradley_terry(world.reward, SCALE), _sure),
        Annotator("intransitive preferences", intransitive(world.reward, seed, TWIST), _circles),
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
    # with label smoothing the loss is the cross-entropy of the smoothed labels, so its lower bound
    # is their entropy
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
) -> AnnotatorRow:
    return AnnotatorRow(
        name=name,
        bayes_accuracy=exact.bayes_accuracy(preference, weights),
        entropy=exact.label_entropy(preference, weights),
        total_variation=measured.gap.total_variation,
        relative_gap=measured.gap.relative,
        loss=measured.loss,
        excess=measured.loss - measured.entropy,
        kl=measured.kl,
        length=measured.length,
        words=words,
    )


def _distances(m: Measured) -> str:
    return f"{m.kl:.2f} nats from the reference; the optimum is at {m.kl_optimum:.2f}"


def _true(m: Measured) -> str:
    return (
        "The minimizer of DPO's loss is the optimum, and its loss is the entropy of the labels, "
        f"{m.loss:.4f} nats."
    )


def _flipped(m: Measured) -> str:
    return f"Differences in reward look smaller than they are, so the minimizer is {_distances(m)}."


def _smoothed(m: Measured) -> str:
    return (
        "Smoothing does not undo the flips, it adds as many again: the minimizer is "
        f"{_distances(m)}."
    )


def _long(m: Measured) -> str:
    return (
        f"The minimizer's responses have {m.length:.2f} tokens on average, the optimum's "
        f"{m.length_optimum:.2f}."
    )


def _sure(m: Measured) -> str:
    return (
        "DPO takes confidence for a large reward: the minimizer is the optimum of three times the "
        f"reward, {_distances(m)}."
    )


def _circles(m: Measured) -> str:
    return (
        f"No reward explains these labels: the least loss is {m.loss - m.entropy:.3f} nats above "
        "their entropy."
    )


# ---- a file ----


def sampled(preference: Array, labels: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[P, Y, Y] how often the response of the second axis won against that of the third, in
    `labels` labels of pairs drawn uniformly.
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
    """Whether exactly one finite policy has the least DPO loss on these labels [P, Y, Y].

    This holds if every response can be reached from every other one by wins: however the responses
    to a prompt are split in two, each side has won against the other (Ford 1957). Otherwise the
    loss falls forever as the two sides move apart, or does not depend on their distance.
    """
    reach = (wins > 0) | np.eye(wins.shape[-1], dtype=bool)
    for _ in range(int(np.ceil(np.log2(wins.shape[-1])))):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return bool(reach.all())


def _file(world: World, preference: Array, weights: Array, seed: int, labels: int) -> AnnotatorRow:
    wins = sampled(preference, labels, np.random.default_rng([seed, 6]))
    games = wins + wins.swapaxes(1, 2)
    share = np.divide(wins, games, out=np.full(wins.shape, 0.5), where=games > 0)
    measured = _measure(world, share, games / labels)
    pairs = int((games > 0).sum()) // 2
    words = (
        f"Only {labels:,} true labels, on {pairs:,} pairs: sampling noise alone keeps the "
        "minimizer this far from the optimum."
    )
    if not has_minimum(wins):
        words = (
            f"In {labels:,} true labels, some responses only won, only lost or were not compared, "
            "so no single finite policy has the least loss. This is where "
            f"{STEPS} steps end."
        )
    return _row(f"{labels:,} true labels", preference, weights, measured, words)
