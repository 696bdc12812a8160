"""A row that holds a prompt once and two responses to it says what two rows say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiducial.core.shared_prefix import SharedPrefix, common_length, shared_prefix
from fiducial.data.batches import pad
from fiducial.data.render import Rendered
from fiducial.methods.dpo import Pair, pair_logprobs
from fiducial.models.load import load_policy
from fiducial.models.roles import Policy
from fiducial.settings import LoraSettings, RunSettings

CPU = torch.device("cpu")


def sequence(prompt: list[int], response: list[int]) -> Rendered:
    return Rendered(prompt + response, [False] * len(prompt) + [True] * len(response), "")


PAIRS = [
    Pair(sequence([5, 6, 7], [8, 9]), sequence([5, 6, 7], [9, 10, 11, 12])),
    Pair(
        sequence([5], [8, 9, 3]), sequence([5], [8, 9, 4])
    ),  # responses that begin alike: labels are never shared
    Pair(
        sequence([5, 6, 7, 8, 9, 10, 11], [12]), sequence([5, 6, 7, 8], [12, 13])
    ),  # a prompt that was cut: only a part is common
]


def apart(policy, pairs):
    batch = pad([p.chosen for p in pairs] + [p.rejected for p in pairs])
    return policy(batch.ids, batch.mask).logprobs.sum(1).split(len(pairs))


def test_a_row_by_hand():
    ids, mask, how = shared_prefix([PAIRS[0]])
    assert ids.tolist() == [[5, 6, 7, 8, 9, 9, 10, 11, 12]]
    assert mask.tolist() == [[False] * 3 + [True] * 6]
    assert how.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6]]
    assert how.branch.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]
    assert how.previous.tolist()[0][3:] == [2, 3, 2, 5, 6, 7]
    seen = how.attention()[0, 0]
    assert seen[5].tolist() == [True, True, True, False, False, True, False, False, False]
    assert [common_length(p) for p in PAIRS] == [3, 1, 4]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_log_probabilities_and_gradients_are_those_of_two_rows(models, kind):
    policy = load_policy(str(models[kind]), LoraSettings(), RunSettings())
    assert policy.supports_shared_prefix

    def gradient(values):
        policy.zero_grad()
        (
            values[0] * torch.tensor([1.0, -2.0, 0.5]) - values[1] * torch.tensor([0.3, 1.0, 2.0])
        ).sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    together, two = pair_logprobs(policy, PAIRS, CPU), apart(policy, PAIRS)
    for ours, theirs in zip(together, two, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(gradient(together), gradient(two), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=2e-5)


RANKED = [sequence([5, 6], r) for r in ([8], [9, 3], [8, 3], [9, 10, 4])]
CUT = Rendered(RANKED[1].ids, [False] * 3 + [True], "")  # the same tokens, with fewer labels
OFTEN = [
    *(Pair(a, b) for k, a in enumerate(RANKED) for b in RANKED[k + 1 :]),
    Pair(CUT, RANKED[1]),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_responses_of_several_pairs_are_read_once_and_count_in_each(models, kind, monkeypatch):
    policy = load_policy(str(models[kind]), LoraSettings(), RunSettings())
    assert policy.supports_shared_prefix
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0, -0.7, 0.2, 1.1]])

    def gradient(values):
        policy.zero_grad()
        (torch.stack(values) * torch.cat([weight, 0.4 - weight])).sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    two = apart(policy, OFTEN)
    expected, rows, whole = gradient(two), [], Policy.forward

    def counted(self, ids, mask, *more, **named):
        rows.append(len(ids))
        return whole(self, ids, mask, *more, **named)

    monkeypatch.setattr(Policy, "forward", counted)
    once = pair_logprobs(policy, OFTEN, CPU)
    assert rows == [len(RANKED) + 1]
    for ours, theirs in zip(once, two, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(gradient(once), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_a_response_does_not_see_the_other_one(models):
    policy = load_policy(str(models["gpt2"]), LoraSettings(), RunSettings())
    other = [
        Pair(p.chosen, sequence(p.rejected.ids[: common_length(p)], [20, 21, 22]))
        for p in PAIRS[:2]
    ]
    assert torch.allclose(
        pair_logprobs(policy, PAIRS[:2], CPU)[0], pair_logprobs(policy, other, CPU)[0], atol=1e-5
    )


def test_a_model_that_looks_past_the_mask_is_asked_for_two_rows(models):
    policy = load_policy(str(models["llama"]), LoraSettings(), RunSettings())
    inner = policy.lm.base_model.forward
    policy.lm.base_model.forward = lambda *a, attention_mask=None, **k: inner(*a, **k)
    assert not policy.supports_shared_prefix
    assert torch.equal(pair_logprobs(policy, PAIRS, CPU)[1], apart(policy, PAIRS)[1])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=2, max_size=7),
        min_size=2,
        max_size=4,
    )
)
def test_every_token_has_the_neighbours_of_its_own_sequence(groups):
    rows = [Rendered([i for i, _ in g], [False] + [m for _, m in g[1:]], "") for g in groups]
    ids, mask, how = shared_prefix([rows])
    start = common_length(rows)
    for number, row in enumerate(rows, start=1):
        columns = [*range(start), *(how.branch[0] == number).nonzero()[:, 0].tolist()]
        assert ids[0, columns].tolist() == row.ids
        assert how.positions[0, columns].tolist() == list(range(len(row)))
        assert mask[0, columns[start:]].tolist() == row.mask[start:] and not any(row.mask[:start])
        for place in range(max(start, 1), len(row)):
            assert how.previous[0, columns[place]] == columns[place - 1]
            assert (
                how.attention()[0, 0, columns[place]].nonzero()[:, 0].tolist()
                == columns[: place + 1]
            )
    assert isinstance(how, SharedPrefix)
