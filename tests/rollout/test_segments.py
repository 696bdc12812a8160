"""A trajectory is a sequence of segments.

Everything is right on rows whose policy tokens lie in two stretches with given tokens between them,
by slow references that know the policy's tokens alone.
"""

import functools

import numpy as np
import pytest
import torch

from fiducial import losses
from fiducial.core import advantages, corrections, kl, loss_aggregation
from fiducial.core.reductions import whiten
from fiducial.data.row_types import PromptRow
from fiducial.models.load import load_roles, load_scorer
from fiducial.models.roles import ScoreModel
from fiducial.models.scores import ScoreFacts, StepScores
from fiducial.rewards.process import ProcessReward
from fiducial.rewards.shaping import importance_weights, normalize_scores, overlong, shape
from fiducial.rewards.types import Responses, Scored
from fiducial.rollout.forward import forward
from fiducial.rollout.sampling import Keys, SamplingParams, sample_all
from fiducial.rollout.trajectory import Segment, Trajectory
from fiducial.settings import LongSettings, LoraSettings, RowSettings, RunSettings, ScoreSettings
from fiducial.train.processes import Processes
from fiducial.train.renderer import load_renderer

ROWS = [  # prompt, chosen, given, chosen; the second row has one stretch, the third ends in a given
    [[5, 6, 7], [8, 9], [20, 21, 22], [10, 11, 2]],
    [[5], [12, 13, 14, 2]],
    [[9, 9], [15], [30], [16, 17], [31, 32]],
]
FINISHED = [True, True, False]


def segments(row, lp=-0.5):
    return [
        Segment(ids, None if k % 2 == 0 else [lp * (t + 1) for t in range(len(ids))])
        for k, ids in enumerate(row)
    ]


def two_stretches(temperature=1.0):
    rows = [segments(row) for row in ROWS]
    return Trajectory.from_segments(rows, FINISHED, [0, 1, 2], [0, 0, 0], temperature)


def columns(row):
    """The columns of the policy's tokens, counted by hand."""
    out, start = [], 0
    for k, ids in enumerate(row):
        out += list(range(start, start + len(ids))) if k % 2 else []
        start += len(ids)
    return out


CHOSEN = [columns(row) for row in ROWS]


def numbers(seed, scale=1.0):
    """Random values at the policy's tokens and NaN everywhere else."""
    t = two_stretches()
    values = torch.full(t.mask.shape, float("nan"), dtype=torch.float64)
    rng = np.random.default_rng(seed)
    for i, at in enumerate(CHOSEN):
        values[i, at] = torch.tensor(scale * rng.normal(size=len(at)))
    return values


def packed(x):
    """The values at the policy's tokens moved to the left: the layout of one stretch."""
    width = max(map(len, CHOSEN))
    out = torch.zeros((len(CHOSEN), width), dtype=x.dtype)
    for i, at in enumerate(CHOSEN):
        out[i, : len(at)] = x[i, at]
    return out


def packed_mask():
    width = max(map(len, CHOSEN))
    return torch.tensor([[t < len(at) for t in range(width)] for at in CHOSEN])


# ---- the trajectory itself ----


def test_columns_lengths_and_the_last_token_by_hand():
    t = two_stretches()
    assert CHOSEN == [[3, 4, 8, 9, 10], [1, 2, 3, 4], [2, 4, 5]]
    assert [row.nonzero()[:, 0].tolist() for row in t.mask] == CHOSEN
    assert t.response_lengths.tolist() == [5, 4, 3] and t.lengths.tolist() == [11, 5, 8]
    assert [row.nonzero()[:, 0].tolist() for row in t.last] == [[10], [4], [5]]
    assert t.logprobs[0].tolist() == [0, 0, 0, -0.5, -1, 0, 0, 0, -0.5, -1, -1.5]


def test_the_text_behind_a_prompt_holds_what_was_given_and_not_the_ending():
    assert two_stretches().responses() == [
        [8, 9, 20, 21, 22, 10, 11],
        [12, 13, 14],
        [15, 30, 16, 17, 31, 32],  # not finished: nothing is left out
    ]
    assert two_stretches().responses(ending=True)[0][-1] == 2


def test_segments_come_back_as_they_were_given():
    t = two_stretches()
    for i, row in enumerate(ROWS):
        back = t.segments(i)
        assert [list(s.ids) for s in back] == row
        assert [s.logprobs is not None for s in back] == [k % 2 == 1 for k in range(len(row))]
        assert list(back[1].logprobs) == [-0.5 * (k + 1) for k in range(len(row[1]))]


