"""What rows hold, counted in one pass beside their tokens. No copy of a row is kept but of a few
that are shown: of the others there are counts, lengths and hashes.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from .encoding import added_tokens, tags
from .prepare import text_of
from .render import Rendered, Renderer
from .row_types import (
    ChatRow,
    CompletionRow,
    Content,
    LabeledRow,
    Message,
    PreferenceRow,
    PromptRow,
    Row,
    StepsRow,
    TextRow,
)

MOST = 100_000
"""Rows that are looked at; of more rows, so many at equal distances."""
SHOWN = 3
"""Rows that are kept to be shown."""
TEMPLATES = 64
"""Conversations for which the chat template is asked whether it writes every message."""
LONG = 20
"""Characters from which on a text that stands in another is no coincidence."""
_FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|eot_id|start_header_id|end_header_id|begin_of_text|end|user|assistant"
    r"|system|endoftext|end_of_text)\|>|\[/?INST\]|<(?:start|end)_of_turn>|</s>"
)
"""Control tokens of well-known models."""
_BROKEN = re.compile(
    "\ufffd|\u00c3[\x80-\xbf]|\u00e2\u20ac.|\u00ef\u00bb\u00bf|[\x00-\x08\x0e-\x1f]"
)
"""What is left of text that was decoded with the wrong character set."""


class Survey:
    """Counts over the rows of a source.

    n: counts by name. lengths, labels: number of tokens of each sequence (of a prompt row, of its
    prompt), and of those that are trained on. longer: for each pair 1 if chosen has more tokens, 0
    if fewer, one half if as many, with the prompt of each pair in `pair_prompts`. right: labels of
    steps or solutions. taught: the end tokens that are labels. shown: a few rows and what was made
    of them. leaked: evaluation prompts that are also trained on, of `held`.
    """

    def __init__(self, renderer: Renderer) -> None:
        tokenizer = renderer.tokenizer
        self.renderer = renderer
        self.n: Counter[str] = Counter()
        self.lengths, self.labels = array("I"), array("I")
        self.longer, self.pair_prompts = array("f"), array("q")
        self.right: Counter[bool] = Counter()
        self.taught: Counter[int] = Counter()
        self.shown: list[tuple[Row, Any]] = []
        self.total = self.held = self.leaked = 0
        self._rows: set[int] = set()
        self._prompts: set[int] = set()
        self._folded: set[int] = set()
        self._for: Counter[int] = Counter()
        self._against: Counter[int] = Counter()
        self._labels: dict[int, int] = {}
        self.answers: Counter[int] = Counter()
        self.rejected: Counter[int] = Counter()
        self._last = ""
        self._bos = tokenizer.bos_token_id
        named = {tokenizer.eos_token_id, self._bos, tokenizer.pad_token_id}
        unknown = tokenizer.unk_token_id
        self._unknown = None if unknown in named else unknown
        added, special = added_tokens(tokenizer)
        self._special = frozenset(added[t] for t in special - tags(special)) - {self._unknown}
        self._added = frozenset(added)
        self._turns = frozenset(t for t in renderer.template.structure if len(t) > 1)

    @property
    def prompts(self) -> int:
        """Number of different prompts."""
        return len(self._prompts)

    @property
    def near(self) -> int:
        """Prompts that differ from another one in case and white space alone."""
        return max(0, len(self._prompts) - len(self._folded))

    @property
    def contradictions(self) -> int:
        """Rows whose opposite stands there at least as often, each counted with one of these."""
        both = sum(min(n, self._against[key]) for key, n in self._for.items())
        return both + self.n["other labels"]

    def look(self, rows: Sequence[Row], made: Sequence[Any], most: int = MOST) -> None:
        """Count rows and what was made of each: a sequence, a pair of them, something that has one
        as `rendered`, or the ids of a prompt.
        """
        self.total = len(rows)
        step = max(1, -(-len(rows) // most))
        for i in range(0, len(rows), step):
            self._add(rows[i], made[i])

    def compare(self, rows: Sequence[Row], made: Sequence[Any]) -> None:
        """Count the prompts of evaluation rows, and those that are trained on too, whatever their
        case and white space.
        """
        found = {hash(_folded(text)) for row in rows if (text := _told(row)) is not None}
        self.held, self.leaked = len(found), len(found & self._folded)

    def _add(self, row: Row, made: Any) -> None:
        sequences = _sequences(made)
        if row.where != self._last:  # a conversation may be several sequences
            self._row(row, sequences)
            self._last = row.where
            if len(self.shown) < SHOWN and len(self._prompts) + (not self._prompts) > len(
                self.shown
            ):
                self.shown.append((row, made))
        plain = isinstance(row, TextRow) or isinstance(getattr(row, "prompt", None), str)
        for one in sequences:
            self._sequence(one, plain, text=isinstance(row, TextRow))
            if isinstance(row, ChatRow):
                self.n["all trained"] += one.num_labels >= len(one) - 1
        if not sequences:
            self.n["tokens"] += len(made)
            self.lengths.append(len(made))
            self._begin(made)
        if isinstance(row, PreferenceRow):
            chosen, rejected = sequences
            self._pair(chosen, rejected, hash(text_of(row.prompt)))

    def _sequence(self, one: Rendered, plain: bool, *, text: bool) -> None:
        n, ids, mask, ends = self.n, one.ids, one.mask, self.renderer.ends
        labels = sum(mask)
        n["sequences"] += 1
        n["tokens"] += len(ids)
        n["labels"] += labels
        self.lengths.append(len(ids))
        self.labels.append(labels)
        self._begin(ids)
        if one.truncated:
            n["cut"] += 1
            n["little left"] += labels < 16
        elif mask[-1] and ids[-1] in ends:
            self.taught[ids[-1]] += 1
        else:
            n["no end"] += 1
        if not ends.isdisjoint(ids[:-1]) and any(
            i in ends and here and after
            for i, here, after in zip(ids, mask, mask[1:], strict=False)
        ):
            n["end inside text" if text else "end inside"] += 1
        n["empty"] += labels <= 1 and not one.truncated
        if plain and not self._special.isdisjoint(ids[1:-1]):
            n["special in plain"] += 1

    def _begin(self, ids: Sequence[int]) -> None:
        """How a sequence begins, and tokens that stand for something unknown."""
        n, bos = self.n, self._bos
        n["begun"] += 1
        if bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            n["double bos"] += 1
        begins = self.renderer.encoder.bos
        n["no bos"] += bool(begins) and tuple(ids[:1]) != begins
        if self._unknown is not None and self._unknown in ids:
            n["unknown"] += ids.count(self._unknown)
            n["rows unknown"] += 1

    def _pair(self, chosen: Rendered, rejected: Rendered, prompt: int) -> None:
        a, b = chosen.num_labels, rejected.num_labels
        self.longer.append(0.5 if a == b else float(a > b))
        self.pair_prompts.append(prompt)
        self.n["chosen cut alone"] += chosen.truncated and not rejected.truncated
        self.n["rejected cut alone"] += rejected.truncated and not chosen.truncated

    def _row(self, row: Row, sequences: Sequence[Rendered]) -> None:
        n = self.n
        n["rows"] += 1
        prompt, answers = _parts(row)
        texts = [text_of(a) for a in answers]
        asked = None if prompt is None else text_of(prompt)
        for text in texts if asked is None else (asked, *texts):
            self._characters(text)
        key = hash((asked, *texts))
        n["duplicates"] += key in self._rows and not isinstance(row, PromptRow)
        self._rows.add(key)
        if isinstance(row, PromptRow):
            n["duplicates"] += hash(asked) in self._prompts
            n["answer at the end"] += _answered(asked or "", row.columns)
        if isinstance(row, ChatRow):
            prompt = _before_answer(row)
            asked = None if prompt is None else text_of(prompt)
        if isinstance(row, TextRow):
            self._folded.add(hash(_folded(row.text)))
        self._prompt(row, prompt, asked)
        if isinstance(prompt, str) and texts:
            n["asked in plain"] += 1
            glued = not prompt[-1:].isspace() and not texts[0][:1].isspace()
            n["no space"] += glued
        if asked is not None and not isinstance(row, ChatRow):
            last = _last(prompt)
            for answer in answers:
                said = _last(answer)
                n["prompt repeated"] += len(last) >= LONG and said.lstrip().startswith(last.strip())
                n["answer in prompt"] += len(said.strip()) >= LONG and said.strip() in asked
            n["answered"] += len(answers)
        self._judge(row, asked, texts)

    def _prompt(self, row: Row, prompt: Content | None, asked: str | None) -> None:
        n = self.n
        if asked is not None:
            self._prompts.add(hash(asked))
            self._folded.add(hash(_folded(asked)))
        if isinstance(prompt, str):
            n["plain"] += 1
        elif prompt is not None:
            n["chat"] += 1
            n["system"] += prompt[0].role == "system"
            n["spelled"] += any(t in m.content for m in _messages(row, prompt) for t in self._turns)
            if n["templates"] < TEMPLATES:
                n["templates"] += 1
                self._written(prompt, row.where)

    def _written(self, prompt: Sequence[Message], where: str) -> None:
        """Count messages of people that the chat template leaves out."""
        template = self.renderer.template
        try:
            guarded, _ = template.guarded(prompt, where)
            text = _squeezed(template.render(guarded, where, generation=True))
        except InputError:  # a row that was rendered in another way
            return
        for m in guarded:
            if m.role in ("system", "user") and _squeezed(m.content) not in text:
                self.n[f"dropped {m.role}"] += 1

    def _characters(self, text: str) -> None:
        n = self.n
        if not text.isascii() or not text.isprintable():
            n["broken"] += _BROKEN.search(text) is not None
        if ("<" in text or "[" in text) and (found := _FOREIGN.search(text)):
            n["foreign"] += found[0] not in self._added
        n["texts"] += 1

    def _judge(self, row: Row, asked: str | None, texts: list[str]) -> None:
        """Labels and preferences, and those that contradict an earlier one."""
        if isinstance(row, PreferenceRow):
            chosen, rejected = map(hash, texts)
            first = chosen < rejected
            both = (chosen, rejected) if first else (rejected, chosen)
            (self._for if first else self._against)[hash((asked, *both))] += 1
            self.answers[chosen] += 1
            self.rejected[rejected] += 1
        elif isinstance(row, LabeledRow):
            self.right[row.label] += 1
            (self._for if row.label else self._against)[hash((asked, *texts))] += 1
        elif isinstance(row, StepsRow):
            self.right.update(row.labels)
            now = hash(row.labels)
            known = self._labels.setdefault(hash((asked, *texts)), now)
            self.n["other labels"] += known != now
        elif isinstance(row, CompletionRow):
            self.answers[hash(texts[0])] += 1


def _sequences(made: Any) -> Sequence[Rendered]:
    if isinstance(made, Rendered):
        return (made,)
    if isinstance(made, tuple):
        return made
    return () if isinstance(made, list) else (made.rendered,)


def _parts(row: Row) -> tuple[Content | None, list[Content]]:
    """Prompt and answers of a row; text or a conversation as a whole has no prompt."""
    if isinstance(row, TextRow):
        return None, [row.text]
    if isinstance(row, ChatRow):
        return None, [row.messages]
    if isinstance(row, PreferenceRow):
        return row.prompt, [row.chosen, row.rejected]
    if isinstance(row, StepsRow):
        return row.prompt, ["\n".join(row.completions)]
    return row.prompt, [] if isinstance(row, PromptRow) else [row.completion]


def _before_answer(row: ChatRow) -> Content | None:
    """The messages before the assistant's first."""
    first = next(i for i, m in enumerate(row.messages) if m.role == "assistant")
    return row.messages[:first] or None


def _told(row: Row) -> str | None:
    """What must not stand in training and in evaluation: the prompt, or the text."""
    if isinstance(row, TextRow):
        return row.text
    prompt = _before_answer(row) if isinstance(row, ChatRow) else row.prompt
    return None if prompt is None else text_of(prompt)


def _messages(row: Row, prompt: Sequence[Message]) -> Sequence[Message]:
    """All messages of a row, those of its answers included."""
    if isinstance(row, ChatRow):
        return row.messages
    _, answers = _parts(row)
    return [*prompt, *(m for a in answers if not isinstance(a, str) for m in a)]


def _last(content: Content | None) -> str:
    """The text of a content's last message."""
    if content is None or isinstance(content, str):
        return content or ""
    return content[-1].content


def _answered(prompt: str, columns: dict[str, Any]) -> bool:
    """Whether a prompt ends with what one of the row's columns names as the answer to it."""
    end = prompt.rstrip().rstrip(".")
    return any(
        str(columns[name]).strip() and end.endswith(str(columns[name]).strip().rstrip("."))
        for name in ("answer", "solution", "ground_truth", "target", "reference")
        if isinstance(columns.get(name), str | int | float)
    )


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _squeezed(text: str) -> str:
    return "".join(text.split())
