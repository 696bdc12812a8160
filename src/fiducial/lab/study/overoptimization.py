r"""Over-optimization (Goodhart's law): as a proxy of the true (gold) reward is optimized, the true
reward peaks and falls.

Three kinds of error in a proxy, under best-of-n of a standard normal gold reward, and one in a
world whose frontier is exact. The horizontal axis is :math:`d = \sqrt{KL(\pi\|\pi_{ref})}`. Gao et
al. 2022 (arXiv 2210.10760, section 3) describe gold by :math:`d(\alpha - \beta d)` under best-of-n
and by :math:`d(\alpha - \beta\log d)` under reinforcement learning; here the error of these fits is
measured, not assumed to be small.
"""

from __future__ import annotations

import numpy as np
import torch

from ...core.best_of_n import expected_best_of
from ..worlds import exact, policies
from ..worlds.world import Array, World, exploited
from .results import Curve, CurvePoint, GaoFit, Overoptimization

BATCH = 25_000
BATCHES = {"quick": 10, "full": 32}
"""The estimate is the mean over batches of samples; their standard deviation gives its error."""
LARGEST_N = 4000  # sqrt(log n - (n - 1) / n) = 2.70
FALL = 0.1
"""Gold turns over if it ends below its peak by more than this share of the peak, which is more than
the error of the sampled curves.
"""


def curves(form: str, seed: int = 0) -> list[Overoptimization]:
    """Gold and proxy along the root of the KL, one entry per proxy. The form "quick" draws 250,000
    scores; "full" draws 800,000 and adds a world of 19,531 responses.
    """
    ns = [
        int(n) for n in np.unique(np.geomspace(1, LARGEST_N, 16 if form == "quick" else 24).round())
    ]
    sampled = [_sampled(key, ns, seed, BATCHES[form]) for key in ("gaussian", "heavy", "exploit")]
    large = _world(exploit_world("full", seed), "world_large", ns) if form == "full" else []
    return [*sampled, *_world(exploit_world("quick", seed), "world_exploit", ns), *large]


# ---- best-of-n of sampled scores ----


def scores(key: str, seed: int, samples: int) -> tuple[Array, Array]:
    """(gold, proxy) [N] of responses drawn from the reference: gold is standard normal, the proxy
    is gold plus an error.

    gaussian: a standard normal error. heavy: Student's t with 3 degrees of freedom, scaled to a
    standard deviation of 1. exploit: a normal error with a standard deviation of 0.5, and one
    response in a thousand whose gold is 2 lower and whose error is 7 higher.
    """
    rng = np.random.default_rng([seed, 7])
    gold = rng.normal(size=samples)
    if key == "gaussian":
        return gold, gold + rng.normal(size=samples)
    if key == "heavy":
        return gold, gold + rng.standard_t(3, size=samples) / np.sqrt(3)
    error = 0.5 * rng.normal(size=samples)
    few = rng.random(samples) < 1e-3
    gold, error = gold - 2 * few, error + 7 * few
    return gold, gold + error


SAMPLED = {
    "gaussian": (
        "Normal error",
        "A normal error as large as the reward: half of the proxy's gain is real, and more "
        "selection never hurts.",
    ),
    "heavy": (
        "Heavy-tailed error",
        "An error with the same standard deviation and heavy tails (Student's t, 3 degrees of "
        "freedom): the largest scores are errors.",
    ),
    "exploit": (
        "An exploit",
        "One response in a thousand has a gold reward that is 2 lower and a score that is 5 "
        "higher: harmless until n is large enough to find it.",
    ),
}
"""Title and description of each proxy of sampled scores."""


def _sampled(key: str, ns: list[int], seed: int, batches: int) -> Overoptimization:
    gold, proxy = (
        torch.split(torch.from_numpy(x), BATCH) for x in scores(key, seed, batches * BATCH)
    )
    found = np.array(
        [
            [[expected_best_of(p, values, n) for n in ns] for values in (p, g)]
            for p, g in zip(proxy, gold, strict=True)
        ]
    )
    mean, error = found.mean(0), found.std(0, ddof=1) / np.sqrt(batches)
    kl = exact.best_of_n_bound(np.array(ns))  # exact, because no two scores are equal
    title, words = SAMPLED[key]
    return _entry(key, f"{title}, best of n", words, kl, *mean, error=error[1])


