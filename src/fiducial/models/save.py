"""Saving: ordinary Hugging Face folders, loaded again and compared before they count as saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ..errors import RunError
from .remote_code import is_remote
from .roles import Policy, ScoreModel, full_precision
from .tokenizer_mark import write_mark
from .trunk import plain
from .weights import adapters_merged


def pick_pad_token(tokenizer: Any, model: Any) -> str | None:
    """Give a sequence classifier that is to be saved a pad token other than EOS.

    transformers reads the score at the last token that is not padding: if EOS were the pad token,
    it would read one token too early.

    Returns:
        The token that was chosen, or None where the tokenizer's own is kept.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        chosen = None
    else:
        special = (tokenizer.unk_token, tokenizer.bos_token)
        free = [t for t in special if t is not None and t != tokenizer.eos_token]
        chosen = free[0] if free else "<|pad|>"
        if not free:
            tokenizer.add_special_tokens({"pad_token": chosen})
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tokenizer.pad_token = chosen
    plain(model).config.pad_token_id = tokenizer.pad_token_id
    return chosen


def save(module: Policy | ScoreModel, tokenizer: Any, path: Path, probe: Tensor) -> None:
    """Write `path` in the Hugging Face layout, load it with plain transformers, and compare.

    Args:
        probe: [1, T] ids on which the saved model is compared with the one in memory.

    Raises:
        RunError: the reloaded model answers differently.
    """
    if isinstance(module, ScoreModel):  # an adapter folder would keep no pad token and no facts
        module.model = adapters_merged(module.model)
        module.facts.write(plain(module.model).config)
    elif not module.base_on_disk:
        module.lm = adapters_merged(module.lm)
    model = module.lm if isinstance(module, Policy) else module.model
    _same_ending(plain(model), tokenizer)
    model.save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)
    write_mark(tokenizer, path)
    device = next(module.parameters()).device
    # nothing can be predicted from one token alone
    probe = (probe if probe.shape[1] > 1 else probe.repeat(1, 2)).to(device)
    with torch.no_grad(), full_precision(module):
        ours, theirs = _compared(module, path, probe)
    worst = float((ours - theirs).abs().max())
    if not worst <= 1e-4:
        raise RunError(
            f"the model saved in {path} answers differently when it is loaded again: the largest "
            f"difference is {worst:.3g}"
        )


def _compared(module: Policy | ScoreModel, path: Path, probe: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, Policy):
        again = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=is_remote(plain(module.lm))
        )
        mask = torch.ones_like(probe, dtype=torch.bool)
        mask[:, 0] = False
        ours = module(probe, mask).logprobs[0, 1:]
        logp = again.eval().to(probe.device)(input_ids=probe).logits[0, :-1].float().log_softmax(-1)
        return ours, logp.gather(-1, probe[0, 1:, None])[:, 0]
    again = AutoModelForSequenceClassification.from_pretrained(
        path,
        dtype=torch.float32,
        num_labels=1,
        trust_remote_code=is_remote(plain(module.model)),
    )
    ours = module(probe, torch.tensor([probe.shape[1]], device=probe.device))
    return ours, again.eval().to(probe.device)(input_ids=probe).logits[:, 0].float()


def _same_ending(model: Any, tokenizer: Any) -> None:
    """Add the EOS that was trained to the saved configs, so that others stop where we do.

    --rows.eos-token may have chosen another one than the model's own.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        known = getattr(config, "eos_token_id", None)
        ids = known if isinstance(known, list) else [] if known is None else [known]
        if config is not None and tokenizer.eos_token_id not in ids:
            ids = [tokenizer.eos_token_id, *ids]
            config.eos_token_id = ids if len(ids) > 1 else ids[0]
