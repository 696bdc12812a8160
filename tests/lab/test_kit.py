"""The kit that checks losses: it must pass what is right, however it is written, and name what is
wrong.

The broken losses are written here as someone outside would write them, with their own shifts, masks
and loops: nothing of the kit's own formulas in them.
"""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fiducial import lab, losses
from fiducial.core import advantages, corrections, kl
from fiducial.core.loss_aggregation import constant, sequence_mean
from fiducial.core.reductions import select
from fiducial.lab import (
    CATALOGUE,
    check_likelihood,
    check_policy_loss,
    check_preference_loss,
    check_reward_loss,
    check_value_loss,
    unbiased,
)
from fiducial.lab.kit import cases as kit
from fiducial.lab.kit import diagnosis
from fiducial.lab.kit.batch import build
from fiducial.lab.kit.faults.explain import explain
from fiducial.lab.kit.layout import layout
from fiducial.lab.kit.measure import loss_gradient, measure
from fiducial.lab.kit.population import likelihoods, make_population, pairs, rows
from fiducial.lab.study import estimators as shipped
from fiducial.lab.study import kl_estimators, sequence
from fiducial.lab.worlds import exact
from world import difference

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "check_your_loss.py"


def policy(objective="J", **keywords):
    return lambda loss: check_policy_loss(loss, objective, train=False, **keywords)


def likelihood(loss):
    return check_likelihood(loss, train=False)


def preference(loss):
    return check_preference_loss(loss, train=False)


def reward(loss):
    return check_reward_loss(loss, train=False)


def value(loss):
    return check_value_loss(loss, train=False)


groups, groups_reward = policy(group=2), policy("reward", group=2)


# ---- (a) what is shipped passes ----


def dpo(b):
    return losses.dpo(b.policy_chosen, b.policy_rejected, b.ref_chosen, b.ref_rejected, beta=b.beta)


def shipped_gspo(b, **clips):
    each = b.rewards[:, None] * sequence_mean(b.mask)
    return losses.gspo_sum(b.logprobs, b.old_logprobs, each, b.mask, **clips)[0]


def last_score(b):
    return b.scores[torch.arange(len(b)), b.trajectory.lengths - 1]


SHIPPED = {
    "ppo, lambda 1": (policy(), shipped.ppo_loss),
    "ppo, lambda 1, no critic": (policy(critic="none"), shipped.ppo_loss),
    "ppo, lambda 1, a wrong critic": (policy(critic="arbitrary"), shipped.ppo_loss),
    "ppo, lambda 0.95": (policy(), lambda b: shipped.ppo_loss(b, lam=0.95)),
    "ppo, lambda 0": (policy(), lambda b: shipped.ppo_loss(b, lam=0.0)),
    "ppo, whitened": (policy(), lambda b: shipped.ppo_loss(b, lam=0.95, whitened=True)),
    "ppo, the reward alone": (policy("reward"), shipped.ppo_loss),
    "ppo_clip on advantages": (
        policy(),
        lambda b: losses.ppo_clip(b.logprobs, b.old_logprobs, b.advantages, b.mask),
    ),
    "ppo_clip off policy": (
        policy("clip"),
        lambda b: losses.ppo_clip(b.logprobs, b.old_logprobs, b.advantages, b.mask),
    ),
    "ppo_clip off policy, another clip": (
        policy("clip", clip=1.5),
        lambda b: losses.ppo_clip(b.logprobs, b.old_logprobs, b.advantages, b.mask, clip=1.5),
    ),
    "k2 of the response": (policy("kl"), lambda b: shipped.kl_loss(b, "k2")),
    "k2 in the loss": (
        policy("kl"),
        lambda b: kl.penalty(
            b.logprobs, b.ref_logprobs, b.old_logprobs, b.mask, estimator="k2"
        ).sum(),
    ),
    "k1 in the reward": (policy("kl"), lambda b: shipped.kl_in_the_reward(b, "k1")),
    "k3 of the response": (policy("forward_kl"), lambda b: shipped.kl_loss(b, "k3")),
    "reinforce": (policy(), lambda b: sequence.reinforce(b, sequence.returns(b))),
    "reinforce, to go": (
        policy(),
        lambda b: sequence.reinforce(b, advantages.reward_to_go(sequence.paid(b), b.mask)),
    ),
    "reinforce, whitened": (policy(), sequence.reinforce_plus_plus),
    "reinforce and k2 in the loss": (
        policy(),
        lambda b: sequence.reinforce(b, b.rewards) + b.beta * shipped.kl_penalty(b, "k2"),
    ),
    "rloo": (
        groups,
        lambda b: sequence.reinforce(b, advantages.leave_one_out(sequence.returns(b), b.group)),
    ),
    "rloo, all 64 responses one group": (
        policy(),
        lambda b: sequence.reinforce(b, advantages.leave_one_out(sequence.returns(b), b.group)),
    ),
    "dr. grpo": (
        groups,
        lambda b: sequence.grouped(b, advantages.group_mean, lambda m: constant(m, 2)),
    ),
    "clip-higher": (
        policy("clip", clip_high=0.28),
        lambda b: losses.ppo_clip(b.logprobs, b.old_logprobs, b.advantages, b.mask, clip_high=0.28),
    ),
    "gspo": (policy("gspo"), lambda b: shipped_gspo(b, clip=0.2, clip_high=0.2)),
    "gspo, two bounds": (
        policy("gspo", clip_high=0.28),
        lambda b: shipped_gspo(b, clip=0.2, clip_high=0.28),
    ),
    "gspo, the papers clip": (policy("gspo", clip=3e-4, clip_high=4e-4), lambda b: shipped_gspo(b)),
    "cispo": (
        policy("cispo"),
        lambda b: losses.cispo(b.logprobs, b.old_logprobs, b.advantages, b.mask, cap=1.5),
    ),
    "cispo, no cap": (
        policy("cispo", cap=math.inf),
        lambda b: losses.cispo(b.logprobs, b.old_logprobs, b.advantages, b.mask, cap=math.inf),
    ),
    "the whole response's ratio": (
        policy("moved"),
        lambda b: sequence.corrected(b, corrections.sequence_tis, cap=math.inf),
    ),
    "nll": (likelihood, lambda b: losses.nll(b.logprobs, b.mask)),
    "dpo": (preference, dpo),
    "bradley_terry": (reward, lambda b: losses.bradley_terry(b.score_chosen, b.score_rejected)),
    "bradley_terry on tokens": (
        reward,
        lambda b: losses.bradley_terry(last_score(b.chosen), last_score(b.rejected)),
    ),
    "critic": (value, shipped.value_loss),
    "critic, lambda 1": (value, lambda b: shipped.value_loss(b, lam=1.0)),
    "critic, not clipped": (
        value,
        lambda b: losses.clipped_value(
            b.values, b.old_values, shipped.ppo_advantages(b)[1], b.mask, clip=None
        ),
    ),
}


@pytest.mark.parametrize("what", SHIPPED)
def test_what_is_shipped_is_exact_and_selects_with_its_mask(what):
    check, loss = SHIPPED[what]
    verdict = check(loss)
    assert verdict.ok and verdict.name == "correct", str(verdict)
    assert verdict.relative_bias < 1e-9
    assert verdict.cosine == pytest.approx(1, abs=1e-12)
    assert verdict.probes == ()


# ---- code of others: correct ----


def togo(r):
    return r.flip(1).cumsum(1).flip(1)


def reinforce(
    b,
    *,
    logp=None,
    mask=None,
    penalty=lambda d: d,
    rewards=lambda b: b.trajectory.last * b.rewards[:, None],
    returns=togo,
    critic=False,
    over="tokens",
):
    """REINFORCE with reward-to-go, with a place for every mistake."""
    mask = b.mask.double() if mask is None else mask
    logp = b.logprobs if logp is None else logp
    paid = rewards(b) - b.beta * penalty((b.logprobs - b.ref_logprobs).detach()) * b.mask
    advantage = returns(paid) - (b.old_values * b.mask if critic else b.rewards.mean())
    each = advantage * logp * mask
    if over == "tokens":
        return -each.sum() / mask.sum()
    return -each.sum(1).mean() if over == "responses" else -(each.sum(1) / mask.sum(1)).mean()


def own_logprobs(b, *, temperature=None, shift=1, normalise=True, dtype=torch.float64):
    """From logits, as one would."""
    z = b.logits().to(dtype) / (b.temperature if temperature is None else temperature)
    z = z.log_softmax(-1) if normalise else z
    found = z[:, : z.shape[1] - shift].gather(-1, b.ids[:, shift:, None])[..., 0]
    return F.pad(found, (shift, 0))


def log_ratio(b):
    return (b.logprobs - b.ref_logprobs) * b.mask


def loop_reinforce(b):
    """Row by row and token by token, with a baseline for each prompt."""
    difference = (b.logprobs - b.ref_logprobs).detach()
    paid = [
        float(b.rewards[i])
        - b.beta * sum(float(difference[i, t]) for t in b.mask[i].nonzero()[:, 0])
        for i in range(len(b))
    ]
    mean = {
        p: np.mean([x for x, q in zip(paid, b.group.tolist(), strict=True) if q == p])
        for p in set(b.group.tolist())
    }
    total = torch.zeros(())
    for i in range(len(b)):
        for t in range(int(b.trajectory.prompt_lengths[i]), int(b.trajectory.lengths[i])):
            total = (
                total
                - (paid[i] - mean[int(b.group[i])])
                * (b.logits()[i, t - 1] / b.temperature).log_softmax(-1)[b.ids[i, t]]
            )
    return total / len(b)


def sequence_ratio(b):
    """Importance-weighted REINFORCE on whole responses."""
    ratio = (torch.where(b.mask, b.logprobs - b.old_logprobs, 0.0)).sum(1).exp()
    return -(ratio * (b.rewards - b.beta * log_ratio(b).detach().sum(1))).mean()