# ---- a world ----


def exploit_world(form: str, seed: int = 0) -> World:
    """A world whose proxy overrates the least likely responses. "quick": 121 responses, the world
    in which PPO is run too; "full": 19,531 responses and a rarer exploit.
    """
    if form == "quick":
        return policies.exploit(seed)[0]
    world, _ = policies.make("exploit", seed=seed, vocabulary=6, horizon=6, kl=None)
    gold, proxy = exploited(
        world.reward, np.exp(exact.reference(world)), seed, mass=0.001, proxy=1.0
    )
    return world.with_(reward=gold, proxy=proxy)


def _world(world: World, key: str, ns: list[int]) -> list[Overoptimization]:
    assert world.proxy is not None
    ref = exact.reference(world)
    zero = {"proxy": exact.expected(ref, world.proxy), "gold": exact.expected(ref, world.reward)}
    tilt = exact.frontier(
        world, np.geomspace(30.0, 0.1, len(ns) + 10), reward=world.proxy, other=world.reward
    )
    assert tilt.other is not None
    chosen = [exact.best_of_n(ref, world.proxy, n) for n in ns]
    kl = np.array([exact.kl(logp, ref) for logp in chosen])
    proxy, gold = (
        np.array([exact.expected(logp, values) for logp in chosen])
        for values in (world.proxy, world.reward)
    )

    name = f"a world of {len(world.responses):,} responses"
    rl = _entry(
        key,
        f"An exploit in {name}, reinforcement learning",
        f"{name[0].upper()}{name[1:]}; the proxy overrates the rarest ones. Exact optima of the "
        "proxy at every beta; scores are relative to the reference's.",
        tilt.kl,
        tilt.reward - zero["proxy"],
        tilt.other - zero["gold"],
        learned=True,
    )
    best = _entry(
        f"{key}_best_of_n",
        f"An exploit in {name}, best of n",
        "The same world and proxy, exact best-of-n: it uses only the order of the scores, not how "
        "far too high those of the exploit are.",
        kl,
        proxy - zero["proxy"],
        gold - zero["gold"],
    )
    return [rl, best]


# ---- what a curve shows ----


def _entry(
    key: str,
    title: str,
    words: str,
    kl: Array,
    proxy: Array,
    gold: Array,
    *,
    error: Array | None = None,
    learned: bool = False,
) -> Overoptimization:
    """`error`: [N] standard error of gold, where it was sampled. `learned`: by reinforcement
    learning, not by best-of-n.
    """
    kl = np.maximum(kl, 0.0)
    d = np.sqrt(kl)
    top = int(gold.argmax())
    turns = bool(gold[-1] < (1 - FALL) * gold[top])
    return Overoptimization(
        key=key,
        title=title,
        words=words,
        curve=Curve(kl.tolist(), proxy.tolist(), gold.tolist()),
        turns_over=turns,
        peak=CurvePoint(float(d[top]), float(gold[top])) if turns else None,
        last=CurvePoint(float(d[-1]), float(gold[-1])),
        fit=None if learned else gao_fit(d, gold),
        rl_fit=gao_fit(d, gold, learned=True) if learned else None,
        error=None if error is None else error.tolist(),
    )


def gao_fit(d: Array, gold: Array, *, learned: bool = False) -> GaoFit:
    """Least-squares fit of gold by d (alpha - beta d), or by d (alpha - beta log d) for
    reinforcement learning, over d > 0.
    """
    d, gold = d[d > 0], gold[d > 0]
    terms = np.stack([d, -d * (np.log(d) if learned else d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, gold, rcond=None)
    error = terms @ np.array([alpha, beta]) - gold
    return GaoFit(float(alpha), float(beta), float(np.sqrt((error**2).mean())))
