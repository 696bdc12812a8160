"""From plain values to frozen, validated settings; an unknown key is an error that offers the
nearest name.

Order of precedence: flags, then the file, then the defaults in the classes. This module imports
nothing heavy.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from .errors import InputError

S = TypeVar("S", bound="Settings")

POSITIONAL = "positional"
"""Marks a setting that is given without a flag: `Annotated[str, POSITIONAL]`."""
SHOWN = 80
"""Characters of a user's value that a message repeats."""


class Settings(BaseModel):
    """Frozen; nothing is coerced beyond what a flag needs; an unknown key is refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
    moved: ClassVar[Mapping[str, str]] = {}
    """Names that a user may expect here, and the sentence that says where to find them."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and is_number(cls.model_fields[str(info.field_name)]):
            raise PydanticCustomError("switch", "input should be a number")
        return value


def is_number(field: FieldInfo) -> bool:
    """Whether a setting is a single number."""

    def kinds(annotation: Any) -> set[Any]:
        inner = get_args(annotation)
        return {annotation} if not inner else set().union(*map(kinds, inner))

    return kinds(field.annotation) <= {int, float, type(None)} and field.annotation is not None


def build(
    cls: type[S],
    values: Mapping[str, Any],
    *,
    source: str | Callable[[tuple[str, ...]], str] = "settings",
) -> S:
    """`cls` from nested plain values; a section keeps the method's defaults where it gives none.

    Args:
        source: who gave the values, for messages; by the path of the setting where several did.

    Raises:
        InputError: one sentence that names the setting at fault.
    """
    named = source if callable(source) else lambda path: source
    _check_known(cls, values, named, ())
    whole = dict(values)
    for name, field in cls.model_fields.items():
        default = field.get_default()
        if isinstance(default, Settings) and isinstance(whole.get(name), Mapping):
            whole[name] = default.model_dump() | whole[name]
    try:
        return cls(**whole)
    except ValidationError as error:
        raise _refusal(error, named) from None


_IN_WORDS = {
    "float_parsing": "input should be a number",
    "int_parsing": "input should be a whole number",
    "int_from_float": "input should be a whole number",
}
"""Faults that pydantic tells in words about parsing."""


class MissingSetting(InputError):
    """A setting without a default was not given; `name` is the setting."""

    def __init__(self, source: str, name: str) -> None:
        super().__init__(f"{source}: --{name.replace('_', '-')} is required")
        self.name = name


def _refusal(error: ValidationError, source: Callable[[tuple[str, ...]], str]) -> InputError:
    """The first fault of a pydantic error as one sentence."""
    # what is wrong comes before what is not there
    first = min(error.errors(), key=lambda e: e["type"] == "missing")
    path = tuple(part for part in first["loc"] if isinstance(part, str))
    told = source(path)
    message = _IN_WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "value_error":
        return InputError(f"{told}: {message}")
    flag = f"--{'.'.join(path).replace('_', '-')}"
    if first["type"] == "missing":
        if len(path) == len(first["loc"]):
            return MissingSetting(told, ".".join(path))
        return InputError(f"{told}: {flag} needs more values")
    given = first["input"]
    shown = given if isinstance(given, str) and given.strip() else repr(given)
    if len(shown) > SHOWN:
        shown = f"{shown[:SHOWN]}... ({len(shown):,} characters)"
    return InputError(f"{told}: {flag}: {message[0].lower()}{message[1:]}, not {shown}")


def _check_known(
    cls: type[BaseModel],
    values: Mapping[str, Any],
    source: Callable[[tuple[str, ...]], str],
    path: tuple[str, ...],
) -> None:
    """Refuse a name that is no setting, and offer the nearest that is."""
    for key, value in values.items():
        here = (*path, str(key))
        name, field = ".".join(here), cls.model_fields.get(str(key))
        if field is None:
            if issubclass(cls, Settings) and key in cls.moved:
                raise InputError(f"{source(here)}: {name}: {cls.moved[key]}")
            near = difflib.get_close_matches(str(key), list(cls.model_fields), n=1, cutoff=0.5)
            hint = (
                f": did you mean {'.'.join((*path, near[0]))}?"
                if near
                else f"; there are {', '.join(cls.model_fields)}"
            )
            raise InputError(f"{source(here)}: unknown setting {name}{hint}")
        if isinstance(field.get_default(), Settings) and not isinstance(value, Settings):
            if not isinstance(value, Mapping):
                raise InputError(
                    f"{source(here)}: {name} is a section: write its settings below it"
                )
            _check_known(type(field.get_default()), value, source, here)
