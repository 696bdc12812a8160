"""What the lab tells of DPO's derivation, of labels and of proxies, against slow loops, other
algorithms and numbers worked out by quadrature.
"""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

import world as slow
from fiducial.lab.study import (
    decision_process,
    derivation,
    frontier,
    labels,
    optimize,
    overoptimization,
)
from fiducial.lab.study.results import CurvePoint, GaoFit
from fiducial.lab.worlds import exact
from fiducial.lab.worlds.world import World, bradley_terry, flipped, intransitive

BETA = 0.7
RNG = np.random.default_rng(5)
WORLD = World("test", ((1,), (2,)), RNG.normal(size=(2, 7, 3)), RNG.normal(size=(2, 15)), BETA, 3)
REF = [slow.distribution(t) for t in WORLD.reference]
BEST, Z = zip(
    *(slow.optimum(t, r, BETA) for t, r in zip(WORLD.reference, WORLD.reward, strict=True)),
    strict=True,
)
PAIRS = list(itertools.permutations(range(15), 2))


def mean(f) -> float:
    """Over the two prompts."""
    return (f(0) + f(1)) / 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def text(y: int) -> str:
    return "".join(".ab"[t] for t in slow.RESPONSES[y])


def test_the_slow_world_counts_responses_and_states_alike():
    assert list(WORLD.responses) == slow.RESPONSES and list(WORLD.tree.states) == slow.PREFIXES


# ---- the setting ----


def test_the_walk_is_that_of_the_slow_loops():
    told = decision_process.decision_process(WORLD)
    likely = [
        (BEST[p][y], p, y) for p in range(2) for y in range(15) if len(slow.RESPONSES[y]) == 3
    ]
    _, p, y = max(likely)
    response, reward = slow.RESPONSES[y], WORLD.reward[p]
    assert (told.prompt, told.response) == ("ab"[p], text(y))
    table = slow.table_of(BEST[p])
    values = slow.state_values(
        table, WORLD.reference[p], reward, BETA
    )  # of the optimum: what is still to come, the price of its tokens included
    assert [s.state for s in told.steps] == ["ab"[p] + text(y)[:t] for t in range(3)]
    assert "".join(s.action for s in told.steps) == text(y)
    for t, step in enumerate(told.steps):
        here = slow.PREFIXES.index(response[:t])
        pi, ref = (
            slow.softmax(table[here])[response[t]],
            slow.softmax(WORLD.reference[p][here])[response[t]],
        )
        behind = reward[y] if t == 2 else values[slow.PREFIXES.index(response[: t + 1])]
        expected = {
            "pi": pi,
            "ref": ref,
            "log_ratio": math.log(pi / ref),
            "reward": reward[y] * (t == 2),
            "value": values[here],
            "q": behind,
        }
        assert {k: getattr(step, k) for k in expected} == pytest.approx(expected, abs=1e-12)
        assert BETA * step.log_ratio == pytest.approx(step.q - step.value, abs=1e-12)
    assert (
        told.probability == pytest.approx(REF[p][y], abs=1e-14)
        and told.reward == reward[y]
        and told.beta == BETA
    )
    assert told.sum_log_ratio == pytest.approx(math.log(BEST[p][y] / REF[p][y]), abs=1e-12)
    assert told.z == pytest.approx(Z, abs=1e-12)
    assert told.beta_log_z == pytest.approx(mean(lambda p: BETA * math.log(Z[p])), abs=1e-12)
    assert told.expected_reward == pytest.approx(
        mean(lambda p: BEST[p] @ WORLD.reward[p]), abs=1e-12
    )
    assert told.kl == pytest.approx(mean(lambda p: slow.kl(BEST[p], REF[p])), abs=1e-12)
    assert told.objective == pytest.approx(told.beta_log_z, abs=1e-12)
    assert told.probabilities_sum == pytest.approx(1, abs=1e-12)


# ---- frontier, best-of-n ----


