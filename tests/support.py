"""What tests share: one thread, no network, and three tiny random models of different make.

The models differ where alignment code goes wrong: `llama` has grouped queries, BOS and EOS and no
pad token; `gpt2` has absolute positions, dropout in its config and one token for BOS, EOS and
padding; `qwen3` has a chat template, no BOS, and ends a turn with `<|im_end|>`.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from fiducial.models.roles import Policy
from fiducial.rollout.local import LocalSampler
from fiducial.rollout.sampling import Keys, SamplingParams
from fiducial.rollout.trajectory import Trajectory

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("llama", "gpt2", "qwen3")
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("e", "r"),
    ("c", "a"),
    ("ca", "t"),
    (" ", "the"),
    ("o", "n"),
]
CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Characters and eight merges, which also cross spaces: small enough to tokenize by hand."""
    specials = {
        "llama": ["<unk>", "<s>", "</s>"],
        "gpt2": ["<|endoftext|>"],
        "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }[kind]
    tokens = [*specials, *string.ascii_lowercase, *" .,?!\n", *(a + b for a, b in MERGES)]
    inner = Tokenizer(
        BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=MERGES, unk_token=specials[0])
    )
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    names: dict[str, Any] = {
        "llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "gpt2": {
            "unk_token": "<|endoftext|>",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
        "qwen3": {
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
        },
    }[kind]
    if kind == "llama":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if kind == "qwen3":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(kind: str, folder: Path, **changes: Any) -> str:
    """A random model and its tokenizer in the Hugging Face layout. Weights are large, so that
    probabilities differ a lot from token to token.
    """
    tokenizer = make_tokenizer(kind)
    common: dict[str, Any] = {
        "vocab_size": 64,
        "initializer_range": 0.25,
        "eos_token_id": tokenizer.eos_token_id,
    }
    common |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if kind == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        sizes |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
        config: Any = GPT2Config(**(sizes | common | changes))
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        sizes |= {
            "head_dim": 8,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": kind == "qwen3",
        }
        config = (LlamaConfig if kind == "llama" else Qwen3Config)(**(sizes | common | changes))
    torch.manual_seed(len(kind))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    context: int = CONTEXT,
    tokens: int = 65_536,
    **params: Any,
) -> Trajectory:
    """One response to each prompt; the prompts are numbered in order where no numbers are given."""
    keys = Keys(
        seed,
        step,
        list(range(len(prompts))) if numbers is None else numbers,
        [0] * len(prompts) if samples is None else samples,
    )
    return LocalSampler(policy, context, tokens).sample(prompts, SamplingParams(**params), keys)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PROMPTS = [
    "the cat",
    "a",
    "on the mat",
    "who is in",
    "cats ran on",
    "i",
    "one two three four",
    "the end is near",
    "say",
    "more than this",
]
GOOD = [" sat", " e", " in the sun", " no", " the other one", " er", " on", " yes", " ok", " cat"]
BAD = [" xyz zy", " q", " zq", " vv wv", " x", " zzz", " kkq", " j", " uvw", " qqqqqq"]


def tensor(x: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """In double precision, in which sums by hand are exact enough."""
    return torch.tensor(x, dtype=dtype)


def noisy(seed: int = 0, rows: int = 4, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with NaN and infinities where the mask is false, and the mask."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, width)) < 0.6
    mask[0, 0], mask[1] = True, False
    x = rng.normal(loc=3, scale=2, size=(rows, width))
    x[~mask] = rng.choice([np.nan, np.inf, -np.inf], size=(~mask).sum())
    return tensor(x), torch.tensor(mask)