def own_gae(b, lam, *, gamma=1.0, values=None, end=0.0):
    v = (b.old_values if values is None else values) * b.mask + (~b.mask) * end
    r = b.trajectory.last * b.rewards[:, None] - b.beta * log_ratio(b).detach()
    out, running = torch.zeros_like(r), torch.zeros(len(b))
    for t in reversed(range(r.shape[1])):
        following = v[:, t + 1] if t + 1 < r.shape[1] else torch.zeros(len(b))
        running = (r[:, t] + gamma * following - v[:, t] + gamma * lam * running) * b.mask[:, t]
        out[:, t] = running
    return out


def rloo(
    b,
    *,
    advantage=lambda x: x - x.flip(1),
    penalty="reward",
    over="tokens",
    view=lambda x: x.view(-1, 2),
    back=lambda x: x.reshape(-1),
):
    d = log_ratio(b)
    paid = b.rewards - (b.beta * d.detach().sum(1) if penalty == "reward" else 0.0)
    each = back(advantage(view(paid)))[:, None] * b.logprobs * b.mask
    if penalty == "k3":
        each = each - b.beta * ((-d).exp() - 1 + d) * b.mask
    if penalty == "policy gradient":
        each = each - b.beta * d.detach().sum(1, keepdim=True) * b.logprobs * b.mask
    if over == "tokens":
        return -each.sum() / b.mask.sum()
    if over == "groups":
        return -(each.view(len(b) // 2, -1).sum(1) / b.mask.view(len(b) // 2, -1).sum(1)).mean()
    return -(each.sum(1) / b.mask.sum(1)).mean()


def rloo_of(b, paid, groups=None):
    return sequence.reinforce(
        b, advantages.leave_one_out(paid, b.group if groups is None else groups)
    )


def rloo_by_ids(b):
    """Groups found by their ids, in any order."""
    paid = b.rewards - b.beta * log_ratio(b).detach().sum(1)
    _, where = b.group.unique(return_inverse=True)
    total = torch.zeros(int(where.max()) + 1, dtype=torch.float64).index_add_(0, where, paid)
    return -((paid - (total[where] - paid))[:, None] * b.logprobs * b.mask).sum(1).mean()


def h(b):
    return (b.policy_chosen - b.ref_chosen) - (b.policy_rejected - b.ref_rejected)


def token_h(b, mask=lambda x: x.mask.double(), logp=lambda x: x.logprobs, mean=False):
    def ratio(x):
        found = ((logp(x) - x.ref_logprobs) * mask(x)).sum(1)
        return found / mask(x).sum(1) if mean else found

    return ratio(b.chosen) - ratio(b.rejected)


def sigmoid_loss(u):
    return -F.logsigmoid(u).mean()


def exact_kl_both_ways(b):
    """Rao-Blackwell: the exact KL of every state, as a loss, and as the price of the tokens before
    it.
    """
    p = (b.logits() / b.temperature).log_softmax(-1)[:, :-1]
    q = (b.ref_logits() / b.temperature).log_softmax(-1)[:, :-1]
    state = (p.exp() * (p - q)).sum(-1) * b.mask[:, 1:]
    later = togo(state.detach()) - state.detach()
    return (state + later * b.logprobs[:, 1:] * b.mask[:, 1:]).sum(1).mean()


def cross_entropy(b, **keywords):
    labels = torch.where(b.mask, b.ids, -100)
    return F.cross_entropy(b.logits()[:, :-1].reshape(-1, 3), labels[:, 1:].reshape(-1), **keywords)


CORRECT = {
    "REINFORCE, multiplied by the mask": (policy(), reinforce),
    "REINFORCE, the exact critic": (policy(), lambda b: reinforce(b, critic=True)),
    "REINFORCE, a wrong critic": (policy(critic="arbitrary"), lambda b: reinforce(b, critic=True)),
    "REINFORCE, a sum": (policy(), lambda b: reinforce(b) * b.mask.sum()),
    "REINFORCE, a mean over responses": (policy(), lambda b: reinforce(b, over="responses")),
    "REINFORCE, own log-probabilities": (policy(), lambda b: reinforce(b, logp=own_logprobs(b))),
    "REINFORCE, in float32": (policy(), lambda b: reinforce(b, logp=own_logprobs(b).float())),
    "REINFORCE, in loops": (policy(), loop_reinforce),
    "REINFORCE, ratios of whole responses": (policy(), sequence_ratio),
    "REINFORCE, whole returns": (
        policy(),
        lambda b: reinforce(b, returns=lambda r: r.sum(1, keepdim=True).expand_as(r)),
    ),
    "REINFORCE and k2 of the response": (
        policy(),
        lambda b: (
            reinforce(b, penalty=lambda d: 0 * d, over="responses")
            + b.beta * (log_ratio(b).sum(1) ** 2).mean() / 2
        ),
    ),
    "GAE of one's own": (policy(), lambda b: surrogate(b, own_gae(b, 0.8))),
    "RLOO": (groups, rloo),
    "RLOO, groups by their ids": (groups, rloo_by_ids),
    "RLOO, the penalty apart": (groups, lambda b: rloo(b, penalty="policy gradient")),
    "RLOO, the reward alone": (groups_reward, lambda b: rloo(b, penalty="none")),
    "the exact KL of every state": (policy("kl"), exact_kl_both_ways),
    "the likelihood by cross-entropy": (likelihood, cross_entropy),
    "the likelihood, own log-probabilities": (
        likelihood,
        lambda b: -torch.where(b.mask, own_logprobs(b), 0.0).sum() / b.mask.sum(),
    ),
    "DPO on tokens": (preference, lambda b: sigmoid_loss(b.beta * token_h(b, logp=own_logprobs))),
    "DPO, prompts included, which cancel": (
        preference,
        lambda b: sigmoid_loss(
            b.beta
            * token_h(
                b, lambda x: (torch.arange(x.ids.shape[1]) < x.trajectory.lengths[:, None]).double()
            )
        ),
    ),
    "DPO by softplus": (preference, lambda b: F.softplus(-b.beta * h(b)).sum()),
    "Bradley-Terry by cross-entropy": (
        reward,
        lambda b: F.cross_entropy(
            torch.stack([b.score_chosen, b.score_rejected], 1),
            torch.zeros(len(b), dtype=torch.long),
        ),
    ),
    "a critic on Monte-Carlo returns": (
        value,
        lambda b: (
            (
                (
                    (
                        b.values
                        - togo(
                            b.trajectory.last * b.rewards[:, None] - b.beta * log_ratio(b).detach()
                        )
                    )
                    * b.mask
                )
                ** 2
            ).sum()
            / b.mask.sum()
        ),
    ),
}


@pytest.mark.parametrize("what", CORRECT)
def test_a_correct_loss_passes_however_it_is_written(what):
    check, loss = CORRECT[what]
    verdict = check(loss)
    assert verdict.ok and verdict.name == "correct", str(verdict)
    assert verdict.relative_bias < 1e-6


# ---- (b) code of others: broken ----


def shifted(mask, by):
    out = torch.zeros_like(mask)
    if by > 0:
        out[:, by:] = mask[:, :-by]
    else:
        out[:, :by] = mask[:, -by:]
    return out


def not_eos(b):
    return (b.mask & (b.ids != b.pad_id)).double()


def everything(b):
    return torch.ones_like(b.mask).double()


def with_prompt(b):
    return (torch.arange(b.ids.shape[1]) < b.trajectory.lengths[:, None]).double()


def at(column):
    """The reward in a column of each row, and the mask on top."""

    def rewards(b):
        out = torch.zeros_like(b.logprobs)
        out[torch.arange(len(b)), column(b)] = b.rewards
        return out * b.mask

    return rewards


def first_padding(b):
    return b.trajectory.lengths.clamp(max=b.ids.shape[1] - 1)


def surrogate(b, advantage):
    return -(advantage * b.logprobs * b.mask).sum() / b.mask.sum()


def whole(b):
    return (b.logprobs * b.mask).sum(1)


def micro_batches(each, b, size=8):
    """Means of micro-batches, averaged as if they were of one size."""
    return torch.stack(
        [each[i : i + size].sum() / b.mask[i : i + size].sum() for i in range(0, len(b), size)]
    ).mean()


def plus_loss(f):
    return lambda b: (
        reinforce(b, penalty=lambda d: 0 * d, over="responses") + b.beta * f(log_ratio(b))
    )


def whitened_over_everything(b):
    a = own_gae(b, 1.0)
    return surrogate(b, (a - a.mean()) / a.std())


def centred(x):
    return x - x.mean(1, keepdim=True)


def deviation(x, eps=1e-4, correction=1):
    return centred(x) / (x.std(1, keepdim=True, correction=correction) + eps)


def clipped(b, ratio=lambda now, old: (now - old).exp(), join=torch.minimum, low=0.2, high=0.2):
    r = ratio(b.logprobs, b.old_logprobs)
    return (
        -(join(r * b.advantages, r.clamp(1 - low, 1 + high) * b.advantages) * b.mask).sum()
        / b.mask.sum()
    )


def own_ratios(b):
    """Log-ratios of tokens, and lengths."""
    return (b.logprobs - b.old_logprobs) * b.mask, b.mask.sum(1)


def own_gspo(
    b,
    *,
    of=lambda d, n: (d.sum(1) / n).exp(),
    low=0.1,
    high=0.28,
    join=torch.minimum,
    over="responses",
):
    """One ratio a response."""
    d, n = own_ratios(b)
    s = of(d, n)
    each = join(s * b.rewards, s.clamp(1 - low, 1 + high) * b.rewards)
    return -(each * (n if over == "tokens" else 1)).mean()


def gspo_by_tokens(b, *, low=0.1, high=0.28):
    d, n = own_ratios(b)
    each = torch.minimum(
        d.exp() * b.rewards[:, None], d.exp().clamp(1 - low, 1 + high) * b.rewards[:, None]
    )
    return -((each * b.mask).sum(1) / n).mean()


def own_cispo(b, *, weight=lambda rho: rho.detach().clamp(max=1.5), mask=None):
    d, _ = own_ratios(b)
    mask = b.mask if mask is None else mask
    return -(weight(d.exp()) * b.advantages * b.logprobs * mask).sum() / mask.sum()


def importance(b, weight, baseline=0.3, mask=None):
    """The policy gradient with a weight of log-ratios [N, W], of responses that another policy
    wrote.
    """
    d, _ = own_ratios(b)
    mask = b.mask if mask is None else mask
    return -(weight(d) * (b.rewards - baseline)[:, None] * b.logprobs * mask).sum(1).mean()


def product(d):
    return d.detach().sum(1, keepdim=True).exp()


def mean_ratio(d, mask):
    return (d.detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()


def weighted_k3(b):
    k3 = (-log_ratio(b)).exp() - 1 + log_ratio(b)
    return ((b.logprobs - b.old_logprobs).exp() * k3 * b.mask).sum(1).mean()


def pooled(column, sign=1.0):
    def score(x):
        return x.scores[torch.arange(len(x)), column(x)]

    return lambda b: sigmoid_loss(sign * (score(b.chosen) - score(b.rejected)))


def mean_pooled(b, over=lambda x: x.mask.sum(1)):
    chosen, rejected = ((x.scores * x.mask).sum(1) / over(x) for x in (b.chosen, b.rejected))
    return sigmoid_loss(chosen - rejected)


def squared(b, *, target=None, mask=None, values=None, by_response=False):
    mask = b.mask.double() if mask is None else mask
    target = own_gae(b, 0.95) + b.old_values if target is None else target
    error = ((b.values if values is None else values) - target) ** 2 * mask
    return (error.sum(1) / mask.sum(1)).mean() if by_response else error.sum() / mask.sum()


def own_nll(b, mask=None, logp=None):
    mask = b.mask.double() if mask is None else mask
    return -((b.logprobs if logp is None else logp) * mask).sum() / mask.sum()


NLL = [  # nll
    ("pad is EOS (1)", lambda b: own_nll(b, not_eos(b)), "EOS masked out"),
    (
        "each response by its length (2)",
        lambda b: -((b.logprobs * b.mask).sum(1) / b.mask.sum(1)).mean(),
        "mean of response means",
    ),
    (
        "micro-batches of 8 (2)",
        lambda b: micro_batches(-b.logprobs * b.mask, b),
        "mean of micro-batch means",
    ),
    (
        "double shift (4)",
        lambda b: own_nll(b, logp=own_logprobs(b, shift=2)),
        "labels shifted twice",
    ),
    ("no shift (4)", lambda b: own_nll(b, logp=own_logprobs(b, shift=0)), "labels not shifted"),
    (
        "mask a token early",
        lambda b: own_nll(b, shifted(b.mask.double(), -1)),
        "mask one token early",
    ),
    ("mask a token late", lambda b: own_nll(b, shifted(b.mask.double(), 1)), "mask one token late"),
    ("prompt in the loss", lambda b: own_nll(b, with_prompt(b)), "trains on the prompt"),
    ("no mask", lambda b: own_nll(b, everything(b)), "trains on the prompt + trains on padding"),
    (
        "padded positions in the count",
        lambda b: -(b.logprobs * b.mask).mean(),
        "depends on padding",
    ),
    ("sign", lambda b: -own_nll(b), "wrong sign"),
    (
        "bfloat16 (13)",
        lambda b: own_nll(b, logp=own_logprobs(b, dtype=torch.bfloat16)),
        "low precision",
    ),
    ("label smoothing", lambda b: cross_entropy(b, label_smoothing=0.1), "label smoothing"),
    ("dropout (12)", lambda b: own_nll(b, logp=F.dropout(b.logprobs, 0.1)), "not deterministic"),
]
PPO = [  # ppo_clip, gae, and rewards as they are shaped
    (
        "temperature (10)",
        lambda b: reinforce(b, logp=own_logprobs(b, temperature=1.0)),
        "temperature missing",
    ),
    (
        "no log-softmax",
        lambda b: reinforce(b, logp=own_logprobs(b, normalise=False)),
        "log-softmax missing",
    ),
    (
        "no log-softmax, exact advantages, under which the expectation is right",
        lambda b: surrogate(replace(b, logprobs=own_logprobs(b, normalise=False)), b.advantages),
        "log-softmax missing",
    ),
    ("pad is EOS (1)", lambda b: reinforce(b, mask=not_eos(b)), "EOS masked out"),
    (
        "mask a token early",
        lambda b: reinforce(b, mask=shifted(b.mask.double(), -1)),
        "mask one token early",
    ),
    (
        "mask a token late",
        lambda b: reinforce(b, mask=shifted(b.mask.double(), 1)),
        "mask one token late",
    ),
    (
        "first token",
        lambda b: reinforce(b, mask=shifted(b.mask.double(), 1) * b.mask),
        "first token left out",
    ),
    (
        "each response by its length (2)",
        lambda b: reinforce(b, over="means"),
        "mean of response means",
    ),
    (
        "each response by its length, with a critic (2)",
        lambda b: reinforce(b, over="means", critic=True),
        "mean of response means",
    ),
    (
        "micro-batches of 8 (2)",
        lambda b: micro_batches(-own_gae(b, 1.0) * b.logprobs * b.mask, b),
        "depends on the order of rows",
    ),
    ("no penalty", lambda b: reinforce(b, penalty=lambda d: 0 * d), "KL penalty missing"),
    (
        "penalty turned",
        lambda b: reinforce(b, penalty=lambda d: -d),
        "KL penalty has the wrong sign",
    ),
    ("beta applied twice", lambda b: reinforce(b, penalty=lambda d: b.beta * d), "wrong beta"),
    ("k1 as a loss (19)", plus_loss(lambda d: d.sum(1).mean()), "KL penalty missing"),
    (
        "k3 as a loss (19)",
        plus_loss(lambda d: ((-d).exp() - 1 + d).sum(1).mean()),
        "per-token k3 as a loss",
    ),
    (
        "k3 of the response as a loss (19)",
        plus_loss(lambda d: ((-d.sum(1)).exp() - 1 + d.sum(1)).mean()),
        "k3 as a loss",
    ),
    (
        "k2 of each token",
        plus_loss(lambda d: (d**2 / 2).sum(1).mean()),
        "KL not credited to earlier tokens",
    ),
    (
        "k3 in the reward",
        lambda b: reinforce(b, penalty=lambda d: (-d).exp() - 1 + d),
        "k3 in the reward",
    ),
    ("k2 in the reward", lambda b: reinforce(b, penalty=lambda d: d**2 / 2), "k2 in the reward"),
    (
        "penalty cut at 0",
        lambda b: reinforce(b, penalty=lambda d: d.clamp(min=0)),
        "KL clipped at zero",
    ),
    (
        "penalty by the length",
        lambda b: reinforce(b, penalty=lambda d: d / b.mask.sum(1, keepdim=True)),
        "KL divided by the length",
    ),
    (
        "reference is the policy (18)",
        lambda b: reinforce(b, penalty=lambda d: d * 0),
        "KL penalty missing",
    ),
    (
        "reward behind the end (14)",
        lambda b: reinforce(b, rewards=at(first_padding)),
        "reward lost on padded rows",
    ),
    (
        "reward in the last column (14)",
        lambda b: reinforce(b, rewards=at(lambda b: -1)),
        "reward lost on padded rows",
    ),
    (
        "reward without the prompt (14)",
        lambda b: reinforce(b, rewards=at(lambda b: b.mask.sum(1) - 1)),
        "reward position ignores the prompt",
    ),
    (
        "first EOS (15)",
        lambda b: reinforce(b, rewards=at(lambda b: (b.ids == b.eos_id).int().argmax(1))),
        "first EOS of the row",
    ),
    (
        "reward at every token",
        lambda b: reinforce(b, rewards=lambda b: b.rewards[:, None] * b.mask),
        "reward at every token",
    ),
    (
        "return off by one",
        lambda b: reinforce(b, returns=lambda r: togo(r) - r),
        "return without the token's own reward",
    ),
    (
        "returns forwards",
        lambda b: reinforce(b, returns=lambda r: r.cumsum(1)),
        "no reward-to-go",
    ),
    ("gamma 0.95", lambda b: surrogate(b, own_gae(b, 1.0, gamma=0.95)), "discount"),
    (
        "value behind the token",
        lambda b: surrogate(b, own_gae(b, 1.0, values=F.pad(b.old_values[:, 1:], (0, 1)))),
        "value read one token late",
    ),
    (
        "bootstrap behind the end",
        lambda b: surrogate(b, own_gae(b, 0.95, end=b.old_values)),
        "bootstrap past the end",
    ),
    (
        "advantage with gradient",
        lambda b: -((b.rewards - b.beta * log_ratio(b).sum(1)) * whole(b)).mean(),
        "advantage not detached",
    ),
    (
        "entropy bonus",
        lambda b: surrogate(b, own_gae(b, 1.0) - 0.05 * b.logprobs.detach()),
        "entropy bonus",
    ),
    (
        "ratio detached",
        lambda b: reinforce(b, logp=(b.logprobs - b.old_logprobs).detach().exp()),
        "no gradient",
    ),
    (
        "ratio inverted",
        lambda b: -((b.old_logprobs - b.logprobs).exp() * b.advantages * b.mask).sum(),
        "wrong sign",
    ),
    ("whitened with padding (16)", whitened_over_everything, "depends on padding"),
    (
        "two at a time",
        lambda b: reinforce(b, penalty=lambda d: (-d).exp() - 1 + d, mask=not_eos(b)),
        "EOS masked out + k3 in the reward",
    ),
]
GROUPS = [
    (
        "group mean with itself",
        lambda b: rloo(b, advantage=centred, penalty="policy gradient"),
        "group mean includes the response itself",
    ),
    (
        "groups mixed (17)",
        lambda b: rloo(b, view=lambda x: x.view(2, -1).T, back=lambda x: x.T.reshape(-1)),
        "groups mixed",
    ),
    (
        "deviation",
        lambda b: rloo(b, advantage=deviation),
        "divided by the group's standard deviation",
    ),
    (
        "deviation, ddof 0",
        lambda b: rloo(b, advantage=lambda x: deviation(x, 1e-6, 0)),
        "divided by the group's standard deviation",
    ),
    (
        "deviation without epsilon (23)",
        lambda b: rloo(b, advantage=lambda x: deviation(x, 0.0)),
        "not finite",
    ),
    ("each response by its length", lambda b: rloo(b, over="means"), "mean of response means"),
    ("each group by its tokens", lambda b: rloo(b, over="groups"), "mean of group means"),
    (
        "baseline of the best",
        lambda b: rloo(b, advantage=lambda x: x - x.amax(1, keepdim=True)),
        "baseline is the group's best",
    ),
    (
        "only what is better",
        lambda b: rloo(b, advantage=lambda x: centred(x).clamp(min=0)),
        "negative advantages left out",
    ),
    (
        "penalty a mean over tokens",
        lambda b: rloo_of(b, b.rewards - b.beta * log_ratio(b).detach().sum(1) / b.mask.sum(1)),
        "KL divided by the length",
    ),
    (
        "advantage with gradient",
        lambda b: rloo_of(b, b.rewards - b.beta * log_ratio(b).sum(1)),
        "advantage not detached",
    ),
    (
        "groups by position",
        lambda b: rloo_of(
            b,
            b.rewards - b.beta * log_ratio(b).detach().sum(1),
            torch.arange(len(b)) % (len(b) // 2),
        ),
        "groups mixed",
    ),
    (
        "GRPO",
        lambda b: rloo(b, advantage=deviation, penalty="k3", over="means"),
        "divided by the group's standard deviation + mean of response means + "
        "per-token k3 as a loss",
    ),
]
CLIP = [
    ("not clipped", lambda b: clipped(b, join=lambda x, _: x), "not clipped"),
    ("no minimum", lambda b: clipped(b, join=lambda _, x: x), "clipped without the minimum"),
    ("maximum", lambda b: clipped(b, join=torch.maximum), "maximum instead of minimum"),
    (
        "old is new",
        lambda b: clipped(b, ratio=lambda now, old: (now - now.detach()).exp()),
        "ratio always one",
    ),
    ("inverted", lambda b: clipped(b, ratio=lambda now, old: (old - now).exp()), "ratio inverted"),
]
HIGHER = [
    ("bounds exchanged", lambda b: clipped(b, low=0.28, high=0.2), "clip bounds swapped"),
    ("one bound", lambda b: clipped(b, high=0.2), "clip_high ignored"),
    ("not clipped", lambda b: clipped(b, high=0.28, join=lambda x, _: x), "not clipped"),
    ("maximum", lambda b: clipped(b, high=0.28, join=torch.maximum), "maximum instead of minimum"),
]
GSPO = [
    (
        "arithmetic mean",
        lambda b: own_gspo(b, of=lambda d, n: (d.exp() * b.mask).sum(1) / n),
        "arithmetic instead of geometric mean",
    ),
    (
        "product",
        lambda b: own_gspo(b, of=lambda d, n: d.sum(1).exp()),
        "product instead of the geometric mean",
    ),
    ("token ratios", gspo_by_tokens, "token ratio instead of sequence ratio"),
    ("mean over all tokens", lambda b: own_gspo(b, over="tokens"), "mean over all tokens"),
    ("bounds exchanged", lambda b: own_gspo(b, low=0.28, high=0.1), "clip bounds swapped"),
    ("one bound", lambda b: own_gspo(b, high=0.1), "clip_high ignored"),
    ("maximum", lambda b: own_gspo(b, join=torch.maximum), "maximum instead of minimum"),
    (
        "old is new",
        lambda b: own_gspo(b, of=lambda d, n: ((d - d.detach()).sum(1) / n).exp()),
        "ratio always one",
    ),
    ("inverted", lambda b: own_gspo(b, of=lambda d, n: (-d.sum(1) / n).exp()), "ratio inverted"),
    ("not clipped", lambda b: own_gspo(b, join=lambda x, _: x), "not clipped"),
    ("no minimum", lambda b: own_gspo(b, join=lambda _, x: x), "clipped without the minimum"),
    (
        "lengths with padding",
        lambda b: own_gspo(b, of=lambda d, n: d.mean(1).exp()),
        "depends on padding",
    ),
]
CISPO = [
    (
        "not detached",
        lambda b: own_cispo(b, weight=lambda rho: rho.clamp(max=1.5)),
        "ratio not detached",
    ),
    (
        "dropped",
        lambda b: own_cispo(b, weight=lambda rho: torch.where(rho > 1.5, 0.0, rho).detach()),
        "gradient dropped beyond the cap",
    ),
    (
        "PPO's clip",
        lambda b: (
            -(
                torch.minimum(
                    own_ratios(b)[0].exp() * b.advantages,
                    own_ratios(b)[0].exp().clamp(max=1.5) * b.advantages,
                )
                * b.mask
            ).sum()
        ),
        "gradient dropped beyond the cap",
    ),
    ("no cap", lambda b: own_cispo(b, weight=lambda rho: rho.detach()), "not capped"),
    ("old is new", lambda b: own_cispo(b, weight=lambda rho: 1.0), "ratio always one"),
    (
        "inverted",
        lambda b: own_cispo(b, weight=lambda rho: (1 / rho.detach()).clamp(max=1.5)),
        "ratio inverted",
    ),
    ("pad is EOS (1)", lambda b: own_cispo(b, mask=not_eos(b)), "EOS masked out"),
]
MOVED = [
    ("no weight", lambda b: importance(b, lambda d: 1.0), "ratio always one"),
    (
        "token",
        lambda b: importance(b, lambda d: d.detach().exp()),
        "token ratio instead of sequence ratio",
    ),
    (
        "prefix",
        lambda b: importance(b, lambda d: d.detach().cumsum(1).exp()),
        "prefix ratio instead of sequence ratio",
    ),
    (
        "geometric",
        lambda b: importance(b, lambda d: mean_ratio(d, b.mask)),
        "geometric mean instead of the product",
    ),
    ("inverted", lambda b: importance(b, lambda d: 1 / product(d)), "ratio inverted"),
    (
        "not detached",
        lambda b: importance(b, lambda d: d.sum(1, keepdim=True).exp()),
        "ratio not detached",
    ),
    (
        "token, not detached",
        lambda b: importance(b, lambda d: d.exp()),
        "token ratio instead of sequence ratio + ratio not detached",
    ),
    (
        "TIS",
        lambda b: importance(b, lambda d: d.detach().exp().clamp(max=1.5)),
        "token ratio instead of sequence ratio + weights truncated",
    ),
    (
        "IcePop",
        lambda b: sequence.corrected(b, corrections.icepop),
        "token ratio instead of sequence ratio + weights masked",
    ),
    (
        "sequence TIS",
        lambda b: importance(b, lambda d: product(d).clamp(max=2.0)),
        "weights truncated",
    ),
    (
        "sequence MIS",
        lambda b: importance(b, lambda d: torch.where(product(d) <= 2, product(d), 0.0)),
        "weights masked",
    ),
    ("pad is EOS (1)", lambda b: importance(b, product, mask=not_eos(b)), "EOS masked out"),
    (
        "each response by its length (2)",
        lambda b: importance(b, lambda d: product(d) / b.mask.sum(1, keepdim=True)),
        "mean of response means",
    ),
]
KL = [
    ("k1 (19)", lambda b: log_ratio(b).sum(1).mean(), "k1 as a loss"),
    (
        "k3 (19)",
        lambda b: ((-log_ratio(b).sum(1)).exp() - 1 + log_ratio(b).sum(1)).mean(),
        "k3 as a loss",
    ),
    (
        "k3 of tokens (19)",
        lambda b: ((-log_ratio(b)).exp() - 1 + log_ratio(b)).sum(1).mean(),
        "per-token k3 as a loss",
    ),
    (
        "k3 upside down",
        lambda b: (log_ratio(b).exp() - 1 - log_ratio(b)).sum(1).mean(),
        "k3 of the inverse ratio as a loss",
    ),
    (
        "k2 of tokens",
        lambda b: (log_ratio(b) ** 2 / 2).sum(1).mean(),
        "KL not credited to earlier tokens",
    ),
    ("weighted k3", weighted_k3, "KL not credited to earlier tokens"),
]
DPO = [
    ("exchanged", lambda b: sigmoid_loss(-b.beta * h(b)), "chosen and rejected swapped"),
    (
        "no reference",
        lambda b: sigmoid_loss(b.beta * (b.policy_chosen - b.policy_rejected)),
        "reference missing",
    ),
    (
        "reference exchanged",
        lambda b: sigmoid_loss(b.beta * (h(b) + 2 * (b.ref_chosen - b.ref_rejected))),
        "reference has the wrong sign",
    ),
    (
        "reference is the policy (18)",
        lambda b: sigmoid_loss(b.beta * (h(b) - h(b).detach())),
        "reference is the policy",
    ),
    ("no beta", lambda b: sigmoid_loss(h(b)), "beta missing"),
    ("beta outside", lambda b: b.beta * sigmoid_loss(h(b)), "beta missing"),
    ("beta applied twice", lambda b: sigmoid_loss(b.beta**2 * h(b)), "beta applied twice"),
    (
        "means over tokens",
        lambda b: sigmoid_loss(b.beta * token_h(b, mean=True)),
        "divided by the length",
    ),
    ("no logarithm", lambda b: -torch.sigmoid(b.beta * h(b)).mean(), "no logarithm"),
    ("hinge loss", lambda b: F.relu(1 - b.beta * h(b)).mean(), "hinge loss"),
    ("IPO", lambda b: ((h(b) - 1 / (2 * b.beta)) ** 2).mean(), "squared loss"),
    (
        "label smoothing",
        lambda b: 0.9 * sigmoid_loss(b.beta * h(b)) + 0.1 * sigmoid_loss(-b.beta * h(b)),
        "label smoothing",
    ),
    ("pad is EOS (1)", lambda b: sigmoid_loss(b.beta * token_h(b, not_eos)), "EOS masked out"),
    (
        "mask a token early",
        lambda b: sigmoid_loss(b.beta * token_h(b, lambda x: shifted(x.mask.double(), -1))),
        "mask one token early",
    ),
    (
        "mask a token late",
        lambda b: sigmoid_loss(b.beta * token_h(b, lambda x: shifted(x.mask.double(), 1))),
        "mask one token late",
    ),
    ("no mask", lambda b: sigmoid_loss(b.beta * token_h(b, everything)), "trains on padding"),
    (
        "no shift (4)",
        lambda b: sigmoid_loss(b.beta * token_h(b, logp=lambda x: own_logprobs(x, shift=0))),
        "labels not shifted",
    ),
    ("sign", lambda b: -sigmoid_loss(b.beta * h(b)), "wrong sign"),
]
REWARD = [
    ("one early (9)", pooled(lambda x: x.trajectory.lengths - 2), "score read one token early"),
    ("last column (8)", pooled(lambda x: -1), "score read in the last column"),
    ("first padding (8)", pooled(lambda x: first_padding(x)), "score read at the first padding"),
    (
        "first EOS (8)",
        pooled(lambda x: (x.ids == x.pad_id).int().argmax(1)),
        "first EOS of the row",
    ),
    (
        "before the first pad (8)",
        pooled(lambda x: (x.ids == x.pad_id).int().argmax(1) - 1),
        "first EOS of the row",
    ),
    (
        "last that is not padding (8)",
        pooled(lambda x: (x.ids != x.pad_id).int().cumsum(1).argmax(1)),
        "EOS mistaken for padding",
    ),
    ("mask.sum - 1 (8)", pooled(lambda x: x.mask.sum(1) - 1), "score position ignores the prompt"),
    ("mean", mean_pooled, "score is a mean over tokens"),
    ("sum", lambda b: mean_pooled(b, over=lambda x: 1.0), "score is a sum over tokens"),
    (
        "exchanged",
        pooled(lambda x: x.trajectory.lengths - 1, -1.0),
        "chosen and rejected swapped",
    ),
    (
        "no logarithm",
        lambda b: -torch.sigmoid(b.score_chosen - b.score_rejected).mean(),
        "no logarithm",
    ),
    (
        "centring",
        lambda b: losses.bradley_terry(b.score_chosen, b.score_rejected, centering=0.01),
        "centered scores",
    ),
]
CRITIC = [
    (
        "no penalty",
        lambda b: squared(b, target=(b.rewards[:, None] * b.mask)),
        "KL penalty missing from the target",
    ),
    ("advantage", lambda b: squared(b, target=own_gae(b, 0.95)), "advantage as the target"),
    (
        "bootstrap behind the end",
        lambda b: squared(b, target=own_gae(b, 0.95, end=b.old_values) + b.old_values),
        "bootstrap past the end",
    ),
    (
        "gamma 0.95",
        lambda b: squared(b, target=own_gae(b, 0.9, gamma=0.95) + b.old_values),
        "discount",
    ),
    (
        "each response by its length (2)",
        lambda b: squared(b, by_response=True),
        "mean of response means",
    ),
    ("pad is EOS (1)", lambda b: squared(b, mask=not_eos(b)), "EOS masked out"),
    (
        "mask a token late",
        lambda b: squared(b, mask=shifted(b.mask.double(), 1)),
        "mask one token late",
    ),
    (
        "value behind the token",
        lambda b: squared(b, values=F.pad(b.values[:, 1:], (0, 1))),
        "value read one token late",
    ),
    (
        "no mask",
        lambda b: squared(b, mask=everything(b)),
        "trains on the prompt + trains on padding",
    ),
]


def own_return(b, lam=0.95):
    return own_gae(b, lam) + b.old_values


def whitened_tokens(b, x, correction=0):
    inside = x[b.mask]
    return (x - inside.mean()) / inside.std(correction=correction)


def own_value(b, *, target=own_return, join=torch.maximum, clip=0.2, dtype=torch.float64):
    """The critic's clipped loss."""
    values, old, returns = (x.to(dtype) for x in (b.values, b.old_values, target(b)))
    near = old + (values - old).clamp(-clip, clip)
    return (join((values - returns) ** 2, (near - returns) ** 2) * b.mask).sum() / b.mask.sum()


def cut(b):
    return b.old_values.clamp(-1.4, 1.4)


STUCK = [  # right where the old values are, or where the values are close to them
    (
        "its own old values",
        lambda b: own_value(b, target=lambda b: b.old_values),
        "target is the old value",
    ),
    *(
        (
            f"V + {x:g} A",
            lambda b, x=x: own_value(b, target=lambda b: b.old_values + x * own_gae(b, 0.95)),
            "advantage scaled in the target",
        )
        for x in (0.01, 0.9, -1.0)
    ),
    (
        "V + whitened A (16)",
        lambda b: own_value(
            b, target=lambda b: b.old_values + whitened_tokens(b, own_gae(b, 0.95))
        ),
        "whitened advantage in the target",
    ),
    *(
        (
            f"whitened returns, correction {x} (16)",
            lambda b, x=x: own_value(b, target=lambda b: whitened_tokens(b, own_return(b), x)),
            "whitened target",
        )
        for x in (0, 1)
    ),
    (
        "returns in other units",
        lambda b: own_value(b, target=lambda b: 0.1 * own_return(b)),
        "whitened target",
    ),
    (
        "old values cut where those of the policy are not",
        lambda b: own_value(
            b, target=lambda b: own_gae(b, 0.95, values=cut(b)) + cut(b), join=lambda x, _: x
        ),
        "target is not a return",
    ),
    ("minimum", lambda b: own_value(b, join=torch.minimum), "minimum in the value clip"),
    (
        "clipped alone",
        lambda b: own_value(b, join=lambda _, x: x),
        "value clip without the maximum",
    ),
    (
        "values detached",
        lambda b: squared(b, values=b.values.detach() + 0 * b.values),
        "no gradient",
    ),
]
CRITIC += STUCK
BROKEN = [
    pytest.param(check, loss, name, id=f"{kind}: {what}")
    for kind, check, cases in [
        ("nll", likelihood, NLL),
        ("ppo", policy(), PPO),
        ("groups", groups, GROUPS),
        ("clip", policy("clip"), CLIP),
        ("kl", policy("kl"), KL),
        ("higher", policy("clip", clip_high=0.28), HIGHER),
        ("gspo", policy("gspo", clip=0.1, clip_high=0.28), GSPO),
        ("cispo", policy("cispo"), CISPO),
        ("moved", policy("moved"), MOVED),
        ("dpo", preference, DPO),
        ("reward", reward, REWARD),
        ("critic", value, CRITIC),
    ]
    for what, loss, name in cases
]


@pytest.mark.parametrize(("check", "loss", "name"), BROKEN)
def test_a_broken_loss_is_named(check, loss, name):
    verdict = check(loss)
    assert not verdict.ok
    assert verdict.name == name, str(verdict)
    for part in name.split(" + "):  # (d) the text says what it is and what to do
        fault = CATALOGUE[part]
        assert fault.explanation in verdict.sentence and fault.remedy in verdict.sentence
    assert name in str(verdict)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (own_value, ("lambda 0.95.", "0.2 above its old value and its target is higher")),
        (
            lambda b: own_value(b, clip=0.5, target=lambda b: own_return(b, 0.0)),
            ("lambda 0.", "0.5 above"),
        ),
        (lambda b: own_value(b, dtype=torch.float32), ("lambda 0.95.", "0.2 below")),
        (lambda b: own_value(b, clip=0.03), ("lambda 0.95.", "0.03 above", "where the clip acts")),
        (squared, ("lambda 0.95.", "values are not clipped")),
        (lambda b: squared(b, target=own_return(b, 1.0)), ("lambda 1.", "not clipped")),
        (
            lambda b: squared(b, target=(own_return(b, 1.0) + own_return(b, 0.0)) / 2),
            ("a mixture of n-step returns", "not clipped"),
        ),
        (
            lambda b: own_value(b, join=lambda x, y: (x + y) / 2),
            ("lambda 0.95.", "not that of a squared error"),
        ),
    ],
)
def test_what_a_critic_is_fitted_to_and_where_it_is_clipped_is_measured(loss, words):
    verdict = value(loss)
    assert verdict.ok and verdict.name == "correct", str(verdict)
    assert all(w in str(verdict) for w in words), str(verdict)


def test_a_loss_whose_gap_stays_is_not_called_correct():
    def until_the_reference(b):
        """Pairs at the reference have no gradient, and the training begins there."""
        return torch.where(h(b).abs() > 1e-9, -F.logsigmoid(b.beta * h(b)), 0.0).mean()

    assert preference(until_the_reference).ok
    verdict = check_preference_loss(until_the_reference)
    assert not verdict.ok and verdict.name == "does not learn" and verdict.gap > 0.9


def dual_clip(b):
    """The clipped surrogate, with a bound of 3 for negative advantages."""
    r, a = (b.logprobs - b.old_logprobs).exp(), b.advantages
    low = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    return -(torch.where(a < 0, torch.maximum(low, 3 * a), low) * b.mask).sum()


RANGES = [  # objective, what is asked for, the loss, its name, what was measured
    *(
        ("clip", {}, lambda b, c=c: clipped(b, low=c, high=c), "wrong clip range", (1 - c, 1 + c))
        for c in (0.01, 0.19, 0.45, 0.6, 1.5)
    ),
    ("clip", {}, lambda b: clipped(b, high=0.28), "wrong clip range", (0.8, 1.28)),
    ("clip", {"clip": 1.5}, lambda b: clipped(b, join=lambda x, _: x), "not clipped", ()),
    ("clip", {}, clipped, "correct", (0.8, 1.2)),
    ("clip", {}, lambda b: clipped(b, ratio=float32), "correct", (0.8, 1.2)),
    ("clip", {"group": 2}, clipped, "correct", (0.8, 1.2)),
    ("clip", {}, dual_clip, "correct", (0.8, 1.2, 3)),
    (
        "clip",
        {"clip_high": 0.28},
        lambda b: clipped(b, low=0.3, high=0.28),
        "wrong clip range",
        (0.7,),
    ),
    (
        "gspo",
        {"clip": 0.1, "clip_high": 0.28},
        lambda b: own_gspo(b, low=0.15),
        "wrong clip range",
        (0.85, 1.28),
    ),
    (
        "gspo",
        {"clip": 0.1, "clip_high": 0.28},
        lambda b: own_gspo(b, low=0.15, over="tokens"),
        "mean over all tokens + wrong clip range",
        (0.85, 1.28),
    ),
    ("gspo", {"clip": 3e-4, "clip_high": 3e-4}, shipped_gspo, "wrong clip range", (0.9997, 1.0004)),
    (
        "cispo",
        {},
        lambda b: own_cispo(b, weight=lambda r: r.detach().clamp(max=5)),
        "wrong clip range",
        (5,),
    ),
    ("cispo", {"cap": 5}, lambda b: own_cispo(b, weight=lambda r: r.detach()), "not capped", ()),
    (
        "cispo",
        {"cap": 5},
        lambda b: own_cispo(b, weight=lambda r: r.detach().clamp(max=3)),
        "wrong clip range",
        (3,),
    ),
    (
        "moved",
        {},
        lambda b: importance(b, lambda d: product(d).clamp(max=50)),
        "weights truncated",
        (50,),
    ),
    (
        "moved",
        {},
        lambda b: importance(b, lambda d: d.detach().exp().clamp(max=1.37)),
        "token ratio instead of sequence ratio + weights truncated",
        (1.37,),
    ),
    (
        "moved",
        {},
        lambda b: importance(b, lambda d: torch.where(product(d) <= 2.2, product(d), 0.0)),
        "weights masked",
        (2.2,),
    ),
]


def float32(now, old):
    return (now.float() - old.float()).exp()


@pytest.mark.parametrize(("objective", "asked", "loss", "name", "measured"), RANGES)
def test_the_clip_is_measured_and_compared_with_the_one_that_is_asked_for(
    objective, asked, loss, name, measured
):
    verdict = policy(objective, **asked)(loss)
    assert verdict.name == name and verdict.ok == (name == "correct"), str(verdict)
    for ratio in (x for x in measured if x > 0):
        assert f"a ratio of {ratio:.6g}" in str(verdict), str(verdict)


def own_copy(now, _):
    return (now - now.detach()).exp()


@pytest.mark.parametrize(
    ("loss", "built"),
    [
        (lambda b: clipped(b, ratio=own_copy), True),
        (lambda b: clipped(b, ratio=lambda now, old: own_copy(now.float(), old)), True),
        (lambda b: -(own_copy(own_logprobs(b), 0) * b.advantages * b.mask).sum(), True),
        (lambda b: -((whole(b) - whole(b).detach()).exp() * sequence.returns(b)).mean(), True),
        (clipped, False),
        (shipped.ppo_loss, False),
        (reinforce, False),
        (lambda b: reinforce(b, critic=True), False),
        (sequence_ratio, False),
        (CORRECT["REINFORCE and k2 of the response"][1], False),
    ],
)
def test_a_ratio_of_log_probabilities_and_their_own_copy_is_said_where_it_is_right(loss, built):
    verdict = policy()(loss)
    assert verdict.ok, str(verdict)
    assert ("detached copy of themselves" in str(verdict)) == built
    if built:  # and it is wrong for several steps
        assert policy("clip")(lambda b: clipped(b, ratio=own_copy)).name == "ratio always one"
        assert "logprobs.detach()" in CATALOGUE["ratio always one"].explanation


def test_lambda_below_one_is_named_where_the_critic_is_wrong_and_where_there_is_none():
    for critic, name in (("arbitrary", "lambda with an inexact critic"), ("none", "discount")):
        assert policy(critic=critic)(lambda b: shipped.ppo_loss(b, lam=0.95)).name == name


def test_the_two_directions_of_the_kl_are_told_apart():
    verdict = policy("forward_kl")(lambda b: shipped.kl_loss(b, "k2"))
    assert verdict.name == "reverse instead of forward KL"
    assert policy("kl")(lambda b: shipped.kl_loss(b, "k3")).name == "k3 as a loss"


def test_a_wrong_strength_of_the_penalty_is_measured():
    verdict = policy()(
        lambda b: reinforce(b, rewards=lambda b: 2.5 * b.trajectory.last * b.rewards[:, None])
    )
    assert verdict.name == "wrong beta" and "0.4 times" in str(verdict)


def test_a_group_mean_that_includes_itself_is_only_shorter_where_everything_is_inside():
    verdict = groups(lambda b: rloo(b, advantage=centred))
    assert verdict.ok and "(G - 1) / G = 0.5" in str(verdict)


def test_what_is_unknown_is_called_so_and_where_to_look_is_said():
    verdict = policy()(lambda b: reinforce(b, penalty=lambda d: d**3))
    assert not verdict.ok and verdict.name == "unknown"
    assert "disappears without the distance to the reference" in str(verdict)
    verdict = policy()(
        lambda b: reinforce(b, rewards=lambda b: b.trajectory.last * b.rewards[:, None] ** 3)
    )
    assert "disappears without rewards" in str(verdict)


def test_losses_that_mix_rows_are_correct_here_and_come_with_a_warning():
    verdict = policy()(lambda b: shipped.ppo_loss(b, whitened=True))
    assert verdict.ok and "Rows depend on one another" in str(verdict)
    assert "Rows depend" not in str(policy()(shipped.ppo_loss))


def test_the_variance_is_that_of_one_response_also_in_groups():
    def of(case, loss, alone, per):
        population, (prompt, response, group) = case.population, rows(case.population)
        each = []
        for i in range(0, len(prompt), per):
            one = build(population, prompt[i : i + per], response[i : i + per], group[i : i + per])
            each.append(case.parameters(loss_gradient(alone, one, "raw").table))
        each = np.array(each).reshape(len(each), -1)
        spread = per * ((each - each.mean(0)) ** 2).sum(1).mean() / (each.mean(0) ** 2).sum()
        assert diagnosis.judge(loss, case, train=False).variance == pytest.approx(spread, rel=1e-9)

    def single(b):
        return -((b.rewards - b.beta * log_ratio(b).detach().sum(1)) * whole(b)).mean()

    of(kit.policy_case(), single, single, 1)
    of(
        kit.policy_case(group=2),
        lambda b: rloo(b, over="means"),
        lambda b: rloo(b, over="means"),
        2,
    )


def test_nan_at_padding_is_reported_and_does_not_make_a_loss_wrong():
    verdict = policy()(reinforce)
    assert verdict.ok and verdict.probes == ("nan",) and "torch.where" in str(verdict)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda b: b.logprobs, "shape"),
        (lambda b: 1.0, "not float"),
        (lambda b: {"loss": b.logprobs.sum()}, "not dict"),
    ],
)
def test_what_is_no_loss_is_refused_in_a_sentence(loss, words):
    with pytest.raises(ValueError, match=f"a loss must return a scalar tensor.*{words}"):
        policy()(loss)


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="objective must be one of"):
        check_policy_loss(reinforce, "entropy")
    with pytest.raises(ValueError, match="group must be 1 or 2"):
        check_policy_loss(reinforce, group=4)