def test_the_frontier_is_the_optimum_of_every_beta():
    told = frontier.frontier(WORLD)
    assert min(told.beta) < BETA / 30 and max(told.beta) > BETA * 30
    for beta, kl, reward in list(zip(told.beta, told.kl, told.reward, strict=True))[::10]:
        best = [slow.optimum(WORLD.reference[p], WORLD.reward[p], beta)[0] for p in range(2)]
        assert kl == pytest.approx(mean(lambda p, b=best: slow.kl(b[p], REF[p])), abs=1e-10)
        assert reward == pytest.approx(mean(lambda p, b=best: b[p] @ WORLD.reward[p]), abs=1e-10)
    assert (
        told.optimum.kl == pytest.approx(mean(lambda p: slow.kl(BEST[p], REF[p])), abs=1e-12)
        and told.optimum.beta == BETA
    )
    assert told.optimum.reward == pytest.approx(
        mean(lambda p: BEST[p] @ WORLD.reward[p]), abs=1e-12
    )
    assert 0 < told.slope_error < 1e-6 and 0 < told.variance_error < 1e-6
    on_curve = np.interp([r.kl for r in told.best_of_n], told.kl, told.reward)
    assert all(r.reward <= most + 1e-3 for r, most in zip(told.best_of_n, on_curve, strict=True))


def test_errors_of_the_slope_are_not_small_whatever_the_curve(monkeypatch):
    right = exact.frontier

    def wrong(world, betas, **more):
        curve = right(world, betas, **more)
        return exact.Frontier(curve.beta, 1.01 * curve.kl, curve.reward, 1.02 * curve.variance)

    monkeypatch.setattr(exact, "frontier", wrong)
    told = frontier.frontier(WORLD)
    assert told.slope_error == pytest.approx(
        1 - 1 / 1.01, abs=1e-4
    ) and told.variance_error == pytest.approx(1 - 1 / 1.02, abs=1e-4)


@pytest.mark.parametrize("digits", [9, 0])  # with none many rewards are equal
def test_best_of_n_by_every_draw_there_is(digits):
    world = WORLD.with_(reward=np.round(WORLD.reward, digits))
    rows = frontier.best_of_n(world, [1, 2, 3]).rows
    for row in rows:
        n, found = row.n, [np.zeros(15), np.zeros(15)]
        for p in range(2):
            for draw in itertools.product(range(15), repeat=n):
                found[p][max(draw, key=lambda y: world.reward[p][y])] += np.prod(
                    REF[p][list(draw)]
                )  # the first of the best
        assert row.kl == pytest.approx(mean(lambda p, f=found: slow.kl(f[p], REF[p])), abs=1e-12)
        assert row.reward == pytest.approx(
            mean(lambda p, f=found: f[p] @ world.reward[p]), abs=1e-12
        )
        better = [np.sign(r[:, None] - r[None]) / 2 + 0.5 for r in world.reward]
        assert row.win_rate == pytest.approx(
            mean(lambda p, f=found, b=better: f[p] @ b[p] @ REF[p]), abs=1e-12
        )
        assert row.bound == pytest.approx(
            math.log(n) - (n - 1) / n, abs=1e-12
        ) and row.win_bound == n / (n + 1)
        assert row.kl <= row.bound + 1e-12 and row.win_rate <= row.win_bound + 1e-12
    assert rows[0].kl == pytest.approx(0, abs=1e-12) and rows[0].win_rate == pytest.approx(0.5)


def test_without_ties_and_with_many_responses_the_bound_is_reached():
    ideal = frontier.best_of_n(WORLD, [1, 4, 64, 1024]).ideal
    assert [r.bound for r in ideal] == pytest.approx([0, 0.636, 3.175, 5.932], abs=5e-4)
    assert [r.kl for r in ideal] == pytest.approx([r.bound for r in ideal], abs=3e-3)
    assert all(r.kl <= r.bound + 1e-12 for r in ideal)


# ---- the derivation ----


