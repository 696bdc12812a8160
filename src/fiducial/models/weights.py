"""Loading weights without a gap: every tensor of the model was in the folder, every tensor in the
folder is used, and all of them are finite floating-point numbers of the model's shapes.

What a command makes new on purpose, such as the head of a reward model, is named by the caller.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..errors import InputError
from .remote_code import is_remote
from .trunk import text_config

HEADS = ("lm_head.", "embed_out.")
"""Beginnings of the names that folders use for a language model's output weights."""
FLOATING = {"F64", "F32", "F16", "BF16"}


def pretrained(auto: Any, name: str, flag: str, *, new: Sequence[str] = (), **options: Any) -> Any:
    """The model of a folder or Hub name, with every weight accounted for.

    Args:
        auto: the class that loads it, such as `AutoModelForCausalLM`.
        new: beginnings of the names of weights that the folder need not hold.

    Raises:
        InputError: a weight is missing, unused, of another type or not finite; it is named.
    """
    model, info = auto.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            f"{flag}: {name} is quantized, and only weights in floating point can be used: give "
            "the model that it was made from"
        )
    if wrong := [
        f"{key} ({_shape(there)} in the folder, {_shape(here)} in the model)"
        for key, there, here in sorted(info["mismatched_keys"])
    ]:
        raise InputError(f"{flag}: {name} holds weights of another shape: {_some(wrong)}")
    missing = [key for key in info["missing_keys"] if not key.startswith(tuple(new))]
    unused = list(info["unexpected_keys"])
    if unused and new:  # a scorer has no use for the head of the language model it starts from
        heads = (*HEADS, *_head(model.config))
        unused = [key for key in unused if not key.startswith(heads)]
    if missing or unused:
        raise InputError(f"{flag}: {name} {_difference(missing, unused, type(model).__name__)}")
    if wrong := [f"{key} ({kind})" for key, kind in _types(name) if kind not in FLOATING]:
        weights = {key for key, _ in model.named_parameters()}
        wrong = [w for w in wrong if any(w.startswith(f"{key} ") for key in _both(weights, model))]
        if wrong:
            raise InputError(
                f"{flag}: {name} holds weights that are no floating-point numbers: "
                f"{_some(wrong)}. Convert them to float32 or bfloat16"
            )
    check_finite(model, name, flag)
    return model


@torch.no_grad()
def is_finite(weight: Tensor) -> bool:
    """Whether a weight holds nothing that no weight may hold. A bias may be minus infinity, which
    forbids a token.
    """
    return bool(torch.isfinite(weight).all()) or (
        weight.dim() == 1 and not bool((weight.isnan() | (weight == torch.inf)).any())
    )


@torch.no_grad()
def check_finite(model: Any, name: str, flag: str) -> None:
    """Checks that no weight is NaN or infinite; a bias may be minus infinity.

    Raises:
        InputError: names the first such weights.
    """
    bad = [key for key, p in model.named_parameters() if not is_finite(p)]
    if bad:
        raise InputError(f"{flag}: {name} holds weights that are not finite: {_some(bad)}")


def check_adapter(model: Any, name: str, flag: str, *, unused: Sequence[str] = ()) -> None:
    """Checks that a loaded adapter has all the tensors of its folder, and only those.

    Args:
        model: the PeftModel. unused: parts of the names of tensors that need no place.

    Raises:
        InputError: names the tensors that are missing or unused.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    there = set(load_peft_weights(name, device="cpu"))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    extra = sorted(k for k in there - wanted if not any(part in k for part in unused))
    # embeddings are saved beside an adapter as they are, with nothing to be missed
    extra = [k for k in extra if "lora_" in k or "modules_to_save" in k]
    missing = sorted(wanted - there)
    if missing or extra:
        raise InputError(f"{flag}: the adapter {name} {_difference(missing, extra, 'its base')}")
    check_finite(model, name, flag)


def adapters_merged(model: Any) -> Any:
    """The plain model with its adapters added to the weights.

    A weight that has an adapter and is also used elsewhere (tied embeddings) becomes two: the
    adapter changes only the one it was trained on.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    base = model.get_base_model()
    owners: dict[int, int] = {}
    for _, p in base.named_parameters(remove_duplicate=False):
        owners[id(p)] = owners.get(id(p), 0) + 1
    for module in base.modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if weight is not None and owners.get(id(weight), 0) > 1:
            module.base_layer.weight = nn.Parameter(weight.detach().clone())
            base.config.tie_word_embeddings = False
            text_config(base.config).tie_word_embeddings = False
    return model.merge_and_unload()


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configurations call the number of layers."""


def check_config(folder: Path, flag: str) -> None:
    """Checks a folder's config.json before a model is built from it.

    Raises:
        InputError: it is no JSON object, or names more layers than the folder has tensors, so that
            building the model would only take time and memory; or the index names files elsewhere.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{flag}: {path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{flag}: {path} holds a {type(config).__name__}, not an object")
    _check_index(folder, flag)
    inner = config.get("text_config")
    numbers = [
        (name, part[name])
        for part in (config, inner if isinstance(inner, dict) else {})
        for name in LAYERS
        if isinstance(part.get(name), int)
    ]
    try:
        tensors = len(_types(str(folder)))
    except SafetensorError:  # a torn file is told where it is loaded
        return
    for name, number in numbers:
        if number < 0 or (tensors and number > tensors):
            raise InputError(
                f"{flag}: {path} says {name} {number:,}, and the folder holds {tensors:,} tensors: "
                "correct it there"
            )


def _check_index(folder: Path, flag: str) -> None:
    """Refuse an index of weights that names files elsewhere."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        strange = sorted(f for f in map(str, files) if not re.fullmatch(r"[\w-][\w.-]*", f))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{flag}: {path} is no index of weights (weight_map)") from error
    if strange:
        raise InputError(
            f"{flag}: {path} names {strange[0][:120]!r}, and weights are read from files in the "
            "folder itself alone: put the file there, and correct the index"
        )


def _difference(missing: Collection[str], unused: Collection[str], kind: str) -> str:
    """The end of a sentence about tensors that are missing from a folder or not used."""
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} of the weights of {kind}: {_some(sorted(missing))}")
    if unused:
        parts.append(
            f"holds {len(unused)} tensors that {kind} does not use: {_some(sorted(unused))}"
        )
    return (
        f"{', and '.join(parts)}. Nothing is filled in at random: give a complete folder of this "
        "architecture"
    )


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def _head(config: Any) -> list[str]:
    """The beginnings of the names of a language model's output weights."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=is_remote(config))
    except Exception:
        return []
    head = model.get_output_embeddings()
    return [f"{key}." for key, m in model.named_modules() if m is head]


def _types(name: str) -> list[tuple[str, str]]:
    """Names and types of the tensors in a folder's safetensors files."""
    found = []
    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []:
        with safe_open(path, "pt") as file:
            found += [(key, file.get_slice(key).get_dtype()) for key in file.keys()]  # noqa: SIM118
    return found


def _both(names: set[str], model: Any) -> set[str]:
    """Names with and without the prefix of the base model: folders hold either."""
    prefix = f"{model.base_model_prefix}."
    return names | {n.removeprefix(prefix) for n in names}
