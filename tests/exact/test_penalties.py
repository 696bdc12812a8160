"""The KL penalty in the loss, the settings that are refused, and how a score becomes a reward.
Check 13 of the KL estimators themselves is in test_policy_gradient.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fiducial.core import kl
from fiducial.lab.worlds import exact as lab_exact
from fiducial.lab.worlds import policies
from fiducial.rewards.shaping import overlong, shape
from fiducial.rewards.types import Scored
from fiducial.rollout.forward import RolloutLogprobs
from fiducial.settings import KLSettings, ScoreSettings
from test_sequence import EXACT, LENGTHS, WORLD, off, tensor, token_scores
from world import (
    PREFIXES,
    RESPONSES,
    World,
    all_responses,
    difference,
    distribution,
    grads,
    softmax,
    tabular,
)
from world import kl as slow_kl

NAN = math.nan


# ---- the KL in the loss ----


def penalised(world: World, estimator: str) -> np.ndarray:
    """E under the policy of the gradient of kl.penalty."""
    every, policy = all_responses(), tabular(world.policy)
    now = policy(every.ids, every.mask).logprobs
    ref = tabular(world.ref)(every.ids, every.mask).logprobs.detach()
    each = kl.penalty(now, ref, now.detach(), every.mask, estimator=estimator)
    return grads((tensor(distribution(world.policy))[:, None] * each).sum(), policy).numpy()


def of_states(world: World, each) -> np.ndarray:
    """[21] a gradient [3] for each state by its two distributions, as often as the policy comes
    there.
    """
    pi = distribution(world.policy)
    out = np.zeros((len(PREFIXES), 3))
    for s, prefix in enumerate(PREFIXES):
        visits = sum(
            p
            for p, y in zip(pi, RESPONSES, strict=True)
            if y[: len(prefix)] == prefix and len(y) > len(prefix)
        )
        out[s] = visits * each(softmax(world.policy[s]), softmax(world.ref[s]))
    return out.flatten()


def reverse(p, q):
    log_ratio = np.log(p / q)
    return p * (log_ratio - p @ log_ratio)


@pytest.mark.parametrize("seed", range(3))
def test_13_penalties_have_the_gradients_that_their_table_says(seed):
    world = World.make(seed)
    exact = sum(
        p * np.log(p / q) * sum(g)
        for p, q, g in zip(
            distribution(world.policy),
            distribution(world.ref),
            token_scores(world.policy),
            strict=True,
        )
    )
    np.testing.assert_allclose(
        exact,
        difference(
            lambda t: slow_kl(distribution(t), distribution(world.ref)), world.policy
        ).flatten(),
        atol=1e-8,
    )
    np.testing.assert_allclose(penalised(world, "k2"), exact, atol=EXACT)
    np.testing.assert_allclose(penalised(world, "k2_tokens"), of_states(world, reverse), atol=EXACT)
    np.testing.assert_allclose(
        penalised(world, "weighted_k3"), penalised(world, "k2_tokens"), atol=1e-15
    )
    np.testing.assert_allclose(
        penalised(world, "forward_k3"), of_states(world, lambda p, q: p - q), atol=EXACT
    )
    assert (
        off(penalised(world, "k2_tokens"), exact) > 0.02
        and off(penalised(world, "forward_k3"), exact) > 0.1
    )


def test_13_the_biases_that_the_docstring_tells_are_those_of_the_labs_mild_world():
    world, _ = policies.mild()
    reference = lab_exact.log_softmax(world.reference)
    table = reference + np.random.default_rng([0, 23]).normal(size=reference.shape)
    tree = world.tree
    theta = torch.from_numpy(table).requires_grad_()
    known = torch.from_numpy(tree.path >= 0)
    prompts = len(world.prompts)

    def tokens(t):
        found = t.log_softmax(-1)[
            :, torch.from_numpy(tree.path).clamp(min=0), torch.from_numpy(tree.token).clamp(min=0)
        ]
        return torch.where(known[None], found, NAN).reshape(prompts * len(tree.responses), -1)

    now, ref, mask = tokens(theta), tokens(torch.from_numpy(reference)), known.repeat(prompts, 1)
    likely = torch.from_numpy(np.exp(lab_exact.logprobs(tree, table))).reshape(-1, 1) / prompts
    exact = -lab_exact.gradient(world.with_(reward=np.zeros_like(world.reward)), table, beta=1.0)

    def error(estimator):
        each = kl.penalty(now, ref, now.detach(), mask, estimator=estimator)
        return off(
            torch.autograd.grad((likely * each).sum(), theta, retain_graph=True)[0]
            .numpy()
            .flatten(),
            exact.flatten(),
        )

    assert error("k2") < EXACT
    assert [round(100 * error(e)) for e in ("k2_tokens", "weighted_k3", "forward_k3")] == [
        19,
        19,
        29,
    ]
    text = " ".join(kl.penalty.__doc__.split())
    assert "is 19% off" in text and "forward_k3 29%" in text


def test_13_penalties_by_hand_and_the_ratio_of_further_epochs():
    logp, ref = (
        tensor([[NAN, 0.5, NAN, 0.25, NAN]]).log(),
        tensor([[NAN, 0.25, NAN, 0.5, NAN]]).log(),
    )
    old, mask = tensor([[NAN, 0.25, NAN, 0.25, NAN]]).log(), torch.tensor([[0, 1, 0, 1, 0]])
    two = math.log(2)
    each = {
        e: kl.penalty(logp - tensor(0.0), ref, old, mask, estimator=e)[0].tolist()
        for e in ("k2", "k2_tokens", "forward_k3", "weighted_k3")
    }
    assert each["k2_tokens"] == pytest.approx([0, two**2 / 2, 0, two**2 / 2, 0])
    assert each["forward_k3"] == pytest.approx([0, 0.5 - 1 + two, 0, 2 - 1 - two, 0])
    assert each["weighted_k3"] == pytest.approx([0, 2 * (0.5 - 1 + two), 0, 2 - 1 - two, 0])
    assert each["k2"] == pytest.approx([0] * 5)  # the two log-ratios cancel
    longer = kl.penalty(
        logp, tensor([[NAN, 0.25, NAN, 0.25, NAN]]).log(), old, mask, estimator="k2"
    )[0].tolist()
    assert longer == pytest.approx([0, 0, 0, two**2 / 2, 0])  # at the last token


def test_13_every_penalty_vanishes_where_the_policy_is_the_reference():
    same = World(WORLD.policy, WORLD.policy, WORLD.reward, WORLD.beta)
    for estimator in ("k2", "k2_tokens", "weighted_k3", "forward_k3"):
        assert np.abs(penalised(same, estimator)).max() < EXACT


@pytest.mark.parametrize("estimator", ["k2", "k2_tokens", "weighted_k3", "forward_k3"])
def test_13_the_gradient_of_each_penalty_is_its_finite_difference(estimator):
    rng = np.random.default_rng(1)
    now, ref, old = (tensor(x) for x in rng.normal(size=(3, 5, 6)))
    mask = torch.tensor(rng.random((5, 6)) < 0.6)
    assert torch.autograd.gradcheck(
        lambda x: kl.penalty(x, ref, old, mask, estimator=estimator), now.requires_grad_()
    )


# ---- what is refused ----

REFUSALS = [
    ("loss", "k1", "expected gradient of zero"),
    ("loss", "k3", "gradient of the forward KL"),
    ("reward", "k2", "biased as a value"),
    ("reward", "k3", r"KL\(policy, ref\) - KL\(ref, policy\)"),
    ("reward", "k2_tokens", "is differentiated"),
    ("reward", "weighted_k3", "is differentiated"),
    ("reward", "forward_k3", "is differentiated"),
    (None, "k3", "gradient of the forward KL"),
]


@pytest.mark.parametrize(("placement", "estimator", "reason"), REFUSALS)
def test_a_penalty_that_is_known_to_be_wrong_is_refused_with_setting_reason_and_remedy(
    placement, estimator, reason
):
    for refuse, kind in (
        (lambda: kl.check(placement, estimator), ValueError),
        (lambda: kl.resolve(placement, estimator), ValueError),
        (lambda: KLSettings(placement=placement, estimator=estimator), ValidationError),
    ):
        with pytest.raises(kind, match=reason) as error:
            refuse()
        text = str(error.value)
        assert f"--kl.estimator {estimator}" in text and (
            placement is None or f"--kl.placement {placement}" in text
        )
        assert "k1 in the reward" in text.replace("Use", "use") and "use" in text.lower()


def test_every_combination_is_refused_or_resolved_and_never_to_what_is_refused():
    names = ("k1", "k2", "k3", "k2_tokens", "weighted_k3", "forward_k3")
    for placement, estimator, default in itertools.product(
        (None, "reward", "loss"), (None, *names), ("k1", "k2", "forward_k3")
    ):
        if estimator is not None and any((placement, estimator) == r[:2] for r in REFUSALS):
            continue
        where, what = kl.resolve(placement, estimator, default)
        assert (where, what) not in kl.REFUSED
        assert placement in (None, where) and estimator in (None, what)
        assert KLSettings(placement=placement, estimator=estimator).resolve(default) == (
            where,
            what,
        )
    assert kl.resolve(None, None) == ("reward", "k1") and kl.resolve("loss", None) == ("loss", "k2")
    assert kl.resolve(None, None, "forward_k3") == ("loss", "forward_k3") and kl.resolve(
        "reward", None, "forward_k3"
    ) == ("reward", "k1")
    assert kl.resolve(None, "weighted_k3") == ("loss", "weighted_k3")


def test_what_is_no_penalty_of_the_loss_is_refused_there_too():
    for estimator, words in (
        ("k1", "expected gradient of zero"),
        ("k3", "forward_k3"),
        ("k4", "must be k2, k2_tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            kl.penalty(*[torch.zeros(1, 2)] * 3, torch.ones(1, 2), estimator=estimator)


# ---- the score before it is a reward ----


def test_the_length_penalty_by_hand_with_the_papers_numbers():
    lengths = torch.tensor([1, 16_384, 17_408, 18_432, 20_480])
    assert overlong(lengths, 20_480, 4_096).tolist() == [0, 0, 0.25, 0.5, 1]
    assert overlong(torch.tensor([1, 2, 3]), 3, 1).tolist() == [0, 0, 1]


def test_the_reward_of_each_token_is_its_step_the_rest_of_the_score_and_its_share_of_the_kl():
    every = all_responses()
    now = tensor(np.random.default_rng(2).normal(size=every.mask.shape))
    before = RolloutLogprobs(
        torch.where(every.mask, now, NAN),
        torch.where(every.mask, 0.5 * now, NAN),
        torch.zeros_like(now),
        torch.zeros_like(now),
    )
    steps = tensor(np.random.default_rng(3).normal(size=every.mask.shape))
    settings = ScoreSettings(missing_eos_penalty=0.3, length_buffer=2, length_penalty=0.5)
    for scored_steps, kl_in_reward in itertools.product(
        (None, torch.where(every.mask, steps, NAN)), (True, False)
    ):
        scored = (
            Scored(WORLD.reward.tolist(), {}, scored_steps)
            if scored_steps is not None
            else Scored(WORLD.reward.tolist(), {})
        )
        rewards, metrics, _ = shape(
            every, scored, before, settings, beta=0.7, kl_in_reward=kl_in_reward, limit=3
        )
        for i, n in enumerate(LENGTHS):
            score = (
                WORLD.reward[i] - 0.3 * (RESPONSES[i][-1] != 0) - 0.5 * {1: 0.0, 2: 0.5, 3: 1.0}[n]
            )
            earned = [0.0] * n if scored_steps is None else steps[i, 1 : 1 + n].tolist()
            earned[-1] += score - sum(earned)
            penalty = [0.7 * 0.5 * x * kl_in_reward for x in now[i, 1 : 1 + n].tolist()]
            assert rewards[i, 1 : 1 + n].tolist() == pytest.approx(
                [a - b for a, b in zip(earned, penalty, strict=True)], abs=1e-6
            )
        assert rewards.isfinite().all() and not rewards[~every.mask].any()
        assert metrics["reward"] == pytest.approx(WORLD.reward.mean())
