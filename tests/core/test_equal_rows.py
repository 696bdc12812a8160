"""Rows that are equal are computed once, and what is said of them is what was said of each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiducial.core.equal_rows import distinct, equal_rows
from fiducial.models.load import load_policy, load_scorer
from fiducial.models.roles import Policy, Roles, ScoreModel
from fiducial.settings import LoraSettings, RunSettings

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 9, 0]])
MASK = torch.tensor(
    [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool
)


@given(st.lists(st.integers(0, 4), max_size=30))
def test_each_kind_stands_once_where_it_first_came(keys):
    first, places = distinct(keys)
    assert [keys[i] for i in first] == list(dict.fromkeys(keys))
    assert [keys[first[p]] for p in places] == keys
    assert all(keys.index(keys[i]) == i for i in first)


def test_rows_differ_by_a_token_or_by_a_label():
    assert equal_rows(IDS, MASK) == ([0, 1, 2], [0, 1, 2, 0, 1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("own_critic", [True, False])
def test_outputs_and_gradients_are_those_of_every_row_by_itself(
    models, kind, own_critic, monkeypatch
):
    policy = load_policy(models[kind], LoraSettings(), RunSettings())
    critic = None
    if own_critic:
        critic = load_scorer(models[kind], LoraSettings(), RunSettings(), head="normal", seed=1)
    else:
        torch.manual_seed(3)
        policy.value_head = torch.nn.Linear(policy.lm.config.hidden_size, 1)
    roles = Roles(policy=policy, critic=critic)
    weight = torch.tensor([1.0, -2.0, 0.3, 4.0, 0.5])[:, None]

    def gradients(logprobs, values):
        for module in roles.trained().values():
            module.zero_grad()
        (weight * (logprobs + 0.7 * values)).sum().backward()
        return {
            f"{role}.{name}": p.grad.clone()
            for role, module in roles.trained().items()
            for name, p in module.named_parameters()
            if p.grad is not None
        }

    apart = [policy(IDS[i : i + 1], MASK[i : i + 1], 0.7, entropy=True) for i in range(5)]
    values = [
        out.values if critic is None else torch.where(MASK[i], critic(IDS[i : i + 1]), 0.0)
        for i, out in enumerate(apart)
    ]
    slow = torch.cat([out.logprobs for out in apart]), torch.cat(values)
    expected, entropy = gradients(*slow), torch.cat([out.entropy for out in apart])

    seen = []
    for cls in (Policy, ScoreModel):
        whole = cls.forward

        def counted(self, ids, *more, whole=whole, **named):
            seen.append(len(ids))
            return whole(self, ids, *more, **named)

        monkeypatch.setattr(cls, "forward", counted)
    out = roles.outputs(IDS, MASK, 0.7, entropy=True)
    assert seen == [3] * (1 + own_critic)
    assert torch.allclose(out.logprobs, slow[0], atol=1e-5)
    assert torch.allclose(out.values, slow[1], atol=1e-5)
    assert torch.allclose(out.entropy, entropy, atol=1e-5)
    found = gradients(out.logprobs, out.values)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=2e-5), name
