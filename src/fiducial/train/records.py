"""The records of a run: files of JSON lines that only grow, and that a resumed run cuts back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .disk import explained, told
from .folders import cut_after
from .progress import say

NAMES = ("metrics.jsonl", "samples.jsonl")


class Records:
    """The record files in a run folder. Processes that do not write have none of their own."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.lines = dict.fromkeys(NAMES, 0)
        """Number of lines in each file: what a checkpoint knows of them."""

    def add(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Lines at the end of a file.

        Raises:
            RunError: they cannot be written.
        """
        if not self.writes:
            return
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with (
            explained(self.folder / name),
            open(self.folder / name, "a", encoding="utf-8") as file,
        ):
            file.writelines(lines)
        self.lines[name] += len(lines)

    def cut(self, step: int, lines: Mapping[str, int]) -> None:
        """Go back to what the files held at a checkpoint.

        Args:
            step: of the checkpoint. lines: number of lines then, by file; a file that is not named
                keeps all lines up to `step`.

        Raises:
            RunError: they cannot be written.
        """
        if not self.writes:
            return
        for name in NAMES:
            path = self.folder / name
            with explained(path):
                self.lines[name], foreign = cut_after(path, step, lines.get(name))
            if foreign:
                say(f"{path}: {foreign} lines were no records, and are dropped")


def keep_unscored(folder: Path, rows: Iterable[Mapping[str, Any]], step: int) -> str:
    """Keep the responses of a step that could not be scored, in place of those of an earlier step.

    Returns:
        where they are, or why not, as a clause.
    """
    path = folder / "unscored.jsonl"
    lines = [json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows]
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        return told(error, path)
    return f"the {len(lines):,} responses that were not scored are in {path}"
