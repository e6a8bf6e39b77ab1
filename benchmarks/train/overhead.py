"""What transformers.Trainer adds to a training step.

    python -m benchmarks.train.overhead [--steps 12] [--rounds 2] [--total-seconds 110] [--out DIR]
    python -m benchmarks.train.overhead --batch 4 --policy recompute_all --without-past

One process, one model of random weights, one adapter and one optimizer. Loops take turns: the bare
loop of `python -m benchmarks.train`, the Trainer with a log line every 5 updates and with one after
each, and (unless `--without-past`) the Trainer as it was, which waited for every batch's copy and
read log lines at once; and again, with a bare loop at the end. A turn trains until its step has
been recorded as a CUDA graph, then times steps between events, as bench/steps.py does. `ms` is the
mean over turns of a turn's median, `turn_ms` has the turns, `overhead` is `ms` over the bare
loop's, minus 1. The bare turns differ as well: an overhead that is smaller than `ms_max` is from
`ms_min` there is not resolved.

Last, some steps of the Trainer with a line after each are profiled (trace.py): kernels outside the
graph, calls in which the host waits, idle time of the GPU and what the host did meanwhile.

That the Trainer and the bare loop compute the same is tested (tests/train, tests/step). Turns that
would begin after `--total-seconds` are left out; a run that is interrupted writes what it has.
Without a GPU all of it runs on a tiny model, which tests the benchmark and nothing else.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.harness.interrupt import interruptible
from benchmarks.harness.record import write_record
from benchmarks.train.trace import lines, summary
from qlora_kit.bench.ours import InTrainer, build
from qlora_kit.bench.record import Row
from qlora_kit.bench.shapes import MODELS
from qlora_kit.bench.steps import RECORDED_AFTER, make_batches, timed_steps
from qlora_kit.bench.subject import Build, Point, Stage, Subject
from qlora_kit.train.trainer import Trainer

PROFILED = 5
"""Steps in the profile, after `RECORDED_AFTER` and as many more."""


def as_it_was(trainer: Trainer) -> None:
    """Let a Trainer wait for batches and read log lines when they are due."""
    trainer.logs_late = False
    trainer.accelerator.dataloader_config.non_blocking = False


@dataclass(slots=True)
class Loop:
    """One loop and its turns."""

    name: str
    log_every: int | None = None
    """Updates between two log lines; None for the bare loop, which has none."""
    as_it_was: bool = False
    turn_ms: list[float] = field(default_factory=list)
    """Median of each turn's steps."""

    @property
    def ms(self) -> float:
        """Mean over turns."""
        return statistics.mean(self.turn_ms)


def all_loops() -> list[Loop]:
    """The bare loop first."""
    return [
        Loop("bare"),
        Loop("Trainer, log_every 5", 5),
        Loop("Trainer, log_every 1", 1),
        Loop("Trainer as it was, log_every 5", 5, as_it_was=True),
        Loop("Trainer as it was, log_every 1", 1, as_it_was=True),
    ]


