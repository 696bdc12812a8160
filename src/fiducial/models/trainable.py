"""A loaded model made ready for training: no dropout, checkpointing, adapters."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..errors import InputError
from ..settings import LoraSettings, RunSettings
from .trunk import text_config

LINEAR = ("Linear", "Conv1D")
"""Classes of layers that an adapter can be put on."""


def trainable(model: Any, lora: LoraSettings, run: RunSettings, task: str) -> Any:
    """The model in a mode without randomness, with checkpointing and adapters where they are asked
    for.

    Args:
        task: peft's name of what the model is for: CAUSAL_LM or SEQ_CLS.

    Raises:
        InputError: the model does not have such a layer, or none that can have an adapter.
    """
    model.config.use_cache = True
    model.eval()
    _without_dropout(model, configs=run.gradient_checkpointing)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers checkpoints in training mode only: only the modules that ask for the mode get
        # it, because others would add noise in it
        for module in model.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        if lora.r > 0:
            model.enable_input_require_grads()
    if lora.r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora)
    width = getattr(text_config(model.config), "hidden_size", None) or lora.r
    if lora.r > width:
        raise InputError(
            f"--lora.r {lora.r} is more than the model's width of {width}: ranks of 8 to 64 are "
            "usual"
        )
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        fan_in_fan_out=transposed,  # GPT-2 keeps its linear layers as Conv1D
        target_modules=list(lora.target_modules) if lora.target_modules else "all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        exclude_modules=["score"] if task == "SEQ_CLS" else None,
    )
    with warnings.catch_warnings():  # tied weights are parted when adapters are merged
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)  # peft's
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # peft knows layers that an adapter would break
            kind, why = type(model).__name__, str(error).split("\n")[0][:200]
            raise InputError(f"--lora.r: {kind} cannot have these adapters: {why}") from error


def _check_targets(model: Any, lora: LoraSettings) -> None:
    """Checks that each name of --lora.target-modules is that of a layer.

    Raises:
        InputError: one is not; the message names the layers that there are.
    """
    names = [name for name, _ in model.named_modules()]
    for target in lora.target_modules or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = [n for n, m in model.named_modules() if type(m).__name__ in LINEAR]
            there = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(
                f"--lora.target-modules: the model has no layer {target!r}: it has "
                f"{', '.join(there)}"
            )


def _without_dropout(model: Any, *, configs: bool) -> None:
    """Switch dropout off, which would make every forward pass in training mode another policy. A
    router's jitter stays: PhiMoE's routing depends on its value in evaluation mode too.

    Args:
        configs: also in the configuration, which some layers read in training mode. It is saved
            with the model, so it stays as it is where no layer is in that mode.
    """
    noisy = ("dropout", "pdrop", "layerdrop", "drop_path_rate")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None) if configs else None):
            for key, value in list(vars(owner).items()) if owner is not None else []:
                if key.endswith(noisy) and isinstance(value, float):
                    setattr(owner, key, 0.0)
