"""Strict reading of JSON: no duplicate keys, no NaN, no infinity, and a sentence for each fault."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from ..errors import InputError


class Unparsable(InputError):
    """The text is not JSON at all, in contrast to JSON that is refused."""


class _Refused(ValueError):
    """Python's parser accepts it, but a file of rows may not hold it."""


class _NotFinite(_Refused):
    """A number that is NaN or infinite."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"key {shown(twice)} occurs twice in one object; keep one of the two")
    return record


def _finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise _NotFinite(
            f"{shown(literal, quote=False)} is not a finite number; write one, or leave the key out"
        )
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)


def shown(text: str, *, quote: bool = True, limit: int = 40) -> str:
    """Any text made fit for an error message: short, printable and on one line."""
    short = ascii(text if len(text) <= limit else text[: limit - 3] + "...")
    return short if quote else short[1:-1]


def strict_json(raw: bytes, where: str, *, bom: bool = False) -> object:
    """The value of a row's bytes; `bom` if they may begin with a byte order mark.

    Raises:
        InputError: the text is refused; `Unparsable` if it is not JSON.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte offset {error.start} (0x{raw[error.start]:02x}) is not UTF-8; save the "
            "file as UTF-8"
        ) from error
    if (nul := raw.find(b"\0")) >= 0:
        raise InputError(
            f"{where}: a raw NUL byte at byte offset {nul}; remove it, or save the file as UTF-8 "
            "if it is UTF-16"
        )
    return strict_json_text(text.removeprefix("\ufeff") if bom else text, where)


def strict_json_text(text: str, where: str) -> object:
    """The value of a text.

    Raises:
        InputError: the text is refused; `Unparsable` if it is not JSON.
    """
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        torn = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        place = (
            "the text is torn: it ends before its JSON does"
            if torn
            else f"not JSON at column {error.colno} ({error.msg})"
        )
        raise Unparsable(
            f"{where}: {place}; write the row again as one whole JSON object"
        ) from error
    except _Refused as error:
        raise InputError(
            f"{where}: {_key_not_finite(text) if isinstance(error, _NotFinite) else ''}{error}"
        ) from error
    except RecursionError as error:
        raise InputError(
            f"{where}: lists or objects are nested too deeply to read; flatten the row"
        ) from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise InputError(
            f"{where}: an integer is too long to read; write it as text or shorten it"
        ) from error


def _key_not_finite(text: str) -> str:
    """The key that holds NaN or an infinity, as the beginning of a message.

    The strict parser does not know the key, so the text is parsed again by the lenient one.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # the text has another fault after the number
        return ""
    for key, value in record.items() if isinstance(record, dict) else ():
        if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves(value)):
            return f"key {shown(key)}: "
    return ""


def leaves(value: object) -> Iterator[object]:
    """All keys of objects inside a value, and everything that is neither a list nor an object.

    It keeps a stack of its own, because a row can nest deeper than Python's calls can.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
        else:
            yield item
