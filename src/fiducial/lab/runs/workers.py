"""Processes that make the runs side by side."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

from pydantic import TypeAdapter

from ...errors import RunError
from ...train.children import end_with_parent
from ...train.progress import Progress
from .jobs import Job
from .measured import run_quietly
from .results import MeasuredRun

Done = list[tuple[Job, MeasuredRun]]
RECORD = TypeAdapter(MeasuredRun)
"""How a finished run is kept on disk, for --resume."""


class Workers:
    """Processes with one thread each, which end with this one. Finished runs are kept on disk, and
    with `resume` they are not made again.
    """

    def __init__(self, folder: Path, processes: int | None, resume: bool) -> None:
        self.folder, self.resume = folder, resume
        self.count = processes or max(1, min(8, os.cpu_count() or 1))
        # for the processes to come: this one has read it already
        os.environ["OMP_NUM_THREADS"] = "1"
        self.pool = ProcessPoolExecutor(
            self.count, mp_context=get_context("spawn"), initializer=end_with_parent
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=kind is not None)

    def start(self, todo: Sequence[Job]) -> dict[Future[MeasuredRun], Job]:
        """Submit the runs, the longest first."""
        return {
            self.pool.submit(make_run, job, self.folder, self.resume): job
            for job in sorted(todo, key=lambda j: -j.cost)
        }

    def collect(self, pending: dict[Future[MeasuredRun], Job]) -> Done:
        """All results, in an order that does not depend on which run finished first.

        Raises:
            RunError: a run failed. The message names its log.
        """
        found: Done = []
        work = round(sum(j.cost for j in pending.values()))
        with Progress("lab: runs of the methods, in seconds of work", work) as bar:
            for future in as_completed(pending):
                job = pending[future]
                try:
                    found.append((job, future.result()))
                except Exception as error:
                    log = self.folder / "runs" / f"{job.name}.log"
                    raise RunError(
                        f"the run {job.name} failed: {error}. Its log is {log}. The finished runs "
                        f"are kept; continue with --out {self.folder} --resume"
                    ) from error
                bar.advance({"runs made": len(found), "of": len(pending)}, by=round(job.cost))
        return sorted(found, key=lambda pair: pair[0].name)


def make_run(job: Job, folder: Path, resume: bool) -> MeasuredRun:
    """In a worker: the result of one run, read from disk if the run was made before."""
    out = folder / "runs" / job.name
    record = out.with_name(f"{out.name}.json")
    if resume and record.exists():
        return RECORD.validate_json(record.read_bytes())
    shutil.rmtree(out, ignore_errors=True)  # an interrupted run
    found = run_quietly(job.plan, folder / "worlds" / f"{job.world}-{job.plan.seed}", out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    aside = record.with_name(f".{record.name}")
    aside.write_bytes(RECORD.dump_json(found))
    aside.replace(record)
    return found
