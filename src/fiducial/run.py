"""A run is a folder: opened, recorded, saved, resumed, and closed with a page."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import yaml
from pydantic import TypeAdapter

from .config_file import dump_yaml
from .errors import InputError, RunError
from .report.card import model_card
from .report.page import write_report
from .settings import RunSettings
from .train import checkpoint, machine
from .train.folders import cut_after, is_free, make_folder, next_folder
from .train.inputs import inputs
from .train.lock import Lock
from .train.meter import Meter
from .train.processes import Processes
from .train.progress import Progress, say
from .train.resume import changed_settings, settled
from .train.stopping import Stopping

S = TypeVar("S")


class TrainingSettings(Protocol):
    """What the settings of every method have."""

    @property
    def out(self) -> str | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def resume(self) -> bool: ...

    @property
    def run(self) -> RunSettings: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


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
        self.train_seconds = 0.0
        self._seconds = self._step_started = 0.0
        self._summarized = False
        self._stopping = Stopping(say if self.main else lambda text: None)
        self._bar: Progress | None = None
        self._changed: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.processes.main

    def __enter__(self) -> Run[S]:
        config = self.path / "config.yaml"
        if self.settings.resume:
            self.settings = settled(self.settings, self.processes, config)
            self._changed = changed_settings(
                self.path, self.method, dump_yaml(self.settings, self.method)
            )
        elif not is_free(self.path):
            raise InputError(
                f"--out: {self.path} exists already: choose another folder, or go on with --resume"
            )
        self.processes.wait()
        self._fresh = is_free(self.path)
        self._lock = self._locked()
        if self.main and not self.settings.resume:
            config.write_text(dump_yaml(self.settings, self.method), encoding="utf-8")
        self.processes.wait()
        random.seed(self.settings.seed)
        np.random.seed(self.settings.seed % 2**32)
        torch.manual_seed(self.settings.seed)
        machine.reset_peak_memory()
        self._began = time.monotonic()
        self._stopping.__enter__()
        return self

    def _locked(self) -> Lock | None:
        """The lock on the run folder, which the main process holds. All are refused together."""
        lock, refused = None, None
        if self.main:
            try:
                make_folder(self.path)
                lock = Lock(self.path)
            except InputError as error:
                refused = str(error)
        said = [text for text in self.processes.gather([refused]) if text]
        if said:
            raise InputError(said[0])
        return lock

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

    def _close(self, error: BaseException | None) -> None:
        """Keep what a failed run has, and say so; leave nothing of a refused one."""
        saved = (self.path / "checkpoints" / f"checkpoint-{self.step}").exists()
        whole = (
            not self.processes.dirty and self.processes.count == 1 and 0 < self.step < self.total
        )
        if isinstance(error, Exception) and whole and not saved:
            self.save_checkpoint()  # the weights are those of the last recorded step
        if error is None or not self.main:
            return
        if isinstance(error, InputError):
            if self._fresh:  # refused before it began: the mended command works with this folder
                shutil.rmtree(self.path, ignore_errors=True)
        elif self.path.exists() and not self._summarized:
            self._write_summary("failed", str(error))

    # -- steps

    def start(self, total: int, title: str | None = None) -> None:
        """Everything is loaded: restore the newest good checkpoint if this is a resumed run, and
        begin to count time.
        """
        self.total = total
        self.settings = settled(self.settings, self.processes, self.path / "config.yaml")
        if self.main:
            self._inputs = inputs(self.settings.model_dump(mode="json"))
        if self.settings.resume:
            self._restore()
            self._note_changes()
        elif self.main:
            (self.path / "metrics.jsonl").write_text("")
        self._bar = Progress(
            title or self.method, total, start=self.step, show=self.main
        ).__enter__()
        self._step_started = time.monotonic()

    def _note_changes(self) -> None:
        """Let config.yaml say what is run from here on, and what was changed at which step."""
        if not self.main or not self._changed:
            return
        config = self.path / "config.yaml"
        before = yaml.safe_load(config.read_text(encoding="utf-8"))
        history = [*before.get("resumed", []), {"step": self.step, "changed": self._changed}]
        resumed = yaml.safe_dump({"resumed": history}, sort_keys=False, allow_unicode=True)
        checkpoint.write_text(config, dump_yaml(self.settings, self.method) + resumed)

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
        bad = [k for k, v in values.items() if not np.isfinite(v)]
        if bad:
            raise RunError(
                f"{bad[0]} is {values[bad[0]]} at step {self.step}: nothing of this step was "
                f"saved; {self.how_to_go_on()}"
            )
        self.metrics.update(values)
        self.record(values)
        if self._bar:
            self._bar.advance({k: values[k] for k in show if k in values})
        self.processes.dirty = False
        self._step_started = time.monotonic()

    def record(self, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl at the current step."""
        self.metrics.update(values)
        if self.main:
            line = {
                "step": self.step,
                "seconds": round(time.monotonic() - self._began + self._seconds, 3),
                **values,
            }
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def record_samples(self, rows: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl at the current step."""
        if self.main:
            with open(self.path / "samples.jsonl", "a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"step": self.step, **row}, ensure_ascii=False) + "\n"
                    for row in rows
                )

    def pause(self) -> None:
        """Do not count what was done since the last step (evaluation, checkpoints) as training."""
        self._step_started = time.monotonic()

    def checkpoint_if_due(self) -> None:
        """Save every N steps; after Ctrl-C, SIGTERM or SIGHUP save now and stop.

        Raises:
            RunError: the run was asked to stop; the message says how to go on.
        """
        stop = self.processes.any(self._stopping.wanted)
        due = self.keep.checkpoint_every > 0 and self.step % self.keep.checkpoint_every == 0
        if stop or due:
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
        """
        folder = self.path / "checkpoints"
        aside, final = folder / f".aside-{self.step}", folder / f"checkpoint-{self.step}"
        if self.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.processes.wait()
        self.processes.accelerator.save_state(str(aside))
        self.processes.wait()
        if self.main:
            counters = {
                "step": self.step,
                "rows": self.rows,
                "tokens": self.tokens,
                "train_seconds": self.train_seconds,
                "state": TypeAdapter(type(self.state)).dump_python(self.state, mode="json"),
                "seconds": time.monotonic() - self._began + self._seconds,
                "metrics": self.metrics,
            }
            checkpoint.write_json(aside / "run.json", counters)
            checkpoint.seal(aside)
            checkpoint.publish(aside, final, self.keep.keep_checkpoints)
        self.processes.wait()

    def _restore(self) -> None:
        newest, faults = checkpoint.newest_good(self.path / "checkpoints")
        if self.main:
            for line in faults:
                say(f"passed over: {line}")
        if newest is None:
            if faults:
                raise InputError(
                    f"--resume: no whole checkpoint in {self.path / 'checkpoints'}: {faults[0]}"
                )
            if (self.path / "model").exists():
                raise InputError(
                    f"--resume: {self.path} is finished and kept no checkpoint to go on from: "
                    f"start a new run with --model {self.path / 'model'}"
                )
            if self.main:
                say(f"{self.path} has no checkpoint yet: starting from the beginning")
                for name in ("metrics.jsonl", "samples.jsonl"):
                    (self.path / name).write_text("")
            return
        self.processes.accelerator.load_state(str(newest))
        counters = json.loads((newest / "run.json").read_text())
        self.step, self.rows, self.tokens = counters["step"], counters["rows"], counters["tokens"]
        self.train_seconds, self._seconds = counters["train_seconds"], counters["seconds"]
        self.state = TypeAdapter(type(self.state)).validate_python(counters["state"])
        self.metrics.update(counters["metrics"])
        if self.main:
            say(f"resumed from {newest}")
            for name in ("metrics.jsonl", "samples.jsonl"):
                if foreign := cut_after(self.path / name, self.step):
                    say(f"{self.path / name}: {foreign} lines were no records, and are dropped")

    # -- the end

    def finish(self, *, save: Callable[[Path], None] | None = None) -> Run[S]:
        """Save the model, write the summary and the page."""
        if save is not None and self.main:
            aside = self.path / ".model-aside"
            shutil.rmtree(aside, ignore_errors=True)
            save(aside)
            (aside / "README.md").write_text(
                model_card(
                    self.method,
                    self.settings.model_dump(mode="json"),
                    dump_yaml(self.settings, self.method),
                    self.metrics,
                    self.step,
                ),
                encoding="utf-8",
            )
            shutil.rmtree(self.path / "model", ignore_errors=True)
            aside.rename(self.path / "model")
        self.processes.wait()
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
        checkpoint.write_json(self.path / "summary.json", summary)
        write_report(self.path)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A RunError of the block names the step and says how to go on."""
        try:
            yield
        except RunError as error:
            raise RunError(f"step {self.step + 1}: {error}; {self.how_to_go_on()}") from error

    def how_to_go_on(self) -> str:
        """The command that continues this run."""
        return f"go on with: fiducial {self.method} --out {self.path} --resume"
