"""Loading and saving: ordinary Hugging Face folders in and out, nothing of ours needed to read
them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from ..data.render import Renderer, set_chat_template
from ..errors import InputError, RunError
from ..settings import LoraSettings, RowSettings, RunSettings
from . import tabular as tabular
from .roles import Policy, Scorer, plain

hf_logging.disable_progress_bar()
# "some weights were newly initialized" is said of a head that is meant to be
hf_logging.set_verbosity_error()


def load_renderer(name: str, rows: RowSettings, *, reserve: int = 0) -> Renderer:
    """The tokenizer of a model folder or Hub name, with the limits of the model.

    Raises:
        InputError: no tokenizer, an unknown EOS token, a max_length beyond the context.
    """
    tokenizer = load_tokenizer(name)
    set_chat_template(tokenizer, rows.chat_template)
    if rows.eos_token is not None:
        if tokenizer.convert_tokens_to_ids(rows.eos_token) in (None, tokenizer.unk_token_id):
            raise InputError(
                f"--rows.eos-token: the tokenizer of {name} has no token {rows.eos_token!r}"
            )
        tokenizer.eos_token = rows.eos_token
    limit = context(load_config(name))
    if rows.max_length is not None and rows.max_length > limit:
        raise InputError(
            f"--rows.max-length: {rows.max_length} is beyond the context of {name}, {limit} tokens"
        )
    return Renderer(tokenizer, (rows.max_length or limit) - reserve, rows.on_long, rows.train_on)


def load_tokenizer(name: str) -> Any:
    _exists(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise InputError(f"no tokenizer can be loaded from {name}: {_first_line(error)}") from error


def load_config(name: str) -> Any:
    _exists(name)
    adapter = Path(name) / "adapter_config.json"
    try:
        if adapter.is_file():
            from peft import PeftConfig

            name = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
        return AutoConfig.from_pretrained(name)
    except Exception as error:
        raise InputError(
            f"no model configuration can be loaded from {name}: {_first_line(error)}"
        ) from error


def load_policy(name: str, lora: LoraSettings, run: RunSettings, tokenizer: Any = None) -> Policy:
    """A causal language model as a Policy, in evaluation mode (no dropout anywhere), with adapters
    if asked for.

    A folder that itself holds an adapter is merged into its base first, so that the reference of
    what follows is the model as it is now.

    Raises:
        InputError: no weights, not a causal model, a vocabulary smaller than the tokenizer's.
    """
    model = _pretrained(AutoModelForCausalLM, name)
    _check_vocabulary(model, tokenizer, name)
    policy = Policy(_prepare(model, lora, run, "CAUSAL_LM"))
    _check_head(policy, name)
    return policy


def load_reference(name: str, policy: Policy, lora: LoraSettings, run: RunSettings) -> Any:
    """The frozen mark for `policy`: the base under its adapters, or a second copy of the weights it
    started from.
    """
    from .roles import Reference

    if lora.r > 0:
        return Reference(policy)
    return Reference(policy, load_frozen(name, run).to(next(policy.parameters()).device))


def load_frozen(name: str, run: RunSettings) -> Policy:
    """A causal language model that is only asked, never trained; its weights are held in the
    precision of the run.
    """
    own = load_policy(name, LoraSettings(), run).requires_grad_(False)
    return own.to(torch.bfloat16) if run.precision == "bfloat16" else own


def load_teacher(name: str, policy: Policy, renderer: Renderer, run: RunSettings) -> Policy:
    """A frozen model that reads the token ids of `policy` as they are and gives a distribution over
    the same vocabulary.

    Every token of the student's tokenizer must have the same id in the teacher's; how texts are cut
    into tokens does not matter, for nothing is encoded again. A teacher may have more rows of
    logits than the student (vocabularies are padded to round numbers, or have tokens of their own):
    they are taken away, and what is left of its distribution is normalised. A student with more
    rows could say what the teacher cannot read, and is refused.

    Raises:
        InputError: another vocabulary, or a context too small for what the renderer lets through.
    """
    theirs = load_tokenizer(name)
    known, tokens = theirs.get_vocab(), renderer.tokenizer.get_vocab()
    unused = (
        renderer.tokenizer.pad_token if renderer.tokenizer.pad_token_id != renderer.eos else None
    )  # a pad token may be one side's own: it is never said
    if differ := [t for t, i in tokens.items() if known.get(t) != i and t != unused]:
        token = min(differ, key=tokens.__getitem__)
        raise InputError(
            f"--teacher: {name} has another vocabulary ({len(differ):,} of the student's "
            f"{len(tokens):,} tokens differ, first {token!r}, id {tokens[token]}, "
            f"which is {known.get(token, 'not there')} for the teacher): choose a teacher of the "
            "student's family, or make the student from one"
        )
    teacher = load_frozen(name, run)
    rows, wanted = (plain(p.lm).get_output_embeddings().weight.shape[0] for p in (teacher, policy))
    if rows < wanted:
        raise InputError(
            f"--teacher: {name} has {rows} logits and the student {wanted}, so the student could "
            "say tokens that the teacher cannot read: cut the student to "
            f"size with model.resize_token_embeddings({rows}) and save it"
        )
    if rows > wanted:
        plain(teacher.lm).resize_token_embeddings(wanted, mean_resizing=False)
    if (limit := context(plain(teacher.lm).config)) < renderer.max_length:
        raise InputError(
            f"--teacher: {name} has a context of {limit} tokens and the student may fill "
            f"{renderer.max_length}: give --rows.max-length {limit}"
        )
    return teacher.requires_grad_(False)


def load_scorer(
    name: str,
    lora: LoraSettings,
    run: RunSettings,
    *,
    head: str,
    tokenizer: Any = None,
    seed: int = 0,
) -> Scorer:
    """A model with one scalar output.

    Args:
        head: "saved": it must be in the folder; "normal": new, N(0, 1/sqrt(d+1)) as in Stiennon et
            al. 2020; "zero": new and zero, so that a critic starts at value 0. A folder of a reward
            model keeps its head in any case.

    Raises:
        InputError: no weights, or no scalar head where one must be.
    """
    config = load_config(name)
    has_head = (
        any("SequenceClassification" in a for a in config.architectures or [])
        and config.num_labels == 1
    )
    if head == "saved" and not has_head:
        raise InputError(
            f"{name} is no reward model: its config names {config.architectures}, not a sequence "
            "classifier with one label"
        )
    try:
        model = _pretrained(AutoModelForSequenceClassification, name, num_labels=1)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} cannot carry a scalar head: {_first_line(error)}") from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise InputError(
            f"{name}: {type(model).__name__} has no linear `score` head, which a reward model or "
            "critic needs"
        )
    if not has_head:
        with torch.no_grad():
            weight = model.score.weight
            if head == "zero":
                weight.zero_()
            else:
                generator = torch.Generator().manual_seed(seed)
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1)
                )
            if model.score.bias is not None:
                model.score.bias.zero_()
    _check_vocabulary(model, tokenizer, name)
    return Scorer(_prepare(model, lora, run, "SEQ_CLS"))


def context(config: Any) -> int:
    """Positions that the model has."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 2**30


