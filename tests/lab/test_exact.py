"""The exact quantities of the lab against slow loops, finite differences and numbers worked by
hand. Numbers are those of the checks in the design.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import world as slow
from fiducial import losses
from fiducial.lab.worlds import exact
from fiducial.lab.worlds import world as lab
from fiducial.lab.worlds.world import World, bradley_terry, prompts_for, tree

EXACT = 1e-12
SHAPES = [(3, 3, 2), (4, 3, 1), (2, 5, 1), (5, 1, 3)]  # vocabulary, horizon, prompts
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_world(shape=(3, 3, 2), seed=0, beta=0.7) -> World:
    vocabulary, horizon, prompts = shape
    rng, size = np.random.default_rng([seed, *shape]), tree(vocabulary, horizon)
    reference = rng.normal(size=(prompts, len(size.states), vocabulary))
    return World(
        "random",
        prompts_for(prompts, vocabulary),
        reference,
        rng.normal(size=(prompts, len(size.responses))),
        beta,
        horizon,
    )


def random_logits(world: World, seed: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng([seed, 99]).normal(size=world.reference.shape) * scale


WORLD = random_world()
PROMPTS = range(2)
LOGITS = random_logits(WORLD, 0)
PI = exact.logprobs(WORLD.tree, LOGITS)
TABLES = [np.array(slow.distribution(table)) for table in LOGITS]
REFERENCES = [np.array(slow.distribution(table)) for table in WORLD.reference]


def optima(world: World = WORLD) -> tuple[list[np.ndarray], list[float]]:
    """Of the slow world: pi* and log Z of each prompt."""
    both = [
        slow.optimum(ref, r, world.beta)
        for ref, r in zip(world.reference, world.reward, strict=True)
    ]
    return [p for p, _ in both], [math.log(z) for _, z in both]


# ---- 1: trees and probabilities ----


def test_1_the_tree_lists_the_responses_and_states_of_the_slow_world_in_its_order():
    assert list(WORLD.responses) == slow.RESPONSES and list(WORLD.tree.states) == slow.PREFIXES
    assert WORLD.tree.finished.tolist() == slow.FINISHED and WORLD.tree.lengths.tolist() == [
        len(y) for y in slow.RESPONSES
    ]


def test_1_path_child_and_leaf_lead_where_the_tokens_lead():
    t = tree(4, 3)
    for y, response in enumerate(t.responses):
        assert [t.states[s] for s in t.path[y] if s >= 0] == [
            response[:k] for k in range(len(response))
        ]
        assert [v for v in t.token[y] if v >= 0] == list(response)
    for s, v in itertools.product(range(len(t.states)), range(4)):
        behind = (*t.states[s], v)
        assert (t.leaf[s, v] >= 0) == (v == 0 or len(behind) == 3) != (t.child[s, v] >= 0)
        assert behind == (
            t.responses[t.leaf[s, v]] if t.leaf[s, v] >= 0 else t.states[t.child[s, v]]
        )
    assert [[len(s) for s in t.states[level]] for level in t.levels] == [[0], [1] * 3, [2] * 9]


@pytest.mark.parametrize(
    ("vocabulary", "horizon", "responses"), [(3, 3, 15), (4, 4, 121), (6, 6, 19_531), (27, 2, 703)]
)
def test_1_the_responses_of_small_and_large_trees_sum_to_one_under_any_policy_and_at_the_optimum(
    vocabulary, horizon, responses
):
    world = random_world((vocabulary, horizon, 1))
    best, log_z = exact.optimum(world)
    assert len(world.responses) == len(set(world.responses)) == responses
    assert abs(np.exp(exact.reference(world)).sum() - 1) < EXACT
    assert abs(np.exp(best).sum() - 1) < EXACT
    assert math.exp(log_z[0]) == pytest.approx(
        (np.exp(exact.reference(world)) * np.exp(world.reward / world.beta)).sum(), rel=1e-11
    )
    again = exact.logprobs(world.tree, exact.logits_of(world.tree, best))
    np.testing.assert_allclose(again, best, atol=1e-11)


def test_1_log_probabilities_optimum_and_divergences_are_those_of_the_slow_world():
    pis, log_z = optima()
    best, found_z = exact.optimum(WORLD)
    np.testing.assert_allclose(np.exp(PI), TABLES, rtol=EXACT)
    np.testing.assert_allclose(np.exp(best), pis, rtol=EXACT)
    np.testing.assert_allclose(found_z, log_z, atol=EXACT)
    assert exact.kl(PI, exact.reference(WORLD)) == pytest.approx(
        np.mean([slow.kl(*pq) for pq in zip(TABLES, REFERENCES, strict=True)]), abs=EXACT
    )
    assert exact.kl(exact.reference(WORLD), PI) == pytest.approx(
        np.mean([slow.kl(*pq) for pq in zip(REFERENCES, TABLES, strict=True)]), abs=EXACT
    )
    j = np.mean(
        [
            slow.objective(a, b, r, WORLD.beta)
            for a, b, r in zip(LOGITS, WORLD.reference, WORLD.reward, strict=True)
        ]
    )
    assert exact.objective(WORLD, PI) == pytest.approx(j, abs=EXACT)


def test_1_logits_of_is_the_table_that_has_these_probabilities():
    mass = [slow.table_of(pi) for pi in TABLES]
    np.testing.assert_allclose(exact.logits_of(WORLD.tree, PI), mass, atol=EXACT)
    np.testing.assert_allclose(
        exact.log_softmax(exact.logits_of(WORLD.tree, PI)), exact.log_softmax(LOGITS), atol=EXACT
    )


def test_1_total_variation_is_the_largest_error_in_the_probability_of_any_event():
    events = np.array(list(itertools.product([False, True], repeat=15)))
    worst = [np.abs(events @ (a - b)).max() for a, b in zip(TABLES, REFERENCES, strict=True)]
    assert exact.total_variation(PI, exact.reference(WORLD)) == pytest.approx(
        np.mean(worst), abs=EXACT
    )


# ---- 2: the objective ----


@pytest.mark.parametrize("seed", range(4))
@shapes
def test_2_j_is_beta_log_z_less_beta_times_the_kl_to_the_optimum(shape, seed):
    world = random_world(shape, seed, beta=[0.05, 0.3, 1.0, 4.0][seed])
    pi = exact.logprobs(world.tree, random_logits(world, seed, scale=2.0))
    best, log_z = exact.optimum(world)
    away = np.mean([slow.kl(np.exp(a), np.exp(b)) for a, b in zip(pi, best, strict=True)])
    assert away > 0.01
    assert exact.objective(world, pi) == pytest.approx(
        world.beta * log_z.mean() - world.beta * away, abs=EXACT * max(1, 1 / world.beta)
    )
    assert exact.objective(world, best) == pytest.approx(world.beta * log_z.mean(), abs=EXACT)


def test_2_another_reward_or_beta_may_be_asked_for():
    other, beta = np.random.default_rng(5).normal(size=WORLD.reward.shape), 0.2
    changed = WORLD.with_(reward=other, beta=beta)
    for ours, theirs in zip(
        exact.optimum(WORLD, reward=other, beta=beta), exact.optimum(changed), strict=True
    ):
        assert np.array_equal(ours, theirs)
    assert exact.objective(WORLD, PI, reward=other, beta=beta) == exact.objective(changed, PI)
    assert exact.objective(changed, PI) != exact.objective(WORLD, PI)


# ---- 3: the decision process ----


def soft(
    world: World, p: int, steps: np.ndarray | None = None
) -> dict[tuple[int, ...], tuple[float, list[float]]]:
    """V* and Q* of each state by plain recursion. `steps` [S, V]: what each step earns as it is
    taken, instead of the reward at the end.
    """
    ref = [slow.softmax(row) for row in world.reference[p]]
    out: dict[tuple[int, ...], tuple[float, list[float]]] = {}

    def value(state: tuple[int, ...]) -> float:
        if state in out:
            return out[state][0]
        s, q = world.tree.states.index(state), []
        for v in range(world.vocabulary):
            behind, earned = (*state, v), 0.0 if steps is None else steps[s, v]
            ended = v == 0 or len(behind) == world.horizon
            at_the_end = (
                world.reward[p][world.responses.index(behind)] if ended and steps is None else 0.0
            )
            q.append(earned + (at_the_end if ended else value(behind)))
        out[state] = (
            world.beta
            * math.log(
                sum(ref[s][v] * math.exp(q[v] / world.beta) for v in range(world.vocabulary))
            ),
            q,
        )
        return out[state][0]

    value(())
    return out


@shapes
def test_3_the_soft_recursion_gives_beta_log_z_and_the_advantage_is_the_log_ratio_in_every_state(
    shape,
):
    world = random_world(shape)
    v, q = exact.soft_values(world)
    best, log_z = exact.optimum(world)
    ratio = exact.log_softmax(exact.logits_of(world.tree, best)) - exact.log_softmax(
        world.reference
    )
    for p in range(len(world.prompts)):
        found = soft(world, p)
        np.testing.assert_allclose(v[p], [found[s][0] for s in world.tree.states], atol=EXACT)
        np.testing.assert_allclose(q[p], [found[s][1] for s in world.tree.states], atol=EXACT)
    np.testing.assert_allclose(v[:, 0], world.beta * log_z, atol=EXACT)
    np.testing.assert_allclose(world.beta * ratio, q - v[..., None], atol=EXACT)


@shapes
def test_3_the_policy_made_of_q_is_the_optimum(shape):
    world = random_world(shape)
    _, q = exact.soft_values(world)
    best = exact.optimum(world)[0]
    made = exact.log_softmax(exact.log_softmax(world.reference) + q / world.beta)
    np.testing.assert_allclose(
        made, exact.log_softmax(exact.logits_of(world.tree, best)), atol=EXACT
    )
    np.testing.assert_allclose(exact.logprobs(world.tree, made), best, atol=EXACT)


def test_3_rewards_on_the_way_have_the_same_optimum_as_their_sum_at_the_end():
    world = lab.step_rewards(WORLD, seed=3)
    assert world.step_reward is not None
    v, q = exact.soft_values(world)
    for p in PROMPTS:
        on_the_way = soft(world, p, world.step_reward[p])
        assert on_the_way[()][0] == pytest.approx(
            world.beta * exact.optimum(world)[1][p], abs=EXACT
        )
        advantages = [[x - on_the_way[s][0] for x in on_the_way[s][1]] for s in world.tree.states]
        np.testing.assert_allclose(q[p] - v[p][:, None], advantages, atol=EXACT)
        assert (
            abs(on_the_way[(1,)][0] - v[p, 1]) > 1e-3
        )  # the values themselves differ by what was earned before


def test_3_values_and_visits_of_a_policy_are_those_of_the_slow_world():
    v, q = exact.values(WORLD, LOGITS)
    seen = exact.visits(WORLD.tree, LOGITS)
    for p in PROMPTS:
        np.testing.assert_allclose(
            v[p],
            slow.state_values(LOGITS[p], WORLD.reference[p], WORLD.reward[p], WORLD.beta),
            atol=EXACT,
        )
        through = [
            sum(
                x
                for x, y in zip(TABLES[p], slow.RESPONSES, strict=True)
                if len(y) > len(s) and y[: len(s)] == s
            )
            for s in slow.PREFIXES
        ]
        np.testing.assert_allclose(seen[p], through, atol=EXACT)
    np.testing.assert_allclose((np.exp(exact.log_softmax(LOGITS)) * q).sum(-1), v, atol=EXACT)
    assert v[:, 0].mean() == pytest.approx(exact.objective(WORLD, PI), abs=EXACT)


@shapes
def test_3_the_optimum_has_its_own_soft_values_and_no_policy_has_more_in_any_state(shape):
    world = random_world(shape)
    best, _ = exact.soft_values(world)
    np.testing.assert_allclose(
        exact.values(world, exact.logits_of(world.tree, exact.optimum(world)[0]))[0],
        best,
        atol=EXACT,
    )
    assert (exact.values(world, random_logits(world, 1))[0] < best).all()


# ---- 4, 8: the gradient ----


@pytest.mark.parametrize("seed", range(2))
def test_4_the_gradient_is_the_finite_difference_of_the_slow_objective(seed):
    logits = random_logits(WORLD, seed)

    def j(table: np.ndarray) -> float:
        return float(
            np.mean(
                [
                    slow.objective(table[p], WORLD.reference[p], WORLD.reward[p], WORLD.beta)
                    for p in PROMPTS
                ]
            )
        )

    np.testing.assert_allclose(exact.gradient(WORLD, logits), slow.difference(j, logits), atol=1e-8)
    assert np.abs(exact.gradient(WORLD, logits)).max() > 1e-2


@shapes
def test_8_natural_steps_along_the_gradient_reach_the_optimum_one_level_of_the_tree_at_a_time(
    shape,
):
    world = random_world(shape)
    logits, gaps = world.reference, []
    for _ in range(world.horizon):
        p = np.exp(exact.log_softmax(logits))
        natural = (
            exact.gradient(world, logits)
            * len(world.prompts)
            / (exact.visits(world.tree, logits)[..., None] * p)
        )
        logits = logits + natural / world.beta
        gaps.append(exact.gap(world, exact.logprobs(world.tree, logits)).gap)
    assert abs(gaps[-1]) < 1e-10 and all(b <= a for a, b in itertools.pairwise(gaps))
    np.testing.assert_allclose(
        exact.logprobs(world.tree, logits), exact.optimum(world)[0], atol=1e-10
    )


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_8_ascent_along_the_exact_gradient_reaches_the_optimum_from_the_reference(beta):
    world = WORLD.with_(beta=beta)
    at = torch.tensor(world.reference, requires_grad=True)

    def closure() -> torch.Tensor:
        here = at.detach().numpy()
        at.grad = -torch.tensor(exact.gradient(world, here))
        return torch.tensor(
            -exact.objective(world, exact.logprobs(world.tree, here)), dtype=torch.float64
        )

    lbfgs(closure, [at])
    found = exact.gap(world, exact.logprobs(world.tree, at.detach().numpy()))
    assert abs(found.gap) < 1e-10 and found.total_variation < 1e-5
    assert exact.gap(world, exact.reference(world)).gap > 0.05


def lbfgs(closure, parameters) -> None:
    torch.optim.LBFGS(
        parameters,
        max_iter=800,
        max_eval=4000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    ).step(closure)


# ---- 6, 7: preferences ----

LABELS = bradley_terry(WORLD.reward)
PAIRS = [(p, i, j) for p in PROMPTS for i in range(15) for j in range(15) if i < j]


def symmetric_weights(seed: int, without: int | None = None) -> np.ndarray:
    """[2, 15, 15] any symmetric weights that sum to 1 over unordered pairs; `without`: a response
    that is never compared.
    """
    w = np.random.default_rng([seed, 7]).random((2, 15, 15)) + 0.1
    w = (w + w.swapaxes(1, 2)) * (1 - np.eye(15))
    if without is not None:
        w[:, without, :] = w[:, :, without] = 0
    return w / w.sum() * 2


def fit(weights: np.ndarray, start: np.ndarray, labels: np.ndarray = LABELS) -> np.ndarray:
    """Log-probabilities of the policy at which L-BFGS on DPO's population loss ends, in PyTorch
    from the paper's formula.
    """
    at = torch.tensor(start, requires_grad=True)
    t = WORLD.tree
    known, path, token = (torch.tensor(x) for x in (t.path >= 0, t.path, t.token))
    ref, w = torch.tensor(exact.reference(WORLD)), torch.tensor(weights * labels)

    def closure() -> torch.Tensor:
        at.grad = None
        logp = torch.where(known, at.log_softmax(-1)[:, path, token], torch.zeros(())).sum(-1)
        implicit = WORLD.beta * (logp - ref)
        loss = -(w * F.logsigmoid(implicit[:, :, None] - implicit[:, None, :])).sum()
        loss.backward()
        return loss

    lbfgs(closure, [at])
    return exact.logprobs(t, at.detach().numpy())


def test_6_losses_entropies_and_accuracies_are_those_of_slow_loops_over_the_pairs():
    weights = symmetric_weights(0)
    loss = entropy = right = total = 0.0
    for p, i, j in PAIRS:
        h = WORLD.beta * (
            math.log(TABLES[p][i] / REFERENCES[p][i]) - math.log(TABLES[p][j] / REFERENCES[p][j])
        )
        prefers, w = 1 / (1 + math.exp(WORLD.reward[p][j] - WORLD.reward[p][i])), weights[p, i, j]
        loss += w * (
            prefers * math.log(1 + math.exp(-h)) + (1 - prefers) * math.log(1 + math.exp(h))
        )
        entropy -= w * (prefers * math.log(prefers) + (1 - prefers) * math.log(1 - prefers))
        right, total = right + w * max(prefers, 1 - prefers), total + w
    assert exact.dpo_loss(WORLD, PI, LABELS, weights) == pytest.approx(loss, abs=EXACT)
    assert exact.label_entropy(LABELS, weights) == pytest.approx(entropy, abs=EXACT)
    assert exact.bayes_accuracy(LABELS, weights * 7) == pytest.approx(right / total, abs=EXACT)


def test_6_the_default_compares_every_two_different_responses_equally_often():
    weights = exact.pair_weights(WORLD)
    assert [weights[p, i, j] for p, i, j in PAIRS] == pytest.approx([1 / len(PAIRS)] * len(PAIRS))
    assert (
        np.array_equal(weights, weights.swapaxes(1, 2))
        and not weights[:, range(15), range(15)].any()
    )
    assert exact.dpo_loss(WORLD, PI, LABELS) == pytest.approx(
        exact.dpo_loss(WORLD, PI, LABELS, weights), abs=EXACT
    )
    assert exact.dpo_loss(WORLD, exact.reference(WORLD), LABELS) == pytest.approx(
        math.log(2), abs=EXACT
    )


def test_6_labels_that_are_certain_have_no_entropy_and_a_perfect_judge():
    certain = (WORLD.reward[:, :, None] > WORLD.reward[:, None, :]).astype(float)
    assert exact.label_entropy(certain, exact.pair_weights(WORLD)) == 0.0
    assert exact.bayes_accuracy(certain, exact.pair_weights(WORLD)) == pytest.approx(1.0, abs=EXACT)
    assert exact.bayes_accuracy(
        np.full_like(certain, 0.5), exact.pair_weights(WORLD)
    ) == pytest.approx(0.5, abs=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_6_the_loss_is_the_entropy_of_bradley_terry_labels_at_the_optimum_and_more_elsewhere(
    seed,
):
    weights = symmetric_weights(seed)
    floor = exact.label_entropy(LABELS, weights)
    assert exact.dpo_loss(WORLD, exact.optimum(WORLD)[0], LABELS, weights) == pytest.approx(
        floor, abs=EXACT
    )
    assert (
        exact.dpo_loss(
            WORLD, exact.logprobs(WORLD.tree, random_logits(WORLD, seed)), LABELS, weights
        )
        > floor + 1e-3
    )
    assert exact.dpo_loss(WORLD, exact.reference(WORLD), LABELS, weights) > floor + 1e-3


def test_7_where_one_response_was_never_compared_the_minimiser_depends_on_the_start():
    without = 0
    weights = symmetric_weights(0, without)
    best = exact.optimum(WORLD)[0]
    ends = [fit(weights, start) for start in (WORLD.reference, LOGITS, random_logits(WORLD, 1))]
    least = exact.dpo_loss(WORLD, best, LABELS, weights)
    others = [y for y in range(15) if y != without]
    for end in ends:
        assert exact.dpo_loss(WORLD, end, LABELS, weights) == pytest.approx(least, abs=1e-9)
        assert exact.total_variation(end, best) > 0.05
        mine, theirs = (
            end[:, others],
            best[:, others],
        )  # among the compared ones all is as it should be
        differences = [x[:, :, None] - x[:, None, :] for x in (mine, theirs)]
        np.testing.assert_allclose(*differences, atol=1e-5)
    assert min(exact.total_variation(a, b) for a, b in itertools.combinations(ends, 2)) > 0.02


def test_7_with_every_pair_compared_every_start_ends_at_the_optimum():
    best = exact.optimum(WORLD)[0]
    for start in (WORLD.reference, LOGITS, random_logits(WORLD, 1)):
        np.testing.assert_allclose(fit(symmetric_weights(0), start), best, atol=1e-6)


# ---- 9: the frontier ----


@shapes
@pytest.mark.parametrize("beta", [0.15, 0.5, 2.0])
def test_9_along_the_frontier_de_dkl_is_beta_and_de_d_one_over_beta_is_the_variance(shape, beta):
    h = 1e-4
    curve = exact.frontier(random_world(shape), 1 / (1 / beta + np.array([h, 0.0, -h])))
    assert (curve.reward[0] - curve.reward[2]) / (curve.kl[0] - curve.kl[2]) == pytest.approx(
        beta, rel=1e-4
    )
    assert (curve.reward[0] - curve.reward[2]) / (2 * h) == pytest.approx(
        curve.variance[1], rel=1e-4
    )


def test_9_its_points_are_the_optima_and_a_second_reward_is_that_of_the_same_policies():
    betas, other = np.array([0.3, 1.5]), np.random.default_rng(1).normal(size=WORLD.reward.shape)
    curve = exact.frontier(WORLD, betas, other=other)
    assert curve.other is not None and exact.frontier(WORLD, betas).other is None
    for k, beta in enumerate(betas):
        pis, _ = optima(WORLD.with_(beta=beta))
        assert curve.kl[k] == pytest.approx(
            np.mean([slow.kl(a, b) for a, b in zip(pis, REFERENCES, strict=True)]), abs=EXACT
        )
        assert curve.reward[k] == pytest.approx(
            np.mean([a @ r for a, r in zip(pis, WORLD.reward, strict=True)]), abs=EXACT
        )
        assert curve.other[k] == pytest.approx(
            np.mean([a @ r for a, r in zip(pis, other, strict=True)]), abs=EXACT
        )
    swapped = exact.frontier(WORLD, betas, reward=other, other=WORLD.reward)
    assert swapped.reward == pytest.approx(
        exact.frontier(WORLD.with_(reward=other), betas).reward, abs=EXACT
    )


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_9_a_gaussian_reward_earns_sigma_times_the_root_of_twice_the_kl(sigma):
    z = np.linspace(-14, 14, 4001)
    world = World("gaussian", ((1,),), -(z[None, None] ** 2) / 2, np.empty((1, 4001)), 1.0, 1)
    place = [r[0] for r in world.responses]
    world = world.with_(reward=3 + sigma * z[None, place])
    curve = exact.frontier(world, sigma / np.array([0.1, 0.5, 1.0, 2.0, 4.0]))
    np.testing.assert_allclose(curve.kl, np.array([0.1, 0.5, 1.0, 2.0, 4.0]) ** 2 / 2, rtol=1e-4)
    np.testing.assert_allclose(curve.reward - 3, sigma * np.sqrt(2 * curve.kl), rtol=1e-4)
    np.testing.assert_allclose(curve.variance, sigma**2, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_9_no_policy_lies_above_the_frontier(seed):
    world = random_world(seed=seed)
    for k in range(20):
        pi = exact.logprobs(
            world.tree,
            world.reference + random_logits(world, 10 * seed + k, scale=[0.1, 1.0, 3.0][k % 3]),
        )
        kl = exact.kl(pi, exact.reference(world))
        low, high = 1e-2, 1e3
        for _ in range(80):  # the beta whose optimum has this KL
            middle = math.sqrt(low * high)
            low, high = (
                (middle, high)
                if exact.frontier(world, np.array([middle])).kl[0] > kl
                else (low, middle)
            )
        at = exact.frontier(world, np.array([low]))
        if kl < exact.frontier(world, np.array([1e-2])).kl[0]:
            assert at.kl[0] == pytest.approx(kl, rel=1e-9)
        assert exact.expected(pi, world.reward) < at.reward[0]


# ---- 12: baselines ----


def score_functions(world: World, logits: np.ndarray) -> np.ndarray:
    """[P, Y, S, V]: grad log pi(y), by loops: one at the chosen token, less the probabilities, in
    each state on the way.
    """
    out = np.zeros((len(world.prompts), len(world.responses), *logits.shape[1:]))
    for p, y in itertools.product(range(len(world.prompts)), range(len(world.responses))):
        for t, token in enumerate(world.responses[y]):
            s = world.tree.states.index(world.responses[y][:t])
            out[p, y, s] -= slow.softmax(logits[p, s])
            out[p, y, s, token] += 1
    return out


def policy_gradient(baseline: np.ndarray) -> np.ndarray:
    """E[(r - beta log-ratio - baseline) grad log pi], the mean over prompts; baseline [P, Y]."""
    weight = WORLD.reward - WORLD.beta * (PI - exact.reference(WORLD)) - baseline
    return np.einsum("py,py,pysv->psv", np.exp(PI), weight, score_functions(WORLD, LOGITS)) / 2


def test_12_a_baseline_that_knows_the_prompt_alone_changes_nothing_in_expectation():
    b = np.array([[3.0], [-5.0]]) * np.ones((2, 15))
    assert (
        np.abs(np.einsum("py,py,pysv->psv", np.exp(PI), b, score_functions(WORLD, LOGITS))).max()
        < EXACT
    )
    np.testing.assert_allclose(
        policy_gradient(np.zeros((2, 15))), exact.gradient(WORLD, LOGITS), atol=EXACT
    )
    np.testing.assert_allclose(policy_gradient(b), exact.gradient(WORLD, LOGITS), atol=EXACT)


def test_12_a_baseline_that_knows_the_response_biases():
    leaking = 0.5 * WORLD.reward  # as the mean of a group of two that holds the response itself
    assert np.abs(policy_gradient(leaking) - exact.gradient(WORLD, LOGITS)).max() > 1e-2
    lengths = np.broadcast_to(WORLD.tree.lengths, (2, 15)).astype(float)
    assert np.abs(policy_gradient(lengths) - exact.gradient(WORLD, LOGITS)).max() > 1e-2


# ---- 14: the KL, token by token ----


@pytest.mark.parametrize("seed", range(4))
@shapes
def test_14_the_kl_of_positions_sums_to_the_kl_of_responses(shape, seed):
    world = random_world(shape, seed)
    logits = random_logits(world, seed)
    by_position = exact.kl_by_position(world.tree, logits, world.reference)
    assert by_position.shape == (world.horizon,) and (by_position > 0).all()
    assert by_position.sum() == pytest.approx(
        exact.kl(exact.logprobs(world.tree, logits), exact.reference(world)), abs=EXACT
    )


def test_14_the_sum_of_each_states_kl_has_the_mean_of_the_sampled_log_ratio_and_less_noise():
    for seed in range(5):
        world = random_world(seed=seed)
        logits = world.reference + random_logits(world, seed, scale=0.3)
        for p in PROMPTS:
            pi, ref = (slow.distribution(x[p]) for x in (logits, world.reference))
            k1 = np.log(pi / ref)
            state = [
                slow.kl(slow.softmax(logits[p, s]), slow.softmax(world.reference[p, s]))
                for s in range(7)
            ]
            blackwell = np.array(
                [
                    sum(state[slow.PREFIXES.index(y[:t])] for t in range(len(y)))
                    for y in slow.RESPONSES
                ]
            )
            stds = [math.sqrt(pi @ (x - pi @ x) ** 2) for x in (blackwell, k1)]
            assert (
                pi @ blackwell
                == pytest.approx(pi @ k1, abs=EXACT)
                == pytest.approx(slow.kl(pi, ref), abs=EXACT)
            )
            assert stds[0] < 0.5 * stds[1]


# ---- 17: best of n ----


def tied(world: World) -> np.ndarray:
    """A score that several responses share."""
    return np.round(world.reward)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_17_the_distribution_of_the_best_of_n_is_that_of_all_tuples_enumerated(n, ties):
    score = tied(WORLD) if ties else WORLD.reward
    assert ties == (len(set(score[0])) < 12)
    expected = np.zeros((2, 15))
    for p in PROMPTS:
        for drawn in itertools.product(range(15), repeat=n):
            best = max(
                drawn, key=lambda y: score[p, y]
            )  # the first of them, where several are best
            expected[p, best] += math.prod(TABLES[p][y] for y in drawn)
    np.testing.assert_allclose(np.exp(exact.best_of_n(PI, score, n)), expected, atol=EXACT)


@pytest.mark.parametrize("ties", [False, True])
def test_17_the_best_of_eight_sampled_draws_has_these_frequencies(ties):
    n, draws, score = 8, 100_000, tied(WORLD) if ties else WORLD.reward
    rng = np.random.default_rng(0)
    for p in PROMPTS:
        drawn = rng.choice(15, size=(draws, n), p=TABLES[p] / TABLES[p].sum())
        best = drawn[np.arange(draws), score[p][drawn].argmax(1)]
        expected = draws * np.exp(exact.best_of_n(PI, score, n)[p])
        observed = np.bincount(best, minlength=15)
        assert chi_square(observed, expected) > 1e-4


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Its p-value, the rare ones together."""
    common = expected >= 5
    if not common.all():
        expected, observed = (np.append(x[common], x[~common].sum()) for x in (expected, observed))
    square = ((observed - expected) ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(
            torch.tensor((len(expected) - 1) / 2, dtype=torch.float64),
            torch.tensor(square / 2, dtype=torch.float64),
        )
    )