def test_joining_taking_and_rebuilding_keep_the_stretches():
    t = two_stretches()
    wide = Trajectory.join([t.take([1]), t.take([2, 0])])
    again = Trajectory.from_segments(
        [t.segments(i) for i in range(3)], FINISHED, [0, 1, 2], [0, 0, 0], 1.0
    )
    for other in (wide.take([2, 0, 1]), again):
        for name in ("ids", "mask", "logprobs", "lengths", "prompt_lengths", "finished"):
            assert torch.equal(getattr(other, name), getattr(t, name)), name


def test_a_row_that_begins_with_chosen_tokens_or_lacks_log_probabilities_is_refused():
    with pytest.raises(ValueError, match="begins with its prompt"):
        Trajectory.from_segments([[Segment([1], [0.0])]], [True], [0], [0], 1.0)
    with pytest.raises(ValueError, match="one log-probability per token"):
        Trajectory.from_segments([[Segment([1]), Segment([2, 3], [0.0])]], [True], [0], [0], 1.0)


class Talks:
    """A sampler whose responses hold a given stretch, as one with tools would make them."""

    def sample(self, prompts, params, keys, *, on_progress=None):
        rows = [
            [Segment(p), Segment([n + 1], [-1.0]), Segment([40, 41]), Segment([n + 2, 2], [-2, -3])]
            for p, n in zip(prompts, keys.prompt, strict=True)
        ]
        done = [True] * len(rows)
        return Trajectory.from_segments(rows, done, keys.prompt, keys.sample, params.temperature)

    def sync(self, policy, version):
        pass


class Share:
    """What `sample_all` asks of one process of several."""

    def __init__(self, index, count, everyone):
        self.index, self.count, self.everyone = index, count, everyone

    def share(self, n):
        return range(self.index, n, self.count)

    def gather(self, items):
        self.everyone[self.index] = items
        return [x for one in self.everyone for x in one]


def test_several_processes_put_the_stretches_together_in_the_order_of_the_prompts():
    prompts, keys = [[5, 6], [7], [8, 9, 5], [6]], Keys(0, 0, [0, 1, 2, 3], [0, 0, 1, 1])
    params = SamplingParams(5)
    alone = Talks().sample(prompts, params, keys)
    first = Talks().sample([prompts[0], prompts[2]], params, keys.take([0, 2]))
    everyone = [[([0, 2], first)], []]
    both = sample_all(Talks(), prompts, params, keys, Share(1, 2, everyone))
    for name in ("ids", "mask", "logprobs", "lengths", "prompt_lengths", "prompt", "sample"):
        assert torch.equal(getattr(both, name), getattr(alone, name)), name


# ---- what the models say ----


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probabilities_values_and_the_samplers_gap_are_the_plain_models(models, kind):
    run, processes = RunSettings(), Processes()
    roles = load_roles(
        models[kind], LoraSettings(), run, None, torch.device("cpu"), critic="shared"
    )
    torch.nn.init.normal_(roles.policy.value_head.weight)
    t = two_stretches(temperature=0.7)
    found = forward(t, roles, processes, tokens=16)
    for i, row in enumerate(ROWS):
        ids = torch.tensor([[x for s in row for x in s]])
        with torch.no_grad():
            out = roles.policy.lm(input_ids=ids, output_hidden_states=True)
        logp = (out.logits[0] / 0.7).log_softmax(-1)
        values = roles.policy.value_head(out.hidden_states[-1][0])[:, 0].detach()
        for c in range(t.mask.shape[1]):
            if c not in CHOSEN[i]:
                assert found.logprobs[i, c] == found.values[i, c] == found.ref_logprobs[i, c] == 0
                continue
            here = logp[c - 1]
            assert found.logprobs[i, c] == pytest.approx(float(here[ids[0, c]]), abs=1e-4)
            assert found.ref_logprobs[i, c] == pytest.approx(float(here[ids[0, c]]), abs=1e-4)
            entropy = -float((here.exp() * here).sum())
            assert found.entropy[i, c] == pytest.approx(entropy, abs=1e-4)
            assert found.values[i, c] == pytest.approx(float(values[c - 1]), abs=1e-4)
    _, metrics, _ = shape(t, Scored([0.0] * 3, {}), found, ScoreSettings(), beta=0.0)
    gap = max(
        abs(float(found.logprobs[i, c] - t.logprobs[i, c])) for i in range(3) for c in CHOSEN[i]
    )
    assert metrics["sampler_gap"] == pytest.approx(gap) and gap > 0.1


# ---- rewards ----


class Logprobs:
    def __init__(self):
        zeros = torch.zeros(two_stretches().mask.shape, dtype=torch.float64)
        self.logprobs, self.ref_logprobs, self.entropy = numbers(1), numbers(2), zeros
        self.values = zeros


