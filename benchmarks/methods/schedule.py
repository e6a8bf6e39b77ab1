"""Which job comes next, and the workers that do them.

Steps are timed first, one method after the other in one process while the others wait. Then all
processes share the GPUs: the base, the learning rates, and seed after seed, each for all methods,
so that a run that is cut short has whole seeds. Speeds of that part mean nothing and are not
reported. A finished row is on disk at once; a run in the same folder goes on from there.
"""

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.methods.cases import BY_NAME, DEMO_SHAPE, WIDER, Case, Job, Shape, Task
from benchmarks.methods.work import Row, Workshop
from qlora_kit.train.callbacks import quiet_transformers

TUNING_SEED = 100
"""Not among those that are reported."""


def speed_jobs(cases: Sequence[Case], shapes: Sequence[Shape]) -> list[Job]:
    """A timing of every method at every shape; random weights are not what LoftQ starts from."""
    pairs = [
        (case, s)
        for s in shapes
        for case in cases
        if s.name == DEMO_SHAPE or not case.needs_originals
    ]
    return [Job(what="speed", case=case.name, shape=s.name) for case, s in pairs]


def training_jobs(cases: Sequence[Case], tasks: Sequence[Task], seeds: int) -> list[Job]:
    """The base on every task, the grids, and seed after seed of all methods.

    Args:
        cases: methods.
        tasks: data sets.
        seeds: how many.

    Returns:
        Jobs in their order; reported ones have no rate yet.
    """
    pairs = [(case, task) for task in tasks for case in cases]
    jobs = [Job(what="base", task=task.name) for task in tasks]
    jobs += [
        Job(what="tune", case=case.name, task=task.name, rate=rate, seed=TUNING_SEED)
        for case, task in pairs
        for rate in case.grid
    ]
    for seed in range(seeds):
        jobs += [Job(what="run", case=c.name, task=t.name, seed=seed) for c, t in pairs]
    return jobs


def _losses(rows: Sequence[Row], case: str, task: str) -> dict[float, float]:
    """Rate to validation loss; infinite where training failed."""
    tuned = [r for r in rows if (r["what"], r["method"], r["task"]) == ("tune", case, task)]
    return {
        row["rate"]: float("inf") if row.get("loss") is None else float(row["loss"])
        for row in tuned
    }


def chosen_rate(rows: Sequence[Row], case: str, task: str) -> float | None:
    """The learning rate of the lowest validation loss.

    Args:
        rows: of the record so far.
        case: method.
        task: data set.

    Returns:
        The rate; None if nothing was tuned.

    Example:
        >>> row = {"what": "tune", "method": "lora", "task": "t"}
        >>> rows = [row | {"rate": 1e-3, "loss": 3}, row | {"rate": 2e-3, "loss": 1}]
        >>> chosen_rate(rows, "lora", "t")
        0.002
    """
    losses = _losses(rows, case, task)
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def wider_rate(rows: Sequence[Row], case: Case, task: str) -> float | None:
    """The next rate to try where the best is the outermost one tried.

    Args:
        rows: of the record so far; the whole grid is in it.
        case: method.
        task: data set.

    Returns:
        A rate beyond the grid; None if the best has neighbours, or enough was tried.
    """
    losses = _losses(rows, case.name, task)
    tried = sorted(losses)
    if len(tried) >= len(case.grid) + WIDER or not tried:
        return None
    best = chosen_rate(rows, case.name, task)
    for step in (*range(-1 - WIDER, -1), *range(2, 2 + WIDER)):
        beyond = case.beyond(step)
        inner = case.beyond(step + (1 if step < 0 else -1))
        if best == inner and beyond not in losses:
            return beyond
    return None


@dataclass
class Board:
    """What was done, what is under way, what comes next."""

    pending: list[Job]
    rows: list[Row] = field(default_factory=list)
    running: dict[tuple[object, ...], Job] = field(default_factory=dict)

    def skip_done(self) -> None:
        """Drop jobs whose rows are there, and take up the tuning they call for."""
        done = {row_key(row) for row in self.rows if "error" not in row}
        self.pending = [job for job in self.pending if job.key not in done]
        for row in list(self.rows):
            if row["what"] == "tune":
                self._widen(row)

    def next_job(self) -> Job | None:
        """The first job that can be done now; it is under way from here on."""
        for index, job in enumerate(self.pending):
            if job.what != "run" or not self._tuning(job):
                self.pending.pop(index)
                self.running[job.key] = job
                if job.what == "run" and job.rate is None:
                    case, task = str(job.case), str(job.task)
                    rate = chosen_rate(self.rows, case, task) or BY_NAME[case].rate
                    return replace(job, rate=rate)
                return job
        return None

    def _tuning(self, job: Job) -> bool:
        """Whether a learning rate of this method on this task is still to be tried."""
        jobs = [*self.pending, *self.running.values()]
        return any((j.what, j.case, j.task) == ("tune", job.case, job.task) for j in jobs)

    def finished(self, job: Job, row: Row) -> None:
        """Take a row; a grid that ends at its best rate is continued."""
        self.running.pop(job.key, None)
        self.rows.append(row)
        if job.what == "tune":
            self._widen(row)

    def _widen(self, row: Row) -> None:
        like = Job(what="tune", case=row["method"], task=row["task"])
        if self._tuning(like) or row["method"] is None:
            return
        rate = wider_rate(self.rows, BY_NAME[row["method"]], row["task"])
        if rate is not None:
            self.pending.insert(0, replace(like, rate=rate, seed=TUNING_SEED))