NS = [1, 2, 3, 4, 7, 16, 64, 256, 1024, 4096]


def test_17_the_bound_by_hand():
    np.testing.assert_allclose(
        exact.best_of_n_bound(np.array([1, 2, 4, 1024])),
        [0, 0.193147, 0.636294, 5.932448],
        atol=1e-6,
    )


@shapes
@pytest.mark.parametrize("ties", [False, True])
def test_17_the_kl_never_exceeds_its_bound_nor_the_win_rate_n_over_n_plus_one(shape, ties):
    for seed in range(3):
        world = random_world(shape, seed)
        score, ref = tied(world) if ties else world.reward, exact.reference(world)
        kls = []
        for n in NS:
            best = exact.best_of_n(ref, score, n)
            assert abs(np.exp(best).sum(-1) - 1).max() < EXACT
            kls.append(exact.kl(best, ref))
            assert -EXACT <= kls[-1] <= exact.best_of_n_bound(n) + EXACT
            wins = (score[:, :, None] > score[:, None, :]) + 0.5 * (
                score[:, :, None] == score[:, None, :]
            )
            assert (
                np.einsum("pi,pj,pij->p", np.exp(best), np.exp(ref), wins).max()
                <= n / (n + 1) + EXACT
            )
        assert all(a < b + EXACT for a, b in itertools.pairwise(kls))
        assert (
            kls[-1] < exact.best_of_n_bound(4096) - 0.5
        )  # the likeliest best response has a mass, and its log is all there is