@pytest.fixture(scope="module")
def derived():
    return derivation.derive(WORLD)


def test_both_sides_of_each_step_are_those_of_the_slow_loops(derived):
    steps = {s.key: s for s in derived[0]}
    assert list(steps) == ["objective", "partition", "optimal_policy", "reward", "cancels"]
    for step in steps.values():
        assert (
            max(abs(a - b) for _, a, b in step.rows) <= step.difference < 1e-8
            and 1 < len(step.rows) <= 6
        )
    assert max(steps["objective"].difference, steps["partition"].difference) < 1e-12

    rows = {label: left for label, left, _ in steps["objective"].rows}
    assert rows["reference"] == pytest.approx(mean(lambda p: REF[p] @ WORLD.reward[p]), abs=1e-12)
    assert rows["optimum"] == pytest.approx(mean(lambda p: BETA * math.log(Z[p])), abs=1e-12)
    assert (
        all(rows["optimum"] > j for name, j in rows.items() if name != "optimum") and len(rows) == 5
    )
    assert [left for _, left, _ in steps["partition"].rows] == pytest.approx(Z, abs=1e-12)

    named = {f"{'ab'[p]} → {text(y)}": (p, y) for p in range(2) for y in range(15)}
    assert all(
        right == pytest.approx(BEST[p][y], rel=1e-8)
        for label, _, right in steps["optimal_policy"].rows
        for p, y in [named[label]]
    )
    assert all(
        left == pytest.approx(WORLD.reward[p][y], abs=1e-8)
        for label, left, _ in steps["reward"].rows
        for p, y in [named[label]]
    )
    *pairs, (label, left, right) = steps["cancels"].rows
    for name, implicit, _ in pairs:
        (p, i), j = (
            named[name.split(" over ")[0]],
            [text(y) for y in range(15)].index(name.split(" over ")[1]),
        )
        assert implicit == pytest.approx(sigmoid(WORLD.reward[p][i] - WORLD.reward[p][j]), abs=1e-8)
    assert "shifted" in label and [left, right] == pytest.approx(pairs[0][1:], abs=1e-8)


def test_the_policy_found_numerically_knows_no_formula_and_no_side_knows_the_other(monkeypatch):
    right = optimize.maximize(WORLD)
    np.testing.assert_allclose(right.logp, np.log(BEST), atol=1e-9)
    assert -right.loss == pytest.approx(mean(lambda p: BETA * math.log(Z[p])), abs=1e-12)
    monkeypatch.setattr(
        exact, "optimum", lambda w, **more: (np.full((2, 15), -math.log(15)), np.zeros(2))
    )
    monkeypatch.setattr(exact, "soft_values", lambda w: (np.zeros((2, 7)), np.zeros((2, 7, 3))))
    told = derivation.derive(WORLD)[0]
    assert (
        [left for _, left, _ in told[2].rows]
        == pytest.approx([1 / 15] * 5)
        != [right for *_, right in told[2].rows]
    )
    steps = {s.key: s.difference for s in told}
    assert (
        min(steps["objective"], steps["partition"], steps["optimal_policy"], steps["reward"]) > 0.1
        and steps["cancels"] < 1e-8
    )


def test_a_wrong_reward_shows_in_the_last_two_steps():
    numeric = optimize.maximize(WORLD).logp
    other = WORLD.with_(reward=WORLD.reward + 0.1 * np.arange(15.0))
    assert (
        derivation._reward(other, numeric).difference > 0.1
        and derivation._cancels(other, numeric).difference > 0.01
    )


def test_a_shift_for_each_prompt_moves_z_alone():
    moved = WORLD.with_(reward=WORLD.reward + np.array([[1.0], [-2.0]]))
    np.testing.assert_allclose(optimize.maximize(moved).logp, np.log(BEST), atol=1e-9)
    assert decision_process.decision_process(moved).z == pytest.approx(
        [Z[0] * math.exp(1 / BETA), Z[1] * math.exp(-2 / BETA)], rel=1e-12
    )


