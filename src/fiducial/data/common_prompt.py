"""The prompt of a preference row that has none: the common beginning of chosen and rejected."""

from __future__ import annotations

import difflib

from .fields import Object, as_answer, as_content, as_text, must_differ, refuse
from .row_types import Content
from .strict_json import shown

_TURN = "\n\nAssistant:"
_PROMPT_LIKE = ("question", "instruction", "input", "query", "problem")


def split_common_prompt(record: Object, where: str) -> tuple[Content, Content, Content]:
    """Prompt, chosen and rejected, where the prompt is what chosen and rejected have in common.

    Raises:
        InputError: they have no common beginning that can be a prompt.
    """
    chosen, rejected = (as_content(record[key], key, where) for key in ("chosen", "rejected"))
    must_differ(chosen, rejected, where)
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        prompt = chosen[:shared]
        if not prompt or prompt[-1].role == "assistant":
            refuse(
                where,
                "prompt",
                "is missing, and the messages that chosen and rejected have in common do not end "
                "with one to answer",
                "add the prompt",
            )
        return (
            prompt,
            as_answer(chosen, "chosen", prompt, prompt, where),
            as_answer(rejected, "rejected", prompt, prompt, where),
        )
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        refuse(
            where,
            "rejected",
            "has another form than 'chosen': one is text, the other messages",
            "write both in the same form",
        )
    cut = _shared_words(chosen, rejected, shared, record, where)
    if not chosen[:cut].strip():
        refuse(
            where,
            "prompt",
            "is missing, and chosen and rejected have no common beginning, so it would be empty",
            "add the prompt",
        )
    return (
        chosen[:cut],
        as_text(chosen[cut:], "chosen", where),
        as_text(rejected[cut:], "rejected", where),
    )


def _shared_words(chosen: str, rejected: str, shared: int, record: Object, where: str) -> int:
    """Length of the prompt in two texts whose first `shared` characters are equal."""
    if _TURN in chosen and _TURN in rejected:
        last = chosen.rfind(_TURN, 0, shared)
        return last + len(_TURN) if last >= 0 else 0
    # Two answers often begin with the same words. If the question has another key, these words
    # would be taken for the prompt, and nobody would notice.
    if alike := next(
        (
            key
            for key in record
            if key.lower() in _PROMPT_LIKE
            or difflib.get_close_matches(key.lower(), ["prompt"], cutoff=0.85)
        ),
        None,
    ):
        refuse(
            where,
            "prompt",
            f"is missing, and key {shown(alike)} looks like it",
            f"rename {shown(alike)} to 'prompt'",
        )
    if chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace():
        return shared
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    # As in TRL, the space goes to the answer, because tokens begin with their space.
    return shared - 1 if chosen[:shared].endswith(" ") else shared