def test_17_where_no_score_has_any_mass_the_bound_is_the_kl_and_the_win_rate_n_over_n_plus_one():
    misses = []
    for size in (10, 100, 1000, 10_000):
        even, score = (
            np.full((1, size), -math.log(size)),
            np.random.default_rng(0).permutation(size)[None].astype(float),
        )
        best = exact.best_of_n(even, score, 4)
        misses.append(float(exact.best_of_n_bound(4) - exact.kl(best, even)))
        win = float((np.exp(best) * (score + 0.5) / size).sum())
        assert 4 / 5 - win == pytest.approx(
            1 / (3 * size**2), rel=0.01
        )  # the trapezoid rule's error for the integral of F^4
    assert (
        all(0 < b < a / 5 for a, b in itertools.pairwise(misses)) and misses[-1] < 1e-4
    )  # .636 at n = 4


def test_17_a_best_response_of_next_to_no_mass_is_found_n_times_as_often():
    for mass in (1e-6, 1e-12, 1e-20, 1e-300):
        logp = np.log([[mass, 0.25, 0.75]])
        best = exact.best_of_n(logp, np.array([[2.0, 0.0, 1.0]]), 8)[0]
        assert best[0] == pytest.approx(math.log(mass) + math.log(8), abs=8 * mass + EXACT)
        assert best[1] == pytest.approx(8 * math.log(0.25), abs=8 * mass + EXACT)
        assert best[2] == pytest.approx(math.log(1 - 0.25**8), abs=8 * mass + EXACT)


