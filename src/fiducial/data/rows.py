"""Typed rows, and turning one dict into one row: the keys choose the format, and whatever is not
plainly right is an error naming file, line and key.

The formats are TRL's, so that users' files load unchanged; text is a plain string or ``[{"role",
"content"}]`` messages. Nothing is coerced.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from ..errors import InputError
from .sources import EMPTY, leaves, records, shown

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


Content = str | tuple[Message, ...]
"""Plain text, which no template touches, or the messages of a chat, which the model's template
renders.
"""


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text, every token of which is learned."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A whole conversation with at least one assistant message."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to answer, with the row's other columns for the reward functions."""

    prompt: Content
    columns: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt and one answer to it. Here and below, prompt and answers are all text or all messages."""

    prompt: Content
    completion: Content
    where: str


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two different answers to one prompt, the better one first; margin is by how much, where the
    file says.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None
    where: str


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """An answer and whether it is good."""

    prompt: Content
    completion: Content
    label: bool
    where: str


@dataclass(frozen=True, slots=True)
class StepsRow:
    """The steps of one answer and whether each is right."""

    prompt: Content
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    where: str


Row = TextRow | ChatRow | PromptRow | CompletionRow | PreferenceRow | LabelledRow | StepsRow


@dataclass(frozen=True)
class Rows:
    """What a source held: the rows that can be used, and how many could not."""

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
    """Reads a file or a Hub dataset (see ``sources.records``) into rows of the accepted types, in
    the order of the source.

    Args:
        source: a path, or ``org/name`` with an optional ``:split`` (train if not given).
        accept: the row types that the caller can use.
        on_error: whether a bad row stops the reading or is counted and left out.
        skipped: where rows left out go, if there are any, as JSON lines of where, error and the
            row's first 2,000 characters.

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
    """The row that a record (usually a dict from JSON) stands for, in the most specific accepted
    format whose keys are all there.

    ``chosen`` + ``rejected`` without a prompt take their common beginning as the prompt: the
    leading messages, the transcript up to the last common ``\\n\\nAssistant:``, or whole common
    words. Keys beyond the format's own are ignored, save that a PromptRow keeps them as columns.

    Raises:
        InputError: names ``where``, the key, what is wrong and what to do.
    """
    if not isinstance(record, dict):
        raise InputError(
            f'{where}: the row is {_kind(record)} where an object belongs; write it as {{"key": value, ...}}'
        )
    for key, value in record.items():
        for leaf in leaves({key: value}):
            if (
                isinstance(leaf, str)
                and not leaf.isascii()
                and (lone := _LONE_SURROGATE.search(leaf))
            ):
                _bad(
                    where,
                    key,
                    f"holds a lone surrogate ({lone[0]!a}), which is no character",
                    "remove it or write the whole pair",
                )
    return _choose(record, where, accept).build(record, where)


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _bad(where: str, key: str, problem: str, remedy: str) -> NoReturn:
    raise InputError(f"{where}: key {shown(key)} {problem}; {remedy}")


def _kind(value: object) -> str:
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        _bad(where, key, f"is {_kind(value)} where text belongs", "write a string")
    if not value.strip():
        _bad(where, key, "is empty", "fill it in or remove the row")
    return value


