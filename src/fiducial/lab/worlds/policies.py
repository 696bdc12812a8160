"""Policies of a world as models in the Hugging Face layout: a table, and a real transformer of two
layers; and the exact distribution of either.

The transformer as it is initialised is the world's reference, and the table is given the same
probabilities, so that both start from the same mark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

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
    spread: float = 0.1,
    width: int = 64,
    layers: int = 2,
    rare_end: float = 0.0,
) -> Any:
    """An untrained GPT-2 with the world's vocabulary. `spread` is the deviation of its initial
    weights: the larger, the more peaked it is. `rare_end`: nats
    by which EOS is less likely than that, so that responses are long.

    GPT-2 and not a newer make because its positions are absolute: with rotary ones and no BOS,
    attention over equal tokens gives the same mean however many they are, so `a`, `aa` and `aaa`
    would share one distribution and the optimum would be out of reach of any method.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=max(16, max(map(len, prompts)) + horizon),
        initializer_range=spread,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    # what comes out of a normalisation has mean 0, so a bias of ones meets only the mean of a row
    # of the head
    if rare_end:
        with torch.no_grad():
            model.lm_head.weight -= model.lm_head.weight.mean(1, keepdim=True)
            model.lm_head.weight[EOS] -= rare_end / width
            model.transformer.ln_f.bias.fill_(1.0)
    return model.eval()


def table(world: World) -> TabularLM:
    """A table with the reference's probabilities."""
    config = TabularConfig(
        vocab_size=world.vocabulary, prompts=world.prompts, horizon=world.horizon, eos_token_id=EOS
    )
    model = TabularLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(
            torch.from_numpy(world.reference.reshape(-1, world.vocabulary).T.copy())
        )
    return model.eval()


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A letter a token; the full stop is EOS. No BOS: a text is its letters and nothing else."""
    inner = Tokenizer(
        models.WordLevel({LETTERS[i]: i for i in range(vocabulary)}, unk_token=LETTERS[EOS])
    )
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=LETTERS[EOS], clean_up_tokenization_spaces=False
    )


def save(model: Any, path: Path) -> Path:
    """The model and its tokenizer in the Hugging Face layout."""
    model.save_pretrained(path, safe_serialization=True)
    tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


def load(path: Path) -> Any:
    """A model of a world: a table, a transformer, or what a training run saved."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, prompts: tuple[Tokens, ...], tree: Tree) -> Array:
    """[P, S, V] logits of any causal language model in every state of the world, in float64 (the
    model itself is left as it is).
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
    spread: float = 0.05,
    beta: float = 0.5,
    kl: float | None = 1.25,
    reward: Array | None = None,
    uneven: bool = False,
    rare_end: float = 0.0,
) -> tuple[World, Any]:
    """A world around an untrained transformer, and that transformer.

    Args:
        reward: [P, Y]; default: independent normal ones.
        kl: nats that the optimum is to lie from the reference; the rewards are scaled until it
            does. None: they stay as they are.
        uneven: prompts of two lengths.
        rare_end: nats by which EOS is less likely than the other tokens.

    Raises:
        ValueError: no scale of the rewards puts the optimum so far away.
    """
    texts, shape = prompts_for(prompts, vocabulary, uneven=uneven), tree(vocabulary, horizon)
    model = transformer(texts, vocabulary, horizon, seed, spread=spread, rare_end=rare_end)
    start = logits(model, texts, shape)
    for attempt in range(DRAWS):
        drawn = (
            random_reward(prompts, len(shape.responses), seed + 10_000 * attempt)
            if reward is None
            else reward
        )
        world = World(name, texts, start, drawn, beta, horizon)
        try:
            return (
                world if kl is None else world.with_(reward=drawn * scale_for(world, kl))
            ), model
        except (
            ValueError
        ):  # rarely, the best response of a draw is one that the reference gives anyway
            if reward is not None or attempt + 1 == DRAWS:
                raise
    raise AssertionError("unreachable")


DRAWS = 20
"""How often rewards are drawn again where their optimum cannot be moved as far from the reference
as asked for.
"""


def scale_for(world: World, kl: float) -> float:
    """The factor on the rewards with which KL(pi*, ref) is `kl` nats: it grows with the factor, so
    halving finds it.

    Raises:
        ValueError: no factor is large enough, for the responses of the largest reward are
            themselves too likely.
    """
    low, high = 0.0, 64.0
    farthest, _ = exact.optimum(world, reward=world.reward * high)
    if (most := exact.kl(farthest, exact.reference(world))) < kl:
        raise ValueError(
            f"{world.name}: no scale of these rewards puts the optimum {kl:g} nats from the "
            f"reference: its best responses are {most:.3g} away"
        )
    for _ in range(60):
        middle = (low + high) / 2
        best, _ = exact.optimum(world, reward=world.reward * middle)
        low, high = (middle, high) if exact.kl(best, exact.reference(world)) < kl else (low, middle)
    return (low + high) / 2


def mild(seed: int = 0) -> tuple[World, Any]:
    """15 responses to each of 2 prompts, all of them within reach of the reference: the optimum
    lies 1.25 nats away.
    """
    return make("mild", seed=seed)


def peaked(seed: int = 0) -> tuple[World, Any]:
    """As many responses, but the best ones are rare under the reference and the pull to it is weak:
    2.9 nats. What is not sampled is not learned.
    """
    world, model = make("peaked", seed=seed, spread=0.25, beta=0.3, kl=None)
    ref = exact.reference(world)
    world = world.with_(reward=world.reward - RARE * (ref - ref.mean(-1, keepdims=True)))
    return world.with_(reward=world.reward * scale_for(world, 2.9)), model


RARE = 0.5
"""What a nat of rareness under the reference is worth in the peaked world, in deviations of the
random reward.
"""


def large(seed: int = 0) -> tuple[World, Any]:
    """121 responses to each of 2 prompts."""
    return make("large", seed=seed, vocabulary=4, horizon=4)


def sparse(seed: int = 0) -> tuple[World, Any]:
    """121 responses to each of 2 prompts, of which a few are right, as a verifier says it: reward 1
    for them, 0 for all others.
    """
    world, model = make("sparse", seed=seed, vocabulary=4, horizon=4, beta=0.15, kl=None)
    return world.with_(
        reward=sparse_reward(len(world.prompts), world.tree, seed, share=0.03)
    ), model


def exploit(seed: int = 0) -> tuple[World, Any]:
    """121 responses to each of 2 prompts; a proxy overrates the least likely ones, which the true
    reward hates, and the pull to the reference is weak.
    """
    world, model = make("exploit", seed=seed, vocabulary=4, horizon=4, beta=0.15, kl=None)
    gold, proxy = exploited(world.reward, np.exp(exact.reference(world)), seed, proxy=1.0)
    return world.with_(reward=gold, proxy=proxy), model


def long(seed: int = 0) -> tuple[World, Any]:
    """511 responses of up to 8 tokens to each of 2 prompts, most of them long, and a verifier at
    their end: right is a response that has the right letters
    at five of its first seven places, whatever the others are. So it is known which tokens deserve
    the credit.
    """
    reward, _ = letters_in_place(2, tree(3, 8), seed, keys=5, within=7)
    return make("long", seed=seed, horizon=8, beta=0.15, kl=None, reward=reward, rare_end=2.3)
