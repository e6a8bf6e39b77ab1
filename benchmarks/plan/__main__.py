"""Peak memory and tokens/s of a training step: predicted beside measured, over a grid.

    python -m benchmarks.plan                      # the whole grid, recorded
    python -m benchmarks.plan --models Llama-3.1-8B Gemma-3-4B --sizes 4x2048:save
    python -m benchmarks.plan --only-missing RECORD ... --later --total-seconds 280
    python -m benchmarks.plan --again RECORD       # predict a record's rows anew: no GPU
    python -m benchmarks.plan --again NEW OLD ...  # and take the old ones' rows into the new one
    python -m benchmarks.plan --only-missing RECORD ... --estimate     # seconds it would take

Models have random weights of a real shape, made where they run, and train on random tokens
with the step that `train` runs, small batches as a CUDA graph. All are made in one process, one
after the other: importing the libraries takes longer than most of the runs (`--fresh` for a
process each). Predictions are made after the measurements, from the record alone; `--later`
leaves them to `--again`, on a machine that costs less. Targets: every peak within 3%, half of
them within 1%, tokens/s within 15%.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.record import write_record
from benchmarks.plan.cases import GRID, SMALL, jobs, missing, of_sizes, together
from qlora_kit.bench.predicted import add_predictions, prediction_of
from qlora_kit.bench.record import Row, machine
from qlora_kit.bench.session import Session
from qlora_kit.bench.subject import Job, first_fields
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.train.record import source_commit

MOST, MEDIAN, SPEED = 0.03, 0.01, 0.15
"""Targets: each peak, their median, each speed; relative."""
SMALL_TOKENS = 4096
"""Of a batch that any host may keep waiting."""


def errors(rows: list[Row]) -> list[tuple[Row, float, float]]:
    """Rows with both numbers, and how far off the prediction was.

    Args:
        rows: of a record.

    Returns:
        Each row, and the relative errors of peak and of tokens/s.

    Example:
        >>> row = {"peak_allocated_gib": 10.0, "predicted_gib": 10.1, "tokens_per_s": 100.0,
        ...     "predicted_tokens_per_s": 90.0}
        >>> [(round(m, 3), round(s, 3)) for _, m, s in errors([row, {"predicted_gib": None}])]
        [(0.01, -0.1)]
    """
    found = []
    for row in rows:
        if row.get("predicted_gib") is None or row.get("peak_allocated_gib") is None:
            continue
        memory = row["predicted_gib"] / row["peak_allocated_gib"] - 1
        found.append((row, memory, row["predicted_tokens_per_s"] / row["tokens_per_s"] - 1))
    return found


def waits(row: Row) -> bool:
    """Whether Python's launches set the pace of a row: a small batch without a CUDA graph.

    Args:
        row: of a record, with predictions.

    Returns:
        True where that was predicted, or the batch is so small that hosts decide.

    Example:
        >>> waits({"batch": 1, "seq": 512}), waits({"batch": 1, "seq": 512, "graph": True})
        (True, False)
        >>> waits({"batch": 4, "seq": 2048, "predicted_limit": "host"})
        True
    """
    small = row["batch"] * row["seq"] <= SMALL_TOKENS
    return not row.get("graph") and (small or row.get("predicted_limit") == "host")


_SPEEDS = {False: "Tokens/s", True: "Tokens/s of small batches without a CUDA graph"}


def table(rows: list[Row]) -> str:
    """What is printed: a line a row, and how the targets fare.

    Args:
        rows: of a record, with predictions.

    Returns:
        Lines.
    """
    heading = f"{'model':14} {'method':8} {'size':>10} {'policy':26} {'GiB':>7} {'predicted':>9} "
    lines = [f"{heading}{'':>6} {'tok/s':>7} {'':>6}"]
    known = errors(rows)
    for row, memory, speed in known:
        method = f"{row['method']}/{row['bits']}"
        lines.append(
            f"{row['model']:14} {method:8} {row['batch']:>3} x {row['seq']:<5}"
            f" {row['policy'][:26]:26} {row['peak_allocated_gib']:7.2f} "
            f"{row['predicted_gib']:9.2f} {memory:+6.1%} {row['tokens_per_s']:7,.0f} {speed:+6.1%}"
        )
    for row in rows:
        if row.get("predicted_gib") is None or row.get("peak_allocated_gib") is None:
            if row.get("peak_allocated_gib") is not None:
                peak = f"{row['peak_allocated_gib']:.2f} GiB, {row['tokens_per_s']:,.0f} tokens/s"
                row = {**row, "failed": f"{peak}, not predicted"}
            words = ("skipped", "error", "failed", "not_predicted")
            reason = next((row[word] for word in words if row.get(word)), None)
            what = "out of memory" if row.get("oom") else str(reason)[:60]
            lines.append(
                f"{row['model']:14} {row['method']:8} {row['batch']} x {row['seq']} "
                f"{row['policy']}: {what}"
            )
    if known:
        sizes = [abs(memory) for _, memory, _ in known]
        peaks = f"median error {statistics.median(sizes):.2%} (target {MEDIAN:.0%})"
        most = f"largest {max(sizes):.2%} (target {MOST:.0%})"
        over = sum(size > MOST for size in sizes)
        lines += ["", f"{len(known)} points. Peak memory: {peaks}, {most}; {over} beyond it."]
        for waiting, named in _SPEEDS.items():
            speeds = [abs(speed) for row, _, speed in known if waits(row) == waiting]
            if speeds:
                most = f"largest {max(speeds):.1%} (target {SPEED:.0%})"
                over = sum(speed > SPEED for speed in speeds)
                median = f"median error {statistics.median(speeds):.1%}"
                lines.append(f"{named}: {len(speeds)} points, {median}, {most}; {over} beyond it.")
    return "\n".join(lines)


def _again(file: Path, others: Sequence[Path]) -> None:
    """Predict a record's rows anew, those of others among them, and write them into it."""
    record, *older = (json.loads(one.read_text(encoding="utf-8")) for one in (file, *others))
    for one in older:
        if one["gpu"] != record["gpu"]:
            raise SystemExit(f"{one['gpu']} is not {record['gpu']}: records of one card only")
    for one in (record, *older):
        for row in one["rows"]:
            row.setdefault("commit", one["commit"])
    record["rows"] = together([one["rows"] for one in (record, *older)])
    add_predictions(record)
    record["predicted_by"] = source_commit()
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record["rows"]))


