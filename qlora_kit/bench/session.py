"""One run of a benchmark: its processes, the time it may take, the rows that come.

Every job runs in a fresh process (`child.py`) which writes its rows as JSON lines. A point
that ends its process is a row with the reason, and the points after it start anew; a job
whose process built nothing is given up as a whole. Rows are handed on as they come, so a
run that is cut short has what it measured until then.
"""

import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.bench.child import BUILDERS, command
from qlora_kit.bench.process import Outcome, run_process
from qlora_kit.bench.random_checkpoint import Storage, checkpoint_bytes, roomy_folder
from qlora_kit.bench.record import Row
from qlora_kit.bench.subject import BUILDS, MEASURES, Job, Point, first_fields, write_jobs
from qlora_kit.core.errors import QloraKitError

CHILD = "qlora_kit.bench.child"
_SHORTEST_S = 10.0
"""With less time left than this no process is started."""


class StepFailedError(QloraKitError):
    """A process that everything else needs has failed: rates, or a checkpoint."""


def read_rows(file: Path) -> list[Row]:
    """Rows of a file of JSON lines.

    Args:
        file: need not exist; a last line that was cut short is left out.

    Returns:
        One row per line.

    Example:
        >>> read_rows(Path("/no/such/file"))
        []
    """
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(text) for text in lines[:-1]]


class Session:
    """Runs jobs one after the other and keeps their rows.

    Attributes:
        rows: of all jobs so far.
        peaks: rates of the card, once measured.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        limit_seconds: float,
        total_seconds: float,
        on_row: Callable[[Row], None] | None = None,
    ) -> None:
        """Start the clock.

        Args:
            scratch: a folder for jobs and what libraries leave behind.
            limit_seconds: of one process.
            total_seconds: of the whole run.
            on_row: called with every row as it comes.
        """
        self.scratch = scratch
        self._limit_seconds, self._total_seconds = limit_seconds, total_seconds
        self._on_row = on_row
        self._began = time.monotonic()
        self.rows: list[Row] = []
        self.peaks: dict[str, float] = {}

    def seconds_left(self) -> float:
        """Of the whole run."""
        return self._total_seconds - (time.monotonic() - self._began)

    def start(self, words: Sequence[str], environment: dict[str, str] | None = None) -> Outcome:
        """Run a fresh process.

        Args:
            words: its command line.
            environment: variables added to this process's.

        Returns:
            How it ended.
        """
        limit = min(self._limit_seconds, self.seconds_left())
        return run_process(words, limit_seconds=limit, environment=environment, folder=self.scratch)

    def measure_peaks(self) -> None:
        """Measure the card's rates, which MFU is a share of.

        Raises:
            StepFailedError: the process failed.
        """
        outcome = self.start([sys.executable, "-m", "qlora_kit.bench.timing"])
        if outcome.reason:
            raise StepFailedError(
                "measuring the card's rates failed: " + "\n".join(outcome.tail or (outcome.reason,))
            )
        self.peaks = json.loads(outcome.tail[-1])
        print("peaks: " + ", ".join(f"{k} {v:.3g}" for k, v in self.peaks.items()), flush=True)

    def checkpoint(
        self, model: str, *, storage: Storage, dtype: str, work: Path | None = None
    ) -> Path:
        """Make a model's checkpoint of random weights, unless a whole one is there.

        Args:
            model: a name as `shapes.config_of` takes it.
            storage: `nf4` or `bf16`.
            dtype: name of the dtype of what is not quantized.
            work: folder for checkpoints; None for one with enough room.

        Returns:
            Its folder.

        Raises:
            StepFailedError: it could not be written.
        """
        base = work or roomy_folder(checkpoint_bytes(model, storage))
        folder = Path(base).resolve() / f"{Path(model).name}-{storage}"
        if (folder / "config.json").exists():
            print(f"checkpoint: {folder}", flush=True)
            return folder
        print(f"checkpoint: making {folder}", flush=True)
        self._make(model, folder, storage, dtype)
        return folder

    def _make(self, model: str, folder: Path, storage: Storage, dtype: str) -> None:
        """Write a checkpoint in a process of its own."""
        words = [sys.executable, "-m", "qlora_kit.bench.random_checkpoint", model, str(folder)]
        words += ["--storage", storage, "--dtype", dtype]
        outcome = self.start(words)
        if outcome.reason:
            shutil.rmtree(folder, ignore_errors=True)
            text = "\n".join(outcome.tail)
            raise StepFailedError(f"no checkpoint of {model}: {outcome.reason}\n{text}")

    def run(self, job: Job) -> None:
        """Run a job; a point that ends the process is a row, and the next ones start anew.

        Args:
            job: what to build and measure.
        """
        self.run_together([job])

    def run_together(self, jobs: Sequence[Job]) -> None:
        """Run jobs one after the other in one process; one that ends it costs its point alone.

        Importing the libraries takes longer than many a measurement. Models are built anew for
        each job, the caches emptied and the counters set to zero.

        Args:
            jobs: of one library; what it needs in the environment is asked of the first.
        """
        left = [job for job in jobs if job.points]
        if not left:
            return
        first = left[0].build
        environment = importlib.import_module(BUILDERS[first.impl]).environment(first)
        while left:
            if self.seconds_left() < _SHORTEST_S:
                for job in left:
                    self._give_up(job, job.points, "no time left in this run")
                return
            outcome = self._process(left, environment)
            left = _without(left, outcome.rows)
            if not left:
                return
            reason = outcome.ended.reason or "ended without a row"
            print(f"   failed: {reason}", *outcome.ended.tail[-15:], sep="\n     ", flush=True)
            points = left[0].points
            if outcome.built:
                points = points[:1]
            self._give_up(left[0], points, reason)
            left = _without(left, len(points))

    def _process(self, jobs: Sequence[Job], environment: dict[str, str]) -> "_Ran":
        """One process with several jobs; its rows are kept."""
        file = self.scratch / f"rows-{len(self.rows)}.jsonl"
        file.unlink(missing_ok=True)
        described = self.scratch / "jobs.jsonl"
        write_jobs(described, [replace(job, rows_file=str(file)) for job in jobs])
        for build in (job.build for job in jobs):
            print(f"{build.impl} {build.variant} {build.model} {build.method}", flush=True)
        found: list[Row] = []
        try:
            ended = self.start(command(CHILD, jobs[0].build, described), environment)
        finally:  # an interrupted run, too, has what it measured
            found = read_rows(file)
            self._keep(found)
        marks = [line.split("s  ", 1)[-1].split("  ")[0] for line in ended.stages]
        last = max((at for at, mark in enumerate(marks) if mark == BUILDS), default=0)
        return _Ran(ended, len(found), MEASURES in marks[last:])

    def _keep(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            if self._on_row is not None:
                self._on_row(row)

    def _give_up(self, job: Job, points: Sequence[Point], reason: str) -> None:
        self._keep([first_fields(job.build, point) | {"error": reason} for point in points])


@dataclass(frozen=True, slots=True)
class _Ran:
    """How a process of several jobs ended."""

    ended: Outcome
    rows: int
    """That it wrote."""
    built: bool
    """Whether the job it ended in had its model."""


def _without(jobs: Sequence[Job], count: int) -> list[Job]:
    """Jobs without their first points."""
    found = []
    for job in jobs:
        rest = job.points[count:]
        count = max(0, count - len(job.points))
        if rest:
            found.append(replace(job, points=rest))
    return found
