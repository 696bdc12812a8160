"""The flags of a verb, read from its settings class: one row per setting, sections included."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from .building import POSITIONAL, Settings
from .names import Name


@dataclass(frozen=True)
class Flag:
    """One setting on the command line.

    name: the flag without its dashes; `section.key` for a setting of a section.
    path: the names of the fields that lead to it.
    """

    name: str
    path: tuple[str, ...]
    field: FieldInfo
    default: Any

    @property
    def required(self) -> bool:
        return self.field.is_required()

    @property
    def positional(self) -> bool:
        return POSITIONAL in self.field.metadata

    @property
    def optional(self) -> bool:
        """Whether None is a value of it."""
        return type(None) in _members(self.field.annotation)

    @property
    def switch(self) -> bool:
        """Whether it stands without a value: --name or --no-name."""
        return self.field.annotation is bool

    @property
    def many(self) -> bool:
        """Whether it takes several values."""
        return any(get_origin(m) is tuple for m in _members(self.field.annotation))

    @property
    def kind(self) -> Name | None:
        """What the setting names, if it names a model, rows or a scorer."""
        found = [m for m in self.field.metadata if isinstance(m, Name)]
        for member in _members(self.field.annotation):
            for part in (member, *get_args(member)):
                found += [m for m in getattr(part, "__metadata__", ()) if isinstance(m, Name)]
        return found[0] if found else None

    @property
    def type(self) -> str:
        """The type as `--help` shows it."""
        return "|".join(_type(m) for m in _members(self.field.annotation))

    @property
    def text(self) -> str:
        """The sentence that explains it."""
        return " ".join((self.field.description or "").split())


def sections(cls: type[Settings]) -> dict[str, Settings]:
    """The sections of a settings class, each with the values it has by default."""
    return {
        name: field.get_default()
        for name, field in cls.model_fields.items()
        if isinstance(field.get_default(), Settings)
    }


def flags(cls: type[Settings]) -> list[Flag]:
    """Every flag of a verb, those of its sections last."""
    return [*_own(cls), *(flag for name in sections(cls) for flag in section_flags(cls, name))]


def section_flags(cls: type[Settings], section: str) -> list[Flag]:
    """The flags of one section."""
    values = sections(cls)[section]
    return list(_own(type(values), section, values))


def _own(
    cls: type[Settings], section: str | None = None, values: Settings | None = None
) -> Iterator[Flag]:
    for name, field in cls.model_fields.items():
        if not isinstance(field.get_default(), Settings):
            default = field.get_default() if values is None else getattr(values, name)
            path = (name,) if section is None else (section, name)
            yield Flag(".".join(path).replace("_", "-"), path, field, default)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself where it is none."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "None"
    if get_origin(annotation) is Literal:
        return "|".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)
        return f"{_type(inner[0])}..." if inner[-1] is Ellipsis else " ".join(map(_type, inner))
    if hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    return str(annotation.__name__)
