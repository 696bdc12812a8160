"""The package against a world in which everything is known: sampling, gradients, KL, advantages,
PPO. Pairs are in test_pairs.py.

Numbers in parentheses are those of the checks in the design; tolerances are theirs too.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from fiducial import losses
from fiducial.core import kl as estimators
from fiducial.core.advantages import gae
from fiducial.models.roles import Policy, Reference, Roles
from fiducial.rewards.shaping import shape
from fiducial.rewards.types import Scored
from fiducial.rollout.forward import RolloutLogprobs, forward
from fiducial.rollout.local import local_sampler
from fiducial.rollout.sampling import Keys, SamplingParams
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import ScoreSettings
from fiducial.train.processes import Processes
from world import (
    EOS,
    FINISHED,
    PREFIXES,
    RESPONSES,
    World,
    all_responses,
    difference,
    distribution,
    grads,
    kl,
    logprobs,
    objective,
    optimum,
    scores,
    softmax,
    state_values,
    table_of,
    tabular,
    tiny,
)

EXACT = 1e-12
WORLD = World.make()
PROMPTS = [
    [1],
    [1, EOS, 2],
]  # of two lengths, so that one is padded; an EOS inside a prompt is a token like any other


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# ---- 1: probabilities and the sampler ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_1_the_probabilities_of_all_responses_sum_to_one_those_that_were_cut_included(
    kind, prompt, temperature
):
    policy = Policy(tiny(kind, dtype=torch.float64))
    assert abs(logprobs(policy, prompt, temperature).sum(1).exp().sum().item() - 1) < EXACT


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_1_a_response_has_the_probability_that_the_model_itself_gives_it_token_by_token(
    kind, temperature
):
    lm = tiny(kind, dtype=torch.float64)
    found = logprobs(Policy(lm), PROMPTS[1], temperature).sum(1)
    for y, ours in zip(RESPONSES, found, strict=True):
        theirs = 0.0
        for t, token in enumerate(y):  # one prefix at a time, alone and unpadded
            theirs += (
                (lm(input_ids=torch.tensor([[*PROMPTS[1], *y[:t]]])).logits[0, -1] / temperature)
                .log_softmax(-1)[token]
                .item()
            )
        assert ours.item() == pytest.approx(theirs, abs=1e-6)  # transformers normalises in float32


def test_1_a_table_behind_policy_has_the_probabilities_of_the_table():
    np.testing.assert_allclose(
        logprobs(tabular(WORLD.policy)).sum(1).exp().detach(),
        distribution(WORLD.policy),
        rtol=EXACT,
    )


@pytest.mark.parametrize(
    ("kind", "seed", "temperature", "n"), [("llama", 1, 1.0, 100_000), ("gpt2", 0, 0.7, 40_000)]
)
def test_1_sampled_frequencies_are_the_probabilities_and_only_what_ended_in_eos_is_finished(
    kind, seed, temperature, n
):
    policy = Policy(tiny(kind, seed=seed))
    each = n // len(PROMPTS)
    keys = Keys(7, 3, [0, 1] * each, [i // 2 for i in range(n)])
    drawn = local_sampler(policy).sample(
        PROMPTS * each, SamplingParams(3, temperature, frozenset({EOS})), keys
    )
    answers = [tuple(y) for y in drawn.responses(ending=True)]

    assert set(answers) <= set(RESPONSES)
    assert drawn.finished.tolist() == [FINISHED[RESPONSES.index(y)] for y in answers]
    for which, prompt in enumerate(PROMPTS):
        expected = each * logprobs(policy, prompt, temperature).sum(1).exp().double().detach()
        observed = tensor([answers[which::2].count(y) for y in RESPONSES])
        common = expected >= 5  # the rare ones together, for the statistic to be a chi-square
        if not common.all():
            expected, observed = (
                torch.cat([x[common], x[~common].sum()[None]]) for x in (expected, observed)
            )
        square = ((observed - expected) ** 2 / expected).sum()
        assert len(expected) > 10
        assert torch.special.gammaincc(tensor((len(expected) - 1) / 2), square / 2) > 1e-4

    few = slice(0, 200)
    again = policy(drawn.ids[few], drawn.mask[few], temperature).logprobs
    torch.testing.assert_close(drawn.logprobs[few], again.detach(), atol=2e-5, rtol=0)


# ---- 4, 5: the gradient of J ----


def exact_gradient(world: World) -> np.ndarray:
    """Grad J [7, 3] by finite differences of the slow objective: nothing of the package in it."""
    return difference(
        lambda table: objective(table, world.ref, world.reward, world.beta), world.policy
    )


def test_4_the_gradient_of_j_is_the_expected_score_times_reward_less_beta_log_ratio():
    policy = tabular(WORLD.policy)
    logp, ref = logprobs(policy).sum(1), tensor(np.log(distribution(WORLD.ref)))
    pi, log_ratio = logp.exp(), logp - ref
    by_autograd = grads((pi * (tensor(WORLD.reward) - WORLD.beta * log_ratio)).sum(), policy)
    by_scores = (pi * (tensor(WORLD.reward) - WORLD.beta * log_ratio)).detach() @ scores(policy)

    np.testing.assert_allclose(by_autograd, by_scores, atol=EXACT)
    np.testing.assert_allclose(by_autograd, exact_gradient(WORLD).flatten(), atol=1e-8)


def test_4_the_gradient_of_j_of_a_real_model_is_its_finite_difference():
    policy = Policy(tiny("gpt2", dtype=torch.float64))
    ref = logprobs(Policy(tiny("gpt2", dtype=torch.float64, seed=1))).sum(1).detach()

    def j() -> torch.Tensor:
        logp = logprobs(policy).sum(1)
        return (logp.exp() * (tensor(WORLD.reward) - WORLD.beta * (logp - ref))).sum()

    gradient = grads(j(), policy)
    direction = torch.randn(
        gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    start = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    values = []
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(start + step * direction, policy.parameters())
        values.append(j().item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((gradient @ direction).item(), abs=1e-8)


def ppo_gradient(
    world: World, values: np.ndarray | None = None, *, lam: float = 1.0
) -> torch.Tensor:
    """The gradient of PPO's first step over all responses, each as often as it is likely, through
    the shipped functions, as that of J.

    values: [7] of each prefix, or None for no critic.
    """
    every, policy = all_responses(), tabular(world.policy)
    now = policy(every.ids, every.mask).logprobs
    ref = tabular(world.ref)(every.ids, every.mask).logprobs.detach()
    critic = torch.full_like(ref, math.nan)
    for i, y in enumerate(RESPONSES):
        for t in range(len(y)):
            critic[i, every.prompt_lengths[i] + t] = (
                0.0 if values is None else values[PREFIXES.index(y[:t])]
            )
    before = RolloutLogprobs(now.detach(), ref, torch.zeros_like(ref), critic)
    scored = Scored(world.reward.tolist(), {})
    rewards, _, _ = shape(every, scored, before, ScoreSettings(), beta=world.beta)
    advantage, _ = gae(rewards, before.values, every.mask, gamma=1.0, lam=lam)
    likely = tensor(distribution(world.policy))[:, None]
    loss, _ = losses.ppo_clip_sum(now, before.logprobs, likely * advantage, every.mask)
    return -grads(loss, policy)


def j_gradient(world: World) -> torch.Tensor:
    policy = tabular(world.policy)
    logp, ref = logprobs(policy).sum(1), tensor(np.log(distribution(world.ref)))
    return grads((logp.exp() * (tensor(world.reward) - world.beta * (logp - ref))).sum(), policy)


@pytest.mark.parametrize("seed", range(3))
def test_5_reward_to_go_with_k1_in_every_tokens_reward_has_the_gradient_of_j(seed):
    world = World.make(seed)
    torch.testing.assert_close(ppo_gradient(world), j_gradient(world), atol=EXACT, rtol=0)


def test_5_a_critic_however_wrong_does_not_bias_the_monte_carlo_gradient():
    wrong = np.random.default_rng(5).normal(size=7)
    torch.testing.assert_close(ppo_gradient(WORLD, wrong), j_gradient(WORLD), atol=EXACT, rtol=0)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_5_with_a_perfect_critic_any_lambda_has_the_gradient_of_j_and_with_a_wrong_one_it_has_not(
    lam,
):
    perfect = state_values(WORLD.policy, WORLD.ref, WORLD.reward, WORLD.beta)
    assert perfect[0] == pytest.approx(
        objective(WORLD.policy, WORLD.ref, WORLD.reward, WORLD.beta), abs=EXACT
    )
    torch.testing.assert_close(
        ppo_gradient(WORLD, perfect, lam=lam), j_gradient(WORLD), atol=EXACT, rtol=0
    )
    wrong = perfect + np.random.default_rng(5).normal(size=7)
    assert (ppo_gradient(WORLD, wrong, lam=lam) - j_gradient(WORLD)).abs().max() > 1e-3


def test_5_at_the_closed_form_optimum_the_gradient_vanishes():
    best, _ = optimum(WORLD.ref, WORLD.reward, WORLD.beta)
    there = World(table_of(best), WORLD.ref, WORLD.reward, WORLD.beta)
    assert ppo_gradient(there).abs().max() < EXACT
    assert ppo_gradient(WORLD).abs().max() > 1e-2


# ---- 13: KL estimators ----


def kl_gradients(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of KL(pi, ref) and of the forward KL(ref, pi), by finite differences of the slow
    formula.
    """
    ref = distribution(world.ref)
    reverse = difference(lambda table: kl(distribution(table), ref), world.policy)
    forward = difference(lambda table: kl(ref, distribution(table)), world.policy)
    return torch.tensor(reverse.flatten()), torch.tensor(forward.flatten())