# ---- training ----


def test_the_gap_is_small_for_a_right_loss_and_large_for_a_wrong_one():
    right, wrong = (
        check_policy_loss(shipped.ppo_loss),
        check_policy_loss(lambda b: reinforce(b, penalty=lambda d: -d)),
    )
    assert right.gap < 0.02 and "gap after a short training" in str(right)
    assert wrong.gap > 0.2
    assert check_preference_loss(dpo).gap < 1e-6
    assert check_preference_loss(lambda b: sigmoid_loss(h(b))).gap > 0.05
    assert (
        check_reward_loss(lambda b: losses.bradley_terry(b.score_chosen, b.score_rejected)).gap
        < 1e-6
    )
    assert check_reward_loss(pooled(lambda x: x.trajectory.lengths - 2)).gap > 0.2
    assert check_likelihood(lambda b: losses.nll(b.logprobs, b.mask)).gap < 0.05
    assert check_value_loss(shipped.value_loss).gap < 0.15


# ---- what the verdicts rest on ----


def test_probabilities_are_whole_parts_and_every_response_stands_as_often_as_it_is_likely():
    population = make_population()
    prompt, response, _ = rows(population)
    for p, row in enumerate(likelihoods(population)):
        counts = np.bincount(response[prompt == p], minlength=len(row))
        np.testing.assert_allclose(counts, 64 * row, atol=1e-12)
    pair = make_population(horizon=2, group=2)
    prompt, response, group = rows(pair)
    first, second = response[::2], response[1::2]
    for p, row in enumerate(likelihoods(pair)):
        inside = prompt[::2] == p
        joint = np.zeros((len(row), len(row)))
        np.add.at(joint, (first[inside], second[inside]), 1 / inside.sum())
        np.testing.assert_allclose(joint, np.outer(row, row), atol=1e-12)
    assert (group[::2] == group[1::2]).all() and len(set(group.tolist())) == len(group) // 2


