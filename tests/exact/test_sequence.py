"""Sequence-level estimators against a world in which everything is known: every group of responses
is enumerated, each as often as it is likely.

Numbers in test names are those of the checks in the design. The slow side is NumPy in loops, with
formulas of its own: nothing of the package in it. What weights and penalties do is in
test_weights.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from fiducial import losses
from fiducial.core import advantages
from fiducial.core.loss_aggregation import constant, sequence_mean, token_mean
from world import (
    LENGTH,
    PREFIXES,
    RESPONSES,
    World,
    all_responses,
    difference,
    distribution,
    grads,
    objective,
    softmax,
    tabular,
)

EXACT = 1e-12
WORLD = World.make()
LENGTHS = [len(y) for y in RESPONSES]


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# ---- slow: NumPy in loops ----


def token_scores(table: np.ndarray) -> list[list[np.ndarray]]:
    """[15][len] of [21]: grad log pi of each token of each response."""
    out = []
    for y in RESPONSES:
        row = []
        for t, token in enumerate(y):
            g = np.zeros((len(PREFIXES), 3))
            s = PREFIXES.index(y[:t])
            g[s] = -softmax(table[s])
            g[s, token] += 1
            row.append(g.flatten())
        out.append(row)
    return out


def token_ratios(new: np.ndarray, old: np.ndarray) -> list[list[float]]:
    return [
        [
            softmax(new[PREFIXES.index(y[:t])])[a] / softmax(old[PREFIXES.index(y[:t])])[a]
            for t, a in enumerate(y)
        ]
        for y in RESPONSES
    ]


def gradient_of_j(world: World) -> np.ndarray:
    return difference(
        lambda table: objective(table, world.ref, world.reward, world.beta), world.policy
    ).flatten()


def exact_gradient_of_j(world: World) -> np.ndarray:
    """E[(R - beta log ratio) grad log pi]: check 4 holds it against finite differences."""
    score = token_scores(world.policy)
    return sum(
        p * r * sum(score[i])
        for i, (p, r) in enumerate(zip(distribution(world.policy), paid(world), strict=True))
    )


def paid(world: World) -> np.ndarray:
    """[15] the reward of each response less beta times its log-ratio: sequence k1 in the reward."""
    return world.reward - world.beta * np.log(distribution(world.policy) / distribution(world.ref))


def slow_groups(world: World, size: int, advantage, weight) -> np.ndarray:
    """E over groups of sum_i w_i A_i grad log pi(y_i); advantage: returns of a group to A_i;
    weight: lengths of a group to the weight of each one's tokens.
    """
    pi, r, score = distribution(world.policy), paid(world), token_scores(world.policy)
    total = np.zeros(len(PREFIXES) * 3)
    for group in itertools.product(range(15), repeat=size):
        each = advantage([r[i] for i in group])
        share = weight([LENGTHS[i] for i in group])
        for i, a, w in zip(group, each, share, strict=True):
            total += math.prod(pi[j] for j in group) * a * w * sum(score[i])
    return total


def sample_deviation(r: list[float]) -> float:
    return math.sqrt(sum((x - sum(r) / len(r)) ** 2 for x in r) / (len(r) - 1))


def cosine(a, b) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def off(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


# ---- through the package ----


def by_groups(
    world: World, size: int, advantage, weight=lambda mask: mask.double() / mask.shape[0]
) -> np.ndarray:
    """The gradient of the shipped loss on all groups at once, each as heavy as it is likely.

    advantage: returns [N] and group ids [N] to advantages [N] or [N, T]. weight: mask [G, T] of one
    step, a group, to the weights of its tokens.
    """
    every, policy = all_responses(), tabular(world.policy)
    rows = list(itertools.chain(*itertools.product(range(15), repeat=size)))
    ids = torch.arange(len(rows)) // size
    now, mask = policy(every.ids, every.mask).logprobs[rows], every.mask[rows]
    likely = tensor(distribution(world.policy))[rows].view(-1, size).prod(1).repeat_interleave(size)
    found = advantage(tensor(paid(world))[rows], ids)
    found = found[:, None].expand(mask.shape) if found.dim() == 1 else found
    weights = torch.cat([weight(m) for m in mask.view(-1, size, mask.shape[1])])
    loss, _ = losses.reinforce_sum(now, likely[:, None] * weights * found, mask)
    return -grads(loss, policy).numpy()


# ---- 10: groups ----


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [2, 3])
def test_10_leave_one_out_has_exactly_the_gradient_of_j(size, seed):
    world = World.make(seed)
    found = by_groups(world, size, advantages.leave_one_out)
    np.testing.assert_allclose(found, exact_gradient_of_j(world), atol=EXACT)
    np.testing.assert_allclose(found, gradient_of_j(world), atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [2, 3])
def test_10_the_groups_mean_is_short_by_exactly_one_over_the_size(size, seed):
    world = World.make(seed)
    np.testing.assert_allclose(
        by_groups(world, size, advantages.group_mean),
        (size - 1) / size * exact_gradient_of_j(world),
        atol=EXACT,
    )


# advantage and weight of a group of two, shipped and slow; the cosine with grad J in this world
GRPO = {
    "the deviation": (
        advantages.group_normalised,
        lambda m: m.double() / 2,
        lambda r: [(x - sum(r) / 2) / (sample_deviation(r) + 1e-4) for x in r],
        lambda n: [1 / 2, 1 / 2],
        0.9845,
    ),
    "a mean within each response": (
        advantages.group_mean,
        sequence_mean,
        lambda r: [x - sum(r) / 2 for x in r],
        lambda n: [1 / 2 / n[0], 1 / 2 / n[1]],
        0.9865,
    ),
    "a mean over the tokens of a step of one group": (
        advantages.group_mean,
        token_mean,
        lambda r: [x - sum(r) / 2 for x in r],
        lambda n: [1 / sum(n)] * 2,
        0.9964,
    ),
    "GRPO, both divisions": (
        advantages.group_normalised,
        sequence_mean,
        lambda r: [(x - sum(r) / 2) / (sample_deviation(r) + 1e-4) for x in r],
        lambda n: [1 / 2 / n[0], 1 / 2 / n[1]],
        0.9864,
    ),
}


@pytest.mark.parametrize("what", GRPO)
def test_10_each_normalisation_of_grpo_alone_turns_the_gradient(what):
    advantage, weight, slow_advantage, slow_weight, measured = GRPO[what]
    found = by_groups(WORLD, 2, advantage, weight)
    np.testing.assert_allclose(
        found, slow_groups(WORLD, 2, slow_advantage, slow_weight), atol=EXACT
    )
    assert cosine(found, exact_gradient_of_j(WORLD)) == pytest.approx(measured, abs=5e-5)


def test_10_a_constant_length_keeps_the_direction_and_divides_by_itself():
    found = by_groups(WORLD, 2, advantages.leave_one_out, lambda m: constant(m, LENGTH))
    np.testing.assert_allclose(found, exact_gradient_of_j(WORLD) / LENGTH, atol=EXACT)


# ---- 12: baselines, and what is credited ----


def one_by_one(world: World, advantage: torch.Tensor) -> np.ndarray:
    """The gradient with advantages [15] or [15, T] of single responses."""
    every, policy = all_responses(), tabular(world.policy)
    each = advantage[:, None].expand(every.mask.shape) if advantage.dim() == 1 else advantage
    loss, _ = losses.reinforce_sum(
        policy(every.ids, every.mask).logprobs,
        tensor(distribution(world.policy))[:, None] * each,
        every.mask,
    )
    return -grads(loss, policy).numpy()


def greedy_response(table: np.ndarray) -> int:
    y: tuple[int, ...] = ()
    while y not in RESPONSES:
        y = (*y, int(table[PREFIXES.index(y)].argmax()))
    return RESPONSES.index(y)


def test_12_no_baseline_a_constant_and_the_greedy_score_all_have_exactly_the_gradient_of_j():
    r, goal = tensor(paid(WORLD)), exact_gradient_of_j(WORLD)
    greedy = r[greedy_response(WORLD.policy)].expand(15)
    for advantage in (
        r,
        r - 3.7,
        advantages.remax(r, greedy),
        advantages.remax(r[:, None].expand(15, 4), greedy),
    ):
        np.testing.assert_allclose(one_by_one(WORLD, advantage), goal, atol=EXACT)


def test_12_a_baseline_that_knows_the_response_takes_its_own_covariance_from_the_gradient():
    best = lambda r, ids: r - r.view(-1, 2).amax(1).repeat_interleave(2)  # noqa: E731  the better of the two, the response itself included
    found = by_groups(WORLD, 2, best)
    pi, r, score = distribution(WORLD.policy), paid(WORLD), token_scores(WORLD.policy)
    taken = sum(
        pi[i] * pi[j] * max(r[i], r[j]) * sum(score[i]) for i in range(15) for j in range(15)
    )
    np.testing.assert_allclose(found, exact_gradient_of_j(WORLD) - taken, atol=EXACT)
    assert off(found, exact_gradient_of_j(WORLD)) > 0.3


def tokens_paid(world: World) -> torch.Tensor:
    """[15, T] k1 at every token, the reward at the last; NaN where no token is."""
    every = all_responses()
    out = torch.full(every.mask.shape, math.nan, dtype=torch.float64)
    for i, (y, ratios) in enumerate(
        zip(RESPONSES, token_ratios(world.policy, world.ref), strict=True)
    ):
        for t in range(len(y)):
            out[i, 1 + t] = -world.beta * math.log(ratios[t]) + (
                world.reward[i] if t + 1 == len(y) else 0.0
            )
    return out


@pytest.mark.parametrize(("seed", "variance"), [(0, 1.015), (1, 0.817), (2, 0.908)])
def test_12_reward_to_go_has_the_gradient_of_the_whole_return_and_as_a_rule_less_variance(
    seed, variance
):
    world = World.make(seed)
    rewards, mask, goal = tokens_paid(world), all_responses().mask, exact_gradient_of_j(world)
    whole, to_go = advantages.sequence_return(rewards, mask), advantages.reward_to_go(rewards, mask)
    np.testing.assert_allclose(whole, paid(world), atol=EXACT)
    for i, n in enumerate(LENGTHS):  # by hand: what comes from each token on
        assert to_go[i, 1 : 1 + n].tolist() == pytest.approx(
            [rewards[i, 1 + t : 1 + n].sum().item() for t in range(n)], abs=EXACT
        )
    assert not to_go[~mask].any()
    np.testing.assert_allclose(one_by_one(world, whole), goal, atol=EXACT)
    np.testing.assert_allclose(one_by_one(world, to_go), goal, atol=EXACT)

    # E |what one response adds|^2, by the token scores: the two means are equal, so the rest is the
    # variance
    pi, score = distribution(world.policy), token_scores(world.policy)
    total = [
        sum(
            p * np.sum(sum(c * g for c, g in zip(credit(i), score[i], strict=True)) ** 2)
            for i, p in enumerate(pi)
        )
        for credit in (
            lambda i: [float(whole[i])] * LENGTHS[i],
            lambda i: to_go[i, 1 : 1 + LENGTHS[i]].tolist(),
        )
    ]
    assert total[1] / total[0] == pytest.approx(variance, abs=5e-4)


def test_12_groups_of_returns_to_go_are_exact_column_by_column():
    mask, rewards = all_responses().mask, tokens_paid(WORLD)
    to_go = advantages.reward_to_go(rewards, mask)
    rows = list(itertools.chain(*itertools.product(range(15), repeat=2)))
    np.testing.assert_allclose(
        by_groups(WORLD, 2, lambda _, ids: advantages.leave_one_out(to_go[rows], ids)),
        exact_gradient_of_j(WORLD),
        atol=EXACT,
    )


@pytest.mark.parametrize(("size", "measured"), [(2, 0.9794), (3, 0.9911)])
def test_12_whitening_a_small_batch_has_a_bias_and_this_is_its_size(size, measured):
    mask, to_go = (
        all_responses().mask,
        advantages.reward_to_go(tokens_paid(WORLD), all_responses().mask),
    )

    def advantage(_, ids):
        rows = torch.tensor(list(itertools.product(range(15), repeat=size)))
        return torch.cat([advantages.whitened(to_go[batch], mask[batch]) for batch in rows])

    found = by_groups(WORLD, size, advantage)
    pi, score, total = distribution(WORLD.policy), token_scores(WORLD.policy), np.zeros(21)
    credit = [to_go[i, 1 : 1 + n].tolist() for i, n in enumerate(LENGTHS)]
    for batch in itertools.product(range(15), repeat=size):
        tokens = np.concatenate([credit[i] for i in batch])
        mean, deviation = tokens.mean(), math.sqrt(((tokens - tokens.mean()) ** 2).mean() + 1e-8)
        for i in batch:
            total += (
                math.prod(pi[j] for j in batch)
                / size
                * sum((c - mean) / deviation * g for c, g in zip(credit[i], score[i], strict=True))
            )
    np.testing.assert_allclose(found, total, atol=EXACT)
    assert cosine(found, exact_gradient_of_j(WORLD)) == pytest.approx(measured, abs=5e-5)


# ---- 16: at ratio one, and off policy ----

OTHER = (
    World.make(7).policy * 0.5
)  # of the policy that sampled, where it is not the one that learns


def off_policy(
    loss_sum,
    advantage: np.ndarray,
    *,
    new=WORLD.policy,
    old=OTHER,
    weight=lambda mask: mask.double(),
) -> tuple[np.ndarray, dict]:
    """The gradient of what the loss wants to grow, over all responses as often as `old` samples
    them, with advantages [15].
    """
    every, policy = all_responses(), tabular(new)
    before = tabular(old)(every.ids, every.mask).logprobs.detach()
    each = (tensor(distribution(old)) * tensor(advantage))[:, None] * weight(every.mask)
    loss, metrics = loss_sum(policy(every.ids, every.mask).logprobs, before, each, every.mask)
    return -grads(loss, policy).numpy(), metrics


def slow_off_policy(
    coefficient, advantage: np.ndarray, *, new=WORLD.policy, old=OTHER
) -> np.ndarray:
    """E_old sum_t c_t A grad log pi; coefficient: A, the ratios of a response's tokens to c_t of
    each.
    """
    score, mu = token_scores(new), distribution(old)
    out = np.zeros(21)
    for i, ratios in enumerate(token_ratios(new, old)):
        for c, g in zip(coefficient(advantage[i], ratios), score[i], strict=True):
            out += mu[i] * c * advantage[i] * g
    return out


def share(mask):
    """by_response of single responses."""
    return torch.cat([sequence_mean(m[None]) for m in mask])


def geometric(ratios: list[float]) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


def kept(a: float, ratio: float, low: float, high: float) -> bool:
    return not ((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low))


def test_16_at_ratio_one_every_loss_has_the_policy_gradient_and_gspo_that_of_grpo():
    a = WORLD.reward
    for weight in (lambda m: m.double(), share):
        plain, _ = off_policy(
            lambda now, old, adv, mask: losses.reinforce_sum(now, adv, mask),
            a,
            old=WORLD.policy,
            weight=weight,
        )
        for loss_sum in (losses.ppo_clip_sum, losses.gspo_sum, losses.cispo_sum):
            found, metrics = off_policy(loss_sum, a, old=WORLD.policy, weight=weight)
            np.testing.assert_allclose(found, plain, atol=EXACT)
            assert (
                metrics["clip_ratio"] == 0
                and metrics["ratio/max"] == 1
                and metrics["ratio"] == sum(LENGTHS)
            )


@pytest.mark.parametrize(("clip", "high"), [(0.2, 0.28), (0.2, None), (0.6, 0.1), (3e-4, 4e-4)])
def test_16_off_policy_each_loss_has_the_gradient_of_a_slow_loop(clip, high):
    a, up = WORLD.reward, clip if high is None else high
    found, _ = off_policy(lambda *x: losses.ppo_clip_sum(*x, clip=clip, clip_high=high), a)
    np.testing.assert_allclose(
        found, slow_off_policy(lambda a, r: [x * kept(a, x, clip, up) for x in r], a), atol=EXACT
    )
    found, _ = off_policy(
        lambda *x: losses.gspo_sum(*x, clip=clip, clip_high=high), a, weight=share
    )
    slow = slow_off_policy(
        lambda a, r: [geometric(r) * kept(a, geometric(r), clip, up) / len(r)] * len(r), a
    )
    np.testing.assert_allclose(found, slow, atol=EXACT)
    found, _ = off_policy(lambda *x: losses.cispo_sum(*x, cap=1 + up), a)
    np.testing.assert_allclose(
        found, slow_off_policy(lambda a, r: [min(x, 1 + up) for x in r], a), atol=EXACT
    )


def test_16_gspos_gradient_is_the_finite_difference_of_the_papers_objective():
    def objective_of_gspo(
        table: np.ndarray,
    ) -> float:  # eq. 5: a mean over responses, of whole responses
        out = 0.0
        for mu, a, ratios in zip(
            distribution(OTHER), WORLD.reward, token_ratios(table, OTHER), strict=True
        ):
            s = geometric(ratios)
            out += mu * min(s * a, min(max(s, 0.8), 1.3) * a)
        return out

    found, _ = off_policy(
        lambda *x: losses.gspo_sum(*x, clip=0.2, clip_high=0.3), WORLD.reward, weight=share
    )
    np.testing.assert_allclose(
        found, difference(objective_of_gspo, WORLD.policy).flatten(), atol=1e-8
    )


def test_16_cispo_without_a_cap_has_the_unclipped_surrogates_gradient_and_with_one_this_bias():
    def surrogate(table: np.ndarray) -> float:
        return sum(
            mu * a * sum(r)
            for mu, a, r in zip(
                distribution(OTHER), WORLD.reward, token_ratios(table, OTHER), strict=True
            )
        )

    goal = difference(surrogate, WORLD.policy).flatten()
    found, _ = off_policy(lambda *x: losses.cispo_sum(*x, cap=math.inf), WORLD.reward)
    np.testing.assert_allclose(found, goal, atol=1e-8)
    biases = {
        cap: off(
            off_policy(lambda *x, cap=cap: losses.cispo_sum(*x, cap=cap), WORLD.reward)[0], goal
        )
        for cap in (5.0, 2.0, 1.2)
    }
    assert biases == pytest.approx({5.0: 0.0, 2.0: 0.0387, 1.2: 0.1334}, abs=5e-5)
    assert biases[5.0] < biases[2.0] < biases[1.2]


def test_16_off_policy_every_surrogate_is_biased_for_the_true_gradient_and_this_is_by_how_much():
    score, pi = token_scores(WORLD.policy), distribution(WORLD.policy)
    goal = sum(p * r * sum(g) for p, r, g in zip(pi, WORLD.reward, score, strict=True))
    slow = difference(
        lambda table: float(distribution(table) @ WORLD.reward), WORLD.policy
    ).flatten()
    np.testing.assert_allclose(goal, slow, atol=1e-8)
    found = {
        "reinforce": off_policy(
            lambda now, old, adv, mask: losses.reinforce_sum(now, adv, mask), WORLD.reward
        ),
        "ppo": off_policy(losses.ppo_clip_sum, WORLD.reward),
        "ppo, clip-higher": off_policy(
            lambda *x: losses.ppo_clip_sum(*x, clip_high=0.6), WORLD.reward
        ),
        "gspo": off_policy(
            lambda *x: losses.gspo_sum(*x, clip=math.inf, clip_high=math.inf), WORLD.reward
        ),
        "cispo": off_policy(losses.cispo_sum, WORLD.reward),
    }
    assert {k: cosine(v, goal) for k, (v, _) in found.items()} == pytest.approx(
        {
            "reinforce": 0.9616,
            "ppo": 0.8825,
            "ppo, clip-higher": 0.9500,
            "gspo": 0.9809,
            "cispo": 0.9817,
        },
        abs=5e-5,
    )


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.4, 0.1)])
def test_16_the_upper_clip_is_its_own_and_the_metrics_say_where_it_cut(low, high):
    for a, rho in itertools.product(
        [-1.5, 0.7],
        [0.5, 1 - low - 1e-6, 1 - low + 1e-6, 1.0, 1 + high - 1e-6, 1 + high + 1e-6, 2.0],
    ):
        for loss_sum in (losses.ppo_clip_sum, losses.gspo_sum):
            now = tensor([[math.log(rho)]]).requires_grad_()
            loss, metrics = loss_sum(
                now, tensor([[0.0]]), tensor([[a]]), torch.ones(1, 1), clip=low, clip_high=high
            )
            (derivative,) = torch.autograd.grad(loss, now)
            assert derivative.item() == pytest.approx(-a * rho * kept(a, rho, low, high), abs=EXACT)
            assert loss.item() == pytest.approx(
                -min(a * rho, a * min(max(rho, 1 - low), 1 + high)), abs=EXACT
            )
            assert metrics["clip_ratio"].item() == float(not kept(a, rho, low, high))
