"""Reading a source into typed rows. The keys of a row choose its format, and every doubt is an
error that names file, line and key.

The formats are TRL's, so that users' files load unchanged. Text is a plain string or a list of
messages, `[{"role": ..., "content": ...}]`. No value is converted to another type.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from ..errors import InputError
from .common_prompt import split_common_prompt
from .fields import (
    LONE_SURROGATE,
    Object,
    as_answered,
    as_content,
    as_label,
    as_list,
    as_margin,
    as_messages,
    as_prompt,
    as_sampled,
    as_text,
    kind_of,
    must_differ,
    only_text,
    refuse,
)
from .record import EMPTY, Blank
from .row_types import (
    ChatRow,
    CompletionRow,
    Content,
    LabeledRow,
    PreferenceRow,
    PromptRow,
    Row,
    StepsRow,
    TextRow,
)
from .row_types import Message as Message
from .sources import records
from .strict_json import leaves, shown


@dataclass(frozen=True)
class Rows:
    """The rows of a source that can be used, and the number of those that were skipped."""

    rows: list[Row]
    skipped: int
    total: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def read_rows(
    source: str | Path,
    accept: tuple[type, ...],
    *,
    on_error: Literal["stop", "skip"] = "stop",
    skipped: Path | None = None,
) -> Rows:
    """Reads a file or a Hub dataset (see `sources.records`) into rows of the accepted types, in the
    order of the source.

    Args:
        source: a path, or `org/name` with an optional `:split` (train if not given).
        accept: the row types that the caller can use.
        on_error: whether a bad row stops the reading or is skipped and counted.
        skipped: the file that skipped rows are written to, if there are any, as JSON lines with
            where, error and the row's first 2,000 characters.

    Raises:
        InputError: a bad row (unless it is skipped), no good row at all, or a source that cannot be
            read.
    """
    rows: list[Row] = []
    bad: list[dict[str, str]] = []
    for record in records(str(source)):
        try:
            if isinstance(record.value, InputError):
                raise record.value
            rows.append(parse_row(record.value, record.where, accept))
        except InputError as error:
            if on_error == "stop":
                raise
            bad.append({"where": record.where, "error": str(error), "line": record.beginning()})
    if bad and skipped is not None:
        skipped.write_text("".join(json.dumps(entry) + "\n" for entry in bad), encoding="utf-8")
    if bad and not rows:
        raise InputError(
            f"{source}: all {len(bad)} rows were skipped, the first because: {bad[0]['error']}"
        )
    if not rows:
        raise InputError(f"{source}:1: {EMPTY}")
    return Rows(rows, skipped=len(bad), total=len(rows) + len(bad))


def parse_row(record: object, where: str, accept: tuple[type, ...]) -> Row:
    """A record (usually a dict from JSON) as a row of the most specific accepted format whose keys
    it has.

    If `chosen` and `rejected` come without a prompt, their common beginning is the prompt: the
    first messages, a transcript up to the last common "\\n\\nAssistant:", or whole words. Other
    keys are ignored, except that a PromptRow keeps them as columns.

    Raises:
        InputError: names `where`, the key, the problem and the remedy.
    """
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: the row is {kind_of(record)} where an object belongs; write it as "
            '{"key": value, ...}'
        )
    for key, value in record.items():
        for leaf in (key, value) if isinstance(value, str) else leaves({key: value}):
            if (
                isinstance(leaf, str)
                and not leaf.isascii()
                and (lone := LONE_SURROGATE.search(leaf))
            ):
                refuse(
                    where,
                    key,
                    f"holds a lone surrogate ({lone[0]!a}), which is not a character",
                    "remove it or write both surrogates of the pair",
                )
    only_text(record, where)
    # Joined files, Parquet and CSV fill in null or an empty cell for keys that a row does not have.
    present = {k: v for k, v in record.items() if v is not None and not isinstance(v, Blank)}
    form = _fitting(tuple(key for key in present if key in _KEYS), accept)
    if form is None and (empty := _with_gap(record, present, accept)):
        return empty.build(record, where)
    if form is None:
        _refuse_keys(present, where, accept)
    return form.build(record if form.row is PromptRow else present, where)


def _steps_row(record: Object, where: str) -> Row:
    prompt = as_prompt(record["prompt"], "prompt", where)
    steps, labels = (as_list(record[key], key, key, where) for key in ("completions", "labels"))
    if len(steps) != len(labels):
        refuse(
            where,
            "labels",
            f"has {len(labels)} entries for {len(steps)} steps",
            "give one label to each step",
        )
    return StepsRow(
        prompt,
        tuple(as_text(step, f"completions[{i}]", where) for i, step in enumerate(steps)),
        tuple(as_label(label, f"labels[{i}]", where) for i, label in enumerate(labels)),
        where,
        as_sampled(record, "completion_ids", where),
    )


def _completion_row(record: Object, where: str) -> Row:
    if "label" in record and not as_label(record["label"], "label", where):
        refuse(
            where,
            "label",
            "marks the completion as bad, but this command trains on it as a good one",
            "remove the row, or remove the label if it means something else",
        )
    prompt, (completion,) = _prompt_and_answers(record, ("completion",), where)
    return CompletionRow(prompt, completion, where, as_sampled(record, "completion_ids", where))


def _labeled_row(record: Object, where: str) -> Row:
    prompt, (completion,) = _prompt_and_answers(record, ("completion",), where)
    label = as_label(record["label"], "label", where)
    sampled = as_sampled(record, "completion_ids", where)
    return LabeledRow(prompt, completion, label, where, sampled)


def _prompt_and_answers(
    record: Object, keys: tuple[str, ...], where: str
) -> tuple[Content, list[Content]]:
    return as_answered(
        as_prompt(record["prompt"], "prompt", where),
        {key: as_content(record[key], key, where) for key in keys},
        where,
    )


def _preference_row(record: Object, where: str) -> Row:
    if "prompt" not in record:
        prompt, chosen, rejected = split_common_prompt(record, where)
    else:
        prompt, (chosen, rejected) = _prompt_and_answers(record, ("chosen", "rejected"), where)
        must_differ(chosen, rejected, where)
    return PreferenceRow(
        prompt,
        chosen,
        rejected,
        as_margin(record.get("margin"), where),
        where,
        as_sampled(record, "chosen_ids", where),
        as_sampled(record, "rejected_ids", where),
    )


def _chat_row(record: Object, where: str) -> Row:
    messages = as_messages(record["messages"], "messages", where)
    if record.get("tools"):
        refuse(
            where,
            "tools",
            "is not supported",
            "describe the tools in the system message, or remove it",
        )
    if not any(message.role == "assistant" for message in messages):
        refuse(
            where,
            "messages",
            "has no assistant message, so there is nothing to learn",
            "add the answer or remove the row",
        )
    return ChatRow(messages, where)


def _prompt_row(record: Object, where: str) -> Row:
    given = record.get("prompt")
    pair = record.get("chosen") is not None and record.get("rejected") is not None
    prompt = (
        split_common_prompt(record, where)[0]
        if pair and (given is None or isinstance(given, Blank))
        else as_prompt(given, "prompt", where)
    )
    return PromptRow(
        prompt, {key: value for key, value in record.items() if key != "prompt"}, where
    )


class _Format(NamedTuple):
    row: type
    keys: tuple[str, ...]
    build: Callable[[Object, str], Row]
    command: str


_FORMATS = (  # the most specific first
    _Format(StepsRow, ("prompt", "completions", "labels"), _steps_row, "fiducial prm"),
    _Format(LabeledRow, ("prompt", "completion", "label"), _labeled_row, "fiducial prm"),
    _Format(
        PreferenceRow,
        ("prompt", "chosen", "rejected"),
        _preference_row,
        "fiducial reward or fiducial dpo",
    ),
    _Format(
        PreferenceRow, ("chosen", "rejected"), _preference_row, "fiducial reward or fiducial dpo"
    ),
    _Format(CompletionRow, ("prompt", "completion"), _completion_row, "fiducial sft"),
    _Format(ChatRow, ("messages",), _chat_row, "fiducial sft"),
    _Format(
        TextRow,
        ("text",),
        lambda record, where: TextRow(as_text(record["text"], "text", where), where),
        "fiducial sft",
    ),
    _Format(PromptRow, ("prompt",), _prompt_row, "fiducial ppo"),
    _Format(PromptRow, ("chosen", "rejected"), _prompt_row, "fiducial ppo"),
)


_KEYS = frozenset(key for form in _FORMATS for key in form.keys)


@functools.lru_cache(maxsize=256)
def _fitting(keys: tuple[str, ...], accept: tuple[type, ...]) -> _Format | None:
    """The most specific accepted format whose keys are there."""
    fits = (f for f in _FORMATS if f.row in accept and all(key in keys for key in f.keys))
    return next(fits, None)


def _with_gap(record: Object, present: Object, accept: tuple[type, ...]) -> _Format | None:
    """The format that a row without one would have if one of its keys held something.

    Building it refuses the row, by the name of the key.
    """
    matching = [form for form in _FORMATS if all(key in present for key in form.keys)]
    found = set(matching[0].keys) if matching else set()
    whole = [f for f in _FORMATS if f.row in accept and all(key in record for key in f.keys)]
    return next((form for form in whole if found <= set(form.keys)), None)


def _refuse_keys(record: Object, where: str, accept: tuple[type, ...]) -> NoReturn:
    wanted = [form for form in _FORMATS if form.row in accept]
    matching = [form for form in _FORMATS if all(key in record for key in form.keys)]
    found = matching[0] if matching else None
    likeness = {
        key: (key in record) + bool(difflib.get_close_matches(key, record, cutoff=0.7))
        for form in wanted
        for key in form.keys
    }
    nearest = max(
        wanted, key=lambda form: (sum(likeness[key] for key in form.keys), -len(form.keys))
    )
    present = {key for key in nearest.keys if key in record}
    names = " or ".join(dict.fromkeys("+".join(form.keys) for form in wanted))
    if found and present <= set(found.keys):
        takes = f"give this file to {found.command}, or " if found.command else ""
        raise InputError(
            f"{where}: found the keys {'+'.join(found.keys)} where {names} is wanted; {takes}give "
            "a file with the wanted keys"
        )
    keys = ", ".join(shown(key) for key in list(record)[:10]) or "none"
    if not any(likeness.values()):
        raise InputError(
            f"{where}: the keys of a row are missing (found: {keys}; wanted: {names}); rename what "
            "is there, or give another file"
        )
    missing = next(key for key in nearest.keys if key not in record)
    misspelt = difflib.get_close_matches(
        missing, [key for key in record if key not in present], n=1, cutoff=0.6
    )
    remedy = (
        f"rename {shown(misspelt[0])} to '{missing}'" if misspelt else "add it or remove the row"
    )
    refuse(where, missing, f"is missing (found: {keys}; wanted: {names})", remedy)
