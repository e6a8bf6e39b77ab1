"""The fresh process of a build: makes it, measures its points, writes a row for each.

    python -m qlora_kit.bench.child JOBS.jsonl

Where a file has several jobs, the next one is built when the one before is gone: importing the
libraries takes longer than many a measurement.
Every row is written as soon as it is there; `session.py` starts this and sets the environment
that a library needs. Out of memory is a result: the row says so and
the next point follows. Any other error ends the process.
"""

import gc
import importlib
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from qlora_kit.bench.components import components, resident_bytes
from qlora_kit.bench.steps import (
    GIB,
    RECORDED_AFTER,
    Measured,
    gpu_memory,
    is_out_of_memory,
    make_batches,
    measure,
    start_counting,
    timed_steps,
)
from qlora_kit.bench.subject import (
    BUILDS,
    MEASURES,
    Batch,
    Build,
    Job,
    NotPossible,
    Point,
    Stage,
    Subject,
    first_fields,
    read_jobs,
    write_row,
)
from qlora_kit.bench.turns import alone, prepares, taken
from qlora_kit.core.allocator import segments_grow
from qlora_kit.core.memory import PeakMemory
from qlora_kit.plan.host import host_us_per_op

BUILDERS = {
    "qlora_kit": "qlora_kit.bench.ours",
    "full": "qlora_kit.bench.full",
    "peft": "qlora_kit.bench.peers.peft_bnb",
    "peft_liger": "qlora_kit.bench.peers.peft_bnb",
    "unsloth": "qlora_kit.bench.peers.unsloth_fast",
}
"""Library to the module that has its `build` and `environment`."""


def command(module: str, build: Build, file: Path) -> list[str]:
    """The command line of a fresh process for a library.

    Unsloth asks to be imported before anything else, torch's allocator included.

    Args:
        module: with a `main` that reads its first argument.
        build: whose library it is.
        file: the argument.

    Returns:
        Program and arguments.
    """
    if build.impl == "unsloth" and build.device == "cuda" and find_spec("unsloth") is not None:
        code = f"import unsloth; from {module} import main; main()"
        return [sys.executable, "-c", code, str(file)]
    return [sys.executable, "-m", module, str(file)]


def vocab_size(build: Build) -> int:
    """Of a build's model.

    Args:
        build: of a checkpoint, whose file is read without transformers (which Unsloth wants to
            be imported before), or of random weights.

    Returns:
        The number of tokens.

    Example:
        >>> vocab_size(Build(impl="full", model="tiny", checkpoint=""))
        512
    """
    file = Path(build.checkpoint) / "config.json"
    if build.checkpoint and file.exists():
        return int(json.loads(file.read_text(encoding="utf-8"))["vocab_size"])
    from qlora_kit.bench.shapes import config_of

    return int(config_of(build.checkpoint or build.model).vocab_size)


def answers(point: Point, measured: Measured) -> dict[str, object]:
    """What a row says of the measured steps."""
    tokens = point.batch * point.seq
    times = sorted(measured.step_ms)
    row: dict[str, object] = {
        "tokens_per_s": tokens / measured.median_ms * 1e3,
        "ms_median": measured.median_ms,
        "ms_min": times[0],
        "ms_max": times[-1],
        "steps": len(times),
        "first_step_s": measured.first_step_s,
        "check_loss": measured.check_loss,
        "last_loss": measured.last_loss,
        "losses": list(measured.losses),
    }
    if measured.breakdown is not None:
        row["profile_ms"] = measured.breakdown.category_ms
        row["profile_kernels"] = measured.breakdown.kernels
    return row


def by_component(subject: Subject, device: str) -> dict[str, object]:
    """The peak since `start_counting`, by component, as records name it."""
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    found = components(resident_bytes(subject, device), peak)
    return {"components_gib": {name: count / GIB for name, count in found.items()}}


