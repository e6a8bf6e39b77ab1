"""Jobs of ours in the benchmark's own process, where importing again takes longer than measuring.

A library that patches another one needs a process of its own (`qlora_kit/bench/session.py`); ours
patches none. What a job leaves behind is freed before the next one, and rows say how much was left.
Peers have their processes as ever, and nothing of what ours has put into the environment.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from qlora_kit.bench.child import run_job
from qlora_kit.bench.random_checkpoint import Storage, write_checkpoint
from qlora_kit.bench.record import Row
from qlora_kit.bench.session import Session, read_rows
from qlora_kit.bench.steps import start_counting
from qlora_kit.bench.subject import Job, Point, Stage, first_fields
from qlora_kit.bench.timing import device, peaks
from qlora_kit.core.errors import QloraKitError


class Here(Session):
    """A session whose own jobs have no process; its limit counts for peers."""

    _stage: Stage | None = None

    def __init__(
        self,
        scratch: Path,
        *,
        limit_seconds: float,
        total_seconds: float,
        on_row: Callable[[Row], None] | None = None,
    ) -> None:
        """Start the clock, and keep the environment for peers.

        Args:
            scratch: a folder for jobs and what libraries leave behind.
            limit_seconds: of one process of a peer.
            total_seconds: of the whole run.
            on_row: called with every row as it comes.
        """
        super().__init__(
            scratch, limit_seconds=limit_seconds, total_seconds=total_seconds, on_row=on_row
        )
        self._environment = dict(os.environ)

    def measure_peaks(self) -> None:
        """Nothing yet: rates are measured when all else has been, see `last`."""

    def last(self) -> None:
        """Measure the card's rates, unless they are known or a failure left CUDA unusable here."""
        if self.peaks:
            return
        try:
            self.peaks = peaks()
        except RuntimeError as error:
            print(f"no rates: {str(error).splitlines()[0]}", flush=True)

    def _make(self, model: str, folder: Path, storage: Storage, dtype: str) -> None:
        """Write a checkpoint in this process."""
        made = getattr(torch, dtype)
        write_checkpoint(model, folder, storage=storage, device=device(), dtype=made)

    def run(self, job: Job) -> None:
        """Run a job; one that fails is rows with the reason, and the next one follows.

        Args:
            job: of ours here, of a peer in a process.
        """
        if job.build.impl != "qlora_kit":
            with suppress(RuntimeError):  # where CUDA is not usable here any more
                start_counting(None)  # what this process has cached is the peer's to have
            with self._as_before():
                super().run(job)
            return
        if self.seconds_left() < 0:
            self._refuse(job, job.points, "no time left in this run")
            return
        self._stage = self._stage or Stage()
        file = self.scratch / f"rows-{len(self.rows)}.jsonl"
        file.unlink(missing_ok=True)
        reason = None
        try:
            run_job(replace(job, rows_file=str(file)), self._stage)
        except (QloraKitError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
        finally:  # an interrupted run, too, has what it measured
            found = read_rows(file)
            self._keep(found)
        if reason is not None:
            self._refuse(job, job.points[len(found) :], reason)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """The environment that this session began with, as long as the context lasts."""
        ours = dict(os.environ)
        os.environ.clear()
        os.environ.update(self._environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(ours)

    def _refuse(self, job: Job, points: tuple[Point, ...], reason: str) -> None:
        self._keep([first_fields(job.build, point) | {"error": reason} for point in points])