def test_pairs_are_as_often_won_as_bradley_terry_says():
    population = make_population(preferences=True)
    strength = np.exp(population.world.reward)
    prompt, chosen, rejected = pairs(population)
    for p in range(2):
        for i, j in itertools.combinations(range(15), 2):
            won = ((prompt == p) & (chosen == i) & (rejected == j)).sum()
            lost = ((prompt == p) & (chosen == j) & (rejected == i)).sum()
            assert won + lost == 4
            assert won / 4 == pytest.approx(strength[p, i] / (strength[p, i] + strength[p, j]))


def test_a_batch_holds_the_responses_and_nothing_else_where_the_mask_is_true():
    population = make_population()
    batch = build(population, *rows(population))
    tree, where = population.tree, layout(population.world.prompts, 3)
    logp = exact.logprobs(tree, population.policy)
    for i, (p, y) in enumerate(zip(*rows(population)[:2], strict=True)):
        assert batch.ids[i][batch.mask[i]].tolist() == list(tree.responses[y])
        assert select(batch.logprobs, batch.mask)[i].sum().item() == pytest.approx(logp[p, y])
        assert batch.ids[i, : len(population.world.prompts[p])].tolist() == list(
            population.world.prompts[p]
        )
    torch.testing.assert_close(own_logprobs(batch)[batch.mask], batch.logprobs[batch.mask])
    assert (
        batch.logprobs.isfinite().all()
        and batch.old_logprobs.isfinite().all()
        and batch.scores.isfinite().all()
    )
    assert where.rows > where.prompts > where.ends > where.states
    assert {len(p) for p in population.world.prompts} == {1, 3} and (
        ~batch.trajectory.finished
    ).any()