def in_trainer(
    subject: Subject, batches: list[Batch], job: Job, point: Point, step: str, stage: Stage
) -> dict[str, object]:
    """The Trainer between two more bare loops, so that a card growing warm favours neither."""
    if subject.trainer is None:
        return {}
    device = job.build.device

    def bare() -> float:
        with subject.prepare(point):
            times, _ = timed_steps(subject, batches[1:], RECORDED_AFTER, job.steps, device)
            return statistics.median(times)

    with alone():
        before = bare()
        inside = statistics.median(subject.trainer(point, step, 2 * job.steps))
        after = bare()
    overhead = inside / ((before + after) / 2) - 1.0
    stage("trainer", f"{inside:.1f} ms against {before:.1f} and {after:.1f}: {overhead:+.1%}")
    return {
        "trainer_tokens_per_s": point.batch * point.seq / inside * 1e3,
        "trainer_overhead": overhead,
    }


def run_point(
    subject: Subject, job: Job, point: Point, stage: Stage, *, vocab: int
) -> dict[str, object]:
    """Measure one point.

    Args:
        subject: as built.
        job: how many steps, and what else to measure.
        point: what to measure.
        stage: told what ends.
        vocab: tokens are drawn below it.

    Returns:
        The row, without what the process as a whole tells.
    """
    row = first_fields(job.build, point)
    device = job.build.device
    subject.restart()
    start_counting(point.cap_gib if device == "cuda" else None)
    try:
        batches = make_batches(vocab, point.batch, point.seq, job.build.seed, device)
        with subject.prepare(point) as step:
            row["step"] = step
            measured = measure(
                subject,
                batches,
                warmup=job.warmup if point.warmup is None else point.warmup,
                steps=point.steps or job.steps,
                device=device,
                stage=stage,
                profile_rank=job.build.rank if job.profile or point.profile else None,
                vocab_size=vocab,
            )
            row |= {} if subject.facts is None else subject.facts()
        row |= answers(point, measured) | gpu_memory() | by_component(subject, device)
        if job.trainer:
            row |= in_trainer(subject, batches, job, point, step, stage)
    except NotPossible as reason:
        row["skipped"] = str(reason)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        row |= {"oom": True} | gpu_memory()
        subject.optimizer.state.clear()  # an update that was cut short leaves half of it
        stage("out of memory", str(error).splitlines()[0][:200])
    subject.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    return row


def _clear_up(now: float) -> float:
    """Free what the job before has left, and its cap; the time is handed through."""
    start_counting(None)
    return now


def run_job(job: Job, stage: Stage) -> None:
    """Build, measure every point, write the rows.

    Args:
        job: what to do.
        stage: told what ends.
    """
    before = stage(BUILDS, f"{job.build.model} {job.build.method}, {job.build.bits} bits")
    gpu = job.build.device == "cuda"
    before = _clear_up(before) if "done" in stage.seconds else 0.0
    left = torch.cuda.memory_allocated() if gpu else 0
    module = importlib.import_module(BUILDERS[job.build.impl])
    with PeakMemory(interval_s=0.05) as memory:
        try:
            subject: Subject = module.build(job.build, stage)
        except NotPossible as reason:
            for point in job.points:
                write_row(job.rows_file, first_fields(job.build, point) | {"skipped": str(reason)})
            return
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            stage("out of memory", "while loading")
            for point in job.points:
                write_row(job.rows_file, first_fields(job.build, point) | {"oom": True})
            return
        loading = {
            "load_s": stage.seconds.get("loaded", 0.0) - stage.seconds.get("imports", 0.0),
            "imports_s": stage.seconds.get("imports", 0.0) - before,
            "load_host_gib": memory.peak_bytes / GIB,
            "weights_gib": (torch.cuda.memory_allocated() - left) / GIB if gpu else None,
            "left_before_gib": left / GIB if gpu else None,
            "growing_segments": segments_grow() if gpu else None,
            "host_us_per_op": host_us_per_op(job.build.device),
            "turns": taken(),
        }
        vocab = vocab_size(job.build)
        for point in job.points:
            stage(MEASURES, f"{point.batch} x {point.seq}, {point.policy}")
            row = run_point(subject, job, point, stage, vocab=vocab)
            write_row(job.rows_file, row | loading | {"host_gib": memory.peak_bytes / GIB})
    stage("done")


def main() -> None:
    """Read the jobs and do them, one after the other."""
    stage = Stage()
    prepares()
    for job in read_jobs(Path(sys.argv[1])):
        run_job(job, stage)


if __name__ == "__main__":
    main()
