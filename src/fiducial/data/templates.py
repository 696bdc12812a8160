"""Chat templates: the prompt of an assistant's turn, and the text that follows it.

The prompt of a turn is what the model is asked with when it is sampled: the messages before it and
the template's generation prompt. The answer is what the template writes after that for the turn
itself, up to the token that ends the turn. So a turn has a prompt and an answer of its own also
where a template rewrites or drops earlier turns, or drops the thinking of the turn itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import InputError
from .bounded import MEMORY, SECONDS, TimeUp, bounded
from .encoding import GUARD, added_tokens, spelled, tags
from .row_types import Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PROBE = "\ufdd1"
"""Stands for the content of a turn. Unicode reserves it as no character."""
_TAG = r"<([A-Za-z][\w-]*)>"
_EMPTY_TAG = re.compile(_TAG + r"\s*</\1>\s*$")


GIVEN = "fiducial_chat_template"
"""The attribute of a tokenizer that says which setting gave it its template."""


class EndlessTemplate(InputError):
    """A chat template takes too much time or memory: no other conversation is tried."""


@dataclass(frozen=True)
class Turn:
    """An assistant's turn as text.

    prompt: what it is sampled after. answer: what follows, up to the token that ends the turn.
    opened: the tag that the prompt opens, where the answer had nothing for it.
    """

    prompt: str
    answer: str
    opened: str = ""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    ends: ids that end a response; the token with which the template ends a turn is among them.
    tail: what the template writes after the content of the last turn; "" if it is not known.
    parts: it reads contents as lists of parts, as templates of models for text and images do.
    """

    tokenizer: Any
    ends: frozenset[int]
    tail: str = ""
    parts: bool = False
    _added: dict[str, int] = field(default_factory=dict, repr=False)
    _words: frozenset[str] = frozenset()
    _control: frozenset[str] = frozenset()
    _structure: frozenset[str] = frozenset()

    @staticmethod
    def of(tokenizer: Any, ends: frozenset[int]) -> ChatTemplate:
        """Finds out by rendering a short conversation."""
        added, special = added_tokens(tokenizer)
        named = {t for t in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) if t}
        named |= {t for t, i in added.items() if i in ends}
        found = ChatTemplate(tokenizer, ends, _added=added, _words=frozenset(added))
        if not tokenizer.chat_template:
            return found
        asked = (Message("user", "a"),)
        try:
            found = replace(found, parts=not found._writes_text())
            alone, prompt = (found.render(asked, "", generation=g) for g in (False, True))
            _, tail = found._around(asked, "")
        except EndlessTemplate:
            raise
        except InputError:  # a template that refuses a short conversation may take a longer one
            alone = prompt = tail = ""
        free = tags(added) - named - {t for t in added if t in alone}
        structure = (named | {t for t in added if t in alone + prompt + tail}) - free
        control = (special | structure) - free
        found = replace(found, tail=tail, _control=control, _structure=frozenset(structure))
        end = found._end_of(tail)
        return found if end is None else replace(found, ends=ends | {added[end]})

    @property
    def structure(self) -> frozenset[str]:
        """The special tokens that begin and end turns and texts."""
        return self._structure

    def render(self, messages: Sequence[Message], where: str, *, generation: bool = False) -> str:
        """The text of messages.

        Raises:
            InputError: there is no template, or it refuses the messages.
            EndlessTemplate: it takes too much time or memory for them.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{where}: this row is made of chat messages and the tokenizer has no chat "
                "template: give one with --rows.chat-template (chatml or a Jinja file), or write "
                "the prompt as plain text"
            )
        plain = [{"role": m.role, "content": self._content(m.content)} for m in messages]
        apply = self.tokenizer.apply_chat_template
        try:
            return str(
                bounded(lambda: apply(plain, tokenize=False, add_generation_prompt=generation))
            )
        except TimeUp:
            what = f"did not end within {SECONDS:g} s: it loops"
        except MemoryError:
            what = f"needs more than {MEMORY >> 20:,} MiB of memory"
        except Exception as error:
            raise InputError(
                f"{where}: the chat template refuses these messages: {self._refusal(error)}"
            ) from error
        raise EndlessTemplate(
            f"{where or 'a short conversation'}: the chat template ({self._source()}) {what}; give "
            "another one with --rows.chat-template"
        )

    def _refusal(self, error: Exception) -> str:
        """What an error says; where the sandbox or the template's code is at fault, which one."""
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else text[:297] + "..."
        asked = type(error).__name__ == "TemplateError"  # the template's own raise_exception
        return text if asked else f"{text} ({self._source()})"

    def _source(self) -> str:
        """Where the template is from."""
        given = getattr(self.tokenizer, GIVEN, None)
        return given or f"of the tokenizer in {self.tokenizer.name_or_path}"

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.parts else text

    def guarded(self, messages: Sequence[Message], where: str) -> tuple[tuple[Message, ...], bool]:
        """The messages with a cut in each control token that a content spells, and whether one did.

        What people write is text. It cannot begin or end a turn, whatever it spells. Tags such as
        <think> stay tokens, and so do, in an assistant's answer, special tokens that do not
        separate turns: the model may say them.

        Raises:
            InputError: a content holds one of the two characters that are reserved here.
        """
        out, found = [], False
        for message in messages:
            if GUARD in message.content or _PROBE in message.content:
                raise InputError(
                    f"{where}: a message holds U+FDD0 or U+FDD1, which are no characters; remove it"
                )
            control = self._structure if message.role == "assistant" else self._control
            content, here = spelled(message.content, control)
            out.append(replace(message, content=content))
            found = found or here
        return tuple(out), found

    def turn(self, messages: Sequence[Message], number: int, where: str) -> Turn:
        """The turn of an assistant, which is message `number` of guarded messages.

        Raises:
            InputError: the template refuses the messages, or it is unknown where the turn begins.
        """
        before, content = messages[:number], messages[number].content
        full = self.render(messages[: number + 1], where)
        header = ""
        tail = self.tail
        if not before or not tail or not full.endswith(tail):
            header, tail = self._around(before, where)
        prompt = self.render(before, where, generation=True) if before else header
        shown = full[: len(full) - len(tail)] if full.endswith(tail) else full
        natural = full.startswith(prompt) and full.endswith(tail)
        if natural and not _dropped(
            content, shown[-2 * len(content) - 400 :], shown[len(prompt) :]
        ):
            return Turn(prompt, shown[len(prompt) :] + self._ended(tail))
        header, tail = self._around(before, where)
        opened = self._opened(before, prompt, header, where)
        return _behind(prompt, opened, content, self._ended(tail))

    def _writes_text(self) -> bool:
        """Whether contents may be plain text."""
        try:
            return _PROBE in self.render((Message("user", _PROBE),), "")
        except EndlessTemplate:
            raise
        except InputError:
            return _PROBE not in replace(self, parts=True).render((Message("user", _PROBE),), "")

    def _around(self, before: Sequence[Message], where: str) -> tuple[str, str]:
        """What the template writes before and after the content of a last assistant's turn."""
        text = self.render((*before, Message("assistant", _PROBE)), where)
        header, found, tail = text.partition(_PROBE)
        if not found or _PROBE in tail:
            raise _unknown(where, "does not write what an assistant's message says once")
        return header, tail

    def _opened(self, before: Sequence[Message], prompt: str, header: str, where: str) -> str:
        """What the generation prompt writes beyond the beginning of a turn, such as <think>.

        Raises:
            InputError: the prompt does not end as a turn begins.
        """
        if not before:
            return ""
        alone = self.render(before, where)
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, alone, strict=False)) if a != b),
            min(len(prompt), len(alone)),
        )
        added = prompt[same:]
        # A template may write an empty thinking where a content has none.
        for begun in (header, _EMPTY_TAG.sub("", header)):
            for end in range(len(added), 0, -1):
                if begun.endswith(added[:end]):
                    return added[end:]
        raise _unknown(
            where, "rewrites earlier turns and begins a turn in another way than it asks for one"
        )

    def _end_of(self, tail: str) -> str | None:
        """The token that ends a turn: the first token after its content, or, of several without a
        gap, the first that is known to end a response. Configs may name only the end of a text.
        """
        tokens = _first_run(tail, self._words)
        known = (t for t in tokens if self._added[t] in self.ends)
        return next(known, tokens[0] if tokens else None)

    def _ended(self, tail: str) -> str:
        """The tail up to the token that ends the turn; all of it if it has none."""
        end = self._end_of(tail)
        return tail if end is None else tail[: tail.find(end) + len(end)]


