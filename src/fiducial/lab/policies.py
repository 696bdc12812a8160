"""Policies of a world as models in the Hugging Face layout: a table, and a real transformer of two layers; and the exact distribution of either.

The transformer as it is initialised is the world's reference, and the table is given the same probabilities, so that both start from the same mark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..models.tabular import TabularConfig, TabularLM
from .world import EOS, LETTERS, Array, Tokens, Tree, World, tree


def transformer(prompts: tuple[Tokens, ...], vocabulary: int, horizon: int, seed: int, *, spread: float = 0.1, width: int = 64, layers: int = 2) -> Any:
    """An untrained Llama with the world's vocabulary. `spread` is the deviation of its initial weights: the larger, the more peaked it is."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=max(map(len, prompts)) + horizon + 1, initializer_range=spread, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def table(world: World) -> TabularLM:
    """A table with the reference's probabilities."""
    config = TabularConfig(vocab_size=world.vocabulary, prompts=world.prompts, horizon=world.horizon, eos_token_id=EOS)
    model = TabularLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.from_numpy(world.reference.reshape(-1, world.vocabulary).T.copy()))
    return model.eval()


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A letter a token; the full stop is EOS. No BOS: a text is its letters and nothing else."""
    inner = Tokenizer(models.WordLevel({LETTERS[i]: i for i in range(vocabulary)}, unk_token=LETTERS[EOS]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=LETTERS[EOS], clean_up_tokenization_spaces=False)


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
    """[P, S, V] logits of any causal language model in every state of the world, in float64 (the model itself is left as it is)."""
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
    name: str, *, seed: int = 0, prompts: int = 2, vocabulary: int = 3, horizon: int = 3, spread: float = 0.1, beta: float = 0.5,
    reward: Array | None = None, uneven: bool = False,
) -> tuple[World, Any]:  # fmt: skip
    """A world around an untrained transformer, and that transformer. Without `reward` every response has a normal one of deviation 1."""
    from .world import prompts_for, random_reward

    texts, shape = prompts_for(prompts, vocabulary, uneven=uneven), tree(vocabulary, horizon)
    model = transformer(texts, vocabulary, horizon, seed, spread=spread)
    if reward is None:
        reward = random_reward(prompts, len(shape.responses), seed)
    return World(name, texts, logits(model, texts, shape), reward, beta, horizon), model
