"""Policies of a world as models in the Hugging Face layout, a table and a transformer of two
layers, and the exact distribution of any model.

The transformer as it is initialized is the world's reference. The table has the same probabilities,
so that both start from the same policy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ...models.tabular import TabularConfig, TabularLM
from . import exact
from .world import (
    EOS,
    LETTERS,
    Array,
    Tokens,
    Tree,
    World,
    exploited,
    letters_in_place,
    prompts_for,
    random_reward,
    sparse_reward,
    tree,
)


def transformer(
    prompts: tuple[Tokens, ...],
    vocabulary: int,
    horizon: int,
    seed: int,
    *,
    std: float = 0.1,
    width: int = 64,
    layers: int = 2,
    rare_end: float = 0.0,
) -> GPT2LMHeadModel:
    """An untrained GPT-2 with the world's vocabulary.

    It is a GPT-2 because its positions are absolute. With rotary positions and no BOS, attention
    over equal tokens gives the same mean whatever their number, so `a`, `aa` and `aaa` would share
    one distribution, and no method could reach the optimum.

    Args:
        std: standard deviation of the initial weights. The larger it is, the more peaked are the
            distributions.
        rare_end: nats by which the log-odds of EOS are lowered, so that responses are long.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=max(16, max(map(len, prompts)) + horizon),
        initializer_range=std,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    # The output of the last layer norm has mean 0, so a bias of ones adds the sum of a row of the
    # head to its logit.
    if rare_end:
        with torch.no_grad():
            model.lm_head.weight -= model.lm_head.weight.mean(1, keepdim=True)
            model.lm_head.weight[EOS] -= rare_end / width
            model.transformer.ln_f.bias.fill_(1.0)
    return model.eval()


def table(world: World) -> TabularLM:
    """A tabular model with the reference's probabilities."""
    config = TabularConfig(
        vocab_size=world.vocabulary, prompts=world.prompts, horizon=world.horizon, eos_token_id=EOS
    )
    model = TabularLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(
            torch.from_numpy(world.reference.reshape(-1, world.vocabulary).T.copy())
        )
    model.eval()
    return model


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per letter; the full stop is EOS. There is no BOS."""
    inner = Tokenizer(
        models.WordLevel({LETTERS[i]: i for i in range(vocabulary)}, unk_token=LETTERS[EOS])
    )
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=LETTERS[EOS], clean_up_tokenization_spaces=False
    )


def save(model: PreTrainedModel, path: Path) -> Path:
    """Save the model and its tokenizer in the Hugging Face layout."""
    model.save_pretrained(path, safe_serialization=True)
    tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


def load(path: Path) -> PreTrainedModel:
    """Load a model of a world: a table, a transformer, or what a training run saved."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False
    ).eval()


@torch.no_grad()
def logits(model: nn.Module, prompts: tuple[Tokens, ...], tree: Tree) -> Array:
    """[P, S, V] logits of any causal language model in every state of the world, computed in
    float64. The model keeps its own precision.
    """
    was = next(model.parameters()).dtype
    model = model.double()
    longest = [s for s in tree.states if len(s) == tree.horizon - 1]
    number = {s: i for i, s in enumerate(tree.states)}
    rows = np.array([[number[s[:t]] for t in range(tree.horizon)] for s in longest])
    out = np.empty((len(prompts), len(tree.states), tree.vocabulary))
    device = next(model.parameters()).device
    for p, prompt in enumerate(prompts):
        for at in range(0, len(longest), 4096):
            ids = torch.tensor([[*prompt, *s] for s in longest[at : at + 4096]], device=device)
            found = model(input_ids=ids).logits[:, len(prompt) - 1 :].double()
            out[p, rows[at : at + 4096]] = found.cpu().numpy()
    model.to(was)
    return out


