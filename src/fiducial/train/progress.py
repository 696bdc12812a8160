"""What is shown during a run: a bar with the time left in a terminal, and else plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from ..names import printable

LINE_SECONDS = 15.0
READING_SECONDS = 2.0


class Progress:
    """A progress bar: `with Progress("dpo", total) as bar: bar.advance({"loss": 0.5})`.

    Args:
        start: how much was already done before, in a run that is resumed.
        show: false shows nothing, as on all processes but the main one.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, show: bool = True) -> None:
        self.title, self.total, self.show = printable(title), total, show
        self.done = self.first = start
        self.live = show and sys.stderr.isatty()
        self.began = self.said = time.monotonic()

    def __enter__(self) -> Progress:
        if self.live:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self.bar = Bar(*columns, console=Console(stderr=True), transient=False)
            self.task = self.bar.add_task(
                self.title, total=self.total, completed=self.done, numbers=""
            )
            self.bar.start()
        return self

    def advance(self, metrics: Mapping[str, float] | None = None, by: int = 1) -> None:
        """Moves the bar by `by`, and shows a few numbers beside it."""
        self.done += by
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in (metrics or {}).items())
        if self.live:
            self.bar.update(self.task, advance=by, numbers=numbers)
        elif self.show and time.monotonic() - self.said > LINE_SECONDS:
            self.said = time.monotonic()
            left = (
                (self.said - self.began) / max(1, self.done - self.first) * (self.total - self.done)
            )
            print(
                f"{self.title}: {self.done}/{self.total}, about {left:.0f} s left  {numbers}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.bar.stop()


@contextlib.contextmanager
def reading(title: str, *, show: bool = True) -> Iterator[Callable[[float], None]]:
    """Progress of reading a source: a function to call with the share that has been read.

    Nothing is shown of what takes less than two seconds.
    """
    began, bar = time.monotonic(), None

    def told(share: float) -> None:
        nonlocal bar
        if bar is None and time.monotonic() - began > READING_SECONDS:
            bar = Progress(f"{title} (percent)", 100, show=show).__enter__()
            bar.began, bar.said = began, began - LINE_SECONDS
        if bar is not None and int(100 * share) > bar.done:
            bar.advance(by=int(100 * share) - bar.done)

    try:
        yield told
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def say(text: str) -> None:
    """Prints one line to the terminal."""
    print(printable(text), file=sys.stderr, flush=True)