_IMPORTS_S, _BUILD_S, _POINT_S = 20.0, 3.0, 1.5
"""Seconds that a process, a model and a point take besides their steps, on an H100's host."""


def estimate(planned: Sequence[Job]) -> str:
    """How long measuring would take on an H100.

    Args:
        planned: jobs.

    Returns:
        A line a point, with the seconds since the start when it ends.
    """
    lines, total = [], _IMPORTS_S
    for job in planned:
        total += _BUILD_S
        for point in job.points:
            row = first_fields(job.build, point)
            made = prediction_of(row, "h100", find_gpu("h100").memory_bytes)
            warmup = job.warmup if point.warmup is None else point.warmup
            took = _POINT_S + made.step_s * (1 + warmup + (point.steps or job.steps))
            took += made.pinning_s
            total += took
            what = f"{job.build.model:14} {job.build.method:8} {job.build.optimizer:18}"
            size = f"{point.batch} x {point.seq}"
            lines.append(f"{what} {size:>10} {point.policy[:28]:28} {took:6.1f} s {total:6.0f} s")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Measure, predict, print, write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=None, help="of the grid; all by default")
    parser.add_argument("--sizes", nargs="+", metavar="BxT:POLICY", help="of those; all by default")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--limit-seconds", type=float, default=1800, help="for one process")
    parser.add_argument("--total-seconds", type=float, default=1800, help="for the whole run")
    add = parser.add_argument
    add("--fresh", action="store_true", help="a process for each model and method")
    add("--only-missing", nargs="+", type=Path, default=(), help="records: not their rows again")
    add("--later", action="store_true", help="predict nothing now; see --again")
    add("--estimate", action="store_true", help="measure nothing: how long would it take?")
    add("--again", nargs="+", type=Path, default=None, help="a record to predict anew")
    parser.add_argument("--out", type=Path, default=None, help="instead of benchmarks/results")
    arguments = parser.parse_args(words)
    if arguments.again is not None:
        _again(arguments.again[0], arguments.again[1:])
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = GRID if device == "cuda" or arguments.estimate else SMALL
    cases = tuple(c for c in cases if arguments.models is None or c.model in arguments.models)
    where = "cuda" if arguments.estimate else device
    planned = jobs(cases, device=where, warmup=arguments.warmup, steps=arguments.steps)
    if arguments.sizes is not None:
        planned = of_sizes(planned, arguments.sizes)
    old = [json.loads(file.read_text(encoding="utf-8")) for file in arguments.only_missing]
    planned = missing(planned, [row for record in old for row in record["rows"]])
    if arguments.estimate:
        print(estimate(planned))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(
            Path(scratch),
            limit_seconds=arguments.limit_seconds,
            total_seconds=arguments.total_seconds,
        )
        try:
            for group in [[job] for job in planned] if arguments.fresh else [planned]:
                session.run_together(group)
        except KeyboardInterrupt:
            print("cut short: what was measured is recorded", flush=True)
    record = {**machine(), "rows": session.rows}
    write_record("plan", session.rows, folder=arguments.out)  # whatever becomes of predictions
    if not arguments.later:
        add_predictions(record)
    file = write_record("plan", session.rows, folder=arguments.out)
    print(table(session.rows))
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
