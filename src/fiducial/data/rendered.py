"""One sequence of tokens with its labels."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence. `mask[t]` is true if token t is a label: a token whose log-probability is
    trained or measured.
    """

    ids: list[int]
    mask: list[bool]
    where: str
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_labels(self) -> int:
        return sum(self.mask)

    def __reduce__(self) -> Any:
        ids = array("i", self.ids).tobytes()
        return _unpacked, (ids, bytes(self.mask), self.where, self.truncated)


def _unpacked(ids: bytes, mask: bytes, where: str, truncated: bool) -> Rendered:
    """A sequence from the bytes that stand for it in a pickle: five for each token."""
    labels: list[Any] = memoryview(mask).cast("?").tolist()
    return Rendered(memoryview(ids).cast("i").tolist(), labels, where, truncated)
