"""The workers: processes that do jobs, one at a time each, and what becomes of their rows.

The first worker makes what all share and times steps while there is no other. Then the rest
start, and all share the GPUs; speeds of that part mean nothing and are not reported. A finished
row is on disk at once; a run in the same folder goes on from there.

Workers are forked from a server that has imported everything and seen no GPU: a dozen processes
that import torch and transformers at a time take a minute of a machine's cores.
"""

import gc
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.methods.cases import Job, Shape, Task
from benchmarks.methods.schedule import Board
from benchmarks.methods.work import Row, Workshop
from qlora_kit.train.callbacks import quiet_transformers

IMPORTED = ("benchmarks.methods.work", "transformers.models.llama.modeling_llama")
"""What workers find imported; other architectures only take longer."""
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""How workers start, unless the first one fails to: then all are spawned."""
UNSEEN = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Environment in which nothing that is imported asks the driver: a process cannot be forked after
that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every worker is told."""

    model: str
    tasks: tuple[Task, ...]
    shapes: tuple[Shape, ...]
    demo: Path
    folder: Path
    workers: int
    bits: tuple[int, ...] = (4,)
    """Of the bases that there are jobs for; none if only random weights are timed."""
    gpus: tuple[str, ...] = ()

    @property
    def shared(self) -> Path:
        """Where the first worker puts what all need; another model or budget has another."""
        told = repr((self.model, self.tasks, str(self.demo)))
        return self.folder / f"shared-{sha256(told.encode()).hexdigest()[:12]}"


def visible_gpus() -> tuple[str, ...]:
    """What `CUDA_VISIBLE_DEVICES` says of the GPUs at hand, one word each."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(words.split(",")) if words else tuple(map(str, range(torch.cuda.device_count())))


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for what is started inside, and put the old ones back."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _context(method: str) -> Any:
    """A way to start processes; the server of forks imports everything first."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(IMPORTED))
        with environment(UNSEEN):
            forkserver.ensure_running()
    return context


def work(pipe: Connection, setting: Setting, number: int) -> None:
    """A worker, on one GPU in turn: says when it is ready, then does jobs until it is told None.

    Args:
        pipe: jobs come in, rows go out.
        setting: as for all.
        number: 0 makes what the others share.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    if setting.gpus:  # before anything asks for a GPU; the server sees none
        os.environ["CUDA_VISIBLE_DEVICES"] = setting.gpus[number % len(setting.gpus)]
    if not torch.cuda.is_available() and setting.workers > 1:
        torch.set_num_threads(1)
    disable_progress_bar()
    with quiet_transformers():
        shop = Workshop(setting.model, setting.tasks, setting.shapes, setting.demo, setting.shared)
        if shop.on_gpu:
            torch.ones(1, device="cuda")
        if number == 0:
            shop.prepare(setting.bits)
        gc.collect()
        gc.freeze()  # what is there by now stays: collections after each job need not look at it
        pipe.send("ready")
        while (job := pipe.recv()) is not None:
            try:
                pipe.send(shop.do(job))
            except BaseException:
                traceback.print_exc()
                raise


class Crew:
    """Processes, each with one job at a time."""

    def __init__(self, setting: Setting, board: Board, deadline: float) -> None:
        """Start nothing yet.

        `left` will hold jobs that time was too short for.

        Args:
            setting: for the workers.
            board: of jobs; gets the rows.
            deadline: of `time.monotonic`, when everything ends.
        """
        self.setting, self.board, self.deadline = setting, board, deadline
        self._context: Any = None
        self._started = 0
        self._crew: dict[Connection, Any] = {}
        self._starting: list[Connection] = []
        self._jobs: dict[Connection, Job] = {}
        self._began = time.monotonic()
        self.left: list[Job] = []

    def __enter__(self) -> "Crew":
        """Start the first worker and wait for it."""
        for method in dict.fromkeys((START, "spawn")):
            self._context, self._started = _context(method), 0
            if self._first_starts():
                return self
            print(f"workers cannot be started by {method}", flush=True)
        raise SystemExit("the first worker failed to start; its message is above")

    def __exit__(self, *arguments: object) -> None:
        """End them, whatever they do."""
        for process in self._crew.values():
            process.kill()
            process.join()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, self.setting, self._started))
        process.start()
        theirs.close()
        self._started += 1
        self._crew[ours] = process
        self._starting.append(ours)

    def _first_starts(self) -> bool:
        """Start a worker while there is none and wait for it."""
        try:
            self._start()
        except (EOFError, OSError):  # the server of forks is gone
            return False
        (pipe,) = self._crew
        if not pipe.poll(max(0.0, self.deadline - time.monotonic())):
            raise SystemExit("the first worker did not get ready in time")
        return self._is_ready(pipe)

    def _is_ready(self, pipe: Connection) -> bool:
        """Take a new worker's word; one that ended instead is forgotten."""
        self._starting.remove(pipe)
        try:
            pipe.recv()
        except EOFError:
            process = self._crew.pop(pipe)
            process.join()
            return False
        return True

    def run(self, jobs: Sequence[Job], *, alone: bool) -> None:
        """Do jobs until none is left or time is up; what time was too short for is `left`.

        Args:
            jobs: in their order; those that are done already are left out.
            alone: one after the other in the first worker, for timing; else the others start.
        """
        self.board.pending = list(jobs)
        self.board.skip_done()
        if not alone and self.board.pending:
            while len(self._crew) < self.setting.workers:
                self._start()
        try:
            self._run()
        finally:
            self.left += [*self.board.running.values(), *self.board.pending]
            self.board.running.clear()

    def _run(self) -> None:
        """Hand out jobs and take rows and new workers."""
        while time.monotonic() < self.deadline:
            for pipe in self._crew:
                if pipe in self._jobs or pipe in self._starting:
                    continue
                if (job := self.board.next_job()) is None:
                    break
                pipe.send(job)
                self._jobs[pipe] = job
            if not self._jobs and not (self._starting and self.board.pending):
                return
            left = max(0.0, self.deadline - time.monotonic())
            for spoke in wait([*self._jobs, *self._starting], timeout=left):
                assert isinstance(spoke, Connection)
                if spoke in self._jobs:
                    self._take(spoke)
                elif not self._is_ready(spoke):
                    print("a worker failed to start; its message is above", flush=True)
                elif not self._starting:
                    print(f"{self._clock()}  {len(self._crew)} workers are ready", flush=True)

    def _take(self, pipe: Connection) -> None:
        """A worker's row; a worker that died is replaced, its job a row that says so."""
        job = self._jobs.pop(pipe)
        try:
            row = pipe.recv()
        except EOFError:
            process = self._crew.pop(pipe)
            process.join()
            row = {"what": job.what, "method": job.case, "task": job.task, "shape": job.shape}
            row |= {"rate": job.rate, "seed": job.seed}
            row["error"] = f"the process ended with {process.exitcode}"
            self._start()
        self._write(job, row)

    def _write(self, job: Job, row: Row) -> None:
        """Keep a row, here and on disk, and say so."""
        self.board.finished(job, row)
        with (self.setting.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = row.get("error") or ", ".join(
            f"{name} {row[name]}" for name in ("loss", "score", "ms") if row.get(name) is not None
        )
        print(f"{self._clock()}  {job}: {said} ({row.get('seconds', 0)} s)", flush=True)

    def _clock(self) -> str:
        """Time since the beginning, for people."""
        return f"{time.monotonic() - self._began:5.0f} s"


def read_rows(folder: Path) -> list[Row]:
    """Rows of an earlier run in the same folder; failed ones are done again."""
    file = folder / "rows.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "error" not in row]
