"""Every method on the same two real tasks: parameters, memory, speed, held-out score.

    python scripts/prepare_demo.py all
    python -m benchmarks.methods                     # times steps, tunes, trains; records
    python -m benchmarks.methods --methods lora dora --seeds 1 --budget 0.1      # a look
    python -m benchmarks.methods --report            # docs/methods.md from the newest record

SmolLM2-135M-Instruct in NF4. `reviews`: positive or negative, the quickstart's rows and
budget. `commands`: a voice command to JSON, judged by exact match of the whole answer. For each
seed all methods see the same rows in the same order, for as many updates. The learning rate is
chosen for each method and task on rows that are neither trained on nor reported, with a seed of
its own, in trainings of half the updates and less: three rates half a decade apart, one more
where the best is outermost, at most two.

Steps are timed first, while there is one process alone, at a larger model's shape: where a step
only waits for the processor to launch it, as it does with 135 million weights, methods cannot be
told apart by it. Median of several after a warm-up; the trainings share the GPU and say nothing
about speed. `--work FOLDER` keeps every finished row at once, and a run
in the same folder goes on from there. `--total-seconds` ends the run; the record says what is
missing.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness.record import ROOT, write_record
from benchmarks.methods.cases import BY_NAME, DEMO, MODEL, TASKS, Shape, budget_row
from benchmarks.methods.crew import Crew, Setting, read_rows, visible_gpus
from benchmarks.methods.report import budget_of, draw, table, text, write_into
from benchmarks.methods.schedule import Board, bases, costs_of, speed_jobs, training_jobs
from benchmarks.methods.work import reduced
from benchmarks.ops.plot_nf4_linear import newest
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.cores import usable_cores

DOCUMENT = ROOT / "docs" / "methods.md"
FIGURE = ROOT / "docs" / "methods.svg"


def shapes_of(words: Sequence[str]) -> tuple[Shape, ...]:
    """Read `NAME:BATCHxSEQ` words.

    Args:
        words: such as `demo:16x128` or `Llama-3.2-1B:4x1024`.

    Returns:
        Shapes.

    Example:
        >>> shapes_of(["demo:2x8"])[0].seq
        8
    """
    found = []
    for word in words:
        name, _, size = word.rpartition(":")
        batch, _, seq = size.partition("x")
        found.append(Shape(name=name, batch=int(batch), seq=int(seq)))
    return tuple(found)


def default_workers(gpu: bool) -> int:
    """Three for every four cores, where a GPU waits for a launch most of the time; else one."""
    return max(1, usable_cores() * 3 // 4) if gpu else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    add("--tasks", nargs="*", choices=[t.name for t in TASKS], default=[t.name for t in TASKS])
    add("--seeds", type=int, default=3)
    add("--budget", type=float, default=1.0, help="share of updates and held-out rows")
    add("--batch", type=int, help="rows of an update, instead of the tasks' own")
    add("--no-tune", action="store_true", help="take the middle of every grid")
    add("--model", default=str(MODEL), help="a folder or a .gguf file")
    add("--demo", type=Path, default=DEMO, help="folder of the data")
    default = ["Llama-3.2-1B:4x1024"] if gpu else ["demo:4x64"]
    add("--speed", nargs="*", default=default, metavar="NAME:BxT", help="where steps are timed")
    add("--speed-steps", type=int, default=Shape(name="", batch=1, seq=1).steps)
    add("--workers", type=int, default=default_workers(gpu), help="processes that train")
    add("--total-seconds", type=float, default=3600)
    add("--work", type=Path, help="folder to keep rows in and to go on from")
    add("--out", type=Path, help="instead of benchmarks/results")
    add("--report", nargs="?", const="newest", metavar="RECORD", help="only write the document")
    add("--leave-out", nargs="*", default=[], help="of a report: methods changed since the record")
    add("--document", type=Path, default=DOCUMENT)
    add("--figure", type=Path, default=FIGURE)
    return parser.parse_args(argv)


def report(arguments: argparse.Namespace) -> None:
    """Write the document's table and the figure from a record."""
    newest_one = arguments.report == "newest"
    file = newest("methods") if newest_one else Path(arguments.report)
    record = json.loads(file.read_text(encoding="utf-8"))
    write_into(arguments.document, text(record, file.name, arguments.leave_out))
    print(f"{arguments.document} from {file.name}")
    if budget_of(record)["tasks"]:
        draw(record, arguments.figure)
        print(f"{arguments.figure} from {file.name}")


def measure(arguments: argparse.Namespace, folder: Path) -> Path:
    """Do all jobs and write the record.

    Args:
        arguments: the command line.
        folder: for rows and scratch files.

    Returns:
        The record.
    """
    began = time.monotonic()
    cases = [BY_NAME[name] for name in arguments.methods]
    tasks = [reduced(t, arguments.budget) for t in TASKS if t.name in arguments.tasks]
    if arguments.batch:
        tasks = [replace(task, batch=arguments.batch) for task in tasks]
    shapes = [replace(s, steps=arguments.speed_steps) for s in shapes_of(arguments.speed)]
    setting = Setting(
        model=str(open_source(arguments.model).folder),
        tasks=tuple(tasks),
        shapes=tuple(shapes),
        demo=arguments.demo,
        folder=folder,
        workers=arguments.workers,
        bits=bases(cases, tasks, shapes),
        gpus=visible_gpus(),
    )
    board = Board([], read_rows(folder))
    with Crew(setting, board, began + arguments.total_seconds) as crew:
        try:
            print(f"{time.monotonic() - began:5.0f} s  the first worker is ready", flush=True)
            crew.run(speed_jobs(cases, shapes), alone=True)
            trainings = training_jobs(cases, tasks, arguments.seeds, costs_of(board.rows))
            if arguments.no_tune:
                trainings = [job for job in trainings if job.what != "tune"]
            crew.run(trainings, alone=False)
        except KeyboardInterrupt:
            print("cut short: what was finished is recorded", flush=True)
    left = crew.left
    more = {
        "model": Path(arguments.model).name,
        "workers": arguments.workers,
        "tuned": not arguments.no_tune,
        "measured_seconds": round(time.monotonic() - began, 1),
        "not_run": [str(job) for job in left],
    }
    rows = [budget_row(tasks, shapes, cases, **more), *board.rows]
    file = write_record("methods", rows, folder=arguments.out)
    print(table(json.loads(file.read_text(encoding="utf-8"))).text())
    print(f"{len(left)} jobs were not run; {file}")
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or report."""
    arguments = parse(argv)
    if arguments.report is not None:
        report(arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="qlora-kit-methods-") as scratch:
        folder = arguments.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        measure(arguments, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