def slow_loss(policy, preference, weights=None) -> float:
    """DPO's loss in loops: every ordered pair as often as it would be the label."""
    total, mass = 0.0, 0.0
    for p in range(2):
        for i, j in PAIRS:
            share = 1.0 if weights is None else weights[p][i, j]
            h = math.log(policy[p][i] / REF[p][i]) - math.log(policy[p][j] / REF[p][j])
            total += share * preference[p][i, j] * math.log1p(math.exp(-BETA * h))
            mass += share / 2
    return total / mass


def slow_entropy(preference) -> float:
    return sum(
        -preference[p][i, j] * math.log(preference[p][i, j]) for p in range(2) for i, j in PAIRS
    ) / len(PAIRS)


def test_minimising_dpos_loss_recovers_the_optimum(derived):
    told, preference = derived[1], bradley_terry(WORLD.reward)
    assert (
        told.loss
        == pytest.approx(slow_loss(BEST, preference), abs=1e-12)
        == pytest.approx(slow_entropy(preference), abs=1e-12)
    )
    assert told.entropy == pytest.approx(slow_entropy(preference), abs=1e-12)
    assert 0 < told.largest_logprob_error < 1e-6 and told.gradient_at_optimum < 1e-14


def test_the_population_loss_is_the_slow_one_for_any_policy_labels_and_smoothing():
    rng = np.random.default_rng(2)
    logits, preference = rng.normal(size=(2, 7, 3)), intransitive(WORLD.reward, 0, 1.0)
    policy = [slow.distribution(t) for t in logits]
    logp = optimize.table_logprobs(WORLD.tree, torch.from_numpy(logits))
    np.testing.assert_allclose(logp, np.log(policy), atol=1e-12)
    weights = np.abs(rng.normal(size=(2, 15, 15)))
    weights = weights + weights.swapaxes(1, 2)
    weights[:, range(15), range(15)] = 0
    weights /= weights.sum() / 2
    for smoothing in (0.0, 0.2):
        found = optimize.population_loss(WORLD, preference, weights, label_smoothing=smoothing)(
            logp
        )
        assert found.item() == pytest.approx(
            slow_loss(policy, flipped(preference, smoothing), weights), abs=1e-12
        )


# ---- a response never compared ----


def test_starts_reach_one_loss_at_policies_that_differ():
    told = labels.missing(WORLD)
    y = int(np.argmax(BEST[0]))
    assert (told.prompt, told.never_compared) == ("a", text(y))
    assert told.optimum_probability == pytest.approx(BEST[0][y], abs=1e-12)
    weights = np.ones((2, 15, 15))
    weights[0, y, :] = weights[0, :, y] = 0
    least = slow_loss(BEST, bradley_terry(WORLD.reward), weights)
    rows = {row.start: row for row in told.starts}
    assert [row.loss for row in rows.values()] == pytest.approx([least] * 4, abs=1e-9)
    assert rows["from the optimum"].total_variation < 1e-9 and rows[
        "from the optimum"
    ].probability == pytest.approx(BEST[0][y], abs=1e-9)
    others = [row for name, row in rows.items() if name != "from the optimum"]
    assert len(others) == 3 and len({round(row.probability, 3) for row in others}) == 3
    for row in others:
        # the rest keeps its proportions, so that the distance is the probability it lacks, in one
        # of two prompts
        assert (
            row.total_variation == pytest.approx(abs(BEST[0][y] - row.probability) / 2, abs=1e-5)
            and row.total_variation > 0.01
        )
    assert rows["from the reference"].start_probability == pytest.approx(REF[0][y], abs=1e-12)
    assert told.complete.loss == pytest.approx(
        slow_loss(BEST, bradley_terry(WORLD.reward)), abs=1e-10
    )
    assert told.complete.total_variation < 1e-6


# ---- annotators ----