def make(
    name: str,
    *,
    seed: int = 0,
    prompts: int = 2,
    vocabulary: int = 3,
    horizon: int = 3,
    std: float = 0.05,
    beta: float = 0.5,
    kl: float | None = 1.25,
    reward: Array | None = None,
    uneven: bool = False,
    rare_end: float = 0.0,
) -> tuple[World, GPT2LMHeadModel]:
    """A world whose reference is an untrained transformer, and that transformer.

    Args:
        std: standard deviation of the transformer's initial weights.
        reward: [P, Y]; default: independent normal rewards.
        kl: KL of the optimum from the reference, in nats; the rewards are scaled to give it. None:
            the rewards stay as they are.
        uneven: prompts of two lengths.
        rare_end: nats by which the log-odds of EOS are lowered.

    Raises:
        ValueError: no scale of the rewards puts the optimum that far from the reference.
    """
    texts, shape = prompts_for(prompts, vocabulary, uneven=uneven), tree(vocabulary, horizon)
    model = transformer(texts, vocabulary, horizon, seed, std=std, rare_end=rare_end)
    start = logits(model, texts, shape)
    for attempt in range(DRAWS):
        drawn = reward
        if drawn is None:
            drawn = random_reward(prompts, len(shape.responses), seed + 10_000 * attempt)
        world = World(name, texts, start, drawn, beta, horizon)
        if kl is None:
            return world, model
        try:
            return world.with_(reward=drawn * scale_for(world, kl)), model
        except ValueError:  # rarely, the best response is one that the reference gives anyway
            if reward is not None or attempt + 1 == DRAWS:
                raise
    raise AssertionError("unreachable")


DRAWS = 20
"""Most attempts to draw rewards whose optimum can be moved as far from the reference as asked."""


def scale_for(world: World, kl: float) -> float:
    """The factor on the rewards with which KL(pi*, ref) is `kl` nats. The KL grows with the factor,
    so bisection finds it.

    Raises:
        ValueError: no factor is large enough, because the responses with the largest reward are
            themselves likely under the reference.
    """
    low, high = 0.0, 64.0
    farthest, _ = exact.optimum(world, reward=world.reward * high)
    if (most := exact.kl(farthest, exact.reference(world))) < kl:
        raise ValueError(
            f"{world.name}: no scale of these rewards puts the optimum {kl:g} nats from the "
            f"reference: the best responses are {most:.3g} nats away"
        )
    for _ in range(60):
        middle = (low + high) / 2
        best, _ = exact.optimum(world, reward=world.reward * middle)
        low, high = (middle, high) if exact.kl(best, exact.reference(world)) < kl else (low, middle)
    return (low + high) / 2


def mild(seed: int = 0) -> tuple[World, GPT2LMHeadModel]:
    """15 responses to each of 2 prompts, all of them likely enough to be sampled: the optimum is
    1.25 nats from the reference.
    """
    return make("mild", seed=seed)


def peaked(seed: int = 0) -> tuple[World, GPT2LMHeadModel]:
    """15 responses to each of 2 prompts. The best ones are rare under the reference and beta is
    small: the optimum is 2.9 nats away. What is not sampled is not learned.
    """
    world, model = make("peaked", seed=seed, std=0.25, beta=0.3, kl=None)
    ref = exact.reference(world)
    world = world.with_(reward=world.reward - RARE * (ref - ref.mean(-1, keepdims=True)))
    return world.with_(reward=world.reward * scale_for(world, 2.9)), model


RARE = 0.5
"""In the peaked world, the reward per nat of rarity under the reference, in standard deviations of
the random reward.
"""


def large(seed: int = 0) -> tuple[World, GPT2LMHeadModel]:
    """121 responses to each of 2 prompts."""
    return make("large", seed=seed, vocabulary=4, horizon=4)


def sparse(seed: int = 0) -> tuple[World, GPT2LMHeadModel]:
    """121 responses to each of 2 prompts, of which a verifier accepts a few: reward 1 for them, 0
    for all others.
    """
    world, model = make("sparse", seed=seed, vocabulary=4, horizon=4, beta=0.15, kl=None)
    return world.with_(
        reward=sparse_reward(len(world.prompts), world.tree, seed, share=0.03)
    ), model


def exploit(seed: int = 0) -> tuple[World, GPT2LMHeadModel]:
    """121 responses to each of 2 prompts. A proxy overrates the least likely ones, whose true
    reward is low, and beta is small.
    """
    world, model = make("exploit", seed=seed, vocabulary=4, horizon=4, beta=0.15, kl=None)
    gold, proxy = exploited(world.reward, np.exp(exact.reference(world)), seed, proxy=1.0)
    return world.with_(reward=gold, proxy=proxy), model


def long(seed: int = 0) -> tuple[World, GPT2LMHeadModel]:
    """511 responses of up to 8 tokens to each of 2 prompts, most of them long, and a verifier at
    the end. It accepts a response with the right letters at five of its first seven positions, so
    it is known which tokens deserve the credit.
    """
    reward, _ = letters_in_place(2, tree(3, 8), seed, keys=5, within=7)
    return make("long", seed=seed, horizon=8, beta=0.15, kl=None, reward=reward, rare_end=2.3)
