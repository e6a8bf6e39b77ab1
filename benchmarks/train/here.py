"""Jobs of ours in the benchmark's own process, where importing again takes longer than measuring.

A library that patches another one needs a process of its own (`qlora_kit/bench/session.py`); ours
patches none. What a job leaves behind is freed before the next one, and rows say how much was left.
"""

from dataclasses import replace
from pathlib import Path

import torch

from qlora_kit.bench.child import run_job
from qlora_kit.bench.random_checkpoint import Storage, write_checkpoint
from qlora_kit.bench.session import Session, read_rows
from qlora_kit.bench.subject import Job, Point, Stage, first_fields
from qlora_kit.bench.timing import device, peaks
from qlora_kit.core.errors import QloraKitError


class Here(Session):
    """A session without processes; its limit for one of them counts for nothing."""

    _stage: Stage | None = None

    def measure_peaks(self) -> None:
        """Nothing yet: rates are measured when all else has been, see `last`."""

    def last(self) -> None:
        """Measure the card's rates, unless they are known."""
        if not self.peaks:
            self.peaks = peaks()

    def _make(self, model: str, folder: Path, storage: Storage, dtype: str) -> None:
        """Write a checkpoint in this process."""
        made = getattr(torch, dtype)
        write_checkpoint(model, folder, storage=storage, device=device(), dtype=made)

    def run(self, job: Job) -> None:
        """Run a job; one that fails is rows with the reason, and the next one follows.

        Args:
            job: of ours.
        """
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

    def _refuse(self, job: Job, points: tuple[Point, ...], reason: str) -> None:
        self._keep([first_fields(job.build, point) | {"error": reason} for point in points])