def strengths(wins: np.ndarray) -> np.ndarray:
    """Zermelo's iteration for the Bradley-Terry maximum likelihood: log-strengths of any number of
    wins, whole or not.
    """
    s, games = np.ones(len(wins)), wins + wins.T
    for _ in range(100_000):
        new = wins.sum(1) / (games / (s[:, None] + s[None])).sum(1)
        new /= np.exp(np.log(new).mean())
        if np.abs(new / s - 1).max() < 1e-13:
            break
        s = new
    return np.log(s)


def tilted(preference, games=None) -> list[np.ndarray]:
    """DPO's minimiser without DPO: the reference tilted by the scores that Bradley and Terry's
    model gives the responses.
    """
    games = np.ones((2, 15, 15)) if games is None else games
    wins = [preference[p] * games[p] * (1 - np.eye(15)) for p in range(2)]
    return [slow.optimum(WORLD.reference[p], strengths(wins[p]), BETA)[0] for p in range(2)]


def measured(policy) -> dict[str, float]:
    def j(pi):
        return mean(lambda p: pi[p] @ WORLD.reward[p] - BETA * slow.kl(pi[p], REF[p]))

    lengths = np.array([len(y) for y in slow.RESPONSES])
    return {
        "total_variation": mean(lambda p: np.abs(policy[p] - BEST[p]).sum() / 2),
        "relative_gap": (j(BEST) - j(policy)) / (j(BEST) - j(REF)),
        "kl": mean(lambda p: slow.kl(policy[p], REF[p])),
        "length": mean(lambda p: policy[p] @ lengths),
    }


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in labels.annotators(WORLD)}


def policies_of_annotators() -> dict[str, tuple]:
    """Name: preference, DPO's minimiser."""
    true, lengths = bradley_terry(WORLD.reward), np.array([len(y) for y in slow.RESPONSES])
    wrong = 0.9 * true + 0.1 * (1 - true)
    again = 0.9 * wrong + 0.1 * (1 - wrong)
    longer = [WORLD.reward[p] + 0.5 * lengths for p in range(2)]
    circles = intransitive(WORLD.reward, 0, 1.5)
    return {
        "Bradley-Terry, true labels": (true, BEST),
        "one label in ten flipped": (wrong, tilted(wrong)),
        "one label in ten flipped, label smoothing 0.1": (wrong, tilted(again)),
        "half a nat in favor of each extra token": (
            bradley_terry(np.array(longer)),
            [slow.optimum(WORLD.reference[p], longer[p], BETA)[0] for p in range(2)],
        ),
        "three times overconfident": (
            bradley_terry(3 * WORLD.reward),
            [slow.optimum(WORLD.reference[p], 3 * WORLD.reward[p], BETA)[0] for p in range(2)],
        ),
        "intransitive preferences": (circles, tilted(circles)),
    }


@pytest.mark.parametrize("name", policies_of_annotators())
def test_the_minimiser_on_an_annotators_labels_is_the_tilt_of_its_bradley_terry_scores(rows, name):
    (preference, policy), row = policies_of_annotators()[name], rows[name]
    assert {k: getattr(row, k) for k in measured(policy)} == pytest.approx(
        measured(policy), abs=2e-5
    )
    assert row.entropy == pytest.approx(slow_entropy(preference), abs=1e-12)
    assert row.bayes_accuracy == pytest.approx(
        sum(max(preference[p][i, j], preference[p][j, i]) for p in range(2) for i, j in PAIRS)
        / 420,
        abs=1e-12,
    )
    smoothed = flipped(preference, 0.1) if "smoothing" in name else preference
    assert row.loss == pytest.approx(slow_loss(policy, smoothed), abs=1e-9)
    assert row.excess == pytest.approx(
        slow_loss(policy, smoothed) - slow_entropy(smoothed), abs=1e-9
    )


