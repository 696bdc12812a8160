"""Argv, --config and --help: the settings of one command from its flags."""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import InputError
from .settings import S, Settings, _known, _parsing, _Refused, build, explain, load_yaml


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
