"""Loading the roles of a run from ordinary Hugging Face folders or Hub names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from ..errors import InputError
from ..names import check_name
from ..settings import LoraSettings, RunSettings
from . import tabular as tabular  # registers its architecture, so that its folders load too
from .remote_code import needed
from .roles import Policy, Reference, Roles, ScoreModel
from .scores import CriticStart, ScoreFacts, adapter_scores, rescaled
from .tokenizer_mark import check_mark
from .trainable import trainable
from .trunk import context, plain
from .weights import adapters_merged, check_adapter, check_config, pretrained

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()  # it would warn about a new head, which is meant to be new

SHARED = "shared"
"""In place of a critic's folder: a value head on the policy's own trunk."""


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Endings of files of weights that can run code when they are loaded."""
HEADS = ("score.", "classifier.", "classification_head.", "pre_classifier.", "dense.")
"""Beginnings of the names of a new scalar head."""


def load_tokenizer(name: str, *, flag: str = "--model", trust: bool = False) -> Any:
    """The tokenizer of a model folder or Hub name.

    Args:
        trust: whether Python code of the folder may run, here as in everything below.

    Raises:
        InputError: it cannot be loaded; `flag` names the setting in the message.
    """
    exists(name, flag)
    try:
        folder = _with_tokenizer(name)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:
        raise needed(name, flag, error) or InputError(
            f"{flag}: no tokenizer can be loaded from {name}: {_first_line(error)}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes make of no files
        raise InputError(
            f"{flag}: {name} holds no tokenizer (tokenizer.json): copy those of the model's maker "
            "into the folder"
        )
    check_mark(tokenizer, Path(folder), flag)
    return tokenizer


def load_config(name: str, *, flag: str = "--model", trust: bool = False) -> Any:
    """The configuration of a model; of an adapter folder, that of its base model.

    Raises:
        InputError: it cannot be loaded.
    """
    exists(name, flag)
    adapter = Path(name) / "adapter_config.json"
    try:
        if adapter.is_file():
            from peft import PeftConfig

            name = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except Exception as error:
        raise needed(name, flag, error) or InputError(
            f"{flag}: no model configuration can be loaded from {name}: {_first_line(error)}"
        ) from error


def load_roles(
    name: str,
    lora: LoraSettings,
    run: RunSettings,
    tokenizer: Any,
    device: torch.device,
    *,
    critic: str | CriticStart | None = None,
    reference: bool = True,
    seed: int = 0,
    trust: bool = False,
) -> Roles:
    """The policy and, where they are asked for, its frozen reference and a critic.

    Args:
        name: the model that the policy starts from, and that the reference stays.
        critic: None for no critic; the folder `SHARED` for a zero value head on the policy's trunk;
            else the folder or Hub name of the model whose weights the critic starts from.
        reference: whether anything reads the reference; without one no weights are loaded for it.
        seed: of a new head.

    Raises:
        InputError: as `load_policy` and `load_scorer`.
    """
    policy = load_policy(name, lora, run, tokenizer, trust=trust).to(device)
    own_critic = None
    critic = CriticStart(critic) if isinstance(critic, str) else critic
    if critic is not None and critic.folder == SHARED:
        weight = plain(policy.lm).get_output_embeddings().weight
        policy.value_head = nn.Linear(weight.shape[1], 1).to(weight.device)
        nn.init.zeros_(policy.value_head.weight)  # every state starts at value 0
        nn.init.zeros_(policy.value_head.bias)
    elif critic is not None:
        own_critic = load_scorer(
            critic.folder,
            lora,
            run,
            head="zero",
            seed=seed,
            scale=(critic.scale, critic.shift),
            trust=trust,
        )
    if not reference:
        return Roles(policy=policy, critic=own_critic)
    own = None
    if lora.r == 0:  # with adapters the base under them is the reference
        own = load_frozen(name, run, trust=trust).to(next(policy.parameters()).device)
    return Roles(policy=policy, reference=Reference(policy, own), critic=own_critic)


def load_policy(
    name: str,
    lora: LoraSettings,
    run: RunSettings,
    tokenizer: Any = None,
    *,
    flag: str = "--model",
    trust: bool = False,
) -> Policy:
    """A causal language model as a Policy, without dropout, with adapters if they are asked for.

    A folder that itself holds an adapter is merged into its base first, so that the reference of
    what follows is the model as it is now.

    Raises:
        InputError: the folder has no weights, the model is not causal, or its vocabulary is smaller
            than the tokenizer's.
    """
    model, on_disk = _pretrained(AutoModelForCausalLM, name, flag, trust)
    _check_vocabulary(model, tokenizer, name)
    return Policy(trainable(model, lora, run, "CAUSAL_LM"), _precision(run), base_on_disk=on_disk)


def load_frozen(
    name: str, run: RunSettings, *, flag: str = "--model", trust: bool = False
) -> Policy:
    """A causal language model that is never trained, and computes exactly as the policy does."""
    return frozen(load_policy(name, LoraSettings(), run, flag=flag, trust=trust), run)


def frozen(own: Policy, run: RunSettings) -> Policy:
    """A policy that is not trained any more.

    In bfloat16 only the weights that are multiplied in bfloat16 anyway are kept in it. Rounding
    embeddings and norms too would make the KL to an equal policy differ from 0.
    """
    own.requires_grad_(False)
    if run.precision == "bfloat16":
        tied = plain(own.lm).get_input_embeddings().weight
        for module in own.modules():
            if isinstance(module, nn.Linear) and module.weight is not tied:
                module.to(torch.bfloat16)
    return own


def load_teacher(
    name: str,
    policy: Policy,
    tokenizer: Any,
    max_length: int,
    run: RunSettings,
    *,
    trust: bool = False,
) -> Policy:
    """A frozen model that reads the token ids of `policy` and has the same vocabulary.

    Every token of the student's tokenizer must have the same id in the teacher's. How texts are cut
    into tokens does not matter, because nothing is tokenized again. A teacher may have more logits
    than the student (vocabularies are padded to round numbers): the additional ones are removed and
    the rest is normalized. A student with more logits could say what the teacher cannot read.

    Args:
        tokenizer: the student's. max_length: the longest sequence that the student may produce.

    Raises:
        InputError: the vocabularies differ, or the teacher's context is too small.
    """
    known = load_tokenizer(name, flag="--teacher", trust=trust).get_vocab()
    tokens = tokenizer.get_vocab()
    # a pad token may exist on one side alone: it is never sampled
    unused = tokenizer.pad_token if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    if differ := [t for t, i in tokens.items() if known.get(t) != i and t != unused]:
        token = min(differ, key=tokens.__getitem__)
        raise InputError(
            f"--teacher: {name} has another vocabulary: {len(differ):,} of the student's "
            f"{len(tokens):,} tokens differ, the first is {token!r} with id {tokens[token]} "
            f"(teacher: {known.get(token, 'absent')}). Choose a teacher of the student's family"
        )
    teacher = load_frozen(name, run, flag="--teacher", trust=trust)
    if teacher.vocabulary < policy.vocabulary:
        raise InputError(
            f"--teacher: {name} has {teacher.vocabulary} logits and the student "
            f"{policy.vocabulary}, so the student could sample tokens that the teacher does not "
            f"know: call model.resize_token_embeddings({teacher.vocabulary}) on the student and "
            "save it"
        )
    if teacher.vocabulary > policy.vocabulary:
        plain(teacher.lm).resize_token_embeddings(policy.vocabulary, mean_resizing=False)
    if (limit := context(plain(teacher.lm).config)) < max_length:
        raise InputError(
            f"--teacher: {name} has a context of {limit} tokens and the student may use "
            f"{max_length}: give --rows.max-length {limit}"
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
    flag: str = "--model",
    scale: tuple[float, float] = (1.0, 0.0),
    trust: bool = False,
) -> ScoreModel:
    """A model with one scalar output.

    Args:
        head: "saved": the folder must hold it; "normal": new, N(0, 1/sqrt(d+1)) as in Stiennon et
            al. 2020; "zero": new and zero, so that a critic starts at value 0. The folder of a
            reward model keeps its head in any case, and so does an adapter that holds one.
        seed: of a new normal head.
        scale: factor and shift of the scores of a head that the folder holds.

    Raises:
        InputError: the folder has no weights, or no scalar head where it must have one.
    """
    config, heads = load_config(name, flag=flag, trust=trust), adapter_scores(Path(name))
    architectures = config.architectures or []
    has_head = any("SequenceClassification" in a for a in architectures) and config.num_labels == 1
    has_head = has_head if heads is None else heads == 1
    if head == "saved" and not has_head:
        what = f"config names {config.architectures}, not a sequence classifier with one label"
        if _is_adapter(name):
            what = f"adapter holds no `score` head of one label (modules_to_save), and its {what}"
        raise InputError(f"{flag}: {name} is no reward model: its {what}")
    try:
        new = () if has_head and heads is None else HEADS  # an adapter may bring its own head
        model, _ = _pretrained(
            AutoModelForSequenceClassification, name, flag, trust, new=new, num_labels=1
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{flag}: {name} cannot carry a scalar head: {_first_line(error)}"
        ) from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise InputError(
            f"{flag}: {type(model).__name__} of {name} has no linear `score` head, which a reward "
            "model or critic needs"
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
    elif scale != (1.0, 0.0):
        model.score = rescaled(model.score, *scale)
    _check_vocabulary(model, tokenizer, name)
    facts = ScoreFacts.of(model.config, f"{flag}: {name}/config.json")
    if _is_adapter(name):  # the mean of the base's scores is not that of the adapter's
        facts = replace(facts, mean=None, std=None)
    return ScoreModel(trainable(model, lora, run, "SEQ_CLS"), _precision(run), facts)


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _with_tokenizer(name: str) -> str:
    """The folder itself, or the base of an adapter folder that holds no tokenizer."""
    if not _is_adapter(name) or (Path(name) / "tokenizer_config.json").is_file():
        return name
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(name).base_model_name_or_path)


def _precision(run: RunSettings) -> torch.dtype | None:
    return torch.bfloat16 if run.precision == "bfloat16" else None


def _pretrained(
    auto: Any, name: str, flag: str, trust: bool, *, new: Sequence[str] = (), **keywords: Any
) -> tuple[Any, bool]:
    """The model in float32, and whether a folder holds it as it is."""
    exists(name, flag)
    folder = Path(name)
    wanted = "adapter_model" if _is_adapter(name) else "model"
    if folder.is_dir() and not list(folder.glob(f"{wanted}*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        what = (
            f"its weights in {pickles[0]}, a pickle, which could run code and is never loaded: "
            "have its author, or someone who trusts them, save it again with "
            "save_pretrained(..., safe_serialization=True)"
            if pickles
            else f"no weights ({wanted}*.safetensors)"
        )
        raise InputError(f"{flag}: {name} holds {what}")
    options = {"dtype": torch.float32, "use_safetensors": True, **keywords}
    options["trust_remote_code"] = trust
    try:
        if _is_adapter(name):
            return _merged(auto, name, flag, new, options), False
        return pretrained(auto, name, flag, new=new, **options), True
    except InputError:
        raise
    except Exception as error:
        raise needed(name, flag, error) or InputError(
            f"{flag}: {name} cannot be loaded as a model: {_first_line(error)}"
        ) from error


def _merged(auto: Any, name: str, flag: str, new: Sequence[str], options: dict[str, Any]) -> Any:
    """The base of an adapter folder with the adapter added to its weights."""
    from peft import PeftConfig, PeftModel

    adapter = PeftConfig.from_pretrained(name)
    adapter.task_type = None  # the adapter of a policy also fits the trunk of a scorer
    base = pretrained(auto, str(adapter.base_model_name_or_path), flag, new=new, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing is refused by name below
        model = PeftModel.from_pretrained(base, name, config=adapter)
    check_adapter(model, name, flag, unused=("lm_head", "embed_out") if new else ())
    return adapters_merged(model)


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


def exists(name: str, flag: str) -> None:
    """Checks that a model's name is a folder or may be a name on the Hub.

    Raises:
        InputError: names the setting and the folder.
    """
    check_name("model", name, flag)
    if Path(name).exists() and not Path(name).is_dir():
        raise InputError(f"{flag}: {name} is not a folder")
    check_config(Path(name), flag)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