def test_what_the_words_say_is_so(rows):
    assert rows["Bradley-Terry, true labels"].relative_gap < 1e-9
    away = exact.kl(np.log(BEST), np.log(REF))
    flips, smoothed, sure = (
        rows[k].kl
        for k in (
            "one label in ten flipped",
            "one label in ten flipped, label smoothing 0.1",
            "three times overconfident",
        )
    )
    assert smoothed < flips < away < sure
    assert (
        f"{flips:.2f} nats from the reference; the optimum is at {away:.2f}"
        in rows["one label in ten flipped"].words
    )
    assert rows["intransitive preferences"].excess > 0.01
    for name in (
        "Bradley-Terry, true labels",
        "half a nat in favor of each extra token",
        "three times overconfident",
    ):
        assert abs(rows[name].excess) < 1e-9
    assert rows["half a nat in favor of each extra token"].length > measured(BEST)["length"] + 0.05


def test_a_file_of_labels_is_fitted_as_it_is_and_its_wins_are_drawn_by_the_annotator(rows):
    true = bradley_terry(WORLD.reward)
    wins = labels.sampled(true, 1000, np.random.default_rng([0, 6]))
    games = wins + wins.swapaxes(1, 2)
    assert wins.sum() == 1000 and labels.has_minimum(wins)
    policy = tilted(wins / np.maximum(games, 1), games)
    row = rows["1,000 true labels"]
    assert {k: getattr(row, k) for k in measured(policy)} == pytest.approx(
        measured(policy), abs=2e-4
    )
    assert f"on {(games > 0).sum() // 2} pairs" in row.words
    assert row.entropy == pytest.approx(
        slow_entropy(true), abs=1e-12
    )  # the annotator's, not the file's

    many = labels.sampled(true, 400_000, np.random.default_rng(1))
    count = many + many.swapaxes(1, 2)
    off = ~np.eye(15, dtype=bool)
    assert (
        np.abs(count[:, off] - 400_000 / 210).max() < 5 * math.sqrt(400_000 / 210)
        and not count[:, ~off].any()
    )
    z = (many - count * true)[:, off] / np.sqrt(count * true * (1 - true))[:, off]
    assert np.abs(z).max() < 4.5 and 0.8 < (z**2).mean() < 1.2


def test_labels_without_a_least_loss_are_told_and_end_in_numbers():
    row = labels.annotators(WORLD, labels=30)[-1]
    assert row.name == "30 true labels" and "no single finite policy" in row.words
    assert (
        all(math.isfinite(v) for v in vars(row).values() if isinstance(v, float))
        and row.total_variation > 0.1
    )


@pytest.mark.parametrize(
    ("wins", "there_is"),
    [
        ([(0, 1), (1, 0)], True),
        ([(0, 1)], False),
        ([(0, 1), (1, 2), (2, 0)], True),
        ([(0, 1), (1, 0), (2, 3), (3, 2)], False),  # two groups never compared
        ([(0, 1), (1, 0), (2, 3), (3, 2), (0, 2)], False),  # one group only ever wins
        ([(0, 1), (1, 0), (2, 3), (3, 2), (0, 2), (3, 1)], True),
        ([(i, (i + 1) % 9) for i in range(9)], True),
        ([(i, i + 1) for i in range(8)], False),
    ],
)
def test_whether_there_is_a_least_loss_by_hand(wins, there_is):
    size = max(max(w) for w in wins) + 1
    table = np.zeros((2, size, size), dtype=int)
    table[1] = 1  # the other prompt is compared in every way
    for i, j in wins:
        table[0, i, j] += 1
    assert labels.has_minimum(table) is there_is


# ---- over-optimisation ----


