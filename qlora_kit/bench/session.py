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
from dataclasses import replace
from pathlib import Path

from qlora_kit.bench.child import BUILDERS, command, first_fields
from qlora_kit.bench.process import Outcome, run_process
from qlora_kit.bench.random_checkpoint import Storage, checkpoint_bytes, roomy_folder
from qlora_kit.bench.record import Row
from qlora_kit.bench.subject import Job, Point
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
        words = [sys.executable, "-m", "qlora_kit.bench.random_checkpoint", model, str(folder)]
        words += ["--storage", storage, "--dtype", dtype]
        outcome = self.start(words)
        if outcome.reason:
            shutil.rmtree(folder, ignore_errors=True)
            text = "\n".join(outcome.tail)
            raise StepFailedError(f"no checkpoint of {model}: {outcome.reason}\n{text}")
        return folder

    def run(self, job: Job) -> None:
        """Run a job; a point that ends the process is a row, and the next ones start anew.

        Args:
            job: what to build and measure.
        """
        environment = importlib.import_module(BUILDERS[job.build.impl]).environment(job.build)
        left = job.points
        while left:
            if self.seconds_left() < _SHORTEST_S:
                self._give_up(job, left, "no time left in this run")
                return
            file = self.scratch / f"rows-{len(self.rows)}.jsonl"
            file.unlink(missing_ok=True)
            now = replace(job, points=left, rows_file=str(file))
            described = self.scratch / "job.json"
            described.write_text(now.to_json(), encoding="utf-8")
            build = job.build
            print(f"{build.impl} {build.variant} {build.model} {build.method}", flush=True)
            try:
                outcome = self.start(command(CHILD, build, described), environment)
            finally:  # an interrupted run, too, has what it measured
                found = read_rows(file)
                self._keep(found)
            left = left[len(found) :]
            if not left:
                return
            reason = outcome.reason or "ended without a row"
            print(f"   failed: {reason}", *outcome.tail[-15:], sep="\n     ", flush=True)
            self._give_up(job, left[:1], reason)
            if not any("s  point" in line for line in outcome.stages):  # nothing was built
                self._give_up(job, left[1:], reason)
                return
            left = left[1:]

    def _keep(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows.append(row)
            if self._on_row is not None:
                self._on_row(row)

    def _give_up(self, job: Job, points: Sequence[Point], reason: str) -> None:
        self._keep([first_fields(job.build, point) | {"error": reason} for point in points])
