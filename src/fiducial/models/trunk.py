"""An ordinary Hugging Face causal model in two halves: ids to hidden states, and states to logits.

Splitting it spares the [B, T, V] of logits. Whether both halves together are what the model's own
`forward` computes is not assumed: `contract.py` compares them at the start of each run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.shared_prefix import SharedPrefix


def plain(model: Any) -> Any:
    """The Hugging Face model itself; with LoRA it is inside the adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(config: Any) -> Any:
    """The configuration of the language model, which a multimodal model keeps inside its own."""
    found = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return config if found is None else found


def trunk(model: Any) -> Any:
    """The module from ids to hidden states; of a multimodal model, its language model."""
    model = plain(model)
    if model.base_model is model:  # Llama 4 names its own prefix wrongly
        return model.model
    if text_config(model.config) is model.config:
        return model.base_model
    return model.get_decoder()


@functools.cache
def _parameters(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepts(module: Any, name: str) -> bool:
    """Whether the module's forward has a parameter of this name; `**kwargs` does not count."""
    forward = getattr(module, "forward", module)
    return name in _parameters(getattr(forward, "__func__", forward))


def context(config: Any) -> int:
    """Number of positions that the model has."""
    for one in (text_config(config), config):
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(value := getattr(one, name, None), int) and value > 0:
                return value
    return 2**30


def windowed(config: Any) -> bool:
    """Whether some layer sees a part of the context alone: a window, or chunks."""
    config = text_config(config)
    names = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    return any(getattr(config, name, None) is not None for name in names) or bool(
        kinds - {"full_attention", "attention"}
    )


def autocast(precision: torch.dtype | None, device: torch.device) -> Any:
    """The context in which a forward pass runs; None leaves float32 as it is."""
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the time of a block.

    In training mode gradient checkpointing switches the cache off, and layers may be random.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def hidden_states(
    model: Any, ids: Tensor, precision: torch.dtype | None, layout: SharedPrefix | None = None
) -> Tensor:
    """Hidden states [B, T, H] of a right-padded batch of `ids` [B, T], before any head.

    Args:
        layout: given where a row holds several sequences with a common beginning.
    """
    body = trunk(model)
    inputs: dict[str, Any] = {}
    if layout is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if accepts(body, "position_ids"):
            inputs["position_ids"] = positions
    else:
        inputs = {"position_ids": layout.positions, "attention_mask": layout.attention()}
    if accepts(body, "use_cache"):
        inputs["use_cache"] = False
    with autocast(precision, ids.device):
        out: Tensor = body(input_ids=ids, **inputs).last_hidden_state
    return out


def logits(model: Any, hidden: Tensor, precision: torch.dtype | None) -> Tensor:
    """Logits [n, V] of hidden states [n, H], with the scaling that the architecture applies."""
    model = plain(model)
    with autocast(precision, hidden.device):
        out: Tensor = model.get_output_embeddings()(hidden)
    config = text_config(model.config)
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        out = out * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        out = out / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return out if cap is None else cap * torch.tanh(out / cap)
