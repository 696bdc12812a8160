"""A response as a reward model reads it.

With the policy's tokens, these are read as they were sampled. With other tokens, prompt and text
are rendered by the reward model's own tokenizer and chat template, with the ending that its
training put behind every response; a response that was cut has no ending.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from ..data.render import Rendered, Renderer, same_tokens
from ..data.row_types import Content, Message, PromptRow
from ..errors import InputError, RunError
from ..models.contract import check_scorer, probe_rows
from ..models.roles import ScoreModel
from .types import Responses

PROBED = 64
"""Prompts from which those are chosen that a model is checked on."""


class Reader:
    """Responses to the token ids of one reward model.

    name: of the reward model. renderer: of the reward model, limited to its context.
    """

    def __init__(self, name: str, renderer: Renderer) -> None:
        self.name, self.renderer, self.limit = name, renderer, renderer.max_length
        self._uncut = replace(renderer, max_length=2**40)
        self._compared: tuple[Renderer, bool] | None = None
        self._endings: dict[bool, list[int]] = {}

    def same_tokens(self, renderer: Renderer) -> bool:
        """Whether the policy has the same tokens as this model, so that nothing is encoded again.

        A pad token that only this model has does not count as a difference.
        """
        if self._compared is None or self._compared[0] is not renderer:
            self._compared = renderer, same_tokens(self.renderer, renderer)
        return self._compared[1]

    def check_rows(self, rows: Sequence[PromptRow]) -> None:
        """Checks that the model's chat template can render the prompts, on the first chat.

        Raises:
            InputError: it cannot.
        """
        for row in itertools.islice((r for r in rows if not isinstance(r.prompt, str)), 1):
            if not self.renderer.tokenizer.chat_template:
                raise InputError(
                    f"{row.where}: the prompt is made of chat messages, and the reward model "
                    f"{self.name} has no chat template: give it the template that it was trained "
                    "with, or write the prompts as plain text"
                )
            self.renderer.prompt(row.prompt, row.where)

    def check_model(self, scorer: ScoreModel, rows: Sequence[PromptRow]) -> None:
        """Checks that the model scores the first prompts as plain transformers does.

        Raises:
            InputError: it does not.
        """
        ids = [self.renderer.prompt(row.prompt, row.where)[: self.limit] for row in rows[:PROBED]]
        if any(ids):
            probed = probe_rows([i for i in ids if i], max(map(len, ids)))
            check_scorer(scorer, probed, self.name, "--reward")

    def read(self, batch: Responses) -> list[Rendered]:
        """Each response with its prompt; the labels are the response and its ending.

        Raises:
            RunError: a sequence is longer than the model's context, or cannot be rendered.
        """
        if self.same_tokens(batch.renderer):
            rows = self._sampled(batch)
        else:
            where = batch.where or [f"response {i}" for i in range(len(batch.completions))]
            finished = batch.trajectory.finished.tolist()
            texts = zip(batch.prompts, batch.completions, finished, where, strict=True)
            try:
                rows = [self._text(*text) for text in texts]
            except InputError as error:
                raise RunError(f"the reward model {self.name}: {error}") from error
        for row in rows:
            if len(row) > self.limit:
                raise RunError(
                    f"{row.where}: prompt and response are {len(row)} tokens, and the reward model "
                    f"{self.name} reads {self.limit}: lower --max-new-tokens, or leave out such "
                    "prompts"
                )
        return rows

    def _sampled(self, batch: Responses) -> list[Rendered]:
        trajectory = batch.trajectory
        where = batch.where or [f"response {i}" for i in range(len(trajectory))]
        lengths = zip(trajectory.prompt_lengths.tolist(), trajectory.lengths.tolist(), strict=True)
        return [
            Rendered(ids[:end], [t >= start for t in range(end)], place)
            for ids, (start, end), place in zip(
                trajectory.ids.tolist(), lengths, where, strict=True
            )
        ]

    def _text(self, prompt: Content, text: str, finished: bool, where: str) -> Rendered:
        if finished:
            return self._uncut.completion(prompt, text, where)
        if text:
            whole, ending = self._uncut.completion(prompt, text, where), self.ending(prompt)
            if whole.ids[-len(ending) :] == ending:
                return Rendered(whole.ids[: -len(ending)], whole.mask[: -len(ending)], where)
        # nothing was said, or the last token of the text also holds the beginning of the ending
        start = self._uncut.prompt(prompt, where)
        ids = self.renderer.tokenizer(text, add_special_tokens=False).input_ids if text else []
        return Rendered([*start, *ids], [False] * len(start) + [True] * len(ids), where)

    def ending(self, prompt: Content) -> list[int]:
        """The ids that the model's training puts behind a response, in plain text or in a chat like
        the prompt: what two short responses have in common.
        """
        text = isinstance(prompt, str)
        if text not in self._endings:
            short: Content = "a" if text else (Message("user", "a"),)
            one, two = (self._uncut.completion(short, c, "a response") for c in ("a", "b"))
            both = zip(reversed(one.ids), reversed(two.ids), strict=False)
            same = [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
            self._endings[text] = same[: min(one.num_labels, two.num_labels) - 1][::-1]
        return self._endings[text]
