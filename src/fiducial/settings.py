"""Settings: a YAML file and flags become frozen, validated objects. An unknown key is an error that
offers the nearest name.

Order of precedence: flags, then the file, then the defaults in the classes. This module imports
nothing heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InputError

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Frozen; nothing is coerced beyond what a flag needs; an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            if not _parsing:
                raise
            command, whole = _parsing[-1]
            section = next(
                (f"{n}." for n, f in whole.model_fields.items() if f.annotation is type(self)), ""
            )
            raise _Refused(explain(error, command, section)) from None


class _Refused(Exception):
    """Carries one sentence past the flag parser, which would frame any ValueError in its own words."""


_parsing: list[tuple[str, type[Settings]]] = []
"""The command whose flags are being parsed, and its settings."""


class RowSettings(Settings):
    """How rows are read, rendered to tokens and split."""

    max_length: int | None = Field(None, gt=1)
    """Tokens of a row, prompt and response together. Default: the model's context."""
    on_long: Literal["truncate", "error"] = "truncate"
    """A response beyond max_length is cut at its end, and counted, or is an error. A prompt that
    leaves no room for a label is always one.
    """
    on_error: Literal["stop", "skip"] = "stop"
    """A bad row stops the command with its file:line, or is counted and written to skipped.jsonl."""
    train_on: Literal["all", "last"] = "all"
    """Of a conversation, the assistant turns that are learned."""
    chat_template: str | None = None
    """`chatml` or a Jinja file, for a tokenizer without a template. Default: the tokenizer's own."""
    eos_token: str | None = None
    """The token that ends a response, if it is not the tokenizer's EOS."""
    held_out: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts that is kept for evaluation and never trained on. Ours. ppo, reinforce
    and grpo train on all of them: judge them by eval.
    """
    eval_data: str | None = None
    """Rows for evaluation, instead of held_out."""


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by peft."""

    r: int = Field(0, ge=0)
    """Rank; 0 trains all weights."""
    alpha: float = 16.0
    """Scale: an adapter counts alpha / r."""
    target_modules: tuple[str, ...] | None = None
    """Layers that get an adapter. Default: every linear layer of the transformer."""


class OptimizerSettings(Settings):
    """AdamW and the schedule of its learning rate."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments. 0.9, 0.95: InstructGPT."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment. PyTorch's default."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled. 0: InstructGPT."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """From the peak to zero (cosine: to a tenth, as in InstructGPT), after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the rate rises linearly to its peak."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient's norm is cut to this. The field's custom."""


class RunSettings(Settings):
    """The run folder, memory, checkpoints."""

    tokens: int = Field(8192, gt=0)
    """Padded tokens of a micro-batch: the memory knob. It never changes the result."""
    checkpoint_every: int = Field(100, ge=0)
    """Steps from one checkpoint to the next; 0: none but at Ctrl-C."""
    keep_checkpoints: int = Field(2, gt=0)
    """How many of the newest stay."""
    eval_every: int = Field(50, ge=0)
    """Steps from one evaluation on held-out rows to the next, where a method keeps some; 0: at the
    end only.
    """
    samples: int = Field(8, ge=0)
    """Prompts that are answered before and after, for the page."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass; weights and optimizer stay in float32."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    timeout_minutes: float = Field(10.0, gt=0)
    """How long a process waits for the others before all stop with an error."""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; InputError with the line if it is none."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--config: there is no file {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}"
        ) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(
            f"{path}:1: expected settings as `name: value` lines, got a {type(data).__name__}"
        )
    return data


def build(cls: type[S], values: Mapping[str, Any], *, source: str = "settings") -> S:
    """`cls` from nested plain values; every fault in one InputError sentence that names the setting."""
    _known(cls, values, source, "")
    try:
        return cls(**values)
    except ValidationError as error:
        raise InputError(explain(error, source)) from None


def explain(error: ValidationError, source: str, section: str = "") -> str:
    """The first fault of a pydantic error as one sentence."""
    first = min(
        error.errors(), key=lambda e: e["type"] == "missing"
    )  # what is wrong before what is not there
    name = section + ".".join(str(p) for p in first["loc"]) or "settings"
    if first["type"] == "missing":
        return f"{source}: {name} is required: give --{name.replace('_', '-')}"
    message = first["msg"].removeprefix("Value error, ")
    flag = f"--{name.replace('_', '-')}"
    return (
        f"{source}: {flag}: {message[0].lower() + message[1:]}, not {first['input']!r}"
        if first["type"] != "value_error"
        else f"{source}: {message}"
    )


def _known(cls: type[BaseModel], values: Mapping[str, Any], source: str, prefix: str) -> None:
    for key, value in values.items():
        field = cls.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), list(cls.model_fields), n=1, cutoff=0.5)
            hint = (
                f": did you mean {prefix}{near[0]}?"
                if near
                else f"; there are {', '.join(cls.model_fields)}"
            )
            raise InputError(f"{source}: unknown setting {prefix}{key}{hint}")
        if (
            isinstance(value, Mapping)
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        ):
            _known(field.annotation, value, source, f"{prefix}{key}.")


def dump_yaml(settings: Settings, method: str) -> str:
    """The resolved settings as YAML that `--config` reads back."""
    return yaml.safe_dump(
        {"method": method, **settings.model_dump(mode="json")}, sort_keys=False, allow_unicode=True
    )