def pick_pad_token(tokenizer: Any, model: Any) -> str | None:
    """Give a saved sequence classifier a pad token other than EOS, and say which.

    transformers reads the score at the last token that is not padding: were EOS the pad token, it
    would read one token too early.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        chosen = None
    else:
        free = [
            t
            for t in (tokenizer.unk_token, tokenizer.bos_token)
            if t is not None and t != tokenizer.eos_token
        ]
        chosen = free[0] if free else "<|pad|>"
        if not free:
            tokenizer.add_special_tokens({"pad_token": chosen})
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tokenizer.pad_token = chosen
    plain(model).config.pad_token_id = tokenizer.pad_token_id
    return chosen


def save(module: Policy | Scorer, tokenizer: Any, path: Path, probe: Tensor) -> None:
    """Write `path` in the Hugging Face layout, load it again with plain transformers and compare:
    what cannot be loaded equal was not saved.

    Args:
        probe: [1, T] ids to compare on.

    Raises:
        RunError: the reloaded model answers differently.
    """
    if isinstance(
        module, Scorer
    ):  # a folder of adapters would keep neither the pad token nor the zero of the scale
        module.model = adapters_merged(module.model)
    elif getattr(
        plain(module.lm), "only_in_memory", False
    ):  # no folder holds the base of these adapters
        module.lm = adapters_merged(module.lm)
    model = module.lm if isinstance(module, Policy) else module.model
    _same_ending(plain(model), tokenizer)
    model.save_pretrained(path, safe_serialization=True)
    tokenizer.save_pretrained(path)
    device = next(module.parameters()).device
    probe = (probe if probe.shape[1] > 1 else probe.repeat(1, 2)).to(
        device
    )  # of one token there is nothing to predict
    auto = (
        AutoModelForCausalLM if isinstance(module, Policy) else AutoModelForSequenceClassification
    )
    extra = {} if isinstance(module, Policy) else {"num_labels": 1}
    again = auto.from_pretrained(path, dtype=torch.float32, **extra).eval().to(device)
    with torch.no_grad():
        if isinstance(module, Policy):
            mask = torch.ones_like(probe, dtype=torch.bool)
            mask[:, 0] = False
            ours = module(probe, mask).logprobs[0, 1:]
            theirs = (
                again(input_ids=probe)
                .logits[0, :-1]
                .float()
                .log_softmax(-1)
                .gather(-1, probe[0, 1:, None])[:, 0]
            )
        else:
            ours = module(probe, torch.tensor([probe.shape[1]], device=device))
            theirs = again(input_ids=probe).logits[:, 0].float()
    tolerance = 1e-4 if getattr(plain(model), "autocast_dtype", None) is None else 0.2
    worst = float((ours - theirs).abs().max())
    if not worst <= tolerance:
        raise RunError(
            f"the model saved in {path} answers differently when it is loaded again: largest "
            f"difference {worst:.3g}"
        )


def _same_ending(model: Any, tokenizer: Any) -> None:
    """The saved configs name the EOS that was trained (--rows.eos-token may have chosen it), so
    that others stop where we do.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        known = getattr(config, "eos_token_id", None)
        if config is not None and tokenizer.eos_token_id not in (
            known if isinstance(known, list) else [known]
        ):
            config.eos_token_id = tokenizer.eos_token_id