def normal(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def student(x):
    """t with 3 degrees of freedom, scaled to a variance of 1."""
    return math.sqrt(3) * 2 / (math.pi * math.sqrt(3) * (1 + x * x) ** 2)


def by_quadrature(key: str, ns) -> tuple[np.ndarray, np.ndarray]:
    """E of gold and of the proxy under best-of-n, with no sample: gold's mean at every proxy score,
    averaged over the density of the largest of n.
    """
    s = np.concatenate(
        [
            -np.geomspace(1000, 12, 800),
            np.linspace(-12, 14, 2601)[1:],
            np.geomspace(14, 1000, 1200)[1:],
        ]
    )
    g = np.linspace(-7, 7, 561)
    error = {"gaussian": normal, "heavy": student, "exploit": lambda x: normal(x / 0.5) / 0.5}[key]
    k = error(s[:, None] - g) * (normal(g) * (g[1] - g[0]))
    density, gold = k.sum(1), k @ g
    if key == "exploit":
        moved, moved_gold = np.interp(s - 5, s, density), np.interp(s - 5, s, gold)
        density, gold = (
            0.999 * density + 0.001 * moved,
            0.999 * gold + 0.001 * (moved_gold - 2 * moved),
        )
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(s))])
    at = gold / np.maximum(density, 1e-290)
    out = [
        (
            (at[1:] + at[:-1]) / 2 @ np.diff((cdf / cdf[-1]) ** n),
            (s[1:] + s[:-1]) / 2 @ np.diff((cdf / cdf[-1]) ** n),
        )
        for n in ns
    ]
    return np.array(out).T


@pytest.fixture(scope="module")
def curves():
    return {c.key: c for c in overoptimization.curves("quick")}


NS = np.unique(np.geomspace(1, 4000, 16).round())
ERROR = {"gaussian": 0.14, "heavy": 0.17, "exploit": 0.14}
"""Standard error of gold at n = 4000, from 60 samples of this size; at a smaller n it falls as the
root of it.
"""


@pytest.mark.parametrize("key", ["gaussian", "heavy", "exploit"])
def test_sampled_curves_are_those_of_quadrature(curves, key):
    told = curves[key]
    gold, proxy = by_quadrature(key, NS)
    assert told.curve.kl == pytest.approx(np.log(NS) - (NS - 1) / NS, abs=1e-12)
    error = 0.005 + ERROR[key] * np.sqrt(NS / 4000)
    assert (np.abs(np.array(told.curve.gold) - gold) < 3.5 * error).all()
    assert (
        np.abs(np.array(told.curve.proxy) / proxy - 1)[NS > 3] < (0.1 if key == "heavy" else 0.03)
    ).all()
    assert 0.2 < told.error[-1] / ERROR[key] < 2 and told.error[0] < 0.005


def test_peaks_and_ends_are_the_known_ones(curves):
    flat, heavy, exploit = (curves[k] for k in ("gaussian", "heavy", "exploit"))
    assert not flat.turns_over and flat.peak is None
    np.testing.assert_allclose(
        np.array(flat.curve.gold[4:10]) / flat.curve.proxy[4:10], 0.5, atol=0.02
    )
    for curve, peak, end in ((heavy, 1.335, 0.390), (exploit, 1.867, -0.904)):
        assert curve.turns_over and 1.5 < curve.peak.root_kl < 2.05
        assert curve.peak.gold == pytest.approx(peak, abs=0.06)
        assert curve.last.root_kl == pytest.approx(
            2.70, abs=0.01
        ) and curve.last.gold == pytest.approx(end, abs=0.45)
    assert (heavy.fit.alpha, heavy.fit.beta, heavy.fit.rmse) == pytest.approx(
        (1.69, 0.572, 0.1), abs=0.12
    )
    assert exploit.fit.rmse == pytest.approx(0.44, abs=0.06) and flat.fit.rmse < 0.03