def test_targets_of_policies_are_the_finite_differences_of_what_they_are_gradients_of():
    for objective, value_of in {
        "J": lambda p, logp: exact.objective(p.world, logp),
        "reward": lambda p, logp: exact.expected(logp, p.world.reward),
        "kl": lambda p, logp: -exact.kl(logp, exact.reference(p.world)),
        "forward_kl": lambda p, logp: -exact.kl(exact.reference(p.world), logp),
    }.items():
        case = kit.policy_case(objective)
        p = case.population
        slow = difference(
            lambda raw, p=p, f=value_of: f(p, exact.logprobs(p.tree, raw / p.temperature)),
            p.policy * p.temperature,
        )
        np.testing.assert_allclose(case.exact(p), slow, atol=1e-8)


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        (kit.policy_case("clip"), 0.2, 0.2),
        (kit.policy_case("clip", clip_high=0.28), 0.2, 0.28),
        (kit.policy_case("cispo", cap=math.inf), math.inf, math.inf),
    ],
)
def test_the_targets_of_the_clipped_surrogate_and_of_cispo_without_a_cap_are_finite_differences(
    case, low, high
):
    p = case.population

    def surrogate(raw):
        new, total = exact.log_softmax(raw / p.temperature), 0.0
        for x, y in np.ndindex(*likelihoods(p).shape):
            for s, a in zip(p.tree.path[y], p.tree.token[y], strict=True):
                if s >= 0:
                    ratio, advantage = (
                        math.exp(new[x, s, a] - p.data[x, s, a]),
                        p.advantages[x, s, a],
                    )
                    total += (
                        likelihoods(p)[x, y]
                        / 2
                        * min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
                    )
        return total

    np.testing.assert_allclose(
        case.exact(p), difference(surrogate, p.policy * p.temperature), atol=1e-8
    )


