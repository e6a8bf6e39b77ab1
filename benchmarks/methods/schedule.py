"""Which job comes next: the base, the learning rates, and seed after seed.

Each for all methods, the slowest first, so that a run that is cut short has whole seeds and none
is left to one worker at the end. Who does them: `crew.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.methods.cases import BY_NAME, DEMO_SHAPE, WIDER, Case, Job, Shape, Task
from benchmarks.methods.work import Row

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


def costs_of(rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds of a step by method, where it was timed last.

    Example:
        >>> costs_of([{"what": "speed", "method": "lora", "ms": 2.0}, {"what": "base"}])
        {'lora': 2.0}
    """
    return {row["method"]: row["ms"] for row in rows if row["what"] == "speed" and "ms" in row}


def bases(cases: Sequence[Case], tasks: Sequence[Task], shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Bits of the demo model's bases that there is something to do with; the base is in NF4.

    Example:
        >>> bases([BY_NAME["full"]], [], []), bases([BY_NAME["full"]], [], [Shape(
        ...     name="demo", batch=1, seq=8)])
        ((), (16,))
    """
    if not tasks and all(shape.name != DEMO_SHAPE for shape in shapes):
        return ()
    return tuple(sorted({case.bits for case in cases} | ({4} if tasks else set())))


def training_jobs(
    cases: Sequence[Case],
    tasks: Sequence[Task],
    seeds: int,
    costs: Mapping[str, float] | None = None,
) -> list[Job]:
    """The base on every task, the grids, and seed after seed of all methods.

    Args:
        cases: methods.
        tasks: data sets.
        seeds: how many.
        costs: of a step, by method; the slowest come first, so that none is the last alone.

    Returns:
        Jobs in their order; reported ones have no rate yet.
    """
    pairs = [(case, task) for task in tasks for case in cases]
    pairs.sort(key=lambda pair: -(costs or {}).get(pair[0].name, 0.0))
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
