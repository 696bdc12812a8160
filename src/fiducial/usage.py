"""The text of `fiducial VERB --help`: the flat settings, and one line for each section."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from .building import Settings
from .errors import InputError
from .flags import Flag, flags, section_flags, sections

COMMON = """\
  --config FILE
      Read settings from a YAML file first; flags win over it.
  --help [SECTION|all]
      Show this text, the settings of one section, or everything.
  --debug
      Show the traceback of an error."""


def _fill(text: str, width: int, initial_indent: str = "", subsequent_indent: str = "") -> str:
    """Wrapped text; a word with a hyphen, such as the name of a flag, stays in one piece."""
    return textwrap.fill(
        text,
        width,
        initial_indent=initial_indent,
        subsequent_indent=subsequent_indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def usage(cls: type[Settings], command: str, topic: str | None = None) -> str:
    """What `--help`, `--help SECTION` or `--help all` prints.

    Raises:
        InputError: there is no such section.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    inside = sections(cls)
    if topic in inside:
        return _section(cls, command, topic, width)
    if topic not in (None, "all"):
        known = f"the sections are {', '.join(inside)}" if inside else "it has no sections"
        raise InputError(f"{command}: there is no section {topic!r} to explain; {known}, or all")
    parts = [_synopsis(cls, command), _fill(_flat(cls.__doc__), width)]
    own = [flag for flag in flags(cls) if len(flag.path) == 1]
    parts.append("settings:\n" + "\n".join(_entry(flag, width) for flag in own))
    if inside and topic is None:
        parts.append(_folded(cls, command, width))
    elif inside:
        parts += [_section(cls, command, name, width) for name in inside]
    parts.append("also:\n" + COMMON)
    return "\n\n".join(parts)


def _synopsis(cls: type[Settings], command: str) -> str:
    needed = [flag for flag in flags(cls) if flag.required]
    words = [
        _metavar(flag) if flag.positional else f"--{flag.name} {_metavar(flag)}" for flag in needed
    ]
    return f"usage: fiducial {' '.join([command, *words])} [--flag VALUE ...]"


def _folded(cls: type[Settings], command: str, width: int) -> str:
    inside = sections(cls)
    wide = max(map(len, inside))
    lines = []
    for name, values in inside.items():
        count = len(section_flags(cls, name))
        head = f"  {name:<{wide}}  {count:>2} settings  "
        lines.append(
            _fill(
                _flat(type(values).__doc__),
                width,
                initial_indent=head,
                subsequent_indent=" " * len(head),
            )
        )
    example = next(iter(inside))
    return "\n".join(
        [
            f"sections (`fiducial {command} --help {example}` shows one, `fiducial {command} "
            "--help all` shows all):",
            *lines,
        ]
    )


def _section(cls: type[Settings], command: str, name: str, width: int) -> str:
    head = _fill(f"{name}: {_flat(type(sections(cls)[name]).__doc__)}", width)
    return "\n".join([head, *(_entry(flag, width) for flag in section_flags(cls, name))])


def _entry(flag: Flag, width: int) -> str:
    if flag.positional:
        head = f"  {_metavar(flag)}"
    elif flag.switch:
        head = f"  --{flag.name} | --no-{flag.name}"
    else:
        head = f"  --{flag.name} {_metavar(flag)}"
    told = "required" if flag.required else f"default: {shown(flag.default)}"
    return "\n".join(
        [
            f"{head}  ({told})",
            _fill(flag.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    )


def _metavar(flag: Flag) -> str:
    if flag.positional:
        return flag.path[-1].upper()
    names = {"str": "TEXT", "int": "INT", "float": "NUMBER"}
    return " ".join(
        "|".join(
            names.get(word.rstrip("."), word.rstrip(".")) + "..." * word.endswith("...")
            for word in part.split("|")
            if word != "None"
        )
        for part in flag.type.split(" ")
    )


def shown(value: Any) -> str:
    """A default as `--help` and the frozen surface show it."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "none"
    return repr(value) if isinstance(value, str) and (not value or value.isspace()) else str(value)


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())