# ---- 20: wrong labels ----


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_20_the_population_loss_on_flipped_labels_is_that_of_smoothed_dpo_on_clean_ones(e):
    weights, ref = symmetric_weights(1), exact.reference(WORLD)
    population = 0.0
    for p, i, j in PAIRS:
        for w, lo, share in ((i, j, LABELS[p, i, j]), (j, i, LABELS[p, j, i])):
            four = (
                torch.tensor([x], dtype=torch.float64)
                for x in (PI[p, w], PI[p, lo], ref[p, w], ref[p, lo])
            )
            population += (
                weights[p, i, j]
                * share
                * losses.dpo(*four, beta=WORLD.beta, label_smoothing=e)[0].item()
            )
    assert exact.dpo_loss(WORLD, PI, lab.flipped(LABELS, e), weights) == pytest.approx(
        population, abs=EXACT
    )


# ---- the gap ----


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_is_beta_times_the_kl_to_the_optimum_with_everything_beside_it(seed):
    world = random_world(seed=seed)
    logits = random_logits(world, seed)
    found = exact.gap(world, exact.logprobs(world.tree, logits))
    best, log_z = optima(world)
    pis, refs = ([slow.distribution(t) for t in x] for x in (logits, world.reference))
    j, start = (
        np.mean(
            [slow.objective(x[p], world.reference[p], world.reward[p], world.beta) for p in PROMPTS]
        )
        for x in (logits, world.reference)
    )
    gap = world.beta * np.mean([slow.kl(a, b) for a, b in zip(pis, best, strict=True)])

    assert found.objective == pytest.approx(j, abs=EXACT)
    assert found.gap == pytest.approx(gap, abs=EXACT)
    assert found.relative == pytest.approx(gap / (world.beta * np.mean(log_z) - start), abs=1e-11)
    assert found.total_variation == pytest.approx(
        np.mean([0.5 * np.abs(a - b).sum() for a, b in zip(pis, best, strict=True)]), abs=EXACT
    )
    assert found.reward == pytest.approx(
        np.mean([a @ r for a, r in zip(pis, world.reward, strict=True)]), abs=EXACT
    )
    assert found.kl == pytest.approx(
        np.mean([slow.kl(a, b) for a, b in zip(pis, refs, strict=True)]), abs=EXACT
    )


