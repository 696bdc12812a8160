"""The worlds of a lab, made as files, and the facts about them."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..worlds import exact, policies
from ..worlds.files import write_world
from ..worlds.world import World
from .results import WorldFacts

WORLDS = {
    "mild": "Every response is within reach of the reference, so methods should reach the optimum.",
    "peaked": "The best responses are rare under the reference and the pull to it is weak: what is "
    "not sampled is not learned.",
    "large": "Eight times as many responses, and thirty times as many comparisons to learn from.",
    "sparse": "As large as that; a few responses are right and have a reward of 1, all others 0, "
    "as a verifier gives it.",
    "long": "Up to eight tokens, and EOS is rare. A response is right, with a reward of 1, if it "
    "has the right letters at five positions; all others have 0.",
    "exploit": "As large as the sparse world. A proxy overrates the least likely responses, whose "
    "true reward is low. PPO is trained on the proxy, and gap and optimum here are those of the "
    "proxy.",
}
"""What each world is for, in the order of the page."""
MAKE = {
    "mild": policies.mild,
    "peaked": policies.peaked,
    "large": policies.large,
    "sparse": policies.sparse,
    "long": policies.long,
    "exploit": policies.exploit,
}
COPIES = {"mild": 100, "peaked": 100, "large": 2, "sparse": 1, "long": 0, "exploit": 1}
"""How often every two responses are compared in the file of each world; few times or never where no
method reads it.
"""

Worlds = dict[tuple[str, int], World]
"""By name and seed."""


def make_worlds(folder: Path, seed: int) -> Worlds:
    """The worlds of three seeds (one for the exploit), each with its files below `folder`."""
    out = {}
    for name, make in MAKE.items():
        for s in (seed, seed + 1, seed + 2) if name != "exploit" else (seed,):
            world, model = make(s)
            out[name, s] = world
            where = folder / "worlds" / f"{name}-{s}"
            if not where.exists():
                aside = where.with_name(f".{where.name}")
                shutil.rmtree(aside, ignore_errors=True)
                write_world(world, model, aside, copies=COPIES[name]).rename(where)
    return out


def describe(name: str, world: World) -> WorldFacts:
    """The facts of a world, for the page."""
    reward = world.reward if world.proxy is None else world.proxy
    best, _ = exact.optimum(world, reward=reward)
    ref = exact.reference(world)
    return WorldFacts(
        key=name,
        words=WORLDS[name],
        prompts=len(world.prompts),
        responses=len(world.responses),
        vocabulary=world.vocabulary,
        horizon=world.horizon,
        beta=world.beta,
        kl_optimum=exact.kl(best, ref),
        objective_reference=exact.objective(world, ref, reward=reward),
        objective_optimum=exact.objective(world, best, reward=reward),
    )
