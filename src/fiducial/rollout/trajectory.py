"""The only thing that is ever trained on: token ids with what the sampler knew of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """N sampled responses behind their prompts, padded right. Column t speaks of token t.

    ids: [N, T] prompt and response.
    mask: [N, T] true at the tokens that the policy chose, the ending token included.
    logprobs: [N, T] the sampler's own log-probabilities of them at `temperature`, in nats; 0
    elsewhere. prompt_lengths, lengths: [N] tokens of the prompt; of prompt and response. finished:
    [N] true if the response ended with a stop token, false if it was cut at the limit. prompt,
    sample: [N] number of the prompt and of the response to it: the keys of the response's random
    stream, and its group.
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
        """[N] tokens of each response."""
        return self.lengths - self.prompt_lengths

    @property
    def last(self) -> Tensor:
        """[N, T] true at each response's last token: where the reward of the whole stands."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return columns[None] == (self.lengths - 1)[:, None]

    def slice_rows(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and mask of some rows, as wide as the longest of them."""
        width = int(self.lengths[rows].max())
        return self.ids[rows, :width].to(device), self.mask[rows, :width].to(device)

    def take(self, rows: Sequence[int]) -> Trajectory:
        """Only these responses, in this order."""
        picked = {f: getattr(self, f)[list(rows)] for f in _BY_ROW}
        return Trajectory(**picked, temperature=self.temperature)

    @staticmethod
    def join(parts: Sequence[Trajectory]) -> Trajectory:
        """The responses of all parts, one after the other, as wide as the widest."""
        width = max(p.ids.shape[1] for p in parts)
        wide = {
            f: [F.pad(getattr(p, f), (0, width - p.ids.shape[1])) for p in parts]
            for f in ("ids", "mask", "logprobs")
        }
        return Trajectory(
            **{f: torch.cat(wide.get(f) or [getattr(p, f) for p in parts]) for f in _BY_ROW},
            temperature=parts[0].temperature,
        )

    def responses(self, *, ending: bool = False) -> list[list[int]]:
        """Token ids of each response, without the token that ended it unless asked for."""
        out = []
        for row, start, stop, finished in zip(
            self.ids.tolist(),
            self.prompt_lengths.tolist(),
            self.lengths.tolist(),
            self.finished.tolist(),
            strict=True,
        ):
            out.append(row[start : stop - int(finished and not ending)])
        return out

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
        """From ragged lists, one entry a response."""
        n = len(responses)
        prompt_lengths = [len(p) for p in prompts]
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        width = max(lengths)
        ids = torch.full((n, width), pad_id, dtype=torch.long)
        mask = torch.zeros((n, width), dtype=torch.bool)
        kept = torch.zeros((n, width))
        for i, (p, r, lp) in enumerate(zip(prompts, responses, logprobs, strict=True)):
            ids[i, : lengths[i]] = torch.tensor([*p, *r])
            mask[i, len(p) : lengths[i]] = True
            kept[i, len(p) : lengths[i]] = torch.tensor(lp)
        return Trajectory(
            ids,
            mask,
            kept,
            torch.tensor(prompt_lengths),
            torch.tensor(lengths),
            torch.tensor(finished),
            torch.tensor(prompt),
            torch.tensor(sample),
            temperature,
        )


_BY_ROW = ("ids", "mask", "logprobs", "prompt_lengths", "lengths", "finished", "prompt", "sample")