def test_the_score_comes_with_the_last_chosen_token_and_every_chosen_token_pays_its_kl():
    t, beta, old = two_stretches(), 0.3, Logprobs()
    rewards, metrics, _ = shape(
        t, Scored([1.0, 2.0, 3.0], {}), old, ScoreSettings(length_buffer=2), beta=beta, limit=5
    )
    price = [
        [float(old.logprobs[i, c] - old.ref_logprobs[i, c]) for c in at]
        for i, at in enumerate(CHOSEN)
    ]
    for i, (score, late) in enumerate([(1.0, 1.0), (2.0, 0.5), (3.0, 0.0)]):
        expected = np.zeros(t.mask.shape[1])
        for c, cost in zip(CHOSEN[i], price[i], strict=True):
            expected[c] = -beta * cost
        expected[CHOSEN[i][-1]] += score - late  # 5, 4 and 3 chosen tokens of 5, buffer 2
        assert rewards[i].tolist() == pytest.approx(expected.tolist())
    total = [sum(p) for p in price]
    assert metrics["objective/kl"] == pytest.approx(np.mean(total))
    assert metrics["kl"] == pytest.approx(sum(total) / 12)
    assert metrics["completions/mean_length"] == 4.0


def test_lengths_are_those_of_the_chosen_tokens():
    t = two_stretches()
    assert overlong(t.response_lengths, 5, 2).tolist() == [1.0, 0.5, 0.0]
    values, _, _ = normalize_scores(
        [1.0, 1.0, 1.0], t, ScoreSettings(missing_eos_penalty=0.5), limit=5
    )
    assert values.tolist() == [1.0, 1.0, 0.5]


def test_step_rewards_are_paid_at_tokens_that_the_policy_chose(models, make):
    renderer, processes = load_renderer(models["llama"], RowSettings()), Processes()
    e = renderer.tokenizer.convert_tokens_to_ids("e")
    a, b = (renderer.tokenizer.convert_tokens_to_ids(x) for x in "ab")
    # a step ends at every e: one at a chosen token, one inside what was given, the last at the end
    rows = [
        [Segment([a]), Segment([b, e], [-1, -1]), Segment([b, e, a]), Segment([b, 2], [-1, -1])]
    ]
    t = Trajectory.from_segments(rows, [True], [0], [0], 1.0)
    scorer = load_scorer(models["llama"], LoraSettings(), RunSettings(), head="normal")
    assert isinstance(scorer, ScoreModel)
    scorer.facts = ScoreFacts(steps=StepScores("e"))
    prm = ProcessReward("prm", scorer, renderer, 64, processes)
    responses = Responses.of([PromptRow("a", {}, "f:1")], t, renderer)
    (steps,) = prm.steps(responses)
    scored = prm.score(responses)
    assert len(steps) == 3
    earned = {2: steps[0] + (steps[1] - steps[0]), 7: steps[2] - steps[1]}  # the given e goes back
    for c in range(8):
        assert scored.steps[0, c] == pytest.approx(earned.get(c, 0.0), abs=1e-9)
    assert float(scored.steps.sum()) == pytest.approx(scored.scores[0])


# ---- credit, and every loss ----