def test_the_gap_is_one_at_the_reference_zero_at_the_optimum_and_may_be_of_another_reward():
    assert exact.gap(WORLD, exact.reference(WORLD)).relative == pytest.approx(1, abs=EXACT)
    at = exact.gap(WORLD, exact.optimum(WORLD)[0])
    assert abs(at.gap) < EXACT and at.total_variation == 0.0
    other = np.random.default_rng(5).normal(size=WORLD.reward.shape)
    assert exact.gap(WORLD, PI, reward=other) == exact.gap(WORLD.with_(reward=other), PI)


# ---- tables of rewards and annotators ----


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
def test_a_sparse_reward_is_one_for_the_share_asked_for_and_never_for_a_response_of_one_token(
    share,
):
    t = tree(4, 3)
    table = lab.sparse_reward(5, t, seed=0, share=share)
    assert table.shape == (5, 40) and set(np.unique(table)) == {0.0, 1.0}
    assert table.sum(1).tolist() == [max(1, round(share * 39))] * 5
    assert not table[:, t.lengths == 1].any()
    assert not np.array_equal(table[0], table[1]) and np.array_equal(
        table, lab.sparse_reward(5, t, seed=0, share=share)
    )
    assert not np.array_equal(table, lab.sparse_reward(5, t, seed=1, share=share))