class ProfiledSteps(TrainerCallback):
    """Writes a trace of some steps, when a step's graph is there."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.first = 2 * RECORDED_AFTER + 2
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """Start before the first of the steps, write when the last has ended."""
        if state.global_step == self.first:
            self.profiler.start()
        if state.global_step == self.first + PROFILED:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.file))


@dataclass(slots=True)
class Bench:
    """What the turns share."""

    subject: Subject
    inside: InTrainer
    point: Point
    steps: int
    device: str
    step: str = ""
    """`fused` or `eager`: how the bare loop's layers ran, and so the Trainer's."""

    def bare(self) -> float:
        """A turn of the bare loop: its median step, in milliseconds."""
        point, vocab = self.point, self.inside.model.config.vocab_size
        batches = make_batches(vocab, point.batch, point.seq, 0, self.device)[1:]
        warmup = RECORDED_AFTER + 1
        with self.subject.prepare(point) as self.step:
            times, _ = timed_steps(self.subject, batches, warmup, self.steps, self.device)
        return statistics.median(times)

    def turn(self, loop: Loop) -> None:
        """One turn of a loop, noted there."""
        if loop.log_every is None:
            loop.turn_ms.append(self.bare())
            return
        change = as_it_was if loop.as_it_was else None
        times = self.inside(
            self.point, self.step, self.steps, log_every=loop.log_every, change=change
        )
        loop.turn_ms.append(statistics.median(times))

    def profile(self) -> Row:
        """Some steps of the Trainer with a log line after each, as `trace.summary` has them."""
        with tempfile.TemporaryDirectory() as folder:
            profiled = ProfiledSteps(Path(folder) / "trace.json")
            steps = profiled.first + PROFILED - RECORDED_AFTER
            self.inside(self.point, self.step, steps, log_every=1, callbacks=(profiled,))
            trace = json.loads(profiled.file.read_text(encoding="utf-8"))
        return summary(trace["traceEvents"], PROFILED)


def take_turns(bench: Bench, loops: Sequence[Loop], rounds: int, until: float) -> Row | None:
    """All turns, then the profile.

    Args:
        bench: what they share.
        loops: the bare one first.
        rounds: turns of each; the bare loop has one more.
        until: of `time.perf_counter`: what would begin later is left out, except bare turns.

    Returns:
        The profile; None if there was no time for it.
    """
    bare, *others = loops
    for _ in range(rounds):
        bench.turn(bare)
        for loop in others:
            if time.perf_counter() < until:
                bench.turn(loop)
            else:
                print(f"{loop.name}: a turn left out, the time is over", flush=True)
    bench.turn(bare)
    if time.perf_counter() < until:
        return bench.profile()
    print("the profile is left out, the time is over", flush=True)
    return None


def rows_of(loops: Sequence[Loop], common: Row, profile: Row | None) -> list[Row]:
    """The record's rows: one per loop that had a turn; the profile is in that of its loop.

    Args:
        loops: the bare one first.
        common: what every row begins with.
        profile: of the Trainer with a log line after each update.

    Returns:
        Plain values.
    """
    bare = loops[0].ms
    rows = []
    for loop in loops:
        if not loop.turn_ms:
            continue
        row: Row = {"loop": loop.name, "log_every": loop.log_every, "as_it_was": loop.as_it_was}
        row |= common | {"turn_ms": loop.turn_ms, "ms": loop.ms}
        row |= {"ms_min": min(loop.turn_ms), "ms_max": max(loop.turn_ms)}
        row |= {"overhead": loop.ms / bare - 1.0}
        profiled = loop.log_every == 1 and not loop.as_it_was
        rows.append(row | ({"profile": profile} if profiled else {}))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line per loop.

    Args:
        rows: of the record.

    Returns:
        Text.
    """
    text = [f"{'':32}      ms  (least to most)     overhead"]
    for row in rows:
        spread = f"({row['ms_min']:.2f} to {row['ms_max']:.2f})"
        text.append(f"{row['loop']:32} {row['ms']:7.2f}  {spread:20} {row['overhead']:+.2%}")
    return "\n".join(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=list(MODELS), default="Llama-3.1-8B" if gpu else "tiny")
    add("--batch", type=int, default=1)
    add("--seq", type=int, default=2048 if gpu else 32)
    add("--policy", default="save", help="what becomes of activations")
    add("--steps", type=int, default=12, help="timed steps of a turn")
    add("--rounds", type=int, default=2, help="turns of each; the bare loop has one more")
    add("--without-past", action="store_true", help="no turns of the Trainer as it was")
    add("--total-seconds", type=float, default=110, help="start no turn after these")
    add("--out", type=Path, help="instead of benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build, take turns, print, record."""
    began = time.perf_counter()
    arguments = parse(argv)
    gpu = torch.cuda.is_available()
    if not gpu and arguments.model != "tiny":
        sys.exit("there is no GPU here: only --model tiny makes sense without one")
    device, dtype = ("cuda", "bfloat16") if gpu else ("cpu", "float32")
    built = Build(
        impl="qlora_kit", model=arguments.model, checkpoint="", device=device, dtype=dtype
    )
    subject = build(built, Stage())
    assert isinstance(subject.trainer, InTrainer)
    point = Point(batch=arguments.batch, seq=arguments.seq, policy=arguments.policy)
    bench = Bench(subject, subject.trainer, point, arguments.steps, device)
    loops = [one for one in all_loops() if not (arguments.without_past and one.as_it_was)]
    profile = None
    try:
        profile = take_turns(bench, loops, arguments.rounds, began + arguments.total_seconds)
    except KeyboardInterrupt:
        print("stopped: interrupted", flush=True)
        if not loops[0].turn_ms:
            return 1
    common = {
        "model": built.model,
        "batch": point.batch,
        "seq": point.seq,
        "policy": point.policy,
        "rank": built.rank,
        "bits": built.bits,
        "optimizer": built.optimizer,
        "step": bench.step,
        "steps": arguments.steps,
    }
    rows = rows_of(loops, common, profile)
    if profile is not None:
        print("\n" + "\n".join(lines(profile)))
    print("\n" + table(rows), flush=True)
    print(write_record("trainer_overhead", rows, folder=arguments.out))
    return 0


if __name__ == "__main__":
    interruptible()
    sys.exit(main())