def test_the_target_of_gspo_is_its_finite_difference_and_that_of_cispo_its_own_with_weights_held():
    case = kit.policy_case("gspo", clip_high=0.28)
    p = case.population
    often, rewards = likelihoods(p) / 2, p.world.reward

    def gspo(raw):
        log_ratio = exact.logprobs(p.tree, raw / p.temperature) - exact.logprobs(p.tree, p.data)
        s = np.exp(log_ratio / p.tree.lengths)
        return float((often * np.minimum(s * rewards, np.clip(s, 0.8, 1.28) * rewards)).sum())

    np.testing.assert_allclose(case.exact(p), difference(gspo, p.policy * p.temperature), atol=1e-8)

    case = kit.policy_case("cispo", cap=1.5)
    p = case.population
    weight = np.minimum(np.exp(p.policy - p.data), 1.5) * p.advantages

    def held(raw):
        logp, out = exact.log_softmax(raw / p.temperature), 0.0
        for x, y in np.ndindex(*often.shape):
            out += often[x, y] * sum(
                weight[x, s, a] * logp[x, s, a]
                for s, a in zip(p.tree.path[y], p.tree.token[y], strict=True)
                if s >= 0
            )
        return out

    np.testing.assert_allclose(case.exact(p), difference(held, p.policy * p.temperature), atol=1e-8)
    assert (np.exp(p.policy - p.data) > 1.5).any()