def test_a_random_reward_has_the_deviation_asked_for_and_differs_everywhere():
    table = lab.random_reward(20, 500, seed=0, scale=2.0)
    assert table.shape == (20, 500) and len(np.unique(table)) == 10_000
    assert abs(table.mean()) < 0.1 and table.std() == pytest.approx(2.0, abs=0.06)


def test_the_exploit_is_what_is_least_likely_loved_by_the_proxy_and_hated_by_gold():
    world = random_world((4, 3, 3))
    ref = np.exp(exact.reference(world))
    gold, proxy = lab.exploited(
        world.reward, ref, seed=0, noise=0.1, mass=0.02, gold=-5.0, proxy=3.0
    )
    for p in range(3):
        few = np.flatnonzero(gold[p] == -5.0)
        rest = np.setdiff1d(np.arange(40), few)
        assert (
            len(few) >= 1 and ref[p, few].sum() <= 0.02 and ref[p, few].max() <= ref[p, rest].min()
        )
        assert ref[p, few].sum() + ref[p, rest].min() > 0.02  # and no more would fit
        assert np.array_equal(gold[p, rest], world.reward[p, rest])
        assert proxy[p, few] == pytest.approx(world.reward[p].max() + 3.0)
        assert 0 < np.abs(proxy[p, rest] - gold[p, rest]).max() < 0.5
    assert world.reward.min() > -5.0  # what was given is left as it was
    one, _ = lab.exploited(world.reward, ref, seed=0, mass=0.0, gold=-5.0)
    assert (one == -5.0).sum(1).tolist() == [1, 1, 1]