def row_key(row: Row) -> tuple[object, ...]:
    """The key of the job that a row came from."""
    rate = None if row["what"] == "run" else row["rate"]
    return row["what"], row["method"], row["task"], row["shape"], rate, row["seed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every worker is told."""

    model: str
    tasks: tuple[Task, ...]
    shapes: tuple[Shape, ...]
    demo: Path
    folder: Path
    workers: int
    gpus: tuple[str, ...] = ()


def visible_gpus() -> tuple[str, ...]:
    """What `CUDA_VISIBLE_DEVICES` says of the GPUs at hand, one word each."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(words.split(",")) if words else tuple(map(str, range(torch.cuda.device_count())))


def work(pipe: Connection, setting: Setting, number: int) -> None:
    """A worker, on one GPU in turn: says when it is ready, then does jobs until it is told None."""
    if setting.gpus:  # before anything asks for a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = setting.gpus[number % len(setting.gpus)]
    if not torch.cuda.is_available() and setting.workers > 1:
        torch.set_num_threads(1)
    disable_progress_bar()
    with quiet_transformers():
        scratch = setting.folder / f"worker-{number}"
        shop = Workshop(setting.model, setting.tasks, setting.shapes, setting.demo, scratch)
        if shop.on_gpu:
            torch.ones(1, device="cuda")
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
        self._context = multiprocessing.get_context("spawn")
        self._started = 0
        self._crew: dict[Connection, Any] = {}
        self._jobs: dict[Connection, Job] = {}
        self._began = time.monotonic()
        self.left: list[Job] = []

    def __enter__(self) -> "Crew":
        """Start the workers."""
        for _ in range(self.setting.workers):
            self._start()
        return self

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

    def idle(self) -> list[Connection]:
        """Workers without a job."""
        return [pipe for pipe in self._crew if pipe not in self._jobs]

    def ready(self) -> None:
        """Wait until every worker is ready, so that none disturbs the others' timing."""
        for pipe in list(self._crew):
            if not pipe.poll(max(0.0, self.deadline - time.monotonic())):
                raise SystemExit("the workers did not get ready in time")
            try:
                pipe.recv()
            except EOFError:
                raise SystemExit("a worker failed to start; its message is above") from None

    def run(self, jobs: Sequence[Job], *, alone: bool) -> None:
        """Do jobs until none is left or time is up; what time was too short for is `left`.

        Args:
            jobs: in their order; those that are done already are left out.
            alone: one after the other in one process, for timing.
        """
        self.board.pending = list(jobs)
        self.board.skip_done()
        try:
            self._run(self.idle()[:1] if alone else self.idle())
        finally:
            self.left += [*self.board.running.values(), *self.board.pending]
            self.board.running.clear()

    def _run(self, free: list[Connection]) -> None:
        """Hand out jobs and take rows."""
        busy: list[Connection] = []
        while time.monotonic() < self.deadline:
            while free and (job := self.board.next_job()) is not None:
                pipe = free.pop()
                pipe.send(job)
                self._jobs[pipe] = job
                busy.append(pipe)
            if not busy:
                return
            for pipe in wait(busy, timeout=max(0.0, self.deadline - time.monotonic())):
                assert isinstance(pipe, Connection)
                busy.remove(pipe)
                free.append(self._take(pipe))

    def _take(self, pipe: Connection) -> Connection:
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
            pipe = next(reversed(self._crew))
            pipe.recv()  # that it is ready
        self._write(job, row)
        return pipe

    def _write(self, job: Job, row: Row) -> None:
        """Keep a row, here and on disk, and say so."""
        self.board.finished(job, row)
        with (self.setting.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = row.get("error") or ", ".join(
            f"{name} {row[name]}" for name in ("loss", "score", "ms") if row.get(name) is not None
        )
        at = f"{time.monotonic() - self._began:5.0f} s"
        print(f"{at}  {job}: {said} ({row.get('seconds', 0)} s)", flush=True)


def read_rows(folder: Path) -> list[Row]:
    """Rows of an earlier run in the same folder; failed ones are done again."""
    file = folder / "rows.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "error" not in row]
