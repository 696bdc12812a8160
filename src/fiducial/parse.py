"""Argv, --config and --help: the settings of one command.

Order of precedence: flags, then the file, then the defaults in the classes. A flag that takes
several values replaces the file's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import verbs
from .building import MissingSetting, S, Settings, build
from .config_file import check_written, load_begun, load_yaml
from .errors import InputError
from .flags import Flag, flags, sections
from .names import check_name, progress_file
from .usage import usage

Given = dict[tuple[str, ...], Any]
"""What the flags gave, by the path of the setting."""


def parse(cls: type[S], args: Sequence[str], *, command: str, verb: str | None = None) -> S:
    """The settings of one command from its flags, over `--config FILE`, over the defaults.

    With `--out DIR --resume` and no file, DIR's own config.yaml is read, so a run goes on with the
    settings it was started with; with `--out FILE --resume` those that FILE was begun with.
    `--help` prints and exits with 0.

    Args:
        verb: whose settings they are, where the command is another one.

    Raises:
        InputError: one sentence that names the flag, or the file and the setting, at fault.
    """
    words = list(args)
    for asks in ("-h", "--help"):
        if asks in words:
            after = words[words.index(asks) + 1 :][:1]
            topic = after[0] if after and not after[0].startswith("-") else None
            print(usage(cls, command, topic))
            raise SystemExit(0)
    words, file = _take_config(words)
    given = _read(cls, words, command)
    values = load_yaml(file, verb or command) if file else {}
    if file is None and given.get(("resume",)) is True and ("out",) in given:
        run, rows = Path(given["out",]) / "config.yaml", progress_file(given["out",])
        if run.is_file():
            file, values = str(run), load_yaml(run, verb or command)
        elif rows.is_file():
            file, values = str(rows), load_begun(rows, verb or command)
    if file is not None:
        check_written(cls, values, file)

    def source(path: tuple[str, ...]) -> str:
        """Who gave a setting: a flag of the command, or the file."""
        if file is None or any(known[: len(path)] == path for known in given):
            return command
        return file if _has(values, path) else command

    try:
        settings = build(cls, _overlay(values, given), source=source)
    except MissingSetting as missing:
        if file is None and given.get(("resume",)) is True and ("out",) in given:
            raise InputError(
                f"--resume: {given['out',]} holds no run to go on with (config.yaml is missing), "
                f"and is no unfinished file ({progress_file(given['out',]).name} is missing)"
            ) from None
        called = next(_called(flag) for flag in flags(cls) if ".".join(flag.path) == missing.name)
        raise InputError(
            f"{command}: {called} is required (fiducial {command} --help explains it)"
        ) from None
    _check_names(settings)
    return settings


def parse_check(args: Sequence[str]) -> tuple[str, Any, bool]:
    """The verb that `fiducial check` was given, its settings, and whether JSON is asked for.

    Raises:
        InputError: as `parse`, or the first word is no verb that trains.
    """
    words = [word for word in args if word != "--json"]
    methods = {method.name: method for method in verbs.METHODS}
    if not words or words[0].startswith("-"):
        parse(verbs.resolve(verbs.CHECK.settings), words, command="check")
        raise InputError(f"check: give the verb first: {', '.join(methods)}")
    name = words[0]
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(methods)}"
        raise InputError(f"check: {name!r} is no verb that trains: {hint}")
    settings = parse(
        verbs.resolve(methods[name].settings), words[1:], command=f"check {name}", verb=name
    )
    return name, settings, "--json" in args


def _read(cls: type[Settings], words: Sequence[str], command: str) -> Given:
    """What the words of a command line give; types are the settings' own business."""
    table = {flag.name: flag for flag in flags(cls)}
    positional = [flag for flag in table.values() if flag.positional]
    given: Given = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if not positional:
                raise InputError(
                    f"{command}: {word!r} belongs to no flag (fiducial {command} --help lists them)"
                )
            given[positional.pop(0).path] = word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-")
        flag = table.get(name)
        if flag is None or flag.positional:
            switch = table.get(name.removeprefix("no-"))
            if switch is None or not switch.switch or equals:
                raise _unknown(cls, name, command)
            given[switch.path] = False
        elif flag.switch:
            if equals:
                raise InputError(
                    f"{command}: --{name} takes no value: give --{name} or --no-{name}"
                )
            given[flag.path] = True
        else:
            values = [value] if equals else _values(rest, flag)
            if not values:
                raise InputError(
                    f"{command}: --{name} needs a value (fiducial {command} --help explains it)"
                )
            _give(given, flag, values)
    return given


def _values(rest: list[str], flag: Flag) -> list[str]:
    """Take the values of a flag from the words that follow it."""
    values: list[str] = []
    while rest and not rest[0].startswith("--") and (flag.many or not values):
        values.append(rest.pop(0))
    return values


def _give(given: Given, flag: Flag, values: list[str]) -> None:
    if values == ["None"] and flag.optional:
        given[flag.path] = None
    elif flag.many:  # given several times, it takes all of them
        given[flag.path] = (*(given.get(flag.path) or ()), *values)
    else:
        given[flag.path] = values[0]


def _unknown(cls: type[Settings], name: str, command: str) -> InputError:
    """One sentence about a flag that does not exist, with the nearest that does."""
    if name in sections(cls):
        return InputError(
            f"{command}: --{name} is a section, not a flag (fiducial {command} --help {name} lists "
            "its settings)"
        )
    field = name.replace("-", "_")
    if field in cls.moved:
        return InputError(f"{command}: --{name}: {cls.moved[field]}")
    known = [
        option
        for flag in flags(cls)
        for option in ((flag.name, f"no-{flag.name}") if flag.switch else (flag.name,))
    ]
    near = (
        difflib.get_close_matches(name, known, n=1)
        or [k for k in sorted(known) if k.endswith(f".{name}")][:1]
    )
    hint = f": did you mean --{near[0]}?" if near else ""
    return InputError(
        f"{command}: there is no flag --{name}{hint} (fiducial {command} --help lists them)"
    )


def _called(flag: Flag) -> str:
    return flag.path[-1].upper() if flag.positional else f"--{flag.name}"


def _take_config(words: list[str]) -> tuple[list[str], str | None]:
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise InputError("--config needs the path of a YAML file")
            return words[:i] + words[i + 2 :], words[i + 1]
        if word.startswith("--config="):
            return words[:i] + words[i + 1 :], word.split("=", 1)[1]
    return words, None


def _overlay(values: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """The file's values with those of the flags laid over them."""
    whole = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for path, value in given.items():
        at = whole
        for section in path[:-1]:
            if not isinstance(at.get(section), dict):
                at[section] = {}
            at = at[section]
        at[path[-1]] = value
    return whole


def _has(values: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    at: Any = values
    for name in path:
        if not isinstance(at, Mapping) or name not in at:
            return False
        at = at[name]
    return True


def _check_names(settings: Settings) -> None:
    """Refuse names that look like paths and lead nowhere, each under its own flag."""
    for flag in flags(type(settings)):
        value: Any = settings
        for name in flag.path:
            value = getattr(value, name)
        if flag.kind is not None and value is not None:
            for name in value if isinstance(value, tuple) else (value,):
                check_name(flag.kind.kind, name, f"--{flag.name}")
