"""Check a whole trainer, this package's or another: it receives a world's files and returns a
model, whose exact distribution is then examined.

A trainer with a wrong objective ends at the optimum of that objective, and for most wrong
objectives this optimum is known exactly too. So the result not only says how far the model is from
pi*, but also which wrong objective it has optimized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from ..worlds import exact, policies
from ..worlds.files import write_world
from ..worlds.world import Array, World

ARRIVED = 0.05
"""A model counts as having arrived at a place if its total variation from it is below this, and no
more than half of its total variation from the optimum.
"""

BETA_OFF = 0.095
"""A model whose nearest optimum of another beta is this far away in log beta, 10% above or 9%
below, has a wrong beta. Less is left to the noise of sampling.
"""
ON_THE_WAY = 0.03
"""Total variation from that nearest optimum up to which a model counts as being there."""


@dataclass(frozen=True)
class Arrival:
    """Where a trainer ended.

    ok: it closed all but 5% of the gap to the optimum, and is not at the optimum of another beta.
    name: "correct", the wrong objective that it has optimized, or "unfinished".
    sentence: what was found, and what to do.
    relative_gap: J(pi*) - J(pi) as a share of J(pi*) - J(pi_ref).
    total_variation: from pi*.
    kl: of the model from the reference, in nats per response.
    kl_optimum: of pi* from the reference, in nats per response.
    distances: total variation from each place that was considered.
    beta: the factor of beta at whose optimum the model's mean reward would be; 1 at the optimum.
    """

    ok: bool
    name: str
    sentence: str
    relative_gap: float
    total_variation: float
    kl: float
    kl_optimum: float
    distances: dict[str, float]
    beta: float = 1.0

    def __str__(self) -> str:
        numbers = (
            f"gap {100 * self.relative_gap:.3g}%, total variation {self.total_variation:.3g}, "
            f"KL {self.kl:.3g} nats (optimum {self.kl_optimum:.3g})"
        )
        return f"{'ok' if self.ok else 'NOT OK'}: {self.name}\n  {self.sentence}\n  {numbers}"


SENTENCES = {
    "not trained": "The model is still the reference. Check that the optimizer receives the "
    "policy's parameters, and check the learning rate.",
    "reward has the wrong sign": "The model makes good responses rare. A sign is wrong, or chosen "
    "and rejected are swapped.",
    "no KL penalty": "The model gives only the best response. The KL penalty is missing, or has no "
    "gradient (k1 as a loss).",
    "beta halved": "The model has moved too far. Beta has half its strength, for instance because "
    "it multiplies a mean in place of a sum.",
    "beta doubled": "The model has not moved far enough. Beta has twice its strength.",
    "no reference": "The model is at the optimum for a uniform reference. The reference's "
    "log-probabilities are missing or constant.",
    "wrong beta": "The model has moved too far: it is at the optimum of {beta:.3g} times the beta. "
    "Look for a penalty that is scaled down (a mean in place of a sum) or a reward that is scaled "
    "up.",
    "wrong beta or unfinished": "The model is at the optimum of {beta:.3g} times the beta. A "
    "training that has not ended passes through the same place: train twice as long. If the factor "
    "stays, the penalty is too strong, or the reward is scaled down.",
    "forward KL": "The model is at the optimum of E[r] - beta KL(ref || pi). k3 was used as a "
    "loss, which has the gradient of the forward KL.",
}


def check_trainer(
    train: Callable[[Path], nn.Module | Path | str],
    *,
    world: tuple[World, PreTrainedModel] | None = None,
    folder: Path | None = None,
    copies: int = 100,
) -> Arrival:
    """Run `train` on the files of a world, and report where it ended.

    A beta, or a scale of the reward, that is off by 10% or more is found in a model that has
    arrived: the rest of its distance from the optimum must be the smaller part.

    Args:
        train: receives a folder with `transformer/` and `table/` (models in the Hugging Face
            layout; start from one, and use it as the reference), `prompts.jsonl`, `pairs.jsonl`
            (prompt, chosen, rejected) and `reward.py` with `gold(prompts, completions)`.
            `World.load(folder / "world.npz")` has the rest: `.beta`, and `.horizon`, the most
            tokens of a response. Token 0 ends a response. It returns the trained model, or the
            folder in which it was saved.
        world: a world and its transformer; default: `policies.mild()`.
        folder: where to put the files; default: a temporary folder.
        copies: number of comparisons per pair of responses in `pairs.jsonl`.
    """
    made, model = world or policies.mild()
    with tempfile.TemporaryDirectory() as aside:
        where = write_world(made, model, (folder or Path(aside)) / "world", copies=copies)
        trained = train(where)
        if isinstance(trained, str | Path):
            trained = policies.load(Path(trained))
        logits = policies.logits(trained, made.prompts, made.tree)
        return arrival(made, exact.logprobs(made.tree, logits))


def arrival(world: World, logp: Array) -> Arrival:
    """Where a policy [P, Y] stands."""
    found, best = exact.gap(world, logp), exact.optimum(world)[0]
    distances = {name: exact.total_variation(logp, place) for name, place in places(world).items()}
    nearest = min(distances, key=distances.__getitem__)
    beta = fitted_beta(world, logp)
    other = exact.optimum(world, beta=beta * world.beta)[0]
    off = abs(np.log(beta)) > BETA_OFF and exact.kl(logp, other) < exact.kl(logp, best) / 4
    ok = found.relative < 0.05 and not off
    if ok:
        name = "correct"
        sentence = (
            f"The model has closed all but {100 * found.relative:.3g}% of the gap to the optimum."
        )
    elif distances[nearest] < min(ARRIVED, found.total_variation / 2):
        name, sentence = nearest, SENTENCES[nearest]
    elif off and exact.total_variation(logp, other) < ON_THE_WAY:
        name = "wrong beta" if beta < 1 else "wrong beta or unfinished"
        sentence = SENTENCES[name].format(beta=beta)
    else:
        name = "unfinished"
        sentence = (
            f"The model is not at any known optimum (the nearest is {nearest!r}, at a total "
            f"variation of {distances[nearest]:.3g}). Train longer, or with a decaying learning "
            "rate. If the gap remains, check the loss itself with check_policy_loss or "
            "check_preference_loss."
        )
    return Arrival(
        ok,
        name,
        sentence,
        found.relative,
        found.total_variation,
        found.kl,
        exact.kl(best, exact.reference(world)),
        distances,
        beta,
    )


def fitted_beta(world: World, logp: Array) -> float:
    """The factor of the world's beta whose optimum has the mean reward of a policy [P, Y]: among
    all optima it is the one with the smallest KL(policy, optimum). Between 1/100 and 100.
    """
    reward = exact.expected(logp, world.reward)
    low, high = np.log(0.01), np.log(100.0)
    for _ in range(60):
        middle = (low + high) / 2
        there = exact.optimum(world, beta=float(np.exp(middle)) * world.beta)[0]
        if exact.expected(there, world.reward) > reward:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def places(world: World) -> dict[str, Array]:
    """[P, Y] log-probabilities of the reference and of the optima of wrong objectives, by name."""
    ref, beta, reward = exact.reference(world), world.beta, world.reward
    uniform = np.full_like(ref, -np.log(ref.shape[1]))
    # a policy made of logits never reaches a probability of zero
    greedy = np.where(reward == reward.max(1, keepdims=True), 0.0, -60.0)
    return {
        "not trained": ref,
        "reward has the wrong sign": _normalized(ref - reward / beta),
        "no KL penalty": _normalized(greedy),
        "beta halved": _normalized(ref + 2 * reward / beta),
        "beta doubled": _normalized(ref + reward / (2 * beta)),
        "no reference": _normalized(uniform + reward / beta),
        "forward KL": _forward(ref, reward, beta),
    }


def _normalized(logp: Array) -> Array:
    return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)


def _forward(ref: Array, reward: Array, beta: float) -> Array:
    """The optimum of E[r] - beta KL(ref || pi): pi = beta ref / (c - r), where c exceeds every
    reward and is such that pi sums to 1. It is found by bisection.
    """
    out = np.empty_like(ref)
    for p in range(len(ref)):
        low, high = float(reward[p].max()), float(reward[p].max()) + beta
        for _ in range(200):
            middle = (low + high) / 2
            total = np.inf
            if middle > reward[p].max():
                total = (beta * np.exp(ref[p]) / (middle - reward[p])).sum()
            low, high = (middle, high) if total > 1 else (low, middle)
        out[p] = np.log(beta) + ref[p] - np.log(high - reward[p])
    return _normalized(out)