def test_a_policy_that_follows_an_exploited_proxy_gains_gold_first_and_loses_it_all():
    world = random_world((4, 3, 3))
    gold, proxy = lab.exploited(
        world.reward, np.exp(exact.reference(world)), seed=0, mass=0.002, proxy=1.0
    )
    curve = exact.frontier(world, np.geomspace(20, 0.1, 60), reward=proxy, other=gold)
    start = exact.expected(exact.reference(world), gold)
    assert curve.other is not None and (np.diff(curve.reward) > 0).all()
    assert curve.other.max() > start + 0.3 and 5 < curve.other.argmax() < 55
    assert curve.other[-1] == pytest.approx(-2.0, abs=0.05)


def test_step_rewards_add_up_to_the_reward():
    world = lab.step_rewards(WORLD, seed=0, scale=0.5)
    assert world.step_reward is not None and world.step_reward.shape == WORLD.reference.shape
    for p, y in itertools.product(PROMPTS, range(15)):
        response = slow.RESPONSES[y]
        steps = [
            world.step_reward[p, slow.PREFIXES.index(response[:t]), token]
            for t, token in enumerate(response)
        ]
        assert world.reward[p, y] == pytest.approx(sum(steps), abs=EXACT)
    assert world.step_reward.std() == pytest.approx(0.5, abs=0.15) and np.array_equal(
        world.reference, WORLD.reference
    )