@lru_cache(maxsize=64)
def _first_run(text: str, words: frozenset[str]) -> tuple[str, ...]:
    """The first of these words in a text, and those that follow it without a gap."""
    either = "|".join(re.escape(t) for t in sorted(words, key=len, reverse=True))
    run = re.search(f"(?:{either})+", text) if words else None
    return tuple(re.findall(either, run[0])) if run else ()


def _unknown(where: str, what: str) -> InputError:
    return InputError(
        f"{where}: the chat template {what}, so it is unknown which tokens the model is to learn: "
        "give another template with --rows.chat-template, or write the row as plain text"
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _dropped(content: str, end: str, answer: str) -> bool:
    """Whether the template shows only a part of a content.

    Args:
        end: the end of what it shows, prompt included. answer: what it shows after the prompt.
    """
    wanted = _squeezed(content)
    if _squeezed(end).endswith(wanted):
        return False
    return _squeezed(answer) in wanted


def _behind(prompt: str, opened: str, content: str, tail: str) -> Turn:
    """A turn whose whole content follows the prompt, which may have begun it already."""
    begun, text = opened.strip(), content.lstrip()
    if not begun:
        return Turn(prompt, content + tail)
    if text.startswith(begun):
        rest = text[len(opened) :] if text.startswith(opened) else text[len(begun) :]
        return Turn(prompt, rest + tail)
    tag = re.fullmatch(_TAG, begun)
    if tag and f"</{tag[1]}>" not in content:
        return Turn(prompt, f"\n</{tag[1]}>\n\n{content}{tail}", opened=begun)
    return Turn(prompt, content + tail)


def set_chat_template(tokenizer: Any, template: str | None) -> None:
    """Sets the template to `chatml` or to the text of a Jinja file; None keeps the tokenizer's own.

    Raises:
        InputError: the template is neither.
    """
    if template is None:
        return
    if template == "chatml":
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + CHATML
        setattr(tokenizer, GIVEN, "--rows.chat-template chatml")
        return
    path = Path(template)
    if not path.is_file():
        raise InputError(f"--rows.chat-template: {template} is neither chatml nor a file")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    setattr(tokenizer, GIVEN, f"--rows.chat-template {template}")
