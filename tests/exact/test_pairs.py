"""The package against known answers, on pairs: DPO's optimum and start, and the Bradley-Terry
maximum likelihood. The numbers in test names are those of the exact checks in the design.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from fiducial import losses
from fiducial.methods.dpo import pair_logprobs
from fiducial.models.load import load_policy
from fiducial.models.roles import Policy
from fiducial.settings import LoraSettings, RunSettings
from world import World, distribution, grads, logprobs, optimum, pair, table_of, tabular, tiny

WORLD = World.make()
ORDERED = torch.tensor([(i, j) for i in range(15) for j in range(15) if i != j])  # winner, loser
WINNER, LOSER = ORDERED.T


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def minimise(closure, parameters, steps: int = 500) -> float:
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=5 * steps,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    optimizer.step(step)
    return closure().item()


# ---- 6: the optimum of DPO is that of the KL-regularised objective ----

PREFERENCE = torch.sigmoid(
    tensor(WORLD.reward)[WINNER] - tensor(WORLD.reward)[LOSER]
)  # Bradley-Terry, with the true rewards


def symmetric(seed: int) -> torch.Tensor:
    """How often each two responses are compared: any positive number, and the same whichever of
    them wins.
    """
    w = torch.rand(15, 15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    w = (w + w.T)[WINNER, LOSER]
    return w / w.sum() * 2


def population_loss(policy: Policy, weights: torch.Tensor) -> torch.Tensor:
    """The DPO loss over all pairs, both orders, as often as they occur."""
    logp, ref = logprobs(policy).sum(1), tensor(np.log(distribution(WORLD.ref)))

    def one(*four: torch.Tensor) -> torch.Tensor:
        return losses.dpo_sum(*(x[None] for x in four), beta=WORLD.beta)[0]

    each = torch.func.vmap(one)(logp[WINNER], logp[LOSER], ref[WINNER], ref[LOSER])
    return (weights * each).sum()


@pytest.mark.parametrize("seed", range(3))
def test_6_the_gradient_of_dpo_vanishes_at_the_optimum_whatever_symmetric_weights_the_pairs_have(
    seed,
):
    best, _ = optimum(WORLD.ref, WORLD.reward, WORLD.beta)
    there, away = tabular(table_of(best)), tabular(WORLD.ref)
    assert grads(population_loss(there, symmetric(seed) * PREFERENCE), there).abs().max() < 1e-12
    assert grads(population_loss(away, symmetric(seed) * PREFERENCE), away).abs().max() > 1e-3


def test_6_weights_that_depend_on_which_of_the_two_won_move_the_optimum():
    best, _ = optimum(WORLD.ref, WORLD.reward, WORLD.beta)
    there = tabular(table_of(best))
    lopsided = symmetric(0) * torch.where(WINNER < LOSER, 2.0, 1.0)
    assert grads(population_loss(there, lopsided * PREFERENCE), there).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_6_lbfgs_from_the_reference_ends_at_the_optimum_and_at_the_entropy_of_the_labels(seed):
    weights, policy = symmetric(seed) * PREFERENCE, tabular(WORLD.ref)
    loss = minimise(lambda: population_loss(policy, weights), [policy.lm.logits])
    best, _ = optimum(WORLD.ref, WORLD.reward, WORLD.beta)
    assert np.abs(logprobs(policy).sum(1).detach().numpy() - np.log(best)).max() < 1e-6
    entropy = -(symmetric(seed) * PREFERENCE * PREFERENCE.log()).sum().item()
    assert loss == pytest.approx(entropy, abs=1e-12)


def test_6_at_the_optimum_the_implicit_rewards_differ_as_the_true_ones_do():
    best, _ = optimum(WORLD.ref, WORLD.reward, WORLD.beta)
    logp, ref = tensor(np.log(best)), tensor(np.log(distribution(WORLD.ref)))
    for i, j in ORDERED.tolist():
        _, metrics = losses.dpo(logp[[i]], logp[[j]], ref[[i]], ref[[j]], beta=WORLD.beta)
        assert metrics["rewards/margins"].item() == pytest.approx(
            WORLD.reward[i] - WORLD.reward[j], abs=1e-12
        )


# ---- 18: reward models are the Bradley-Terry maximum likelihood ----


def strengths(wins: np.ndarray) -> np.ndarray:
    """Zermelo 1929: s_i = wins_i / sum_j n_ij / (s_i + s_j), to its fixed point; as log-strengths
    of mean 0.
    """
    s, games = np.ones(len(wins)), wins + wins.T
    for _ in range(20_000):
        new = wins.sum(1) / (games / (s[:, None] + s[None])).sum(1)
        new /= np.exp(np.log(new).mean())
        if np.abs(new / s - 1).max() < 1e-14:
            break
        s = new
    return np.log(s)


def tournament(seed: int, items: int = 6) -> np.ndarray:
    """wins[i, j] of i over j; every one has beaten its neighbour in a ring, so that the maximum is
    finite.
    """
    wins = np.random.default_rng(seed).integers(0, 6, size=(items, items)).astype(float)
    np.fill_diagonal(wins, 0)
    for i in range(items):
        wins[i, (i + 1) % items] += 1
    return wins


def fit(loss, items: int = 6, steps: int = 500) -> np.ndarray:
    """Scores from a linear model on one-hot features, at the least loss."""
    weight = torch.zeros(items, dtype=torch.float64, requires_grad=True)
    minimise(lambda: loss(torch.eye(items, dtype=torch.float64) @ weight), [weight], steps)
    return weight.detach().numpy()


def games(wins: np.ndarray) -> torch.Tensor:
    return torch.tensor([(i, j) for i, j in np.argwhere(wins) for _ in range(int(wins[i, j]))])


@pytest.mark.parametrize("seed", range(3))
def test_18_bradley_terry_on_one_hot_features_is_zermelos_iteration(seed):
    wins = tournament(seed)
    pairs = games(wins)
    found = fit(
        lambda scores: losses.bradley_terry_sum(scores[pairs[:, 0]], scores[pairs[:, 1]])[0]
    )
    np.testing.assert_allclose(found - found.mean(), strengths(wins), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_18_ranking_weighs_a_comparison_by_one_over_those_of_its_prompt(seed):
    wins = tournament(seed)
    pairs = games(wins)
    prompt = torch.randint(0, 8, (len(pairs),), generator=torch.Generator().manual_seed(seed))
    weighted = np.zeros_like(wins)
    for (i, j), p in zip(pairs.tolist(), prompt.tolist(), strict=True):
        weighted[i, j] += 1 / prompt.tolist().count(p)
    found = fit(lambda scores: losses.ranking_sum(scores, pairs, prompt)[0])
    np.testing.assert_allclose(found - found.mean(), strengths(weighted), atol=1e-5)
    assert np.abs(strengths(weighted) - strengths(wins)).max() > 1e-2


def test_18_scores_shifted_together_lose_the_same_and_no_gradient_shifts_them():
    pairs = games(tournament(0))
    scores = torch.randn(
        6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True
    )
    loss, _ = losses.bradley_terry_sum(scores[pairs[:, 0]], scores[pairs[:, 1]])
    shifted, _ = losses.bradley_terry_sum(scores[pairs[:, 0]] + 3, scores[pairs[:, 1]] + 3)
    assert loss.item() == pytest.approx(shifted.item(), abs=1e-11)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.abs().max() > 0.1 and abs(gradient.sum().item()) < 1e-12


def test_18_groups_that_were_never_compared_keep_the_distance_they_started_at():
    wins = np.zeros((4, 4))
    wins[0, 1], wins[1, 0], wins[2, 3], wins[3, 2] = 3, 1, 5, 2
    pairs = games(wins)
    weight = tensor([10.0, 10.0, -4.0, -4.0]).requires_grad_()
    minimise(
        lambda: losses.bradley_terry_sum(weight[pairs[:, 0]], weight[pairs[:, 1]])[0], [weight]
    )
    found = weight.detach()
    assert (found[0] - found[1]).item() == pytest.approx(math.log(3), abs=1e-5)
    assert (found[2] - found[3]).item() == pytest.approx(math.log(5 / 2), abs=1e-5)
    assert (found[:2].mean() - found[2:].mean()).item() == pytest.approx(14, abs=1e-9)


def test_18_where_one_group_only_ever_wins_the_scores_go_to_infinity():
    wins = np.zeros((4, 4))
    wins[0, 1], wins[1, 0], wins[2, 3], wins[3, 2] = 3, 1, 5, 2
    wins[0, 2] = wins[1, 3] = 1  # and never the other way
    pairs = games(wins)

    def loss(scores: torch.Tensor, centering: float = 0.0) -> torch.Tensor:
        return losses.bradley_terry_sum(scores[pairs[:, 0]], scores[pairs[:, 1]], None, centering)[
            0
        ]

    up = tensor([1.0, 1.0, 0.0, 0.0])
    values = [loss(up * gap).item() for gap in range(0, 31, 3)]
    assert all(b < a for a, b in itertools.pairwise(values))

    def gap(found: np.ndarray) -> float:
        return found[:2].mean() - found[2:].mean()

    assert gap(fit(loss, 4, steps=100)) > 12
    assert (
        gap(fit(lambda s: loss(s, centering=0.01), 4)) < 12
        and gap(fit(lambda s: loss(s, centering=0.01), 4)) > 0
    )


# ---- 21: DPO at its start ----

PAIRS = [pair(int(i), int(j), [1, 2]) for i, j in ORDERED[::7]]


def at_start(policy: Policy, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the untrained policy, its reference taken in batches of `size`."""
    with torch.no_grad():
        parts = [
            pair_logprobs(policy, PAIRS[k : k + size], torch.device("cpu"))
            for k in range(0, len(PAIRS), size)
        ]
    ref_chosen, ref_rejected = (torch.cat(x) for x in zip(*parts, strict=True))
    chosen, rejected = pair_logprobs(policy, PAIRS, torch.device("cpu"))
    return losses.dpo(chosen, rejected, ref_chosen, ref_rejected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_21_before_the_first_step_the_loss_is_log_two_the_margin_nothing_and_every_pair_a_tie(kind):
    loss, metrics = at_start(Policy(tiny(kind)), size=len(PAIRS))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"].item() == 0.0
    assert metrics["rewards/accuracies"].item() == 0.5
    assert metrics["logps/chosen"].item() < -0.5  # and not because nothing was computed


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_21_the_reference_may_have_been_computed_in_other_batches(kind):
    loss, metrics = at_start(Policy(tiny(kind)), size=4)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert abs(metrics["rewards/margins"].item()) < 1e-6


def test_21_a_model_with_dropout_in_its_config_is_loaded_without_and_stays_so_in_training_mode(
    tmp_path,
):
    lm = tiny("gpt2", dropout=0.5)
    lm.save_pretrained(tmp_path)
    noisy = Policy(lm.train())
    assert at_start(noisy, size=len(PAIRS))[0].item() != pytest.approx(math.log(2), abs=1e-3)
    loaded = load_policy(str(tmp_path), LoraSettings(), RunSettings()).train()
    loss, metrics = at_start(loaded, size=len(PAIRS))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/accuracies"].item() == 0.5


def test_21_the_pairs_log_probabilities_are_those_of_their_responses():
    policy = tabular(WORLD.policy)
    chosen, rejected = pair_logprobs(
        policy, [pair(int(i), int(j)) for i, j in ORDERED], torch.device("cpu")
    )
    exact = np.log(distribution(WORLD.policy))
    np.testing.assert_allclose(chosen.detach(), exact[WINNER], atol=1e-12)
    np.testing.assert_allclose(rejected.detach(), exact[LOSER], atol=1e-12)


# ---- 20: wrong labels ----


@pytest.mark.parametrize("e", [0.05, 0.2, 0.45])
def test_20_with_label_smoothing_a_pair_always_labelled_alike_rests_at_log_odds_of_the_smoothing(e):
    beta, zero = 0.3, torch.zeros(1, dtype=torch.float64)

    def loss(h: float) -> tuple[float, float]:
        at = torch.tensor([h], dtype=torch.float64, requires_grad=True)
        value, _ = losses.dpo(at, zero, zero, zero, beta=beta, label_smoothing=e)
        (slope,) = torch.autograd.grad(value, at)
        return value.item(), slope.item()

    fixed = math.log((1 - e) / e) / beta
    value, slope = loss(fixed)
    assert abs(slope) < 1e-12
    assert value == pytest.approx(-e * math.log(e) - (1 - e) * math.log(1 - e), abs=1e-12)
    assert loss(fixed - 1)[1] < -1e-3 and loss(fixed + 1)[1] > 1e-3


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_20_smoothing_on_clean_labels_is_plain_dpo_on_labels_of_which_that_share_is_flipped(e):
    a, b, c, d = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth, _ = losses.dpo(a, b, c, d, beta=0.7, label_smoothing=e)
    right, wrong = losses.dpo(a, b, c, d, beta=0.7)[0], losses.dpo(b, a, d, c, beta=0.7)[0]
    assert smooth.item() == pytest.approx(((1 - e) * right + e * wrong).item(), abs=1e-12)