def circles(p: np.ndarray) -> int:
    """Of three responses each of which is preferred to the next."""
    wins = p > 0.5
    return (
        sum(
            bool(wins[i, j] and wins[j, k] and wins[k, i])
            for i, j, k in itertools.permutations(range(len(p)), 3)
        )
        // 3
    )


def test_only_the_intransitive_annotators_run_in_circles_and_no_reward_explains_them():
    twisted, straight = (
        lab.intransitive(WORLD.reward, seed=0, twist=2.0),
        lab.intransitive(WORLD.reward, seed=0, twist=0.0),
    )
    np.testing.assert_allclose(straight, LABELS, atol=EXACT)
    np.testing.assert_allclose(twisted + twisted.swapaxes(1, 2), 1, atol=EXACT)
    weights = exact.pair_weights(WORLD)
    for p in PROMPTS:
        assert circles(LABELS[p]) == 0 and circles(twisted[p]) >= 10
    best = fit(weights, WORLD.reference, twisted)
    assert (
        exact.dpo_loss(WORLD, best, twisted, weights) > exact.label_entropy(twisted, weights) + 0.1
    )
    assert exact.bayes_accuracy(twisted, weights) > exact.bayes_accuracy(LABELS, weights)


def test_bradley_terry_annotators_by_hand():
    p = bradley_terry(np.array([[0.0, math.log(3)]]), scale=1.0)[0]
    np.testing.assert_allclose(p, [[0.5, 0.25], [0.75, 0.5]], atol=EXACT)
    np.testing.assert_allclose(
        bradley_terry(np.array([[0.0, math.log(3)]]), scale=2.0)[0],
        [[0.5, 0.1], [0.9, 0.5]],
        atol=EXACT,
    )


def test_length_biased_annotators_like_a_longer_response_by_so_many_nats_a_token():
    p = lab.length_biased(WORLD.reward, WORLD.tree.lengths, 0.8)
    for k, i, j in PAIRS:
        odds = (
            WORLD.reward[k, i]
            - WORLD.reward[k, j]
            + 0.8 * (len(slow.RESPONSES[i]) - len(slow.RESPONSES[j]))
        )
        assert math.log(p[k, i, j] / p[k, j, i]) == pytest.approx(odds, abs=1e-10)
    misled = WORLD.with_(reward=WORLD.reward + 0.8 * WORLD.tree.lengths)
    weights, best = exact.pair_weights(WORLD), exact.optimum(misled)[0]
    assert exact.dpo_loss(WORLD, best, p, weights) == pytest.approx(
        exact.label_entropy(p, weights), abs=EXACT
    )
    length = np.broadcast_to(WORLD.tree.lengths, (2, 15)).astype(float)
    assert exact.expected(best, length) > exact.expected(exact.optimum(WORLD)[0], length) + 0.2


def test_flipped_annotators_answer_the_wrong_way_round_that_often():
    flipped = lab.flipped(LABELS, 0.2)
    for k, i, j in PAIRS:
        assert flipped[k, i, j] == pytest.approx(
            0.8 * LABELS[k, i, j] + 0.2 * LABELS[k, j, i], abs=EXACT
        )
    np.testing.assert_allclose(flipped + flipped.swapaxes(1, 2), 1, atol=EXACT)
    weights = exact.pair_weights(WORLD)
    assert exact.bayes_accuracy(flipped, weights) == pytest.approx(
        0.2 + 0.6 * exact.bayes_accuracy(LABELS, weights), abs=EXACT
    )
