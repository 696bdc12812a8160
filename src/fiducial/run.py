"""A run is a folder. This opens it, keeps its records, saves and restores everything needed to go
on, and closes it with a summary.
"""

from __future__ import annotations

import contextlib
import json
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
import yaml

from .errors import InputError, RunError
from .settings import RunSettings, Settings, dump_yaml
from .train import checkpoint
from .train.meter import Meter
from .train.processes import Processes
from .train.progress import Progress, say

FREE = {"steps", "epochs", "resume", "out", "run"}
"""Settings that may differ when a run is resumed: they do not change what was computed."""


class Run:
    """One training run; use it as a context. `state` is what a method keeps from step to step
    beyond modules and optimizers.
    """

    def __init__(
        self,
        method: str,
        settings: Settings,
        *,
        out: str | None,
        run: RunSettings,
        seed: int,
        resume: bool,
    ) -> None:
        self.method, self.settings, self.keep = method, settings, run
        self.processes = Processes(run.timeout_minutes)
        self.meter = Meter(self.processes)
        self.seed, self.resume = seed, resume
        self.path = Path(out) if out else _next_folder(method)
        self.step = 0
        self.state: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.model: Any = None
        self.evaluation: dict[str, dict[str, float]] = {}
        self.rows = self.tokens = 0
        self.train_seconds = 0.0
        self._seconds = self._step_started = 0.0
        self._stop = False
        self._bar: Progress | None = None
        self._on_finish: list[Callable[[Path], object]] = []

    @property
    def main(self) -> bool:
        return self.processes.main

    def __enter__(self) -> Run:
        config = self.path / "config.yaml"
        if self.resume:
            self._same_settings(config)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(
                f"--out: {self.path} exists already: choose another folder, or go on with --resume"
            )
        self.processes.wait()
        self._fresh = not self.path.exists() or not any(self.path.iterdir())
        if self.main:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                config.write_text(dump_yaml(self.settings, self.method), encoding="utf-8")
        self.processes.wait()
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.manual_seed(self.seed)
        _reset_peak_memory()
        self._began = time.monotonic()
        self._old_handler = signal.getsignal(signal.SIGINT)
        try:
            signal.signal(signal.SIGINT, self._interrupted)
        except ValueError:  # not the main thread: Ctrl-C is somebody else's to handle
            self._old_handler = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
        saved = (self.path / "checkpoints" / f"checkpoint-{self.step}").exists()
        whole = (
            not self.processes.dirty
            and self.processes.count == 1
            and 0 < self.step < getattr(self, "total", 0)
        )
        if isinstance(error, Exception) and whole and not saved:
            # the weights are those of the last recorded step: what was trained is not lost
            self.save_checkpoint()
        if isinstance(error, InputError) and self.main and self._fresh:
            shutil.rmtree(
                self.path, ignore_errors=True
            )  # refused before it began: the same command works once its fault is mended
        elif (
            error is not None
            and self.main
            and self.path.exists()
            and not isinstance(error, InputError)
            and not self.summary_written
        ):
            self._write_summary("failed", str(error))

    summary_written = False

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        if self.main:
            say(
                "stopping after this step; Ctrl-C again stops at once and loses what came after "
                "the last checkpoint"
            )

    def _same_settings(self, config: Path) -> None:
        if not config.is_file():
            raise InputError(
                f"--resume: {self.path} holds no run to go on with (config.yaml is missing)"
            )
        before = yaml.safe_load(config.read_text(encoding="utf-8"))
        now = yaml.safe_load(dump_yaml(self.settings, self.method))
        differ = [k for k in now if k not in FREE and before.get(k) != now[k]]
        if before.get("method") != self.method:
            raise InputError(
                f"--resume: {self.path} is a run of {before.get('method')}, not of {self.method}"
            )
        if differ:
            raise InputError(
                f"--resume: {', '.join(differ)} differ from {config}: a resumed run keeps its "
                "settings, so leave these flags out"
            )

    # -- steps

    def start(self, total: int, title: str | None = None) -> None:
        """Everything is loaded: restore the newest good checkpoint if this is a resumed run, and
        begin to count time.
        """
        self.total = total
        if self.resume:
            self._restore()
        elif self.main:
            (self.path / "metrics.jsonl").write_text("")
        self._bar = Progress(
            title or self.method, total, start=self.step, show=self.main
        ).__enter__()
        self._step_started = time.monotonic()

    def running(self) -> bool:
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
        """What is done from here to the next step (evaluation, checkpoints) is not counted as training."""
        self._step_started = time.monotonic()

    def checkpoint_if_due(self) -> None:
        """Save every N steps; after Ctrl-C save now and stop.

        Raises:
            RunError: the run was asked to stop; the message says how to go on.
        """
        stop = self.processes.any(self._stop)
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
                "state": self.state,
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
        self.state.update(counters["state"])
        self.metrics.update(counters["metrics"])
        if self.main:
            say(f"resumed from {newest}")
            for name in ("metrics.jsonl", "samples.jsonl"):
                _cut_after(self.path / name, self.step)

    # -- the end

    def finish(self, *, save: Callable[[Path], None] | None = None) -> Run:
        """Save the model, write the summary and the page."""
        if save is not None and self.main:
            aside = self.path / ".model-aside"
            shutil.rmtree(aside, ignore_errors=True)
            save(aside)
            (aside / "README.md").write_text(self._card(), encoding="utf-8")
            shutil.rmtree(self.path / "model", ignore_errors=True)
            aside.rename(self.path / "model")
        self.processes.wait()
        if self.main:
            self._write_summary("done")
        self.processes.wait()
        return self

    def _card(self) -> str:
        """The model card: what it was made from, how, and with what result."""
        values = self.settings.model_dump(mode="json")
        numbers = "\n".join(f"| {k} | {v:.5g} |" for k, v in self.metrics.items())
        return (
            f"---\nlibrary_name: transformers\ntags: [{self.method}, fiducial]\n---\n\n# "
            f"{self.method} of {values.get('model')}\n\n"
            f"Trained with fiducial {version('fiducial')} on `{values.get('data')}`, seed "
            f"{self.seed}, {self.step} steps.\n\n"
            f"## Last metrics\n\n| metric | value |\n|---|---|\n{numbers}\n\n## "
            f"Settings\n\n```yaml\n{dump_yaml(self.settings, self.method)}```\n"
        )

    def _write_summary(self, status: str, error: str | None = None) -> None:
        self.summary_written = True
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
            "peak_memory_bytes": peak_memory(self.processes.device),
            "metrics": self.metrics,
            "evaluation": self.evaluation,
            "seed": self.seed,
            "processes": self.processes.count,
            "command": command_line(),
            "versions": {
                "python": platform.python_version(),
                **{p: version(p) for p in ("fiducial", "torch", "transformers")},
            },
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.processes.device}",
        }
        checkpoint.write_json(self.path / "summary.json", summary)
        from .report.page import write_report

        write_report(self.path)

    def how_to_go_on(self) -> str:
        """The command that continues this run."""
        return f"go on with: fiducial {self.method} --out {self.path} --resume"


