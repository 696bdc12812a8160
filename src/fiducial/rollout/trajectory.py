"""The only thing that is ever trained on: token ids with what the sampler knew of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens from one source.

    ids: the tokens. logprobs: the sampler's log-probabilities of them, where the policy chose them;
    None for what it was given: a prompt, a tool's output, a user's next turn.
    """

    ids: Sequence[int]
    logprobs: Sequence[float] | None = None


@dataclass(frozen=True)
class Trajectory:
    """N sequences of segments, padded on the right. Column t is about token t.

    Each row begins with its prompt. Behind it stand one or more stretches that the policy chose,
    perhaps with given tokens between them: only the mask says which is which.

    ids: [N, T] all tokens.
    mask: [N, T] true at the tokens that the policy chose, an ending token included.
    logprobs: [N, T] the sampler's own log-probabilities of them at `temperature`, in nats; 0
        elsewhere.
    prompt_lengths, lengths: [N] number of tokens of the prompt, and of the whole row.
    finished: [N] true if the row ended with a stop token, false if it was cut at the limit.
    prompt, sample: [N] number of the prompt and of the response to it: the keys of the row's random
        stream, and its group.
    temperature: at which all of it was sampled.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    finished: Tensor
    prompt: Tensor
    sample: Tensor
    temperature: float

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """[N] number of tokens that the policy chose."""
        return self.mask.sum(1)

    @property
    def last(self) -> Tensor:
        """[N, T] true at the last token that the policy chose: where the final reward is paid."""
        chosen_so_far = self.mask.long().cumsum(1)
        return self.mask & (chosen_so_far == chosen_so_far[:, -1:])

    def slice_rows(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and mask of some rows, as wide as the longest of them."""
        width = int(self.lengths[rows].max())
        return self.ids[rows, :width].to(device), self.mask[rows, :width].to(device)

    def take(self, rows: Sequence[int]) -> Trajectory:
        """Only these rows, in this order."""
        picked = {f: getattr(self, f)[list(rows)] for f in _BY_ROW}
        return Trajectory(**picked, temperature=self.temperature)

    @staticmethod
    def join(parts: Sequence[Trajectory]) -> Trajectory:
        """The rows of all parts, one after the other, as wide as the widest."""
        width = max(p.ids.shape[1] for p in parts)
        wide = {
            f: [F.pad(getattr(p, f), (0, width - p.ids.shape[1])) for p in parts]
            for f in ("ids", "mask", "logprobs")
        }
        joined = {f: torch.cat(wide.get(f) or [getattr(p, f) for p in parts]) for f in _BY_ROW}
        return Trajectory(**joined, temperature=parts[0].temperature)

    def responses(self, *, ending: bool = False) -> list[list[int]]:
        """Token ids behind each prompt, given tokens included, for whoever reads the text.

        The token that ended a row is left out unless `ending` asks for it.
        """
        rows = zip(
            self.ids.tolist(),
            self.prompt_lengths.tolist(),
            self.lengths.tolist(),
            self.finished.tolist(),
            strict=True,
        )
        return [row[a : b - int(finished and not ending)] for row, a, b, finished in rows]

    def segments(self, row: int) -> list[Segment]:
        """The stretches of one row: its prompt, then what the policy chose or was given in turn."""
        ids, mask = self.ids[row].tolist(), self.mask[row].tolist()
        logprobs = self.logprobs[row].tolist()
        start, end = int(self.prompt_lengths[row]), int(self.lengths[row])
        changes = [t for t in range(start + 1, end) if mask[t] != mask[t - 1]]
        cuts = [start, *changes, end] if end > start else [start]
        out = [Segment(ids[:start])]
        for a, b in itertools.pairwise(cuts):
            out.append(Segment(ids[a:b], logprobs[a:b] if mask[a] else None))
        return out

    @staticmethod
    def from_segments(
        rows: Sequence[Sequence[Segment]],
        finished: Sequence[bool],
        prompt: Sequence[int],
        sample: Sequence[int],
        temperature: float,
        pad_id: int = 0,
    ) -> Trajectory:
        """From lists of segments; the first segment of each row is its prompt.

        Raises:
            ValueError: a row begins with tokens that the policy chose, or a segment has not one
                log-probability per token.
        """
        for row in rows:
            if not row or row[0].logprobs is not None:
                raise ValueError("a row begins with its prompt, which the policy did not choose")
            if any(s.logprobs is not None and len(s.logprobs) != len(s.ids) for s in row):
                raise ValueError("a segment needs one log-probability per token")
        lengths = [sum(len(s.ids) for s in row) for row in rows]
        width = max(lengths)
        ids, mask, logprobs = [], [], []
        for row, length in zip(rows, lengths, strict=True):
            pad = width - length
            ids.append([i for s in row for i in s.ids] + [pad_id] * pad)
            mask.append([s.logprobs is not None for s in row for _ in s.ids] + [False] * pad)
            each = [s.logprobs if s.logprobs is not None else [0.0] * len(s.ids) for s in row]
            logprobs.append([lp for some in each for lp in some] + [0.0] * pad)
        return Trajectory(
            torch.tensor(ids, dtype=torch.long),
            torch.tensor(mask, dtype=torch.bool),
            torch.tensor(logprobs, dtype=torch.float32),
            torch.tensor([len(row[0].ids) for row in rows]),
            torch.tensor(lengths),
            torch.tensor(finished),
            torch.tensor(prompt),
            torch.tensor(sample),
            temperature,
        )

    @staticmethod
    def build(
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        finished: Sequence[bool],
        prompt: Sequence[int],
        sample: Sequence[int],
        temperature: float,
        pad_id: int = 0,
    ) -> Trajectory:
        """From ragged lists of single turns: one prompt and one response per row."""
        turns = zip(prompts, responses, logprobs, strict=True)
        rows = [[Segment(p), Segment(r, lp)] for p, r, lp in turns]
        return Trajectory.from_segments(rows, finished, prompt, sample, temperature, pad_id)


_BY_ROW = (
    "ids",
    "mask",
    "logprobs",
    "prompt_lengths",
    "lengths",
    "finished",
    "prompt",
    "sample",
)