def test_the_exploited_worlds_frontier_by_hand(curves):
    told, chosen, world = (
        curves["world_exploit"],
        curves["world_exploit_best_of_n"],
        overoptimization.exploit_world("quick"),
    )
    assert len(world.responses) == 121
    ref = np.exp(exact.reference(world))
    few = [np.flatnonzero(g == -2.0) for g in world.reward]
    assert all(
        0 < ref[p][few[p]].sum() <= 0.02 and world.proxy[p].argmax() in few[p] for p in range(2)
    )
    betas = np.geomspace(30, 0.1, len(told.curve.kl))
    for k in (0, 12, len(betas) - 1):
        pi = [ref[p] * np.exp(world.proxy[p] / betas[k]) for p in range(2)]
        pi = [x / x.sum() for x in pi]
        assert told.curve.kl[k] == pytest.approx(
            mean(lambda p, pi=pi: slow.kl(pi[p], ref[p])), abs=1e-9
        )
        for name, values in (("gold", world.reward), ("proxy", world.proxy)):
            assert getattr(told.curve, name)[k] == pytest.approx(
                mean(lambda p, pi=pi, v=values: (pi[p] - ref[p]) @ v[p]), abs=1e-9
            )
    assert told.turns_over and told.last.gold < -1.5 < 0 < told.peak.gold
    proxy = told.curve.proxy
    assert all(a < b + 1e-9 for a, b in itertools.pairwise(proxy))
    # best-of-n: order statistics of the proxy, by hand for one n
    k = 5
    n, kl, gold = int(NS[k]), [], []
    for p in range(2):
        scores = world.proxy[p]
        upto = np.array([ref[p][scores <= s].sum() for s in scores])
        below = np.array([ref[p][scores < s].sum() for s in scores])
        pi = ref[p] / (upto - below) * (upto**n - below**n)
        kl.append(slow.kl(pi, ref[p]))
        gold.append((pi - ref[p]) @ world.reward[p])
    assert chosen.curve.kl[k] == pytest.approx(np.mean(kl), abs=1e-9) and chosen.curve.gold[
        k
    ] == pytest.approx(np.mean(gold), abs=1e-9)
    assert chosen.turns_over and chosen.peak.root_kl > told.peak.root_kl
    assert told.fit is None and isinstance(told.rl_fit, GaoFit)


def test_a_fit_finds_the_curve_it_was_made_of_and_says_how_far_off_another_is():
    d = np.linspace(0, 3, 20)
    assert vars(overoptimization.gao_fit(d, d * (1.7 - 0.5 * d))) == pytest.approx(
        {"alpha": 1.7, "beta": 0.5, "rmse": 0}, abs=1e-12
    )
    learned = np.where(d > 0, d * (1.7 - 0.5 * np.log(np.maximum(d, 1e-9))), 0)
    assert vars(overoptimization.gao_fit(d, learned, learned=True)) == pytest.approx(
        {"alpha": 1.7, "beta": 0.5, "rmse": 0}, abs=1e-12
    )
    assert overoptimization.gao_fit(d, learned).rmse > 0.01
    assert overoptimization.gao_fit(
        np.array([1.0, 1.0]), np.array([0.0, 1.0])
    ).rmse == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("gold", "turns"),
    [
        ([0, 1, 2], False),
        ([0, 2, 1.9], False),
        ([0, 2, 1.7], True),
        ([0, 1, -3], True),
        ([0, -1, -2], True),
    ],
)
def test_when_gold_turns_over(gold, turns):
    told = overoptimization._entry(
        "k", "t", "w", np.array([0.0, 1.0, 4.0]), np.arange(3.0), np.array(gold, dtype=float)
    )
    assert (
        told.turns_over is turns
        and (told.peak is not None) is turns
        and told.last == CurvePoint(2.0, gold[-1])
    )


# ---- as JSON ----


def test_every_section_is_plain_json_without_nan(derived, rows, curves):
    everything = [
        decision_process.decision_process(WORLD),
        *decision_process.sparse_answers(WORLD),
        frontier.frontier(WORLD),
        frontier.best_of_n(WORLD, [1, 2, 1024]),
        *derived[0],
        derived[1],
        labels.missing(WORLD),
        *rows.values(),
        *curves.values(),
    ]
    for section in everything:
        text = json.dumps(asdict(section), allow_nan=False)
        assert TypeAdapter(type(section)).validate_json(text) == section
