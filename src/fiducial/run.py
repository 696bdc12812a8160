"""A run is a folder: opened, recorded, saved, resumed, and closed with a page."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter
from torch import nn

from .config_file import dump_yaml
from .errors import InputError, RunError, Unscored
from .report.alarms import Watch
from .report.card import model_card
from .report.page import write_report
from .settings import TrainingSettings
from .train import checkpoint, machine
from .train.disk import unimportant
from .train.folders import is_free, next_folder
from .train.inputs import record_inputs, unchanged_inputs
from .train.keep import Clock, newest, restore, save, together
from .train.lock import lock_together
from .train.meter import Meter
from .train.nonfinite import Nonfinite
from .train.processes import Processes, lost_peer
from .train.progress import Progress, say
from .train.records import Records, keep_unscored
from .train.resume import changed_settings, note_changes, settled
from .train.step import Stepper
from .train.stopping import Stopping

S = TypeVar("S")


class Run(Generic[S]):
    """One training run; use it as a context.

    path: the run folder. step: number of finished steps. metrics: the newest value of each.
    evaluation: estimates with their intervals, for the summary. model: what was trained, at the
    end. state: what the method keeps from step to step beside modules and optimizers, a frozen
    dataclass that the method replaces; it is saved and restored.
    """

    def __init__(self, method: str, settings: TrainingSettings, *, state: S) -> None:
        self.method, self.settings, self.keep = method, settings, settings.run
        self.processes = Processes(settings.run.timeout_minutes)
        self.meter = Meter(self.processes)
        self.path = Path(settings.out) if settings.out else next_folder(method)
        self.step = 0
        self.state = state
        self.metrics: dict[str, float] = {}
        self.model: Any = None
        self.evaluation: dict[str, dict[str, float]] = {}
        self.rows = self.tokens = self.total = 0
        self.train_seconds = self._seconds = self._step_started = 0.0
        self._summarized = False
        self._records = Records(self.path, writes=self.main)
        self._clock = Clock(self.keep.checkpoint_minutes, self.processes)
        self.nonfinite = Nonfinite(
            self.path,
            self.keep.on_nonfinite,
            self.keep.nonfinite_limit,
            index=self.processes.index,
            where=lambda: f"step {self.step + 1}",
        )
        self._evaluated: tuple[int, float] | None = None
        self._stopping = Stopping(say if self.main else lambda text: None)
        self._stopping.at_once = True  # until the first step begins
        self._bar: Progress | None = None
        self._changed: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}
        self._watch = Watch(self.path, self._plain(), writes=self.main)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.processes.main

    def __enter__(self) -> Run[S]:
        config = self.path / "config.yaml"
        if self.settings.resume:
            self.settings = settled(self.settings, self.processes, config)
            text = dump_yaml(self.settings, self.method)
            self._changed = changed_settings(self.path, self.method, text)
            accept = self.keep.changed_inputs == "accept"
            self._inputs = unchanged_inputs(self.path, self._plain(), accept=accept)
        elif not is_free(self.path):
            raise InputError(
                f"--out: {self.path} exists already: choose another folder, or go on with --resume"
            )
        self.processes.wait()
        self._fresh = is_free(self.path)
        self._lock = lock_together(self.path, self.processes)
        if self.main and not self.settings.resume:
            checkpoint.write_text(config, dump_yaml(self.settings, self.method))
        self.processes.wait()
        machine.seed_everything(self.settings.seed)
        machine.reset_peak_memory()
        self._began = time.monotonic()
        self._stopping.__enter__()
        return self

    def _plain(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
        self._stopping.__exit__()
        try:
            self._close(error)
        finally:
            if self._lock is not None:
                self._lock.release()
        if self.processes.count > 1 and lost_peer(error):
            with self.explained():
                raise RunError(
                    "another process ended, or did not answer within --run.timeout-minutes "
                    f"{self.keep.timeout_minutes:g}: the reason is what that one printed"
                ) from error

    def _close(self, error: BaseException | None) -> None:
        """Keep what a failed run has, and say so; leave nothing of a refused one."""
        saved = (self.path / "checkpoints" / f"checkpoint-{self.step}").exists()
        whole = (
            not self.processes.dirty and self.processes.count == 1 and 0 < self.step < self.total
        )
        if isinstance(error, Exception) and whole and not saved:
            with unimportant("a checkpoint of the last step", self.path):
                self.save_checkpoint()  # the weights are those of the last recorded step
        if error is None or not self.main:
            return
        if isinstance(error, KeyboardInterrupt):
            say(f"stopped at once after step {self.step}: {self.how_to_go_on()}")
        if isinstance(error, InputError):
            if self._fresh:  # refused before it began: the mended command works with this folder
                shutil.rmtree(self.path, ignore_errors=True)
        elif self.path.exists() and not self._summarized:
            self._write_summary("failed", str(error))

    # -- steps

    def stepper(self, module: nn.Module, peak: float, total: int, usual_warmup: int = 0) -> Stepper:
        """The optimizer of a module that this run trains in `total` updates; see `Stepper`."""
        return Stepper(
            module,
            peak,
            self.settings.optimizer,
            total,
            self.processes,
            usual_warmup=usual_warmup,
            nonfinite=self.nonfinite,
        )

    def start(self, total: int, title: str | None = None) -> None:
        """Everything is loaded: restore the newest good checkpoint if this is a resumed run, and
        begin to count time.
        """
        self.total, file = total, self.path / "config.yaml"
        self.settings = settled(self.settings, self.processes, file)
        if self.settings.resume:
            self._restore()
            if self.main and self._changed:
                note_changes(file, dump_yaml(self.settings, self.method), self.step, self._changed)
                if self._changed.keys() & {"steps", "epochs"}:
                    say(f"the learning rate goes on as in a run of {total} steps")
        if self.main:
            self._inputs = record_inputs(self.path, self._plain(), self._inputs)
        self._records.cut(self.step, self._records.lines)
        self._watch.begin()
        self._bar = Progress(
            title or self.method, total, start=self.step, show=self.main
        ).__enter__()
        self._clock = Clock(self.keep.checkpoint_minutes, self.processes)
        self._stopping.at_once = False
        self._step_started = time.monotonic()

    def running(self) -> bool:
        """Whether a step is left."""
        return self.step < self.total

    def due(self, every: int) -> bool:
        """True when the step just ended is a multiple of `every`, or the last."""
        return (every > 0 and self.step % every == 0) or self.step == self.total

    def end_step(
        self, metrics: Mapping[str, float], *, rows: int, tokens: int, show: tuple[str, ...] = ()
    ) -> None:
        """Record a finished step. `rows` and `tokens` are global counts.

        Raises:
            RunError: a metric is not finite.
        """
        now = time.monotonic()
        seconds = now - self._step_started
        self.train_seconds += seconds
        self.step += 1
        self.rows += rows
        self.tokens += tokens
        values = {
            **self.meter.take(),
            **metrics,
            "num_tokens": self.tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if self.nonfinite.skipped_now:  # the metrics of a batch that was left out may be NaN
            values = {k: v for k, v in values.items() if k not in bad}
            self.nonfinite.skipped_now = False
        elif bad:
            raise RunError(
                f"{bad[0]} is {values[bad[0]]} at step {self.step}: nothing of this step was "
                f"saved; {self.how_to_go_on()}"
            )
        if self.nonfinite.skipped:
            values["skipped_updates"] = float(self.nonfinite.skipped)
        self.record(values)
        if self._bar:
            self._bar.advance({k: values[k] for k in show if k in values})
        self.processes.dirty = False
        self._step_started = time.monotonic()

    def record(self, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl at the current step."""
        self.metrics.update(values)
        if (loss := values.get("eval/loss")) is not None:
            self._evaluated = self.step, float(loss)
        seconds = round(time.monotonic() - self._began + self._seconds, 3)
        with self.explained(""):
            row = {"step": self.step, "seconds": seconds, **values}
            self._records.add("metrics.jsonl", [row])
            self._watch.see(row)

    def record_samples(self, rows: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl at the current step."""
        with self.explained(""):
            self._records.add("samples.jsonl", [{"step": self.step, **row} for row in rows])

    def pause(self) -> None:
        """Do not count what was done since the last step (evaluation, checkpoints) as training."""
        self._step_started = time.monotonic()

    def checkpoint_if_due(self) -> None:
        """Save every N steps, every few minutes, and at the last step; after Ctrl-C, SIGTERM or
        SIGHUP save now and stop, and so after an alarm with --run.on-alarm stop.

        Raises:
            RunError: the run was asked to stop, or nothing can be saved; it says how to go on.
        """
        stop = self.processes.any(self._stopping.wanted or self._watch.stopped is not None)
        by_steps = self.keep.checkpoint_every > 0 and self.step % self.keep.checkpoint_every == 0
        if stop or by_steps or not self.running() or self._clock.due():
            self.save_checkpoint()
        if stop and self.running():
            if self.main:
                self._write_summary("interrupted")
            raise RunError(
                f"stopped at step {self.step} of {self.total}, saved: {self.how_to_go_on()}"
            )
        self.pause()

    def save_checkpoint(self) -> None:
        """Modules, optimizers, random states, cursor, counters and the method's own state, whole or
        not at all.

        Raises:
            RunError: something of it is not finite, or it cannot be written.
        """

        def counters() -> dict[str, Any]:
            here = self._evaluated is not None and self._evaluated[0] == self.step
            return {
                "step": self.step,
                "rows": self.rows,
                "tokens": self.tokens,
                "train_seconds": self.train_seconds,
                "state": TypeAdapter(type(self.state)).dump_python(self.state, mode="json"),
                "seconds": time.monotonic() - self._began + self._seconds,
                "metrics": self.metrics,
                "lines": self._records.lines,
                "skipped": self.nonfinite.skipped,
                "evaluated": self._evaluated[1] if here and self._evaluated else None,
            }

        with self.explained(""):
            save(
                self.path / "checkpoints",
                self.step,
                counters,
                self.keep.keep_checkpoints,
                self.processes,
            )
        self._clock.saved = time.monotonic()

    def _restore(self) -> None:
        counters = restore(self.path, self.processes)
        if counters is None:
            return
        self.step, self.rows, self.tokens = counters["step"], counters["rows"], counters["tokens"]
        self.train_seconds, self._seconds = counters["train_seconds"], counters["seconds"]
        self.state = TypeAdapter(type(self.state)).validate_python(counters["state"])
        self.metrics.update(counters["metrics"])
        self._records.lines = counters.get("lines", {})
        self.nonfinite.skipped = counters.get("skipped", 0)

    # -- the end

    def finish(self, *, save: Callable[[Path], None] | None = None) -> Run[S]:
        """Save the model, write the summary and the page.

        Raises:
            RunError: the model cannot be written.
        """

        def write() -> None:
            if save is None or not self.main:
                return
            aside = self.path / ".model-aside"
            shutil.rmtree(aside, ignore_errors=True)
            save(aside)
            with unimportant("the model's card", self.path):
                card = model_card(
                    self.method,
                    self._plain(),
                    dump_yaml(self.settings, self.method),
                    self.metrics,
                    self.step,
                )
                (aside / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(self.path / "model", ignore_errors=True)
            aside.rename(self.path / "model")

        with self.explained(""):
            together(self.processes, write, self.path / "model")
        if self.main:
            self._write_summary("done")
        self.processes.wait()
        return self

    def _write_summary(self, status: str, error: str | None = None) -> None:
        self._summarized = True
        summary = {
            "method": self.method,
            "status": status,
            **({"error": error} if error else {}),
            "steps": self.step,
            "train_seconds": round(self.train_seconds, 3),
            "rows": self.rows,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.train_seconds, 1)
            if self.train_seconds
            else 0.0,
            "peak_memory_bytes": machine.peak_memory(self.processes.device),
            "metrics": self.metrics,
            "evaluation": self.evaluation,
            "seed": self.settings.seed,
            "processes": self.processes.count,
            "command": machine.command_line(),
            "versions": machine.versions(),
            "machine": machine.describe(self.processes.device),
            **self._inputs,
        }
        with unimportant("summary.json", self.path):
            checkpoint.write_json(self.path / "summary.json", summary)
        with unimportant("the page", self.path):
            write_report(self.path)

    @contextlib.contextmanager
    def explained(self, where: str | None = None) -> Iterator[None]:
        """A RunError of the block names the step, or `where`, and says what is safe and how to go
        on. Responses that could not be scored are kept.
        """
        try:
            yield
        except RunError as error:
            where = f"step {min(self.step + 1, self.total)}: " if where is None else where
            safe = newest(self.path / "checkpoints")
            if isinstance(error, Unscored) and self.main:
                safe = f"{keep_unscored(self.path, error.rows, self.step + 1)}; {safe}"
            how = self.how_to_go_on()
            if isinstance(error, Unscored):
                how += " (with a mended reward: --run.changed-inputs accept)"
            raise RunError(f"{where}{error}; {safe}; {how}") from error

    def how_to_go_on(self) -> str:
        """The command that continues this run."""
        command = f"fiducial {self.method} --out {self.path} --resume"
        return f"go on with: {command}{self._watch.why_stopped}"
