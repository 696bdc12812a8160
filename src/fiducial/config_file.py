"""The YAML file of settings: plain values, each name once, and bounded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from .building import SHOWN, Settings, is_number
from .errors import InputError

BESIDE = ("method", "resumed")
"""What a run's config.yaml says beside its settings: the verb, and what changed on resume."""


class Dumped(Protocol):
    """Settings, as far as they are written to a file."""

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `1:00` and `2020-01-01` are text, and `no` is no switch. A name that
    is given twice and an alias are refused: one value would be lost, or grow without a bound.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor}: write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or name in seen:
                problem = "a name must be plain text" if name is None else f"{name} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def load_yaml(path: str | Path, verb: str | None = None) -> dict[str, Any]:
    """The settings in a YAML file, without what a run's config.yaml says beside its settings.

    Args:
        verb: the command that reads the file; a file of another one is refused.

    Raises:
        InputError: there is no such file, or it is not a mapping; with the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--config: there is no file {path}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except RecursionError:
        raise InputError(f"{path}: its values are nested too deeply for settings") from None
    except OSError as error:
        raise InputError(f"--config: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {problem[:SHOWN]}"
        ) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(
            f"{path}:1: expected settings as `name: value` lines, got a {type(data).__name__}"
        )
    if verb is not None and (other := data.get("method", verb)) != verb:
        raise InputError(
            f"{path}: these are the settings of {str(other)[:SHOWN]}, and this command is {verb}"
        )
    return {name: value for name, value in data.items() if name not in BESIDE}


def load_begun(path: str | Path, verb: str) -> dict[str, Any]:
    """The settings of the command that began a file of rows, from the file beside it.

    Raises:
        InputError: it is damaged, or another verb began the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            head = json.loads(file.readline())
        begun, settings = head["verb"], dict(head["settings"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"--resume: {path} is damaged, so it is not known how the file was begun: remove it, "
            "and start again with another --out"
        ) from error
    if begun != verb:
        raise InputError(f"--resume: {path} is of {str(begun)[:SHOWN]}, and this command is {verb}")
    return settings


def check_written(
    cls: type[Settings], values: Mapping[str, Any], file: str, path: tuple[str, ...] = ()
) -> None:
    """Refuse text where a number belongs, which a flag may hold and a file may not.

    Raises:
        InputError: with the name of the setting.
    """
    for key, value in values.items():
        field, here = cls.model_fields.get(str(key)), (*path, str(key))
        if field is None:
            continue
        section = field.get_default()
        if isinstance(section, Settings) and isinstance(value, Mapping):
            check_written(type(section), value, file, here)
        elif isinstance(value, str) and is_number(field):
            raise InputError(
                f"{file}: --{'.'.join(here).replace('_', '-')}: expected a number, not the text "
                f"{value[:SHOWN]!r}"
            )


def dump_yaml(settings: Dumped, method: str) -> str:
    """The resolved settings as YAML that `--config` reads back."""
    return yaml.safe_dump(
        {"method": method, **settings.model_dump(mode="json")}, sort_keys=False, allow_unicode=True
    )
