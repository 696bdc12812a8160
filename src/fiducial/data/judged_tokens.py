"""Findings about how rows became tokens: beginnings, ends, cuts, special tokens, the template."""

from __future__ import annotations

from collections.abc import Callable

from .counted import FEW, MANY, NEVER, counted
from .findings import Finding
from .survey import Survey


def _empty(s: Survey) -> Finding | None:
    n, whole = s.n["empty"], s.n["sequences"]
    found = counted(
        "empty-answers",
        n,
        whole,
        FEW,
        "teach nothing but to end at once",
        "remove them, or look for the column that holds the answers",
        unit="sequences",
    )
    if found is not None and n == whole:
        return Finding("error", found.name, found.sentence, found.change, found.numbers)
    return found


def _double_bos(s: Survey) -> Finding | None:
    token = s.renderer.tokenizer.bos_token
    return counted(
        "double-bos",
        s.n["double bos"],
        s.n["begun"],
        FEW,
        f"begin with two {token}, where the model knows one: it is taught to answer after a "
        "beginning that it never gets from a user",
        "remove it from the text, or from the chat template (--rows.chat-template)",
        unit="sequences",
    )


def _end_inside(s: Survey) -> Finding | None:
    names = _names(s, s.renderer.ends)
    return counted(
        "end-inside-answer",
        s.n["end inside"],
        s.n["sequences"],
        FEW,
        f"have a token that ends a response ({names}) in the middle of what is trained: sampling "
        "stops there, and what follows is never said",
        "remove it from the text, or name another end with --rows.eos-token",
        unit="sequences",
    )


def _no_end(s: Survey) -> Finding | None:
    """Rows that were not cut and whose last label is no end token."""
    return counted(
        "end-not-trained",
        s.n["no end"],
        s.n["sequences"],
        MANY,
        "have no end token as their last label, so that the model learns to go on",
        "raise --max-new-tokens where the responses were sampled, or leave out completion_ids",
        unit="sequences",
    )


def _dropped(s: Survey) -> Finding | None:
    for role in ("system", "user"):
        if count := s.n[f"dropped {role}"]:
            return counted(
                f"{role}-message-dropped",
                count,
                s.n["templates"],
                0.0,
                f"have a {role} message that the chat template does not write, so the model never "
                "sees it",
                "put it into the first user message, or give a template with --rows.chat-template",
                unit="conversations that were tried",
            )
    return None


def _special_in_message(s: Survey) -> Finding | None:
    return counted(
        "special-tokens-in-messages",
        s.n["spelled"],
        s.n["chat"],
        FEW,
        "have a message that spells a token of the chat template; it stays text, and the model "
        "learns to say it as text",
        "remove it: the template writes these tokens itself",
        unit="conversations",
    )


def _foreign(s: Survey) -> Finding | None:
    return counted(
        "foreign-special-tokens",
        s.n["foreign"],
        s.n["texts"],
        FEW,
        "spell a control token of another model (such as <|im_end|> or [INST]), which is no token "
        "of this one and is learned letter by letter",
        "give the rows as messages, so that this model's template renders them",
        unit="texts",
    )


def _cut(s: Survey) -> Finding | None:
    n, whole = s.n["cut"], s.n["sequences"]
    return counted(
        "rows-cut",
        n,
        whole,
        MANY,
        f"are cut at {s.renderer.max_length:,} tokens, so the end of the answer is not learned",
        "raise --rows.max-length if the model's context allows it, or leave such rows out "
        "(--rows.on-long error with --rows.on-error skip)",
        unit="sequences",
    )


def _little_left(s: Survey) -> Finding | None:
    return counted(
        "little-left",
        s.n["little left"],
        s.n["sequences"],
        FEW,
        "keep fewer than 16 tokens of their answer, because the prompt fills "
        f"{s.renderer.max_length:,} tokens",
        "raise --rows.max-length, or shorten the prompts",
        unit="sequences",
    )


def _one_side_cut(s: Survey) -> Finding | None:
    pairs = len(s.longer)
    a, b = s.n["chosen cut alone"], s.n["rejected cut alone"]
    which, other = ("rejected", "chosen") if b > a else ("chosen", "rejected")
    return counted(
        "one-side-cut",
        abs(b - a),
        pairs,
        0.05,
        f"more have {which} cut at {s.renderer.max_length:,} tokens and {other} whole: the missing "
        "end alone tells them apart",
        "raise --rows.max-length, or leave such rows out (--rows.on-long error with "
        "--rows.on-error skip)",
        shown=0.01,
        unit="pairs",
    )


def _all_trained(s: Survey) -> Finding | None:
    return counted(
        "prompt-is-trained",
        s.n["all trained"],
        s.n["sequences"],
        FEW,
        "have no prompt: every token is trained on",
        "give the question as prompt, or as a user's message before the answer",
        unit="sequences",
    )


def _plain(s: Survey) -> Finding | None:
    rows = s.n["plain"] - s.n["special in plain"] // (2 if s.longer else 1)
    if not s.renderer.tokenizer.chat_template or rows <= 0:
        return None
    return counted(
        "plain-text-for-chat-model",
        rows,
        s.n["rows"],
        MANY,
        "are plain text, and the model has a chat template: a user who talks to it through the "
        "template will meet what was not trained",
        'write prompts as messages, [{"role": "user", "content": ...}], unless the model is to be '
        "used without its template",
    )


def _unknown(s: Survey) -> Finding | None:
    return counted(
        "unknown-tokens",
        s.n["unknown"],
        s.n["tokens"],
        0.005,
        f"are {s.renderer.tokenizer.unk_token}: the tokenizer cannot write these characters, and "
        "the model cannot learn to",
        "take a model whose tokenizer knows the language of the rows",
        unit="tokens",
    )


def _no_bos(s: Survey) -> Finding | None:
    token = s.renderer.tokenizer.bos_token
    return counted(
        "bos-missing",
        s.n["no bos"],
        s.n["begun"],
        NEVER,
        f"begin without {token}, which the tokenizer puts before plain text, because the chat "
        "template does not write it",
        "leave it so if the model was trained so, or write it in the template "
        "(--rows.chat-template)",
        unit="sequences",
    )


def _special_in_text(s: Survey) -> Finding | None:
    return counted(
        "special-tokens-in-text",
        s.n["special in plain"],
        s.n["sequences"],
        NEVER,
        "of plain text spell special tokens, which are read as such",
        "leave it so if the text was rendered with the model's template",
        unit="sequences",
    )


def _taught(s: Survey) -> Finding | None:
    """With which tokens answers end, and whether the model's own configs say so."""
    if not s.taught:
        return None
    names, known = _names(s, frozenset(s.taught)), s.renderer.end_ids
    told = f"answers are trained to end with {names}, and sampling stops there"
    if known and not known & set(s.taught):
        told += (
            f"; the model's configs name {_names(s, known)} alone, and the saved model's name both"
        )
    return Finding("note", "end-of-answers", told, numbers={"ends": names})


def _names(s: Survey, ids: frozenset[int]) -> str:
    return ", ".join(map(str, s.renderer.tokenizer.convert_ids_to_tokens(sorted(ids))))


LOOKS: tuple[Callable[[Survey], Finding | None], ...] = (
    _empty,
    _double_bos,
    _end_inside,
    _taught,
    _no_end,
    _dropped,
    _special_in_message,
    _foreign,
    _cut,
    _little_left,
    _one_side_cut,
    _all_trained,
    _plain,
    _unknown,
    _no_bos,
    _special_in_text,
)