def _list(value: object, key: str, entries: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        _bad(
            where,
            key,
            f"is {'an empty list' if value == [] else _kind(value)} where a list of {entries} "
            "belongs",
            "fill it in or remove the row",
        )
    return value


def _content(value: object, key: str, where: str) -> Content:
    return _messages(value, key, where) if isinstance(value, list) else _text(value, key, where)


_RENDERED = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")


def _messages(value: object, key: str, where: str) -> tuple[Message, ...]:
    return tuple(
        _message(item, f"{key}[{index}]", where)
        for index, item in enumerate(_list(value, key, "messages", where))
    )


def _message(item: object, key: str, where: str) -> Message:
    if not isinstance(item, dict):
        _bad(
            where,
            key,
            f"is {_kind(item)} where a message belongs",
            'write {"role": ..., "content": ...}',
        )
    for name in ("role", "content"):
        if not isinstance(item.get(name), str):
            problem = f"is {_kind(item[name])} where text belongs" if name in item else "is missing"
            _bad(
                where,
                f"{key}.{name}",
                problem,
                'write every message as {"role": "...", "content": "..."}',
            )
    if item["role"] not in ROLES:
        _bad(
            where,
            f"{key}.role",
            f"is the unknown role {shown(item['role'])}",
            f"use one of {', '.join(ROLES)}",
        )
    # Left out in silence, these would change what the model is taught; null, as Parquet fills in,
    # says nothing.
    if ignored := next((name for name in _RENDERED if item.get(name) not in (None, [], "")), None):
        _bad(
            where,
            f"{key}.{ignored}",
            "is not supported",
            "put what it says into the content, or remove it",
        )
    if item["role"] in ("user", "assistant"):
        _text(item["content"], f"{key}.content", where)
    return Message(item["role"], item["content"])


def _prompt(value: object, key: str, where: str) -> Content:
    prompt = _content(value, key, where)
    if isinstance(prompt, tuple):
        if prompt[-1].role == "assistant":
            _bad(
                where,
                key,
                "ends with an assistant message, so there is nothing to answer",
                "end it with the user's message",
            )
        if not any(message.content.strip() for message in prompt):
            _bad(where, key, "is empty", "fill it in or remove the row")
    return prompt


def _answered(
    prompt: Content, answers: Mapping[str, Content], where: str
) -> tuple[Content, list[Content]]:
    """Prompt and answers in one form: all text, or, as soon as one of them is messages, all messages."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
        return prompt, list(answers.values())
    opening = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return opening, [
        _answer(answer, key, prompt, opening, where) for key, answer in answers.items()
    ]


def _answer(
    answer: Content, key: str, prompt: Content, opening: tuple[Message, ...], where: str
) -> tuple[Message, ...]:
    if isinstance(answer, str):
        return (Message("assistant", answer),)
    if answer[: len(opening)] == opening:  # the whole conversation, as UltraFeedback has it
        answer = answer[len(opening) :]
    if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant":
        _bad(
            where,
            key,
            "does not begin and end with an assistant message after the prompt",
            "give the answer alone",
        )
    if isinstance(prompt, str) and len(answer) > 1:
        _bad(
            where,
            key,
            "is several messages where the prompt is text",
            "write the prompt as messages too",
        )
    return answer


def _label(value: object, key: str, where: str) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        _bad(
            where,
            key,
            f"is {_kind(value)} ({shown(repr(value), quote=False)}) where true or false belongs",
            "write true, false, 1 or 0",
        )
    return bool(value)


def _margin(value: object, where: str) -> float | None:
    if value is None:  # what Parquet has for no margin
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        _bad(
            where,
            "margin",
            f"is {_kind(value)} where a number belongs",
            "write a number or leave the key out",
        )
    if not abs(value) < 1e300:  # NaN, infinity, or an integer that is no float
        _bad(
            where,
            "margin",
            f"is {shown(repr(value), quote=False)} where a finite number belongs",
            "write one or leave the key out",
        )
    return float(value)


Object = dict[str, Any]


def _steps_row(record: Object, where: str) -> Row:
    prompt = _prompt(record["prompt"], "prompt", where)
    steps, labels = (_list(record[key], key, key, where) for key in ("completions", "labels"))
    if len(steps) != len(labels):
        _bad(
            where,
            "labels",
            f"has {len(labels)} entries for {len(steps)} steps",
            "give one label to each step",
        )
    return StepsRow(
        prompt,
        tuple(_text(step, f"completions[{i}]", where) for i, step in enumerate(steps)),
        tuple(_label(label, f"labels[{i}]", where) for i, label in enumerate(labels)),
        where,
    )


def _completion_row(record: Object, where: str) -> Row:
    if isinstance(label := record.get("label"), int) and label == 0:
        _bad(
            where,
            "label",
            "marks the completion as bad, and it would be learned as good",
            "remove the row, or a label that means something else",
        )
    prompt, (completion,) = _prompt_and_answers(record, ("completion",), where)
    return CompletionRow(prompt, completion, where)


def _labelled_row(record: Object, where: str) -> Row:
    prompt, (completion,) = _prompt_and_answers(record, ("completion",), where)
    return LabelledRow(prompt, completion, _label(record["label"], "label", where), where)


def _prompt_and_answers(
    record: Object, keys: tuple[str, ...], where: str
) -> tuple[Content, list[Content]]:
    return _answered(
        _prompt(record["prompt"], "prompt", where),
        {key: _content(record[key], key, where) for key in keys},
        where,
    )


def _preference_row(record: Object, where: str) -> Row:
    if "prompt" not in record:
        prompt, chosen, rejected = _common_prompt(record, where)
    else:
        prompt, (chosen, rejected) = _prompt_and_answers(record, ("chosen", "rejected"), where)
        _differ(chosen, rejected, where)
    return PreferenceRow(prompt, chosen, rejected, _margin(record.get("margin"), where), where)


def _differ(chosen: Content, rejected: Content, where: str) -> None:
    if chosen == rejected:
        _bad(
            where,
            "chosen",
            "is equal to 'rejected', so there is nothing to prefer",
            "remove the row",
        )


def _chat_row(record: Object, where: str) -> Row:
    messages = _messages(record["messages"], "messages", where)
    if record.get("tools"):
        _bad(
            where,
            "tools",
            "is not supported",
            "describe the tools in the system message, or remove it",
        )
    if not any(message.role == "assistant" for message in messages):
        _bad(
            where,
            "messages",
            "has no assistant message, so there is nothing to learn",
            "add the answer or remove the row",
        )
    return ChatRow(messages, where)


def _prompt_row(record: Object, where: str) -> Row:
    prompt = (
        _prompt(record["prompt"], "prompt", where)
        if "prompt" in record
        else _common_prompt(record, where)[0]
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
    _Format(LabelledRow, ("prompt", "completion", "label"), _labelled_row, "fiducial prm"),
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
        lambda record, where: TextRow(_text(record["text"], "text", where), where),
        "fiducial sft",
    ),
    _Format(PromptRow, ("prompt",), _prompt_row, "fiducial ppo"),
    _Format(PromptRow, ("chosen", "rejected"), _prompt_row, "fiducial ppo"),
)


def _choose(record: Object, where: str, accept: tuple[type, ...]) -> _Format:
    wanted = [form for form in _FORMATS if form.row in accept]
    matching = [form for form in _FORMATS if all(key in record for key in form.keys)]
    if fit := next((form for form in matching if form.row in accept), None):
        return fit
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
    _bad(where, missing, f"is missing (found: {keys}; wanted: {names})", remedy)


_TURN = "\n\nAssistant:"
_PROMPT_LIKE = ("question", "instruction", "input", "query", "problem")


def _common_prompt(record: Object, where: str) -> tuple[Content, Content, Content]:
    chosen, rejected = (_content(record[key], key, where) for key in ("chosen", "rejected"))
    _differ(chosen, rejected, where)
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        prompt = chosen[:shared]
        if not prompt or prompt[-1].role == "assistant":
            _bad(
                where,
                "prompt",
                "is missing, and the messages that begin both chosen and rejected end with none to "
                "answer",
                "add it",
            )
        return (
            prompt,
            _answer(chosen, "chosen", prompt, prompt, where),
            _answer(rejected, "rejected", prompt, prompt, where),
        )
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        _bad(
            where,
            "rejected",
            "is not of one form with 'chosen', one text and one messages",
            "write both alike",
        )
    cut = _shared_words(chosen, rejected, shared, record, where)
    if not chosen[:cut].strip():
        _bad(
            where,
            "prompt",
            "is missing, and chosen and rejected have no common beginning to take for it, so it "
            "would be empty",
            "add it",
        )
    return (
        chosen[:cut],
        _text(chosen[cut:], "chosen", where),
        _text(rejected[cut:], "rejected", where),
    )


def _shared_words(chosen: str, rejected: str, shared: int, record: Object, where: str) -> int:
    """How much of both texts, equal up to ``shared``, is the prompt."""
    if _TURN in chosen and _TURN in rejected:
        last = chosen.rfind(_TURN, 0, shared)
        return last + len(_TURN) if last >= 0 else 0
    # Two answers often begin alike: with the question under another name, their first words would
    # pass for it in silence.
    if alike := next(
        (
            key
            for key in record
            if key.lower() in _PROMPT_LIKE
            or difflib.get_close_matches(key.lower(), ["prompt"], cutoff=0.85)
        ),
        None,
    ):
        _bad(
            where,
            "prompt",
            f"is missing, and key {shown(alike)} looks like it",
            f"rename {shown(alike)} to 'prompt'",
        )
    if chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace():
        return shared
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    return (
        shared - 1 if chosen[:shared].endswith(" ") else shared
    )  # the space goes to the answer, as in TRL: tokens begin with theirs
