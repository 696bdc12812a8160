"""Names that users give: folders of models, files of rows, rewards.

A name that looks like a path and leads nowhere is refused under the flag that gave it, before
anything is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .errors import InputError

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ROW_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")


@dataclass(frozen=True)
class Name:
    """What a setting names: a model, rows, or something that scores."""

    kind: Literal["model", "rows", "scorer"]


ModelName = Annotated[str, Name("model")]
"""A folder with a model, or its name on the Hub."""
RowsName = Annotated[str, Name("rows")]
"""A file of rows, or the name of a Hub dataset."""
ScorerName = Annotated[str, Name("scorer")]
"""A reward model's folder, file.py:function, module:function, or a verifiable reward's name."""


def printable(text: str) -> str:
    """Text for a terminal: control characters, which could move its cursor or rename its window,
    and those that turn the direction of writing are shown as escapes. New lines and tabs stay.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def progress_file(out: str | Path) -> Path:
    """The file beside an unfinished file of rows that says how far it is."""
    return Path(f"{out}.progress.jsonl")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a name on the Hub is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def shortened(name: str | Path, most: int = 120) -> str:
    """A name as a message shows it."""
    text = str(name)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def check_name(kind: Literal["model", "rows", "scorer"], name: str, flag: str) -> None:
    """Checks that a name leads somewhere, without loading anything. Names on the Hub pass.

    A leading `~` is expanded for rows alone, because only their reader expands it.

    Raises:
        InputError: the name looks like a path, and nothing is there.
    """
    if kind == "scorer" and ":" in name and not Path(name).is_dir():
        file = name.rpartition(":")[0]
        if file.endswith(".py") and not Path(file).is_file():
            raise InputError(f"{flag}: there is no file {file}")
        return
    path = Path(name).expanduser() if kind == "rows" else Path(name)
    local = looks_local(name) or (kind == "rows" and path.suffix.lower() in _ROW_FILES)
    if not name.strip():
        raise InputError(f"{flag}: an empty name: give a {'file' if kind == 'rows' else 'folder'}")
    try:
        there = path.exists()
    except OSError as error:
        raise InputError(f"{flag}: {shortened(name)}: {error.strerror}") from error
    if local and not there:
        what = "file" if kind == "rows" else "folder"
        raise InputError(f"{flag}: there is no {what} {shortened(name)}")
