"""What each key of a row may hold, and a sentence for each fault."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import InputError
from .row_types import ROLES, Content, Message, SampledIds
from .strict_json import shown

Object = dict[str, Any]
"""A row as it was read: a JSON object."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def refuse(where: str, key: str, problem: str, remedy: str) -> NoReturn:
    """Raises an InputError that names the place, the key, the problem and the remedy."""
    raise InputError(f"{where}: key {shown(key)} {problem}; {remedy}")


def kind_of(value: object) -> str:
    """The JSON type of a value, as messages name it."""
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


def as_text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        refuse(where, key, f"is {kind_of(value)} where text belongs", "write a string")
    if not value.strip():
        refuse(where, key, "is empty", "fill it in or remove the row")
    return value


def as_list(value: object, key: str, entries: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        refuse(
            where,
            key,
            f"is {'an empty list' if value == [] else kind_of(value)} where a list of {entries} "
            "belongs",
            "fill it in or remove the row",
        )
    return value


def as_content(value: object, key: str, where: str) -> Content:
    return as_messages(value, key, where) if isinstance(value, list) else as_text(value, key, where)


_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")


def as_messages(value: object, key: str, where: str) -> tuple[Message, ...]:
    return tuple(
        _message(item, f"{key}[{index}]", where)
        for index, item in enumerate(as_list(value, key, "messages", where))
    )


def _joined_parts(content: list[Any], key: str, where: str) -> object:
    """A content that is a list of parts, as of models that read images too, as one text."""
    if not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            refuse(
                where,
                key,
                f"holds a part of type {shown(repr(part.get('type')), quote=False)}, and only text "
                "is read here",
                "leave the row out, or write the content as text",
            )
    return "".join(part["text"] for part in content) if content else content


def _message(item: object, key: str, where: str) -> Message:
    if not isinstance(item, dict):
        refuse(
            where,
            key,
            f"is {kind_of(item)} where a message belongs",
            'write {"role": ..., "content": ...}',
        )
    if isinstance(item.get("content"), list):
        item = item | {"content": _joined_parts(item["content"], f"{key}.content", where)}
    for name in ("role", "content"):
        if not isinstance(item.get(name), str):
            problem = (
                f"is {kind_of(item[name])} where text belongs" if name in item else "is missing"
            )
            refuse(
                where,
                f"{key}.{name}",
                problem,
                'write every message as {"role": "...", "content": "..."}',
            )
    if item["role"] not in ROLES:
        refuse(
            where,
            f"{key}.role",
            f"is the unknown role {shown(item['role'])}",
            f"use one of {', '.join(ROLES)}",
        )
    # Ignoring these would change what the model is taught. Parquet fills in null for missing keys,
    # so null counts as missing.
    if ignored := next(
        (name for name in _UNSUPPORTED if item.get(name) not in (None, [], "")), None
    ):
        refuse(
            where,
            f"{key}.{ignored}",
            "is not supported",
            "put what it says into the content, or remove it",
        )
    if item["role"] in ("user", "assistant"):
        as_text(item["content"], f"{key}.content", where)
    return Message(item["role"], item["content"])


def as_prompt(value: object, key: str, where: str) -> Content:
    prompt = as_content(value, key, where)
    if isinstance(prompt, tuple):
        if prompt[-1].role == "assistant":
            refuse(
                where,
                key,
                "ends with an assistant message, so there is nothing to answer",
                "end it with the user's message",
            )
        if not any(message.content.strip() for message in prompt):
            refuse(where, key, "is empty", "fill it in or remove the row")
    return prompt


def as_answered(
    prompt: Content, answers: Mapping[str, Content], where: str
) -> tuple[Content, list[Content]]:
    """Prompt and answers in one form: all text, or all messages if one of them is messages."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
        return prompt, list(answers.values())
    opening = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return opening, [
        as_answer(answer, key, prompt, opening, where) for key, answer in answers.items()
    ]


def as_answer(
    answer: Content, key: str, prompt: Content, opening: tuple[Message, ...], where: str
) -> tuple[Message, ...]:
    if isinstance(answer, str):
        return (Message("assistant", answer),)
    if answer[: len(opening)] == opening:  # UltraFeedback repeats the prompt in its answers
        answer = answer[len(opening) :]
    if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant":
        refuse(
            where,
            key,
            "does not begin and end with an assistant message after the prompt",
            "give the answer alone",
        )
    if isinstance(prompt, str) and len(answer) > 1:
        refuse(
            where,
            key,
            "is several messages where the prompt is text",
            "write the prompt as messages too",
        )
    return answer


_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def as_label(value: object, key: str, where: str) -> bool:
    known = _LABELS.get(str(value).strip().lower())
    if known is None:
        refuse(
            where,
            key,
            f"is {kind_of(value)} ({shown(repr(value), quote=False)}) where true or false belongs",
            "write true, false, 1 or 0",
        )
    return known


def as_sampled(record: Object, key: str, where: str) -> SampledIds | None:
    """The token ids under a key, with the fingerprint of their tokenizer; None without them."""
    value, tokenizer = record.get(key), record.get("tokenizer")
    if value is None:
        return None
    if not isinstance(tokenizer, str):  # nobody knows what they are the ids of
        return SampledIds((), "")
    ids = as_list(value, key, "token ids", where)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        refuse(where, key, "holds something else than token ids", "write whole numbers from 0 on")
    return SampledIds(tuple(ids), tokenizer)


_OTHER_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def only_text(record: Object, where: str) -> None:
    """Refuses a row with images, videos or audio: a model would be taught to answer unseen things.

    Raises:
        InputError: names the column.
    """
    for key in record:
        value = record[key]
        if key in _OTHER_MEDIA and value and isinstance(value, str | bytes | list | dict):
            refuse(
                where,
                key,
                "is not supported, because only text is read here and the model would learn to "
                "answer what it cannot see",
                "remove the column if the row makes sense without it, or leave the row out",
            )


def as_margin(value: object, where: str) -> float | None:
    if value is None:  # Parquet fills in null where a row has no margin
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(
            where,
            "margin",
            f"is {kind_of(value)} where a number belongs",
            "write a number or leave the key out",
        )
    if not abs(value) < 1e300:  # NaN, infinity, or an integer too large for a float
        refuse(
            where,
            "margin",
            f"is {shown(repr(value), quote=False)} where a finite number belongs",
            "write one or leave the key out",
        )
    return float(value)


def must_differ(chosen: Content, rejected: Content, where: str) -> None:
    if chosen == rejected:
        refuse(
            where,
            "chosen",
            "is equal to 'rejected', so there is nothing to prefer",
            "remove the row",
        )