def kl_gradients_exact(policy: Policy, ref: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = logprobs(policy).sum(1)
    return grads((logp.exp() * (logp - ref)).sum(), policy), grads(
        (ref.exp() * (ref - logp)).sum(), policy
    )


def test_13_gradients_of_both_kls_are_their_finite_differences():
    exact = kl_gradients_exact(tabular(WORLD.policy), tensor(np.log(distribution(WORLD.ref))))
    for ours, slow in zip(exact, kl_gradients(WORLD), strict=True):
        torch.testing.assert_close(ours, slow, atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_13_as_values_k1_and_k3_are_unbiased_and_k2_is_not(seed):
    world = World.make(seed)
    pi, ref = distribution(world.policy), distribution(world.ref)
    mean = {}
    for name in ("k1", "k2", "k3"):
        sampled = estimators.estimate(
            tensor(np.log(pi))[:, None], tensor(np.log(ref))[:, None], estimator=name
        )[:, 0]
        mean[name] = (tensor(pi) * sampled).sum().item()
    assert abs(mean["k1"] - kl(pi, ref)) < EXACT
    assert abs(mean["k3"] - kl(pi, ref)) < EXACT
    assert abs(mean["k2"] - kl(pi, ref)) > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_13_as_losses_k1_has_no_gradient_k2_that_of_kl_and_k3_that_of_the_forward_kl(seed):
    world = World.make(seed)
    policy, ref = tabular(world.policy), tensor(np.log(distribution(world.ref)))
    logp = logprobs(policy).sum(1)
    likely = (
        logp.exp().detach()
    )  # the policy that sampled: differentiated inside the expectation only
    reverse, forward = kl_gradients_exact(policy, ref)

    def of(name: str) -> torch.Tensor:
        return grads(
            (likely * estimators.estimate(logp[:, None], ref[:, None], estimator=name)[:, 0]).sum(),
            policy,
        )

    torch.testing.assert_close(of("k1"), torch.zeros_like(reverse), atol=EXACT, rtol=0)
    torch.testing.assert_close(of("k2"), reverse, atol=EXACT, rtol=0)
    torch.testing.assert_close(of("k3"), forward, atol=EXACT, rtol=0)
    assert (reverse - forward).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_13_in_the_reward_k1_has_the_gradient_of_kl_and_k3_that_less_the_forward_one(seed):
    world = World.make(seed)
    policy, ref = tabular(world.policy), tensor(np.log(distribution(world.ref)))
    logp = logprobs(policy).sum(1)
    reverse, forward = kl_gradients_exact(policy, ref)
    score = scores(policy)

    def of(name: str) -> torch.Tensor:
        cost = estimators.estimate(logp[:, None], ref[:, None], estimator=name)[:, 0]
        return (logp.exp() * cost).detach() @ score

    torch.testing.assert_close(of("k1"), reverse, atol=EXACT, rtol=0)
    torch.testing.assert_close(of("k3"), reverse - forward, atol=EXACT, rtol=0)


def test_13_k2_summed_over_tokens_forgets_that_early_tokens_choose_later_states():
    policy, ref = tabular(WORLD.policy), logprobs(tabular(WORLD.ref)).detach()
    logp = logprobs(policy)
    likely = logp.sum(1).exp().detach()
    per_token = grads(
        (likely[:, None] * estimators.estimate(logp, ref, estimator="k2")).sum(), policy
    )

    def frozen_states(
        table: np.ndarray,
    ) -> float:  # KL of each prefix's next token, the prefix as likely as it was
        pi = distribution(WORLD.policy)
        visits = [
            sum(
                p
                for p, y in zip(pi, RESPONSES, strict=True)
                if y[: len(s)] == s and len(y) > len(s)
            )
            for s in PREFIXES
        ]
        new, old = softmax(table), softmax(WORLD.ref)
        return float(visits @ (new * np.log(new / old)).sum(1))

    torch.testing.assert_close(
        per_token,
        torch.tensor(difference(frozen_states, WORLD.policy).flatten()),
        atol=1e-8,
        rtol=0,
    )
    reverse, _ = kl_gradients_exact(policy, ref.sum(1))
    assert (per_token - reverse).norm() / reverse.norm() > 0.02


@pytest.mark.parametrize(
    ("mu", "bias_of_k2", "deviations"),
    [
        (0.1, 0.002, {"k1": 20, "k2": 1.42, "k3": 1.42}),
        (1.0, 0.25, {"k1": 2, "k2": 1.73, "k3": 1.7}),
    ],
)
def test_13_schulmans_table(mu, bias_of_k2, deviations):
    # "Approximating KL divergence", samples from N(mu, 1), reference N(0, 1): bias and standard
    # deviation over the true KL, by quadrature
    x = torch.linspace(mu - 12, mu + 12, 200_001, dtype=torch.float64)
    logq, logp = -((x - mu) ** 2) / 2, -(x**2) / 2
    weight = logq.exp() / logq.exp().sum()
    true = mu**2 / 2
    for name, deviation in deviations.items():
        k = estimators.estimate(logq[None], logp[None], estimator=name)[0]
        mean = (weight * k).sum()
        assert ((weight * (k - mean) ** 2).sum().sqrt() / true).item() == pytest.approx(
            deviation, rel=0.01
        )
        assert (mean / true - 1).item() == pytest.approx(
            bias_of_k2 if name == "k2" else 0.0, abs=1e-3
        )


# ---- 15: generalized advantage estimation ----


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and mask of responses of random lengths, prompts in front, gaps inside, NaN
    and infinity wherever nothing was chosen.
    """
    rng = np.random.default_rng(seed)
    rows, width = 6, 11
    mask = np.zeros((rows, width), dtype=bool)
    for i in range(rows - 1):  # the last row has chosen nothing
        start = rng.integers(0, 5)
        mask[i, start : rng.integers(start + 1, width + 1)] = True
        mask[i] &= (rng.random(width) < 0.7) | (np.arange(width) == start)
    rewards, values = rng.normal(size=(2, rows, width))
    rewards[~mask], values[~mask] = math.nan, math.inf
    return tensor(rewards), tensor(values), torch.tensor(mask)


def lambda_return(
    rewards: list[float], values: list[float], t: int, gamma: float, lam: float
) -> float:
    """(1 - lam) sum_n lam^(n-1) G_n, each G_n n rewards and then a value; past the end the
    Monte-Carlo return takes all the weight left.
    """
    steps = len(rewards) - t
    total = 0.0
    for n in range(1, steps + 1):
        g = sum(gamma**k * rewards[t + k] for k in range(n)) + (
            gamma**n * values[t + n] if n < steps else 0.0
        )
        total += (lam ** (n - 1) if n == steps else (1 - lam) * lam ** (n - 1)) * g
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.6), (1.0, 1.0), (0.9, 1.0), (0.9, 0.0)]
)
def test_15_gae_is_the_lambda_return_less_the_value(seed, gamma, lam):
    rewards, values, mask = random_batch(seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i in range(len(mask)):
        columns = mask[i].nonzero()[:, 0].tolist()
        r, v = rewards[i, columns].tolist(), values[i, columns].tolist()
        for t, column in enumerate(columns):
            expected = lambda_return(r, v, t, gamma, lam)
            assert returns[i, column].item() == pytest.approx(expected, abs=EXACT)
            assert advantages[i, column].item() == pytest.approx(expected - v[t], abs=EXACT)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_15_lambda_one_is_monte_carlo_and_lambda_zero_one_step():
    rewards, values, mask = (
        tensor([[9.0, 1.0, 2.0, 9.0, 4.0, 9.0]]),
        tensor([[9.0, 10.0, 20.0, 9.0, 30.0, 9.0]]),
        torch.tensor([[0, 1, 1, 0, 1, 0]]),
    )
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert returns[0].tolist() == [0, 1 + 1 + 1, 2 + 2, 0, 4, 0]
    assert advantages[0].tolist() == [0, 3 - 10, 4 - 20, 0, 4 - 30, 0]
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert returns[0].tolist() == [
        0,
        1 + 10,
        2 + 15,
        0,
        4,
        0,
    ]  # the step past the gap is one step, and behind the end there is no value


# ---- 16: the clipped surrogate ----


def sampled(kind: str) -> tuple[Policy, Trajectory]:
    policy = Policy(tiny(kind))
    keys = Keys(0, 0, [0, 1] * 20, [i // 2 for i in range(40)])
    params = SamplingParams(3, 0.7, frozenset({EOS}))
    return policy, local_sampler(policy).sample(PROMPTS * 20, params, keys)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_16_the_first_minibatch_has_ratio_one_nothing_clipped_and_the_policy_gradient(kind):
    policy, drawn = sampled(kind)
    policy.value_head = torch.nn.Linear(32, 1)
    roles = Roles(policy=policy, reference=Reference(policy, Policy(tiny(kind))))
    before = forward(drawn, roles, Processes(), tokens=64)  # in micro-batches of other widths
    torch.testing.assert_close(before.logprobs, before.ref_logprobs, atol=1e-5, rtol=0)
    advantage = torch.randn(drawn.mask.shape, generator=torch.Generator().manual_seed(1))
    now = policy(drawn.ids, drawn.mask, drawn.temperature).logprobs
    ratio = (now - before.logprobs).exp()[drawn.mask]
    loss, metrics = losses.ppo_clip(now, before.logprobs, advantage, drawn.mask)

    assert (ratio - 1).abs().max() < 1e-5
    assert metrics["clip_ratio"] == 0 and metrics["ratio"].item() == pytest.approx(1, abs=1e-5)
    assert loss.item() == pytest.approx(-advantage[drawn.mask].mean().item(), abs=1e-5)
    plain = -(advantage * now)[drawn.mask].mean()
    mine, theirs = (
        torch.autograd.grad(x, list(policy.lm.parameters()), retain_graph=True)
        for x in (loss, plain)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("eps", [0.2, 0.05])
def test_16_the_derivative_is_zero_where_the_clip_cuts_and_minus_ratio_times_advantage_elsewhere(
    eps,
):
    ratios = [0.5, 1 - eps - 1e-6, 1 - eps + 1e-6, 1.0, 1 + eps - 1e-6, 1 + eps + 1e-6, 2.0]
    for advantage, rho in itertools.product([-1.5, 0.7], ratios):
        now = tensor([[math.log(rho)]]).requires_grad_()
        loss, metrics = losses.ppo_clip_sum(
            now, tensor([[0.0]]), tensor([[advantage]]), torch.ones(1, 1), clip=eps
        )
        (derivative,) = torch.autograd.grad(loss, now)
        cut = (advantage > 0 and rho > 1 + eps) or (advantage < 0 and rho < 1 - eps)
        if cut:
            assert derivative.item() == 0.0
            assert loss.item() == pytest.approx(
                -advantage * (1 + eps if rho > 1 else 1 - eps), abs=EXACT
            )
        else:
            assert derivative.item() == pytest.approx(-advantage * rho, abs=EXACT)
            assert loss.item() == pytest.approx(-advantage * rho, abs=EXACT)
        assert metrics["clip_ratio"].item() == float(cut)