def test_the_target_where_the_policy_has_moved_is_the_gradient_of_its_own_reward():
    case = kit.policy_case("moved")
    p = case.population
    slow = difference(
        lambda raw: exact.expected(exact.logprobs(p.tree, raw / p.temperature), p.world.reward),
        p.policy * p.temperature,
    )
    np.testing.assert_allclose(case.exact(p), slow, atol=1e-8)
    assert np.abs(p.policy - p.data).max() > 0.5 and p.world.beta == 0


def test_targets_of_demonstrations_pairs_and_scores_are_finite_differences():
    case = kit.likelihood_case()
    p = case.population
    slow = difference(
        lambda raw: exact.expected(exact.logprobs(p.tree, p.data), exact.logprobs(p.tree, raw)),
        p.policy.copy(),
    )
    np.testing.assert_allclose(case.exact(p), slow, atol=1e-8)

    case = kit.preference_case(0.4)
    p = case.population
    preferred = 1 / (1 + np.exp(p.world.reward[:, None, :] - p.world.reward[:, :, None]))
    slow = -difference(
        lambda raw: exact.dpo_loss(p.world, exact.logprobs(p.tree, raw), preferred), p.policy.copy()
    )
    np.testing.assert_allclose(case.exact(p), slow, atol=1e-8)

    case = kit.reward_case()
    p, weight = case.population, exact.pair_weights(case.population.world)
    slow = -difference(
        lambda s: float(
            (weight * preferred * np.logaddexp(0, s[:, None, :] - s[:, :, None])).sum()
        ),
        p.scores,
    )
    np.testing.assert_allclose(case.exact(p)[:, -15:], slow, atol=1e-8)
    assert not case.exact(p)[:, :-15].any()


