"""Ctrl-C, SIGTERM and SIGHUP: the step that is being made ends, and is saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C; a scheduler that wants its machine back; a terminal that was closed."""


class Stopping:
    """Remembers that a signal asked to stop. The same signal a second time stops at once, and so
    does the first one while `at_once` is true: while there is no step that has to end.

    A launcher passes a signal on as another one (torchrun answers Ctrl-C with SIGTERM), so two
    different signals are one wish.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        after: str = "this step",
        lost: str = "what came after the last checkpoint",
    ) -> None:
        """`say` is told what happens next: what ends first, and what a second signal loses."""
        self.wanted = False
        self.at_once = False
        self._say, self._after, self._lost, self._seen = say, after, lost, set[int]()
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Stopping:
        try:
            for number in SIGNALS:
                # a signal that is ignored on purpose (nohup) stays ignored
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        except ValueError:  # not the main thread: signals are somebody else's to handle
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.at_once or number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        if not self.wanted:
            self.wanted = True
            self._say(
                f"stopping after {self._after}; the same signal (Ctrl-C) again stops at once and "
                f"loses {self._lost}"
            )
