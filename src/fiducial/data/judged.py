"""Which counts of a survey are findings. Thresholds are heuristics, unless all rows are concerned.

Each function looks at one thing and returns a finding or None.
"""

from __future__ import annotations

from collections.abc import Callable

from ..core import intervals
from .findings import Finding, Level, refuse_errors
from .survey import Survey

FEW = 0.01
"""Share of rows from which on a fault that no row should have is a warning."""
MANY = 0.1
"""The same for what a few rows may well have."""
MOST = 0.5
"""The same for what a good file may have in many rows, and not in most."""


def row_findings(survey: Survey) -> list[Finding]:
    """All findings of the rows, the worst first."""
    found = [f for look in _LOOKS if (f := look(survey)) is not None]
    order: tuple[Level, ...] = ("error", "warning", "note")
    return sorted(found, key=lambda f: order.index(f.level))


def judged(survey: Survey) -> list[Finding]:
    """The same, for a run that is about to begin.

    Raises:
        NothingToLearn: an InputError with all findings, where one of them is an error.
    """
    found = row_findings(survey)
    refuse_errors(found)
    return found


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if whole else 0.0


def _counted(
    s: Survey,
    name: str,
    part: int,
    whole: int,
    limit: float,
    what: str,
    change: str,
    *,
    shown: float = 0.0,
    unit: str = "rows",
) -> Finding | None:
    """A warning where the share reaches the limit, a note above `shown`, or nothing."""
    found = share(part, whole)
    if not part or found < shown:
        return None
    level: Level = "warning" if found >= limit else "note"
    about = {"count": part, "of": whole, "share": found}
    return Finding(level, name, f"{part:,} of {whole:,} {unit} ({found:.1%}) {what}", change, about)


def _double_bos(s: Survey) -> Finding | None:
    token = s.renderer.tokenizer.bos_token
    return _counted(
        s,
        "double-bos",
        s.n["double bos"],
        s.n["begun"],
        FEW,
        f"begin with two {token}, where the model knows one: it is taught to answer after a "
        "beginning that it never gets from a user",
        "remove it from the text, or from the chat template (--rows.chat-template)",
        unit="sequences",
    )


def _no_bos(s: Survey) -> Finding | None:
    token = s.renderer.tokenizer.bos_token
    return _counted(
        s,
        "bos-missing",
        s.n["no bos"],
        s.n["begun"],
        2.0,
        f"begin without {token}, which the tokenizer puts before plain text, because the chat "
        "template does not write it",
        "leave it so if the model was trained so, or write it in the template "
        "(--rows.chat-template)",
        unit="sequences",
    )


def _no_end(s: Survey) -> Finding | None:
    """Of rows that were not cut."""
    return _counted(
        s,
        "end-not-trained",
        s.n["no end"],
        s.n["sequences"],
        MANY,
        "have no end token as their last label, so that the model learns to go on",
        "raise --max-new-tokens where the responses were sampled, or leave out completion_ids",
        unit="sequences",
    )


def _end_inside(s: Survey) -> Finding | None:
    names = _names(s, s.renderer.ends)
    return _counted(
        s,
        "end-inside-answer",
        s.n["end inside"],
        s.n["sequences"],
        FEW,
        f"have a token that ends a response ({names}) in the middle of what is trained: sampling "
        "stops there, and what follows is never said",
        "remove it from the text, or name another end with --rows.eos-token",
        unit="sequences",
    )