CASES = {
    "J": kit.policy_case(),
    "J, a wrong critic": kit.policy_case(critic="arbitrary"),
    "reward": kit.policy_case("reward"),
    "kl": kit.policy_case("kl"),
    "forward kl": kit.policy_case("forward_kl"),
    "clip": kit.policy_case("clip"),
    "higher": kit.policy_case("clip", clip_high=0.28),
    "gspo": kit.policy_case("gspo", clip=0.1, clip_high=0.28),
    "cispo": kit.policy_case("cispo"),
    "moved": kit.policy_case("moved"),
    "groups": kit.policy_case(group=2),
    "nll": kit.likelihood_case(),
    "dpo": kit.preference_case(),
    "reward model": kit.reward_case(),
    "critic": kit.value_case(),
}
SAME = [  # one gradient, two names
    {"no reward-to-go", "discount"},
    {"return without the token's own reward", "last token left out"},
    {"reward lost on truncated responses", "truncated responses left out"},
    {"KL divided by the length", "mean of response means"},
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gradients_of_the_catalogue_are_told_apart(case):
    candidates, target = list(case.candidates(case.population)), case.exact(case.population)
    right = [c for c in candidates if not c.names]
    assert len(right) >= 1 or case.checked in (kit.TITLES["forward_kl"],)
    for c in right:  # with no mistake the closed form is the exact gradient, by another road
        assert (
            measure(c.gradient + (0 if c.penalty is None else c.penalty), target).relative_bias
            < 1e-9
        )
    tried: dict[str, int] = {}
    for c in candidates:
        assert set(c.names) <= set(CATALOGUE)
        if len(c.names) == 1 and tried.setdefault(c.names[0], 0) < 4:
            tried[c.names[0]] += 1
            direction = (
                c.gradient
                + (0 if c.penalty is None else c.penalty)
                + (0 if c.extra is None else 0.1 * c.extra)
            )
            if measure(direction, target).relative_bias > 1e-6:
                found = explain(direction, candidates, case.group)
                assert found is not None and (
                    found.names == c.names or {*found.names, *c.names} in SAME
                ), (c.names, found)


# ---- (e) small batches, baselines ----


def whole_sum(b):
    advantages, _ = shipped.ppo_advantages(b)
    return losses.ppo_clip_sum(b.logprobs, b.old_logprobs, advantages, b.mask)[0] / len(b)


def test_11_the_shipped_surrogate_is_unbiased_in_small_batches():
    draws = unbiased(whole_sum, batch=64, scale=1.0)
    assert draws.ok and len(draws.z) == 3 and max(draws.z) < 4.5, draws
    assert all(0.1 < c < 2.5 for c in draws.chi2)


def test_11_leave_one_out_is_unbiased_in_small_batches_and_the_groups_mean_short_by_half():
    def one(advantage):
        return lambda b: sequence.reinforce(b, advantage(sequence.returns(b), b.group))

    assert unbiased(one(advantages.leave_one_out), group=2, batch=64, scale=1.0).ok
    assert unbiased(one(advantages.group_mean), group=2, batch=64, scale=0.5, seeds=(0,)).ok
    assert not unbiased(one(advantages.group_mean), group=2, batch=64, scale=1.0, seeds=(0,)).ok
    assert not unbiased(one(advantages.group_normalised), group=2, batch=64, seeds=(0,)).ok


def test_11_small_batches_show_what_the_population_cannot():
    assert not unbiased(
        lambda b: shipped.ppo_loss(b, whitened=True), batch=8, n=8_000, seeds=(0,)
    ).ok  # divided by its own deviation
    assert not unbiased(lambda b: 1.3 * whole_sum(b), batch=64, scale=1.0, seeds=(0,)).ok
    assert not unbiased(lambda b: reinforce(b, over="means"), batch=64, seeds=(0,)).ok


def test_12_a_baseline_may_know_the_state_and_nothing_of_the_response():
    def with_baseline(baseline):
        return lambda b: reinforce(b, returns=lambda r: togo(r) - baseline(b))

    of_prompt = with_baseline(lambda b: (7.0 * b.trajectory.prompt_lengths - 3.0)[:, None])
    of_state = with_baseline(
        lambda b: torch.arange(b.ids.shape[1])[None] - b.trajectory.prompt_lengths[:, None]
    )
    of_response = with_baseline(lambda b: b.trajectory.response_lengths[:, None])
    assert policy()(of_prompt).ok and policy()(of_state).ok
    assert not policy()(of_response).ok


# ---- tables ----


@pytest.fixture(scope="module")
def estimators():
    return lab.estimator_table(batches=40)


def of_all_tuples(p, advantage, size=1):
    """By listing all tuples of responses: the variance of the policy gradient with advantages
    [.., size] of returns [.., size], times the responses of a tuple, over its squared length.
    """
    mean, second = [], 0.0
    for x in range(len(p.world.prompts)):
        scores = np.zeros((len(p.tree.responses), *p.policy.shape[1:]))
        for y, t in np.argwhere(p.tree.path >= 0):
            s, a = p.tree.path[y, t], p.tree.token[y, t]
            scores[y, s] += (np.eye(3)[a] - np.exp(p.policy[x, s])) / p.temperature
        scores = scores.reshape(len(scores), -1)
        logp, ref = (exact.logprobs(p.tree, z)[x] for z in (p.policy, p.world.reference))
        paid = p.world.reward[x] - p.world.beta * (logp - ref)
        numbers = np.array(list(itertools.product(range(len(paid)), repeat=size)))
        often = np.exp(logp)[numbers].prod(1)
        each = (advantage(x, paid[numbers])[..., None] * scores[numbers]).mean(1)
        mean.append(often @ each / len(p.world.prompts))
        second += often @ (each**2).sum(1) / len(p.world.prompts)
    g = np.concatenate(mean)
    return size * (second / (g @ g) - 1)


def others(_, paid):
    """Less the mean of the other responses."""
    total = paid.sum(-1, keepdims=True)
    return paid - (total - paid) / (paid.shape[-1] - 1)


def test_the_variances_of_the_table_are_those_of_all_responses_and_pairs_of_one_population(
    estimators,
):
    table, p = {r.name: r.variance for r in estimators}, make_population()
    greedy = sequence.greedy_returns(p).numpy()
    logp, ref = (exact.logprobs(p.tree, x) for x in (p.policy, p.world.reference))
    average = (np.exp(logp) * (p.world.reward - p.world.beta * (logp - ref))).sum(1).mean()
    for name, found in {
        "REINFORCE, no baseline": of_all_tuples(p, lambda x, r: r),
        "REINFORCE, no baseline, every reward 3 higher": of_all_tuples(p, lambda x, r: r + 3),
        "REINFORCE, running mean": of_all_tuples(p, lambda x, r: r - average),
        "REINFORCE, greedy response's score (ReMax)": of_all_tuples(p, lambda x, r: r - greedy[x]),
        "REINFORCE, leave-one-out of 2 (RLOO)": of_all_tuples(p, others, 2),
        "group mean, groups of 2": of_all_tuples(p, lambda x, r: r - r.mean(-1, keepdims=True), 2),
        "GRPO's standard deviation alone, groups of 2": of_all_tuples(
            p,
            lambda x, r: (
                (r - r.mean(-1, keepdims=True)) / (r.std(-1, keepdims=True, ddof=1) + 1e-4)
            ),
            2,
        ),
    }.items():
        assert table[name] == pytest.approx(found, rel=1e-9), name


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_baseline_of_the_others_adds_the_spread_of_the_returns_over_g_minus_one(size):
    p = make_population(horizon=2)
    logp, ref = (exact.logprobs(p.tree, x) for x in (p.policy, p.world.reference))
    often, paid = np.exp(logp), p.world.reward - p.world.beta * (logp - ref)
    mean = (often * paid).sum(1)
    known = of_all_tuples(p, lambda x, r: r - mean[x])
    spread = (often * (paid - mean[:, None]) ** 2).sum(1)
    g = kit.policy_case(group=2).exact(p)
    fisher = (
        (np.exp(p.policy) * (1 - np.exp(p.policy))).sum(-1) * exact.visits(p.tree, p.data)
    ).sum(1)
    noise = (spread * fisher).mean() / p.temperature**2 / (g**2).sum()
    # 2: the gradients of the two prompts are in different places, so |g_x|^2 is on average 2 |g|^2;
    # and the responses of a tuple have one prompt
    found = of_all_tuples(p, others, size)
    assert found == pytest.approx(known + (noise + 2) / (size - 1) + size - 1, rel=1e-9)
    shifted = p.with_(world=p.world.with_(reward=p.world.reward + 3))
    assert of_all_tuples(shifted, others, size) == pytest.approx(found, rel=1e-9)
    assert of_all_tuples(shifted, lambda x, r: r) > 5 * found
    assert of_all_tuples(p, lambda x, r: r) < found


def test_the_table_of_estimators_measures_what_the_design_says(estimators):
    found = estimators
    table = {r.name: r for r in found}
    assert len(table) == len(found)
    unbiased_ones = [
        n for n in table if n.startswith("PPO") and "lambda 1," in n and "within" not in n
    ]
    assert len(unbiased_ones) == 3
    right = [
        *unbiased_ones,
        "PPO's surrogate, lambda 0.95, exact critic",
        "PPO's surrogate, lambda 0.95, exact critic, whitened",
        "PPO's surrogate at a policy that has moved",
        "REINFORCE, no baseline",
        "REINFORCE, no baseline, every reward 3 higher",
        "REINFORCE, running mean",
        "REINFORCE, greedy response's score (ReMax)",
        "REINFORCE, leave-one-out of 2 (RLOO)",
        "group mean, groups of 2",
        "Dr. GRPO, groups of 2",
        "Off policy: sequence ratio, no cap",
        "k2 of the response in the loss",
        "k1 in the reward",
        "DPO's loss",
        "Bradley-Terry loss",
        "negative log-likelihood",
        "critic's clipped loss, lambda 0.95",
        "k3 of the response as a loss, for the forward KL",
    ]
    sampled = {
        "PPO's surrogate, lambda 0.95, exact critic, whitened over 8 responses",
        "REINFORCE, whitened over 8 responses (REINFORCE++)",
    }
    for name, row in table.items():
        assert row.exact == (name not in sampled), name
        assert (row.relative_bias < 1e-9) == (name in right), name
        assert name in right or row.relative_bias > 0.01, name
    assert table["k1 as a loss"].scale == 0


def test_the_rows_of_the_sequence_level_methods_are_in_the_order_that_their_papers_give(estimators):
    table = {r.name: r for r in estimators}
    bias = {n: r.relative_bias for n, r in table.items()}
    for name, scale in (
        ("REINFORCE, no baseline", 1),
        ("REINFORCE, leave-one-out of 2 (RLOO)", 1),
        ("group mean, groups of 2", 1 / 2),
        ("Dr. GRPO, groups of 2", 1 / 6),
    ):
        assert table[name].scale == pytest.approx(scale, abs=1e-12)
    assert bias["weighted_k3 in the loss"] == pytest.approx(
        bias["k2_tokens in the loss"], abs=1e-12
    )
    off = {n.removeprefix("Off policy: "): b for n, b in bias.items() if n.startswith("Off policy")}
    assert (
        off["sequence ratio, no cap"]
        < 1e-12
        < off["sequence TIS, cap 2"]
        < off["token ratios, no cap"]
        < off["not corrected"]
    )
    assert off["CISPO, cap 1.5"] == pytest.approx(off["TIS, cap 1.5"], abs=1e-12)
    assert off["TIS, cap 1.5"] != pytest.approx(off["token ratios, no cap"], abs=1e-6)
    assert off["DAPO's clip-higher, 0.2 and 0.28"] != pytest.approx(
        off["PPO's clip, 0.2"], abs=1e-6
    )
    weights = sequence.by_group(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]))
    assert weights.tolist() == [
        pytest.approx(row) for row in ([1 / 6, 1 / 6, 0], [1 / 6, 0, 0], [1 / 12] * 3, [1 / 12] * 3)
    ]
    assert table["Off policy: not corrected"].estimates == "grad E[r] at the policy that has moved"


def test_the_table_of_kl_estimators():
    world = make_population().world
    table = lab.kl_table(
        world,
        exact.log_softmax(world.reference)
        + np.random.default_rng(0).normal(size=world.reference.shape),
    )
    found = {r.name: r for r in table.estimators}
    true = table.value.kl
    assert sum(table.per_position) == pytest.approx(true)
    for name in (
        "k1",
        "k3",
        "k1, summed over tokens",
        "k3, summed over tokens",
        "exact KL per token",
    ):
        assert found[name].bias == pytest.approx(0, abs=1e-12)
    assert abs(found["k2"].bias) > 1e-3
    assert {n: r.loss_gradient for n, r in found.items()} == {
        "k1": "0",
        "k2": "KL(pi||ref)",
        "k3": "KL(ref||pi)",
        "k1, summed over tokens": "0",
        "k2, summed over tokens": "none of the two",
        "k3, summed over tokens": "none of the two",
        "exact KL per token": "none of the two",
        "exact KL per token, as a loss and in the reward": "KL(pi||ref)",
    }
    assert (
        found["k1"].relative_error_reward < 1e-12
        and found["k1, summed over tokens"].relative_error_reward < 1e-12
    )
    assert found["k1"].cosine_loss is None and found["k3"].relative_error_reward > 0.1
    assert found["exact KL per token"].std < found["k1"].std


@pytest.mark.parametrize(
    ("shift", "k1", "k2", "k3", "bias"), [(0.1, 20, 1.42, 1.42, 0.0025), (1.0, 2, 1.73, 1.7, 0.25)]
)
def test_schulmans_table(shift, k1, k2, k3, bias):
    row = kl_estimators.schulman(shift)
    assert [row.k1, row.k2, row.k3, row.bias_k2] == pytest.approx([k1, k2, k3, bias], rel=0.01)


# ---- the example ----


def test_the_example_finds_the_three_planted_mistakes():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert out.count("WRONG") == 3 and out.count("ok ") >= 1
    for name in ("mask one token late", "k3 as a loss", "mean of response means"):
        assert name in out