def adapters_merged(model: Any) -> Any:
    """The plain model with its adapters added into the weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _pretrained(auto: Any, name: str, **keywords: Any) -> Any:
    _exists(name)
    folder = Path(name)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        pickles = [p.name for p in folder.glob("*.bin")]
        what = (
            f"only {pickles[0]}, a pickle, which is never loaded: convert it to safetensors"
            if pickles
            else "no weights (*.safetensors)"
        )
        raise InputError(f"{name} holds {what}")
    try:
        if (folder / "adapter_config.json").is_file():
            from peft import PeftConfig, PeftModel

            adapter = PeftConfig.from_pretrained(name)
            adapter.task_type = None  # the adapter of a policy also fits the trunk of a scorer
            model = auto.from_pretrained(
                str(adapter.base_model_name_or_path),
                dtype=torch.float32,
                use_safetensors=True,
                **keywords,
            )
            model = PeftModel.from_pretrained(model, name, config=adapter).merge_and_unload()
            model.only_in_memory = True
            return model
        return auto.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **keywords)
    except Exception as error:
        raise InputError(f"{name} cannot be loaded as a model: {_first_line(error)}") from error


def _prepare(model: Any, lora: LoraSettings, run: RunSettings, task: str) -> Any:
    model.config.use_cache = True
    for module in model.modules():  # one policy, not a different one at every forward pass
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for key in list(vars(model.config)):
        if key.endswith(("dropout", "pdrop")) and isinstance(getattr(model.config, key), float):
            setattr(model.config, key, 0.0)
    model.eval()
    model.autocast_dtype = torch.bfloat16 if run.precision == "bfloat16" else None
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers checkpoints in training mode only; with every dropout at 0 that changes
        # nothing else
        for module in model.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        model.train()
        if lora.r > 0:
            model.enable_input_require_grads()
    if lora.r == 0:
        return model
    from peft import LoraConfig, get_peft_model

    targets = list(lora.target_modules) if lora.target_modules else "all-linear"
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        exclude_modules=["score"] if task == "SEQ_CLS" else None,
    )
    return get_peft_model(model, config)


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise InputError(
            f"{name}: the tokenizer has token id {largest} and the model has {rows} embeddings: "
            "they do not belong together"
        )


@torch.no_grad()
def _check_head(policy: Policy, name: str) -> None:
    """Our log-probabilities against the model's own logits, once: an architecture that treats its
    logits in a way we do not know is refused.
    """
    model = plain(policy.lm)
    ids = torch.arange(1, 9)[None] % model.get_input_embeddings().weight.shape[0]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    ours = policy(ids, mask).logprobs[:, 1:]
    theirs = (
        model(input_ids=ids)
        .logits[:, :-1]
        .float()
        .log_softmax(-1)
        .gather(-1, ids[:, 1:, None])[..., 0]
    )
    if not torch.allclose(ours, theirs, atol=1e-3 if model.autocast_dtype is None else 0.2):
        raise InputError(
            f"{name}: {type(model).__name__} does something to its logits that is not known here, "
            "so its log-probabilities would be wrong"
        )


def _exists(name: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if Path(name).is_dir() or not (looks_local or Path(name).exists()):
        return
    raise InputError(
        f"--model: {name} is not a folder"
        if Path(name).exists()
        else f"--model: there is no folder {name}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