def slow_gae(rewards, values, gamma, lam):
    """A double loop over the tokens of one row that the policy chose."""
    n = len(rewards)
    ahead = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * ahead[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def test_gae_steps_over_what_was_given():
    t, rewards, values = two_stretches(), numbers(3), numbers(4)
    got, returns = advantages.gae(rewards, values, t.mask, gamma=0.9, lam=0.8)
    for i, at in enumerate(CHOSEN):
        expected = slow_gae(rewards[i, at].tolist(), values[i, at].tolist(), 0.9, 0.8)
        assert got[i, at].tolist() == pytest.approx(expected)
        both = zip(expected, values[i, at].tolist(), strict=True)
        assert returns[i, at].tolist() == pytest.approx([a + v for a, v in both])
        others = [c for c in range(t.mask.shape[1]) if c not in at]
        assert not got[i, others].any() and not returns[i, others].any()


def test_whitening_and_returns_are_over_the_chosen_tokens():
    t, x = two_stretches(), numbers(5)
    flat = np.concatenate([x[i, at].numpy() for i, at in enumerate(CHOSEN)])
    white = whiten(x, t.mask)
    for i, at in enumerate(CHOSEN):
        expected = (x[i, at].numpy() - flat.mean()) / flat.std()
        assert white[i, at].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert advantages.sequence_return(x, t.mask)[i] == pytest.approx(float(x[i, at].sum()))
        to_go = [float(x[i, at[k:]].sum()) for k in range(len(at))]
        assert advantages.reward_to_go(x, t.mask)[i, at].tolist() == pytest.approx(to_go)


PER_TOKEN = {  # from the values at tokens and a mask to one number per token
    "sequence_mean": lambda v, m: loss_aggregation.sequence_mean(m),
    "token_mean": lambda v, m: loss_aggregation.token_mean(m),
    "constant": lambda v, m: loss_aggregation.constant(m, 6),
    "off_policy_mask": lambda v, m: corrections.off_policy_mask(*v[:3], m, threshold=0.1).double(),
    "whitened": lambda v, m: advantages.whitened(v[0], m),
    **{
        f"kl {name}": functools.partial(
            lambda v, m, name: kl.penalty(v[0], v[1], v[2], m, estimator=name), name=name
        )
        for name in ("k2", "k2_tokens", "weighted_k3", "forward_k3")
    },
    **{
        name: functools.partial(lambda v, m, f: f(v[0], v[1], m), f=f)
        for name, f in corrections.CORRECTIONS.items()
    },
}
LOSSES = {
    "nll": lambda v, m: losses.nll(v[0], m),
    "reinforce": lambda v, m: losses.reinforce(v[0], v[2], m),
    "ppo_clip": lambda v, m: losses.ppo_clip(v[0], v[1], v[2], m, clip=0.2),
    "gspo": lambda v, m: losses.gspo(v[0], v[1], v[2], m),
    "cispo": lambda v, m: losses.cispo(v[0], v[1], v[2], m),
    "clipped_value": lambda v, m: losses.clipped_value(v[0], v[1], v[2], m, clip=0.2),
    "process_reward": lambda v, m: losses.process_reward(v[0], v[1] > 0, m),
    "reverse_kl_states": lambda v, m: losses.reverse_kl_states(v[2] ** 2, v[0], m, discount=0.7),
    "reverse_kl_sampled": lambda v, m: losses.reverse_kl_sampled(v[0], v[1], m, discount=0.7),
}


def test_all_losses_of_tokens_are_here():
    of_pairs = {"dpo", "bradley_terry", "ranking"}
    of_logits = {"reverse_kl"}  # [B, T, V], compared below
    public = {name for name in losses.__all__ if not name.endswith("_sum")}
    assert public - of_pairs - of_logits == set(LOSSES)


def values_both_ways():
    apart = [numbers(seed, scale=0.3) for seed in (11, 12, 13)]
    return apart, [packed(x) for x in apart]


@pytest.mark.parametrize("name", PER_TOKEN)
def test_what_each_token_gets_is_what_it_gets_in_one_stretch(name):
    apart, together = values_both_ways()
    got = PER_TOKEN[name](apart, two_stretches().mask)
    expected = PER_TOKEN[name](together, packed_mask())
    got, expected = (x.double() for x in (got, expected))
    assert float(got.sum()) == pytest.approx(float(expected.sum()))
    assert packed(got) == pytest.approx(expected.numpy())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_one_stretch(name):
    apart, together = values_both_ways()
    leaves = [v[0].clone().requires_grad_() for v in (apart, together)]
    loss, metrics = LOSSES[name]([leaves[0], *apart[1:]], two_stretches().mask)
    other, others = LOSSES[name]([leaves[1], *together[1:]], packed_mask())
    assert float(loss.detach()) == pytest.approx(float(other.detach()))
    for key, value in metrics.items():
        assert float(value) == pytest.approx(float(others[key])), key
    loss.backward()
    other.backward()
    assert packed(leaves[0].grad).numpy() == pytest.approx(leaves[1].grad.numpy())
    assert float(leaves[0].grad.abs().sum()) == pytest.approx(float(leaves[1].grad.abs().sum()))


def test_the_reverse_kl_of_logits_is_that_of_one_stretch():
    t = two_stretches()
    rng = np.random.default_rng(3)
    both = [torch.tensor(rng.normal(size=(*t.mask.shape, 4))) for _ in range(2)]
    moved = [torch.stack([packed(x[..., v]) for v in range(4)], -1) for x in both]
    loss, _ = losses.reverse_kl(*both, t.mask)
    other, _ = losses.reverse_kl(*moved, packed_mask())
    assert float(loss.detach()) == pytest.approx(float(other.detach()))


def test_importance_weights_leave_out_rows_that_were_cut():
    t, old = two_stretches(), Logprobs()
    weights, mask, metrics = importance_weights(
        t, old, LongSettings(mask_truncated=True, correction="tis", cap=1.5)
    )
    assert [row.nonzero()[:, 0].tolist() for row in mask] == [*CHOSEN[:2], []]
    sampler = t.logprobs.double()
    expected = [
        min(1.5, float((old.logprobs[i, c] - sampler[i, c]).exp()))
        for i in range(2)
        for c in CHOSEN[i]
    ]
    assert weights[mask].tolist() == pytest.approx(expected)
    assert metrics["correction/mean"] == pytest.approx(np.mean(expected))