def peak_memory(device: torch.device) -> int:
    """Largest memory since the run began, in bytes: of the accelerator where there is one, else of
    this process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # Linux: several runs in one process each get their own peak


def open_folder(out: str | None, default: str, resume: bool) -> Path:
    """The folder of a command that makes several runs: `out`, or the first of default, default-2,
    ... that does not exist.

    Raises:
        InputError: it is in use and is not to be gone on with, or it cannot be made.
    """
    number, path = 1, Path(out or default)
    while out is None and path.exists():
        number += 1
        path = Path(f"{default}-{number}")
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not resume)):
        raise InputError(
            f"--out: {path} exists already: choose another folder, or go on with --resume"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {path} cannot be made: {error.strerror}") from error
    return path


def _next_folder(method: str) -> Path:
    number = 1
    while Path(f"runs/{method}-{number}").exists():
        number += 1
    return Path(f"runs/{method}-{number}")


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after the checkpoint, a torn last one too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n")[
        :-1
    ]:  # not splitlines: U+2028 may stand in a sample
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def command_line() -> str:
    """The command as it was typed."""
    import shlex

    return (
        shlex.join(["fiducial", *sys.argv[1:]])
        if Path(sys.argv[0]).name.startswith(("fiducial", "__main__"))
        else shlex.join(sys.argv)
    )
