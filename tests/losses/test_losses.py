"""Every loss against hand-worked numbers, a slow NumPy reference, finite differences, and what must
not change it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fiducial import losses

NAN, INF = math.nan, math.inf


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# ---- slow references, one element at a time ----


def slow_nll(logprob):
    return -logprob, {"loss": -logprob}


def slow_ppo(new, old, advantage, clip=0.2, clip_high=None):
    return clipped(math.exp(new - old), advantage, clip, clip if clip_high is None else clip_high)


def clipped(ratio, advantage, low, high):
    loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    cut = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    return loss, {
        "policy_loss": loss,
        "clip_ratio": float(cut),
        "approx_kl": ratio - 1 - math.log(ratio),
        "ratio": ratio,
        "ratio/max": ratio,
    }


def slow_reinforce(new, advantage):
    return -advantage * new, {"policy_loss": -advantage * new}


def slow_gspo(new, old, advantages, clip=3e-4, clip_high=4e-4):
    """Of the tokens of one response, in lists."""
    s = math.exp(sum(a - b for a, b in zip(new, old, strict=True)) / len(new))
    return [clipped(s, a, clip, clip if clip_high is None else clip_high) for a in advantages]


def slow_cispo(new, old, advantage, cap=5.0):
    ratio = math.exp(new - old)
    loss = -min(ratio, cap) * advantage * new
    return loss, {
        "policy_loss": loss,
        "clip_ratio": float(ratio > cap),
        "approx_kl": ratio - 1 - math.log(ratio),
        "ratio": ratio,
        "ratio/max": ratio,
    }


def slow_value(value, old, target, clip=0.2):
    held = min(max(value, old - clip), old + clip)
    loss = 0.5 * max((value - target) ** 2, (held - target) ** 2)
    return loss, {
        "value_loss": loss,
        "value_clip_ratio": float((held - target) ** 2 > (value - target) ** 2),
    }


def slow_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    won, lost = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    loss = -(1 - label_smoothing) * log_sigmoid(won - lost) - label_smoothing * log_sigmoid(
        lost - won
    )
    return loss, {
        "loss": loss,
        "rewards/chosen": won,
        "rewards/rejected": lost,
        "rewards/margins": won - lost,
        "rewards/accuracies": (np.sign(won - lost) + 1) / 2,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def slow_bradley_terry(chosen, rejected, margin=0.0, centering=0.0):
    loss = -log_sigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
    gap = chosen - rejected
    return loss, {
        "loss": loss,
        "accuracy": (np.sign(gap) + 1) / 2,
        "margin": gap,
        "score/chosen": chosen,
        "score/rejected": rejected,
    }


# ---- the losses as one family: B rows, or [B, T] with a mask ----


@dataclass
class Case:
    name: str
    mean: Any
    sum: Any
    slow: Any
    inputs: int
    masked: bool
    keywords: dict[str, Any]
    by_row: bool = False  # slow is of the tokens of a row, in lists
    frozen: bool = False  # a part of the value has no gradient, on purpose

    def draw(self, seed: int = 0) -> list[torch.Tensor]:
        rng = np.random.default_rng(seed)
        shape = (5, 6) if self.masked else (5,)
        values = [tensor(rng.normal(size=shape)) for _ in range(self.inputs)]
        if self.masked:
            mask = torch.tensor(rng.random(shape) < 0.6)
            mask[0, 0], mask[3] = True, False
            for value in values:
                value[~mask] = tensor(rng.choice([NAN, INF, -INF, 1e30], size=int((~mask).sum())))
            values.append(mask)
        return values

    def slow_mean(self, inputs: list[torch.Tensor]) -> tuple[float, dict[str, float]]:
        *values, mask = (
            inputs if self.masked else [*inputs, torch.ones(len(inputs[0]), dtype=torch.bool)]
        )
        if self.by_row:
            each = [
                x
                for i in range(len(mask))
                if mask[i].any()
                for x in self.slow(*(v[i][mask[i]].tolist() for v in values), **self.keywords)
            ]
        else:
            each = [
                self.slow(*(v[tuple(at)].item() for v in values), **self.keywords)
                for at in mask.nonzero().tolist()
            ]
        metrics = {
            k: (np.max if k.endswith("/max") else np.mean)([m[k] for _, m in each])
            for k in each[0][1]
        }
        return float(np.mean([loss for loss, _ in each])), metrics


CASES = [
    Case("nll", losses.nll, losses.nll_sum, slow_nll, 1, True, {}),
    Case("ppo", losses.ppo_clip, losses.ppo_clip_sum, slow_ppo, 3, True, {}),
    Case("ppo-0.5", losses.ppo_clip, losses.ppo_clip_sum, slow_ppo, 3, True, {"clip": 0.5}),
    Case(
        "ppo-higher",
        losses.ppo_clip,
        losses.ppo_clip_sum,
        slow_ppo,
        3,
        True,
        {"clip": 0.2, "clip_high": 1.5},
    ),
    Case("reinforce", losses.reinforce, losses.reinforce_sum, slow_reinforce, 2, True, {}),
    Case(
        "gspo",
        losses.gspo,
        losses.gspo_sum,
        slow_gspo,
        3,
        True,
        {"clip": 0.4, "clip_high": 0.9},
        by_row=True,
        frozen=True,
    ),
    Case(
        "gspo-tight", losses.gspo, losses.gspo_sum, slow_gspo, 3, True, {}, by_row=True, frozen=True
    ),
    Case("cispo", losses.cispo, losses.cispo_sum, slow_cispo, 3, True, {"cap": 1.3}, frozen=True),
    Case("value", losses.clipped_value, losses.clipped_value_sum, slow_value, 3, True, {}),
    Case(
        "value-free",
        losses.clipped_value,
        losses.clipped_value_sum,
        lambda v, o, r, clip: slow_value(v, o, r, INF),
        3,
        True,
        {"clip": None},
    ),
    Case("dpo", losses.dpo, losses.dpo_sum, slow_dpo, 4, False, {}),
    Case(
        "dpo-smooth",
        losses.dpo,
        losses.dpo_sum,
        slow_dpo,
        4,
        False,
        {"beta": 0.8, "label_smoothing": 0.3},
    ),
    Case(
        "bradley-terry",
        losses.bradley_terry,
        losses.bradley_terry_sum,
        slow_bradley_terry,
        2,
        False,
        {},
    ),
    Case(
        "bradley-terry-margin",
        losses.bradley_terry,
        losses.bradley_terry_sum,
        slow_bradley_terry,
        3,
        False,
        {"centering": 0.05},
    ),
]
every_loss = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
masked_losses = pytest.mark.parametrize(
    "case", [c for c in CASES if c.masked], ids=lambda c: c.name
)


def close(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-11, abs=1e-11
    )


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def leaves(case: Case, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in (inputs[:-1] if case.masked else inputs)]


@every_loss
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_metrics_are_those_of_a_slow_loop(case, seed):
    inputs = case.draw(seed)
    loss, metrics = case.mean(*inputs, **case.keywords)
    expected, numbers = case.slow_mean(inputs)
    assert (
        loss.item() == pytest.approx(expected, rel=1e-12)
        and loss.shape == ()
        and loss.dtype == torch.float64
    )
    close(metrics, numbers)


@pytest.mark.parametrize("case", [c for c in CASES if not c.frozen], ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_finite_difference(case, seed):
    inputs = case.draw(seed)
    parameters = leaves(
        case, [x if x.dtype == torch.bool else x.nan_to_num(0, 0, 0).clamp(-9, 9) for x in inputs]
    )
    mask = inputs[-1:] if case.masked else []
    assert torch.autograd.gradcheck(lambda *x: case.mean(*x, *mask, **case.keywords)[0], parameters)


@pytest.mark.parametrize("seed", range(3))
def test_cispos_gradient_holds_its_weights_and_gspos_is_each_tokens_own_share(
    seed,
):
    for case in (c for c in CASES if c.frozen):
        new, old, advantage, mask = (
            x if x.dtype == torch.bool else x.nan_to_num(0, 0, 0).clamp(-9, 9)
            for x in case.draw(seed)
        )
        leaf = new.clone().requires_grad_()
        loss, _ = case.mean(leaf, old, advantage, mask, **case.keywords)
        (found,) = torch.autograd.grad(loss, leaf)
        expected = np.zeros(new.shape)
        for i, t in mask.nonzero().tolist():
            a, row = advantage[i, t].item(), mask[i]
            if case.name == "cispo":
                expected[i, t] = -min(math.exp(new[i, t] - old[i, t]), 1.3) * a
            else:
                s = math.exp((new[i] - old[i])[row].mean())
                expected[i, t] = (
                    -a
                    * s
                    * (
                        1
                        - slow_gspo([math.log(s)], [0.0], [a], **case.keywords)[0][1]["clip_ratio"]
                    )
                )
        np.testing.assert_allclose(found, expected / int(mask.sum()), atol=1e-12)
        assert found.any() or case.name == "gspo-tight"


@masked_losses
def test_nan_and_infinity_on_padding_reach_neither_the_value_nor_the_gradient(case):
    inputs = case.draw()
    mask = inputs[-1]
    clean = [torch.where(mask, x, torch.zeros_like(x)) for x in inputs[:-1]] + [mask]
    found = []
    for values in (inputs, clean):
        parameters = leaves(case, values)
        loss, metrics = case.mean(*parameters, mask, **case.keywords)
        found.append((loss, metrics, gradients(loss, parameters)))
    (loss, metrics, grads), (clean_loss, clean_metrics, clean_grads) = found
    assert loss.item() == clean_loss.item()
    close(metrics, clean_metrics)
    for grad, clean_grad in zip(grads, clean_grads, strict=True):
        assert (grad[~mask] == 0).all()
        torch.testing.assert_close(grad, clean_grad, rtol=0, atol=0)
    assert grads[0][mask].any()


@masked_losses
def test_the_amount_of_padding_changes_nothing(case):
    *values, mask = case.draw()
    loss, metrics = case.mean(*values, mask, **case.keywords)
    wide, wide_metrics = case.mean(
        *(F.pad(v, (2, 3, 0, 1), value=NAN) for v in values),
        F.pad(mask, (2, 3, 0, 1)),
        **case.keywords,
    )
    assert wide.item() == pytest.approx(loss.item(), rel=1e-14)
    close(wide_metrics, metrics)


@every_loss
def test_the_order_of_the_rows_changes_nothing(case):
    inputs = case.draw()
    order = torch.tensor([3, 1, 4, 0, 2])
    loss, metrics = case.mean(*inputs, **case.keywords)
    shuffled, shuffled_metrics = case.mean(*(x[order] for x in inputs), **case.keywords)
    assert shuffled.item() == pytest.approx(loss.item(), rel=1e-14)
    close(shuffled_metrics, metrics)


@every_loss
def test_sums_over_unequal_micro_batches_divided_once_are_the_mean_and_its_gradient(case):
    inputs = case.draw()
    count = int(inputs[-1].sum()) if case.masked else len(inputs[0])
    whole_leaves, split_leaves = leaves(case, inputs), leaves(case, inputs)
    mask = inputs[-1:] if case.masked else []
    whole, metrics = case.mean(*whole_leaves, *mask, **case.keywords)
    parts = [
        case.sum(*(x[s] for x in (*split_leaves, *mask)), **case.keywords)
        for s in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    assert not any(m.requires_grad for _, each in ((whole, metrics), *parts) for m in each.values())
    split = sum(loss for loss, _ in parts) / count
    assert split.item() == pytest.approx(whole.item(), rel=1e-13)
    for a, b in zip(gradients(whole, whole_leaves), gradients(split, split_leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    together = {
        k: max(m[k] for _, m in parts)
        if k.endswith("/max")
        else sum(m[k] for _, m in parts) / count
        for k in metrics
    }
    close(metrics, together)


@every_loss
def test_shapes_that_would_broadcast_are_refused(case):
    inputs = case.draw()
    for i in range(len(inputs)):
        if len(inputs) == 1:
            break
        wrong = [x[..., :1] if j == i else x for j, x in enumerate(inputs)]
        for function in (case.mean, case.sum):
            with pytest.raises(ValueError, match="broadcast"):
                function(*wrong, **case.keywords)


@masked_losses
def test_a_mean_over_no_token_is_refused(case):
    *values, mask = case.draw()
    with pytest.raises(ValueError, match=r"nothing"):
        case.mean(*values, torch.zeros_like(mask), **case.keywords)


@masked_losses
def test_a_micro_batch_without_a_token_adds_nothing(case):
    # a process that only keeps step with the others has one
    *values, mask = case.draw()
    parameters = leaves(case, [*values, mask])
    loss, metrics = case.sum(*parameters, torch.zeros_like(mask), **case.keywords)
    assert loss.item() == 0.0 and all(m.item() == 0.0 for m in metrics.values())
    assert all((g == 0).all() for g in gradients(loss, parameters))


# ---- by hand ----


def test_nll_by_hand_is_over_tokens_and_not_over_rows():
    logprobs = tensor([[0.0, -1.0, -2.0], [0.0, -7.0, 0.0]])
    loss, _ = losses.nll(logprobs, torch.tensor([[False, True, True], [False, True, False]]))
    assert loss.item() == pytest.approx(10 / 3)


def test_ppo_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, -1, 1, -1: -1.2, 1.5, -0.5, 0.8
    new = tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    loss, metrics = losses.ppo_clip(
        new, torch.zeros_like(new), tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4)
    )
    assert loss.item() == pytest.approx(0.6 / 4)
    assert metrics["clip_ratio"].item() == 0.5 and metrics["ratio/max"].item() == pytest.approx(1.5)
    (gradient,) = torch.autograd.grad(loss, new)
    assert (gradient * 4)[0].tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])


def test_value_clipping_by_hand():
    # V 1, old 0: held at 0.2. Towards 2 the held one is worse, 1.8^2 / 2, and its gradient is cut;
    # towards -1 the free one, 2^2 / 2, pulls back.
    for target, expected, slope, cut in ((2.0, 1.62, 0.0, 1.0), (-1.0, 2.0, 2.0, 0.0)):
        value = tensor([[1.0]]).requires_grad_()
        loss, metrics = losses.clipped_value(
            value, tensor([[0.0]]), tensor([[target]]), torch.ones(1, 1), clip=0.2
        )
        assert loss.item() == pytest.approx(expected)
        assert torch.autograd.grad(loss, value)[0].item() == pytest.approx(slope)
        assert metrics["value_clip_ratio"].item() == cut
    free, _ = losses.clipped_value(
        tensor([[1.0]]), tensor([[0.0]]), tensor([[2.0]]), torch.ones(1, 1), clip=None
    )
    assert free.item() == 0.5


def test_dpo_by_hand():
    # beta 0.5, log-ratios 2 and -1: margin 1.5, loss log(1 + e^-1.5)
    four = tensor([-3.0]), tensor([-6.0]), tensor([-5.0]), tensor([-5.0])
    loss, metrics = losses.dpo(*four, beta=0.5)
    assert loss.item() == pytest.approx(0.20141327798275246)
    close(
        metrics,
        {
            "loss": 0.20141327798275246,
            "rewards/chosen": 1.0,
            "rewards/rejected": -0.5,
            "rewards/margins": 1.5,
            "rewards/accuracies": 1.0,
            "logps/chosen": -3.0,
            "logps/rejected": -6.0,
        },
    )
    smooth, _ = losses.dpo(*four, beta=0.5, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(0.9 * 0.20141327798275246 + 0.1 * 1.7014132779827524)


def test_the_gradient_of_dpo_weighs_a_pair_by_how_wrong_it_is():
    # the paper, section 4: -beta sigma(-beta h) (grad log pi_w - grad log pi_l)
    chosen, rejected = tensor([-3.0]).requires_grad_(), tensor([-6.0]).requires_grad_()
    loss, _ = losses.dpo(chosen, rejected, tensor([-5.0]), tensor([-5.0]), beta=0.5)
    weight = 0.5 / (1 + math.exp(1.5))
    assert [g.item() for g in torch.autograd.grad(loss, [chosen, rejected])] == pytest.approx(
        [-weight, weight]
    )


@pytest.mark.parametrize("e", [0.1, 0.25])
def test_conservative_labels_move_the_minimum_to_their_log_odds(e):
    best = tensor([math.log((1 - e) / e)]).requires_grad_()
    zero = tensor([0.0])
    loss, _ = losses.dpo(best, zero, zero, zero, beta=1.0, label_smoothing=e)
    assert torch.autograd.grad(loss, best)[0].item() == pytest.approx(0, abs=1e-12)
    assert loss.item() == pytest.approx(-(1 - e) * math.log(1 - e) - e * math.log(e))


@pytest.mark.parametrize("wrong", [-0.1, 0.5, 1.0])
def test_label_smoothing_outside_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.dpo(*[torch.zeros(1)] * 4, label_smoothing=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_margins_stay_finite_in_value_and_gradient(dtype):
    low, high, zero = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (-1e4, 1e4, 0.0))
    for loss, _ in (
        losses.dpo(low, high, zero, zero, beta=1.0),
        losses.bradley_terry(low, high),
        losses.ranking(torch.cat([low, high]), torch.tensor([[0, 1]]), torch.tensor([0])),
    ):
        assert loss.item() == pytest.approx(2e4)
        assert [g.item() for g in torch.autograd.grad(loss, [low, high])] == pytest.approx([-1, 1])
    right, _ = losses.bradley_terry(high, low)
    assert right.item() == 0.0
    assert [g.item() for g in torch.autograd.grad(right, [low, high])] == [0, 0]


def test_margin_and_centering_by_hand():
    chosen, rejected = tensor([2.0, 0.0]), tensor([1.0, 0.0])
    plain, _ = losses.bradley_terry(chosen, rejected)
    assert plain.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2)
    # margins 1 and 2: sigma(0) and sigma(-2); centering 0.01 * 3^2 and nothing
    loss, metrics = losses.bradley_terry(chosen, rejected, tensor([1.0, 2.0]), centering=0.01)
    assert loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(2)) + 0.09) / 2)
    assert (
        metrics["accuracy"].item() == 0.75 and metrics["margin"].item() == 0.5
    )  # of the scores, the margin not counted; a tie is one half


def test_bradley_terrys_weights_multiply_pairs_and_their_metrics():
    rng = np.random.default_rng(0)
    chosen, rejected, margin, weight = (tensor(x) for x in rng.normal(size=(4, 5)))
    found, metrics = losses.bradley_terry_sum(chosen, rejected, margin, 0.1, weight.abs())
    each = [
        slow_bradley_terry(*(x[i].item() for x in (chosen, rejected, margin)), 0.1)
        for i in range(5)
    ]
    assert found.item() == pytest.approx(
        sum(w * loss for w, (loss, _) in zip(weight.abs().tolist(), each, strict=True))
    )
    close(
        metrics,
        {
            k: sum(w * m[k] for w, (_, m) in zip(weight.abs().tolist(), each, strict=True))
            for k in metrics
        },
    )
    with pytest.raises(ValueError, match="broadcast"):
        losses.bradley_terry_sum(chosen, rejected, None, 0.0, weight[:1])


# ---- rankings ----


def all_pairs(k: int, start: int = 0) -> list[tuple[int, int]]:
    return [(start + i, start + j) for i in range(k) for j in range(i + 1, k)]


def test_a_ranking_of_two_is_bradley_terry():
    scores = tensor([0.3, -1.2, 0.7, 0.9])
    ranked, metrics = losses.ranking(
        scores, torch.tensor([[0, 1], [2, 3]]), torch.tensor([5, 8]), tensor([0.5, 0.0]), 0.02
    )
    paired, expected = losses.bradley_terry(
        scores[[0, 2]], scores[[1, 3]], tensor([0.5, 0.0]), 0.02
    )
    assert ranked.item() == pytest.approx(paired.item(), rel=1e-14)
    close(metrics, expected)


def test_a_prompt_counts_once_however_many_responses_were_ranked_and_its_pairs_may_stand_anywhere():
    rng = np.random.default_rng(0)
    scores = tensor(rng.normal(size=9)).requires_grad_()
    pairs, prompt = all_pairs(4) + all_pairs(2, 4) + all_pairs(3, 6), [7] * 6 + [3] + [9] * 3
    s = scores.tolist()
    means = [
        np.mean([-log_sigmoid(s[i] - s[j]) for i, j in group])
        for group in (pairs[:6], pairs[6:7], pairs[7:])
    ]  # InstructGPT, eq. 1
    order = rng.permutation(10)
    loss, metrics = losses.ranking(scores, torch.tensor(pairs)[order], torch.tensor(prompt)[order])
    assert loss.item() == pytest.approx(np.mean(means), rel=1e-12)
    rights = [
        np.mean([s[i] > s[j] for i, j in group]) for group in (pairs[:6], pairs[6:7], pairs[7:])
    ]
    assert metrics["accuracy"].item() == pytest.approx(np.mean(rights))

    total, _ = losses.ranking_sum(scores, torch.tensor(pairs), torch.tensor(prompt))
    parts = [
        losses.ranking_sum(scores, torch.tensor(pairs)[s], torch.tensor(prompt)[s])[0]
        for s in (slice(0, 7), slice(7, 10))
    ]
    assert total.item() == pytest.approx(sum(means)) and sum(parts).item() == pytest.approx(
        sum(means)
    )
    assert torch.autograd.gradcheck(
        lambda x: losses.ranking(x, torch.tensor(pairs), torch.tensor(prompt))[0], scores
    )


def test_four_equal_scores_lose_log_two_and_the_gradient_orders_them():
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss, metrics = losses.ranking(
        scores, torch.tensor(all_pairs(4)), torch.zeros(6, dtype=torch.long)
    )
    assert loss.item() == pytest.approx(math.log(2)) and metrics[
        "accuracy"
    ].item() == pytest.approx(0.5)
    # each pair pulls by 1/2, and there are six: three wins, two less one, one less two, three
    # losses
    assert torch.autograd.grad(loss, scores)[0].tolist() == pytest.approx(
        [-3 / 12, -1 / 12, 1 / 12, 3 / 12]
    )


def test_a_ranking_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        losses.ranking(
            torch.zeros(2), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        )
