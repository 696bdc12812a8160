"""Settings: a YAML file and flags become frozen, validated objects. An unknown key is an error that
offers the nearest name.

Order of precedence: flags, then the file, then the defaults in the classes. This module imports
nothing heavy.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from collections.abc import Mapping, Sequence
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


def parse(cls: type[S], args: Sequence[str], *, command: str) -> S:
    """Settings of one command from its flags, over `--config FILE`, over the defaults. `--help` and
    a wrong flag exit by themselves (0 and 2).
    """
    import tyro

    args, file = _take_config(list(args))
    values = load_yaml(file) if file else {}
    values.pop("method", None)
    if file is None and "--resume" in args and "--out" in args[:-1]:
        stored = Path(args[args.index("--out") + 1]) / "config.yaml"
        if stored.is_file():  # go on with the settings the run was started with
            file, values = str(stored), load_yaml(stored)
            values.pop("method", None)
    default = _partial(cls, values, file or command)
    if not {"-h", "--help"} & set(args):
        _check_flags(cls, args, default, command)
    _parsing.append((command, cls))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                prog=f"fiducial {command}",
                default=default,
                args=args,
                config=(tyro.conf.AvoidSubcommands,),
                description=_description(cls),
            )
    except _Refused as refused:
        raise InputError(str(refused)) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(
            f"{command}: {_sentence(said.getvalue())} (fiducial {command} --help explains it)"
        ) from None
    finally:
        _parsing.pop()


def _sentence(box: str) -> str:
    """What the flag parser says in a box, as one sentence: what stands between its title and its
    next rule, drawn in lines or, in a plain terminal, dashes.
    """
    lines = [line.strip(" │|") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line.startswith(("╭", "╰", "─", "--", "+-"))]
    told = (
        " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines)
        .strip()
        .removesuffix(".")
    )
    return told[:1].lower() + told[1:]


def _check_flags(cls: type[Settings], args: Sequence[str], default: Settings, command: str) -> None:
    """One sentence for an unknown flag or a missing one."""
    import tyro

    known = {name for flag in _flags(cls) for name in (flag, "no-" + flag)}
    given = {a[2:].split("=", 1)[0].replace("_", "-") for a in args if a.startswith("--")}
    for flag in sorted(given - known):
        near = (
            difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            or [k for k in sorted(known) if k.endswith(f".{flag}")][:1]
        )
        raise InputError(
            f"{command}: there is no flag --{flag}{f': did you mean --{near[0]}?' if near else ''} "
            f"(fiducial {command} --help lists them)"
        )
    for name in cls.model_fields:
        flag = name.replace("_", "-")
        positional = any(
            m is tyro.conf.Positional or "Positional" in repr(m)
            for m in cls.model_fields[name].metadata
        )
        if getattr(default, name) is tyro.MISSING and flag not in given and not positional:
            raise InputError(
                f"{command}: --{flag} is required (fiducial {command} --help explains it)"
            )


def _flags(cls: type[BaseModel], prefix: str = "") -> list[str]:
    out: list[str] = []
    for name, field in cls.model_fields.items():
        flag = prefix + name.replace("_", "-")
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        out += _flags(field.annotation, flag + ".") if nested else [flag]  # type: ignore[arg-type]
    return out


def _description(cls: type[Settings]) -> str:
    return (
        cls.__doc__ or ""
    ) + "\n\n--config FILE reads any of these from a YAML file first; flags win."


def _take_config(args: list[str]) -> tuple[list[str], str | None]:
    for i, arg in enumerate(args):
        if arg == "--config":
            if i + 1 == len(args):
                raise InputError("--config needs the path of a YAML file")
            return args[:i] + args[i + 2 :], args[i + 1]
        if arg.startswith("--config="):
            return args[:i] + args[i + 1 :], arg.split("=", 1)[1]
    return args, None


def _partial(cls: type[Settings], values: Mapping[str, Any], source: str) -> Any:
    """An instance with what the file gives, defaults elsewhere, and a mark where a flag must still
    come.
    """
    import tyro

    _known(cls, values, source, "")
    fields: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            fields[name] = build(
                annotation,
                {**field.get_default().model_dump(), **values.get(name, {})},
                source=f"{source}: {name}",
            )
        elif name in values:
            value = values[name]
            fields[name] = tuple(value) if isinstance(value, list) else value
        else:
            fields[name] = tyro.MISSING if field.is_required() else field.get_default()
    given = {k: v for k, v in fields.items() if v is not tyro.MISSING}
    try:
        cls(**given)
    except ValidationError as error:
        if values and any(
            e["type"] != "missing" and e["loc"] for e in error.errors()
        ):  # two settings that do not fit: a flag may still mend it
            raise InputError(explain(error, source)) from None
    return cls.model_construct(**fields)


def dump_yaml(settings: Settings, method: str) -> str:
    """The resolved settings as YAML that `--config` reads back."""
    return yaml.safe_dump(
        {"method": method, **settings.model_dump(mode="json")}, sort_keys=False, allow_unicode=True
    )


def command_line() -> str:
    """The command as it was typed."""
    import shlex

    return (
        shlex.join(["fiducial", *sys.argv[1:]])
        if Path(sys.argv[0]).name.startswith(("fiducial", "__main__"))
        else shlex.join(sys.argv)
    )
