"""Log-probabilities computed in chunks, against NumPy and the computation in one piece."""

import math

import numpy as np
import pytest
import torch

from fiducial.core import kl
from fiducial.core.logprobs import chosen_logprobs, compared


def tensor(x, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(x, dtype=dtype)


N, H, V = 10, 6, 17


def problem(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 3, N - 1, N, 10 * N])
def test_chunks_of_any_size_have_the_value_and_the_gradient_of_the_whole(rows, temperature):
    hidden, weight, labels = problem()
    at_once = []

    def head(h: torch.Tensor) -> torch.Tensor:
        at_once.append(len(h))
        return h @ weight.T

    found, entropy = chosen_logprobs(
        hidden, labels, head, V, temperature=temperature, entropy=True, chunk_bytes=rows * V * 4
    )
    assert max(at_once) == min(rows, N)
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    whole = logp[torch.arange(N), labels]
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=1e-12, atol=1e-12)
    assert not entropy.requires_grad
    mine, theirs = (
        torch.autograd.grad((x * upstream).sum(), [hidden, weight]) for x in (found, whole)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_log_probabilities_are_numpys_and_their_gradient_the_finite_difference():
    hidden, weight, labels = problem()
    logits = (hidden @ weight.T).detach().numpy() / 0.7
    slow = [z[y] - math.log(np.exp(z).sum()) for z, y in zip(logits, labels.tolist(), strict=True)]
    found, _ = chosen_logprobs(hidden, labels, lambda h: h @ weight.T, V, temperature=0.7)
    np.testing.assert_allclose(found.detach(), slow, rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda h, w: chosen_logprobs(
            h, labels, lambda x: x @ w.T, V, temperature=0.7, chunk_bytes=3 * V * 4
        )[0],
        (hidden, weight),
    )


def test_the_entropy_of_equal_logits_is_the_log_of_their_number_and_that_of_a_certain_token_zero():
    hidden = tensor([[0.0] * 4, [1000.0, 0.0, 0.0, 0.0]])
    logprobs, entropy = chosen_logprobs(hidden, torch.tensor([2, 0]), lambda h: h, 4, entropy=True)
    assert logprobs.tolist() == pytest.approx([-math.log(4), 0.0])
    assert entropy.tolist() == pytest.approx([math.log(4), 0.0])


def test_float64_is_kept_and_bfloat16_is_raised_to_float32_before_the_softmax():
    hidden, weight, labels = problem()
    assert chosen_logprobs(hidden, labels, lambda h: h @ weight.T, V)[0].dtype == torch.float64
    hidden, weight, labels = problem(torch.bfloat16)
    found, entropy = chosen_logprobs(hidden, labels, lambda h: h @ weight.T, V, entropy=True)
    assert found.dtype == entropy.dtype == torch.float32
    raised = (hidden @ weight.T).double().log_softmax(-1)
    torch.testing.assert_close(found.double(), raised[torch.arange(N), labels], rtol=0, atol=1e-5)


def test_no_label_at_all_is_an_empty_answer_that_still_has_a_gradient():
    hidden = torch.zeros(0, H, requires_grad=True)
    found, entropy = chosen_logprobs(
        hidden, torch.zeros(0, dtype=torch.long), lambda h: h, V, entropy=True
    )
    assert found.shape == entropy.shape == (0,) and found.dtype == torch.float32
    found.sum().backward()
    assert hidden.grad is not None


def test_nothing_is_computed_twice_without_gradients():
    hidden, weight, labels = problem()
    calls = []

    def head(h: torch.Tensor) -> torch.Tensor:
        calls.append(len(h))
        return h @ weight.T

    with torch.no_grad():
        chosen_logprobs(hidden, labels, head, V, chunk_bytes=4 * V * 4)
    assert calls == [4, 4, 2]


def test_tokens_that_cannot_be_chosen_have_no_part_in_entropy_kl_and_gradient():
    """A logit of minus infinity: p log p is 0, so the numbers are those of the other tokens."""
    hidden, weight, labels = problem()
    other = hidden.detach().flip(0)
    banned = torch.tensor([2, 11, V - 1])
    kept = torch.tensor([v for v in range(V) if v not in banned.tolist()])
    labels = kept[labels % len(kept)]
    few = torch.searchsorted(kept, labels)  # the same tokens in a vocabulary without the banned

    def masked(h: torch.Tensor) -> torch.Tensor:
        return (h @ weight.T).index_fill(-1, banned, -math.inf)

    def small(h: torch.Tensor) -> torch.Tensor:
        return h @ weight[kept].T

    found = chosen_logprobs(hidden, labels, masked, V, temperature=0.7, entropy=True)
    slow = chosen_logprobs(hidden, few, small, len(kept), temperature=0.7, entropy=True)
    both = compared(hidden, other, labels, masked, masked, V, temperature=0.7)
    slow_both = compared(hidden, other, few, small, small, len(kept), temperature=0.7)
    for one, two in (*zip(found, slow, strict=True), *zip(both, slow_both, strict=True)):
        assert one.isfinite().all()
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    p = np.exp((hidden @ weight[kept].T / 0.7).log_softmax(-1).detach().numpy())
    np.testing.assert_allclose(found[1], -(p * np.log(p)).sum(-1), rtol=1e-12)
    exact = kl.exact(masked(hidden), masked(other).detach(), temperature=0.7)
    torch.testing.assert_close(exact, slow_both.kl, rtol=1e-12, atol=1e-12)
    for one, two in ((found[0], slow[0]), (both.kl, slow_both.kl), (exact, slow_both.kl)):
        mine, theirs = (
            torch.autograd.grad(x.sum(), [hidden, weight], retain_graph=True) for x in (one, two)
        )
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
