r"""Over-optimisation (Goodhart's law): a proxy of the true reward is climbed, the true (gold)
reward turns over.

Three kinds of error in a proxy, under best-of-n of a standard normal gold reward, and one in a
world whose frontier is exact. The abscissa is :math:`d = \sqrt{KL(\pi\|\pi_{ref})}`. Gao et al.
2022 (arXiv 2210.10760, section 3) describe gold by :math:`d(\alpha - \beta d)` under best-of-n and
by :math:`d(\alpha - \beta\log d)` under reinforcement learning; how well that fits is measured here
and not taken for granted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...core.best_of_n import expected_best_of
from ..worlds import exact, policies
from ..worlds.world import Array, World, exploited

BATCH = 25_000
BATCHES = {"quick": 10, "full": 32}
"""The estimate is the mean over batches of samples, so that their spread gives its error."""
LARGEST_N = 4000  # sqrt(log n - (n - 1) / n) = 2.70
FALL = 0.1
"""Gold turns over if it ends this share of its peak below it: more than the error of the sampled
curves.
"""


def curves(form: str, seed: int = 0) -> list[dict[str, Any]]:
    """Gold and proxy along the root of KL, a dictionary a proxy; "quick" draws 250,000 scores,
    "full" 800,000 and has a world of 19,531 responses too.
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
    is gold + an error.

    gaussian: a standard normal error. heavy: Student's t with 3 degrees of freedom, scaled to a
    deviation of 1. exploit: a normal error of deviation 0.5, and one response in a thousand whose
    gold is 2 lower and whose error is 7 higher.
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


def _sampled(key: str, ns: list[int], seed: int, batches: int) -> dict[str, Any]:
    gold, proxy = (torch.from_numpy(x).split(BATCH) for x in scores(key, seed, batches * BATCH))
    found = np.array(
        [
            [[expected_best_of(p, values, n) for n in ns] for values in (p, g)]
            for p, g in zip(proxy, gold, strict=True)
        ]
    )
    mean, error = found.mean(0), found.std(0, ddof=1) / np.sqrt(batches)
    kl = exact.best_of_n_bound(np.array(ns))  # exact: no score has any mass
    title = {"gaussian": "Normal error", "heavy": "Heavy-tailed error", "exploit": "An exploit"}[
        key
    ]
    words = {
        "gaussian": "A normal error as large as the reward: half of what the proxy promises is kept, and more selection never hurts.",
        "heavy": "An error of the same deviation with heavy tails (Student's t, 3 degrees of freedom): the largest scores are errors.",
        "exploit": "One response in a thousand is worth 2 less and scores 5 more: harmless until n is large enough to find it.",
    }[key]
    return _entry(key, f"{title}, best of n", words, kl, *mean, error=error[1])


# ---- a world ----


def exploit_world(form: str, seed: int = 0) -> World:
    """A world whose least likely responses a proxy loves: that of 121 responses in which PPO is run
    too, or one of 19,531 with a rarer exploit.
    """
    if form == "quick":
        return policies.exploit(seed)[0]
    world, _ = policies.make("exploit", seed=seed, vocabulary=6, horizon=6, kl=None)
    gold, proxy = exploited(
        world.reward, np.exp(exact.reference(world)), seed, mass=0.001, proxy=1.0
    )
    return world.with_(reward=gold, proxy=proxy)


def _world(world: World, key: str, ns: list[int]) -> list[dict[str, Any]]:
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
        f"{name[0].upper()}{name[1:]}, its rarest ones loved by the proxy: the exact optima of the "
        "proxy at every beta. Scores are above the reference's.",
        tilt.kl,
        tilt.reward - zero["proxy"],
        tilt.other - zero["gold"],
        learned=True,
    )
    best = _entry(
        f"{key}_best_of_n",
        f"An exploit in {name}, best of n",
        "The same world and proxy, exact best-of-n: it knows only the order of the scores, not how "
        "much too high the exploit's are.",
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
) -> dict[str, Any]:
    """`error`: [N] standard error of gold where it was sampled."""
    kl = np.maximum(kl, 0.0)
    d = np.sqrt(kl)
    top = int(gold.argmax())
    turns = bool(gold[-1] < (1 - FALL) * gold[top])
    out = {
        "key": key,
        "title": title,
        "words": words,
        "curve": {"kl": kl.tolist(), "proxy": proxy.tolist(), "gold": gold.tolist()},
        "peak": {"root_kl": float(d[top]), "gold": float(gold[top])} if turns else None,
        "last": {"root_kl": float(d[-1]), "gold": float(gold[-1])},
        "turns_over": turns,
        "fit": None if learned else gao_fit(d, gold),
    }
    if error is not None:
        out["error"] = error.tolist()
    return out | ({"rl_fit": gao_fit(d, gold, learned=True)} if learned else {})


def gao_fit(d: Array, gold: Array, *, learned: bool = False) -> dict[str, float]:
    """Least squares of gold on d (alpha - beta d), or d (alpha - beta log d) for what was learned,
    d > 0; the error is in units of gold.
    """
    d, gold = d[d > 0], gold[d > 0]
    terms = np.stack([d, -d * (np.log(d) if learned else d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, gold, rcond=None)
    error = terms @ np.array([alpha, beta]) - gold
    return {"alpha": float(alpha), "beta": float(beta), "rmse": float(np.sqrt((error**2).mean()))}
