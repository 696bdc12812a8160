"""Check a whole trainer, yours or another framework's: it gets a world's files and gives back a
model, whose exact distribution is then looked at.

A trainer with a wrong objective does not end just anywhere: it ends at that objective's optimum,
and most wrong objectives have one that is known exactly too. So the verdict does not only say how
far the model is from pi*, but where else it has arrived.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..worlds.files import write_world
from ..worlds import exact, policies
from ..worlds.world import Array, World

ARRIVED = 0.05
"""Total variation below which a model counts as being at a place, if it is also at least twice as
far from the optimum.
"""


@dataclass(frozen=True)
class Arrival:
    """Where a trainer ended.

    ok: it closed all but 5% of the gap to the optimum.
    name: "correct", the wrong objective whose optimum this is, or "unfinished".
    sentence: what was seen, the number, and what to do.
    relative_gap: J(pi*) - J(pi) as a share of J(pi*) - J(pi_ref).
    total_variation: to pi*. kl: of the model from the reference, nats a response. kl_optimum: of
    pi*. distances: total variation to each place that was considered.
    """

    ok: bool
    name: str
    sentence: str
    relative_gap: float
    total_variation: float
    kl: float
    kl_optimum: float
    distances: dict[str, float]

    def __str__(self) -> str:
        mark = "ok" if self.ok else "NOT OK"
        numbers = f"gap {100 * self.relative_gap:.3g}%, total variation {self.total_variation:.3g}, KL {self.kl:.3g} nats (optimum {self.kl_optimum:.3g})"
        return f"{mark}: {self.name}\n  {self.sentence}\n  {numbers}"


WORDS = {
    "not trained": "the model is still the reference: check that the optimizer gets the policy's parameters, and the learning rate",
    "reward turned": "it makes good responses rare: a sign is turned, or chosen and rejected are exchanged",
    "no KL penalty": "it has gone to the best response alone: the KL term is missing, or has no gradient (k1 as a loss)",
    "beta halved": "it went too far: beta counts half, for instance because it multiplies a mean where a sum is meant",
    "beta doubled": "it was held back: beta counts twice",
    "no reference": "it is the optimum against a uniform reference: the reference's log-probabilities are missing or constant",
    "forward KL": "it is the optimum of E[r] - beta KL(ref || pi): k3 was differentiated as a loss, which gives the forward KL",
}


def check_trainer(
    train: Callable[[Path], Any],
    *,
    world: tuple[World, Any] | None = None,
    folder: Path | None = None,
    copies: int = 100,
) -> Arrival:
    """Run `train` on the files of a world and say where it ended.

    Args:
        train: gets a folder with `transformer/` and `table/` (models in the Hugging Face layout;
            start from one of them, and take it as the reference), `prompts.jsonl`, `pairs.jsonl`
            (prompt, chosen, rejected), and `reward.py` with `gold(prompts, completions)`;
            `world.npz` holds the rest (beta is `World.load(folder / "world.npz").beta`, the longest
            response `.horizon` tokens, the token 0 ends one). It returns the trained model, or the
            folder where it was saved.
        world: a world and its transformer; default `policies.mild()`.
        folder: where to put the files; default a temporary folder.
        copies: how often every two responses are compared in `pairs.jsonl`.
    """
    made, model = world or policies.mild()
    with tempfile.TemporaryDirectory() as aside:
        where = write_world(made, model, (folder or Path(aside)) / "world", copies=copies)
        trained = train(where)
        if isinstance(trained, str | Path):
            trained = policies.load(Path(trained))
        return arrival(
            made, exact.logprobs(made.tree, policies.logits(trained, made.prompts, made.tree))
        )


def arrival(world: World, logp: Array) -> Arrival:
    """Where a policy [P, Y] stands."""
    found, best = exact.gap(world, logp), exact.optimum(world)[0]
    distances = {name: exact.total_variation(logp, place) for name, place in places(world).items()}
    nearest = min(distances, key=distances.__getitem__)
    ok = found.relative < 0.05
    if ok:
        name, sentence = (
            "correct",
            f"the model is {100 * found.relative:.3g}% of the way short of the optimum",
        )
    elif distances[nearest] < min(ARRIVED, found.total_variation / 2):
        name, sentence = nearest, WORDS[nearest]
    else:
        name = "unfinished"
        sentence = (
            f"the model is at no optimum that is known here (nearest: {nearest}, total variation "
            f"{distances[nearest]:.3g}): train longer or with a "
            "decaying learning rate, and if the gap stays, check the loss itself with "
            "check_policy_loss or check_preference_loss"
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
    )


def places(world: World) -> dict[str, Array]:
    """[P, Y] log-probabilities of the optima of wrong objectives, by name."""
    ref, beta = exact.reference(world), world.beta
    uniform = np.full_like(ref, -np.log(ref.shape[1]))
    reward = world.reward
    greedy = np.where(reward == reward.max(1, keepdims=True), 0.0, -np.inf)
    return {
        "not trained": ref,
        "reward turned": _tilted(ref, -reward / beta),
        "no KL penalty": _normal(
            np.where(np.isfinite(greedy), 0.0, -60.0)
        ),  # a policy made of logits reaches no zero
        "beta halved": _tilted(ref, 2 * reward / beta),
        "beta doubled": _tilted(ref, reward / (2 * beta)),
        "no reference": _tilted(uniform, reward / beta),
        "forward KL": _forward(ref, reward, beta),
    }


def _tilted(ref: Array, by: Array) -> Array:
    return _normal(ref + by)


def _normal(logp: Array) -> Array:
    return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)


def _forward(ref: Array, reward: Array, beta: float) -> Array:
    """The optimum of E[r] - beta KL(ref || pi): pi = beta ref / (c - r), c above every reward such
    that it sums to 1.
    """
    out = np.empty_like(ref)
    for p in range(len(ref)):
        low, high = float(reward[p].max()), float(reward[p].max()) + beta
        for _ in range(200):
            middle = (low + high) / 2
            total = (
                (beta * np.exp(ref[p]) / (middle - reward[p])).sum()
                if middle > reward[p].max()
                else np.inf
            )
            low, high = (middle, high) if total > 1 else (low, middle)
        out[p] = np.log(beta) + ref[p] - np.log(high - reward[p])
    return _normal(out)
