"""A world small enough to know everything about: every response, its probability, the optimum and
every gradient.

Three tokens, of which 0 is EOS, and at most three to a response: 15 responses, and 7 prefixes in
which a token is chosen. What is exact is computed here in NumPy, in loops, from a table of logits
[7, 3]; the same table stands behind `Policy` as if it were a model, so that the code under test
gets its log-probabilities on the way it gets them from any model. Tiny Hugging Face models of the
same vocabulary stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fiducial.data.render import Rendered
from fiducial.methods.dpo import Pair
from fiducial.models.roles import Policy
from fiducial.rollout.trajectory import Trajectory

EOS, SIZE, LENGTH = 0, 3, 3
PROMPT = [1]


def _grow(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
    if len(prefix) == LENGTH or prefix[-1:] == (EOS,):
        return [prefix]
    return [response for token in range(SIZE) for response in _grow((*prefix, token))]


RESPONSES = _grow(())
FINISHED = [y[-1] == EOS for y in RESPONSES]
PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))}, key=lambda p: (len(p), p))


# ---- exact, slow, NumPy ----


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def distribution(table: np.ndarray) -> np.ndarray:
    """[15] probability of each response under logits [7, 3]."""
    out = []
    for y in RESPONSES:
        p = 1.0
        for t, token in enumerate(y):
            p *= softmax(table[PREFIXES.index(y[:t])])[token]
        out.append(p)
    return np.array(out)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def objective(table: np.ndarray, ref: np.ndarray, reward: np.ndarray, beta: float) -> float:
    """J = E[R] - beta KL(pi, ref)."""
    pi = distribution(table)
    return float(pi @ reward) - beta * kl(pi, distribution(ref))


def optimum(ref: np.ndarray, reward: np.ndarray, beta: float) -> tuple[np.ndarray, float]:
    """pi* [15] = ref exp(R / beta) / Z, and Z."""
    tilted = distribution(ref) * np.exp(reward / beta)
    return tilted / tilted.sum(), float(tilted.sum())


def state_values(table: np.ndarray, ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """[7] expected reward to go from each prefix, less beta times the log-ratios of the tokens
    still to come.
    """
    pi, values = distribution(table), []
    for prefix in PREFIXES:
        behind = [i for i, y in enumerate(RESPONSES) if y[: len(prefix)] == prefix]
        value = 0.0
        for i in behind:
            states = [
                (PREFIXES.index(RESPONSES[i][:t]), RESPONSES[i][t])
                for t in range(len(prefix), len(RESPONSES[i]))
            ]
            cost = sum(math.log(softmax(table[s])[a] / softmax(ref[s])[a]) for s, a in states)
            value += pi[i] / pi[behind].sum() * (reward[i] - beta * cost)
        values.append(value)
    return np.array(values)


def table_of(pi: np.ndarray) -> np.ndarray:
    """Logits [7, 3] of the policy with these response probabilities: the log of the mass behind
    each prefix and token.
    """
    mass = [
        [
            sum(p for p, y in zip(pi, RESPONSES, strict=True) if y[: len(s) + 1] == (*s, a))
            for a in range(SIZE)
        ]
        for s in PREFIXES
    ]
    return np.log(np.array(mass))


def difference(f: Any, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central finite differences of a scalar function at every entry of x."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        out[i] = (f(up) - f(down)) / (2 * step)
    return out


# ---- through the package ----


class Table(nn.Module):
    """What Policy asks of a language model, answered from logits [7, 3], one row a prefix. Where
    nothing is ever chosen it answers NaN.
    """

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.head = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float64).requires_grad_(False)
        nn.init.eye_(self.head.weight)
        self.config = SimpleNamespace()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def base_model(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        rows = {prefix: i for i, prefix in enumerate(PREFIXES)}
        states = [
            [rows.get(tuple(row[len(PROMPT) : t + 1]), -1) for t in range(len(row))]
            for row in input_ids.tolist()
        ]
        table = torch.cat([self.logits, torch.full((1, SIZE), math.nan, dtype=torch.float64)])
        return SimpleNamespace(last_hidden_state=table[torch.tensor(states)])


def tabular(logits: np.ndarray) -> Policy:
    return Policy(Table(logits))


@dataclass(frozen=True)
class World:
    """Tables of a policy and a reference [7, 3], rewards [15], the strength of the pull to the
    reference.
    """

    policy: np.ndarray
    ref: np.ndarray
    reward: np.ndarray
    beta: float

    @staticmethod
    def make(seed: int = 0, beta: float = 0.7) -> World:
        rng = np.random.default_rng(seed)
        return World(rng.normal(size=(7, 3)), rng.normal(size=(7, 3)), rng.normal(size=15), beta)


def all_responses(prompt: list[int] | None = None, temperature: float = 1.0) -> Trajectory:
    """The 15 responses behind one prompt, as if they had been sampled (the sampler's
    log-probabilities are NaN).
    """
    return Trajectory.build(
        [prompt or PROMPT] * 15,
        RESPONSES,
        [[math.nan] * len(y) for y in RESPONSES],
        FINISHED,
        [0] * 15,
        list(range(15)),
        temperature,
    )


def logprobs(policy: Policy, prompt: list[int] | None = None, temperature: float = 1.0) -> Tensor:
    """[15, T] of every token of every response, by the package; the sum over T is that of the
    response.
    """
    every = all_responses(prompt, temperature)
    return policy(every.ids, every.mask, temperature).logprobs


def grads(outputs: Tensor, policy: Policy) -> Tensor:
    """Gradient of a scalar with respect to all that the policy learns, as one vector."""
    found = torch.autograd.grad(
        outputs, [p for p in policy.parameters() if p.requires_grad], retain_graph=True
    )
    return torch.cat([g.flatten() for g in found])


def scores(policy: Policy) -> Tensor:
    """[15, P]: grad log pi(y) of every response."""
    return torch.stack([grads(lp, policy) for lp in logprobs(policy).sum(1)])


def rendered(response: tuple[int, ...], prompt: list[int] | None = None) -> Rendered:
    prompt = prompt or PROMPT
    return Rendered([*prompt, *response], [False] * len(prompt) + [True] * len(response), "world")


def pair(winner: int, loser: int, prompt: list[int] | None = None) -> Pair:
    return Pair(rendered(RESPONSES[winner], prompt), rendered(RESPONSES[loser], prompt))


def tiny(
    kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, dropout: float = 0.0
) -> Any:
    """A Hugging Face model of the world's vocabulary, made from its config, its weights large
    enough to have opinions.

    llama: rotary positions, grouped heads; gpt2: learned absolute positions, which notice a wrong
    one.
    """
    torch.manual_seed(seed)
    config: Any
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=EOS,
        )
    else:
        config = GPT2Config(
            vocab_size=SIZE,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=EOS,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()