def _cut(s: Survey) -> Finding | None:
    n, whole = s.n["cut"], s.n["sequences"]
    return _counted(
        s,
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
    return _counted(
        s,
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
    return _counted(
        s,
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


def _empty(s: Survey) -> Finding | None:
    n, whole = s.n["empty"], s.n["sequences"]
    found = _counted(
        s,
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


def _all_trained(s: Survey) -> Finding | None:
    return _counted(
        s,
        "prompt-is-trained",
        s.n["all trained"],
        s.n["sequences"],
        FEW,
        "have no prompt: every token is trained on",
        "give the question as prompt, or as a user's message before the answer",
        unit="sequences",
    )


def _duplicates(s: Survey) -> Finding | None:
    return _counted(
        s,
        "duplicate-rows",
        s.n["duplicates"],
        s.n["rows"],
        MANY,
        "repeat an earlier one, and count as often as they stand there",
        "remove the repetitions, unless the weight is meant",
        shown=0.001,
    )


def _near(s: Survey) -> Finding | None:
    return _counted(
        s,
        "near-equal-prompts",
        s.near,
        s.prompts,
        MANY,
        "differ from another prompt in case and white space alone",
        "write them alike, so that they count as one prompt",
        shown=0.001,
        unit="prompts",
    )


def _contradictions(s: Survey) -> Finding | None:
    pairs = len(s.longer)
    found = _counted(
        s,
        "contradicting-pairs" if pairs else "contradicting-labels",
        s.n["contradictions"],
        s.n["rows"],
        0.02,
        "say the opposite of an earlier row "
        + ("(A over B, then B over A)" if pairs else "(the same answer, right and wrong)"),
        "decide such rows by majority, or remove both",
    )
    if found is not None and 2 * s.n["contradictions"] >= 0.95 * s.n["rows"]:
        told = f"{found.sentence}, so nothing is left to learn"
        return Finding("error", found.name, told, found.change, found.numbers)
    return found


def _leak(s: Survey) -> Finding | None:
    return _counted(
        s,
        "evaluation-in-training",
        s.leaked,
        s.held,
        FEW,
        "are also among the prompts to train on (whatever their case and white space), so the "
        "evaluation is optimistic",
        "remove them from --data or from --rows.eval-data; without --rows.eval-data, write equal "
        "prompts alike",
        unit="evaluation prompts",
    )


def _length(s: Survey) -> Finding | None:
    if len(s.longer) < 20:
        return None
    found = intervals.mean(s.longer, s.pair_prompts)
    value, low, high = found["value"], found["low"], found["high"]
    which = "longer" if value >= 0.5 else "shorter"
    won = value if value >= 0.5 else 1 - value
    interval = (low, high) if value >= 0.5 else (1 - high, 1 - low)
    told = (
        f"the {which} answer is chosen in {won:.0%} of {len(s.longer):,} pairs (95%: "
        f"{interval[0]:.0%} to {min(1.0, interval[1]):.0%})"
    )
    numbers = {"share": won, "low": interval[0], "high": interval[1], "pairs": len(s.longer)}
    if interval[0] <= 0.75:
        return Finding("note", "length-baseline", told, numbers=numbers)
    return Finding(
        "warning",
        "length-baseline",
        f"{told}: length alone could be all that is learned",
        f"add pairs in which the {'shorter' if which == 'longer' else 'longer'} answer is better, "
        "or judge by accuracy on pairs of equal length",
        numbers,
    )


def _majority(s: Survey) -> Finding | None:
    right, wrong = s.right[True], s.right[False]
    if not right + wrong:
        return None
    usual = max(right, wrong) / (right + wrong)
    name = "right" if right >= wrong else "wrong"
    numbers = {"right": right, "wrong": wrong, "share": usual}
    if not min(right, wrong):
        told = f"all {right + wrong:,} labels say {name}, so there is nothing to tell apart"
        return Finding("error", "one-label", told, "add solutions of the other kind", numbers)
    told = (
        f"always saying {name} is correct for {usual:.1%} of {right + wrong:,} labels: judge the "
        "accuracy by that"
    )
    if usual <= 0.95:
        return Finding("note", "majority-baseline", told, numbers=numbers)
    change = "add solutions of the other kind"
    return Finding("warning", "majority-baseline", told, change, numbers)


def _same_answer(s: Survey) -> Finding | None:
    for name, answers in (("rejected", s.rejected), ("answer", s.answers)):
        count = max(answers.values(), default=0)
        whole = answers.total()
        if whole >= 20 and s.prompts >= whole / 2 and count >= MOST * whole:
            which = name if name == "rejected" or not s.rejected else "chosen"
            return _counted(
                s,
                "same-answer",
                count,
                whole,
                MOST,
                f"have the very same {which}, whatever the prompt: the model learns that text and "
                "not to look at the prompt",
                "look for a column that was filled in by mistake",
            )
    return None


def _repeated(s: Survey) -> Finding | None:
    return _counted(
        s,
        "prompt-repeated",
        s.n["prompt repeated"],
        s.n["answered"],
        MANY,
        "begin with their prompt, so it stands there twice and the model learns to repeat it",
        "give the answer alone",
        unit="answers",
    )


def _revealed(s: Survey) -> Finding | None:
    if s.n["answer at the end"]:
        return _counted(
            s,
            "answer-in-prompt",
            s.n["answer at the end"],
            s.n["rows"],
            MANY,
            "have a prompt that ends with the answer that the row names, so it need only be copied",
            "cut the prompts before the answer",
        )
    return _counted(
        s,
        "answer-in-prompt",
        s.n["answer in prompt"],
        s.n["answered"],
        MOST,
        "stand word for word in their prompt, so they need only be copied",
        "remove the answer from the prompt, unless copying is the task",
        shown=0.02,
        unit="answers",
    )


def _plain(s: Survey) -> Finding | None:
    rows = s.n["plain"] - s.n["special in plain"] // (2 if s.longer else 1)
    if not s.renderer.tokenizer.chat_template or rows <= 0:
        return None
    return _counted(
        s,
        "plain-text-for-chat-model",
        rows,
        s.n["rows"],
        MANY,
        "are plain text, and the model has a chat template: a user who talks to it through the "
        "template will meet what was not trained",
        'write prompts as messages, [{"role": "user", "content": ...}], unless the model is to be '
        "used without its template",
    )


def _special_in_text(s: Survey) -> Finding | None:
    return _counted(
        s,
        "special-tokens-in-text",
        s.n["special in plain"],
        s.n["sequences"],
        2.0,
        "of plain text spell special tokens, which are read as such",
        "leave it so if the text was rendered with the model's template",
        unit="sequences",
    )


def _special_in_message(s: Survey) -> Finding | None:
    return _counted(
        s,
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
    return _counted(
        s,
        "foreign-special-tokens",
        s.n["foreign"],
        s.n["texts"],
        FEW,
        "spell a control token of another model (such as <|im_end|> or [INST]), which is no token "
        "of this one and is learned letter by letter",
        "give the rows as messages, so that this model's template renders them",
        unit="texts",
    )


def _dropped(s: Survey) -> Finding | None:
    for role in ("system", "user"):
        if count := s.n[f"dropped {role}"]:
            return _counted(
                s,
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


def _system(s: Survey) -> Finding | None:
    without = s.n["chat"] - s.n["system"]
    if not s.n["system"] or not without:
        return None
    return _counted(
        s,
        "system-message-missing",
        min(without, s.n["system"]),
        s.n["chat"],
        2.0,
        f"{'lack' if without <= s.n['system'] else 'have'} the system message that the others "
        f"{'have' if without <= s.n['system'] else 'lack'}",
        "give all rows the system message that users will meet",
        unit="conversations",
    )


def _broken(s: Survey) -> Finding | None:
    return _counted(
        s,
        "broken-characters",
        s.n["broken"],
        s.n["texts"],
        FEW,
        "hold characters of a wrong decoding (U+FFFD, or such as Ã© for é) or control characters",
        "write the file again as UTF-8 from its source",
        unit="texts",
    )


def _unknown(s: Survey) -> Finding | None:
    return _counted(
        s,
        "unknown-tokens",
        s.n["unknown"],
        s.n["tokens"],
        0.005,
        f"are {s.renderer.tokenizer.unk_token}: the tokenizer cannot write these characters, and "
        "the model cannot learn to",
        "take a model whose tokenizer knows the language of the rows",
        unit="tokens",
    )


def _no_space(s: Survey) -> Finding | None:
    if s.n["asked in plain"] < 20:
        return None
    return _counted(
        s,
        "no-space-before-answer",
        s.n["no space"],
        s.n["asked in plain"],
        2.0,
        "have no white space between prompt and answer",
        "end the prompts with a new line if the two are different words",
        shown=MOST,
    )


def _names(s: Survey, ids: frozenset[int]) -> str:
    return ", ".join(map(str, s.renderer.tokenizer.convert_ids_to_tokens(sorted(ids))))


_LOOKS: tuple[Callable[[Survey], Finding | None], ...] = (
    _empty,
    _majority,
    _contradictions,
    _double_bos,
    _end_inside,
    _no_end,
    _dropped,
    _special_in_message,
    _foreign,
    _repeated,
    _revealed,
    _same_answer,
    _leak,
    _length,
    _cut,
    _little_left,
    _one_side_cut,
    _all_trained,
    _plain,
    _unknown,
    _broken,
    _duplicates,
    _near,
    _system,
    _no_bos,
    _special_in_text,
    _no_space,
)
