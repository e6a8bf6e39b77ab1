"""Peak memory and tokens/s of a training step: predicted beside measured, over a grid.

    python -m benchmarks.plan                      # the whole grid, recorded
    python -m benchmarks.plan --models Llama-3.1-8B Gemma-3-4B
    python -m benchmarks.plan --again RECORD       # predict a record's rows anew: no GPU

Models have random weights of a real shape, made where they run, and train on random tokens
with the step that `train` runs, small batches as a CUDA graph. Predictions are made after the
measurements, from the record alone. Targets: every peak within 3%, half of them within 1%,
tokens/s within 15%.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.record import write_record
from benchmarks.plan.cases import GRID, SMALL, jobs
from qlora_kit.bench.predicted import add_predictions
from qlora_kit.bench.record import Row, machine
from qlora_kit.bench.session import Session
from qlora_kit.train.record import source_commit

MOST, MEDIAN, SPEED = 0.03, 0.01, 0.15
"""Targets: each peak, their median, each speed; relative."""


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
            reason = row.get("skipped") or row.get("failed") or row.get("not_predicted")
            what = "out of memory" if row.get("oom") else str(reason)[:60]
            lines.append(
                f"{row['model']:14} {row['method']:8} {row['batch']} x {row['seq']} "
                f"{row['policy']}: {what}"
            )
    if known:
        sizes = [abs(memory) for _, memory, _ in known]
        speeds = [abs(speed) for _, _, speed in known]
        peaks = f"median error {statistics.median(sizes):.2%} (target {MEDIAN:.0%})"
        most = f"largest {max(sizes):.2%} (target {MOST:.0%})"
        over = sum(size > MOST for size in sizes)
        lines += ["", f"{len(known)} points. Peak memory: {peaks}, {most}; {over} beyond it."]
        most = f"largest {max(speeds):.1%} (target {SPEED:.0%})"
        over = sum(speed > SPEED for speed in speeds)
        median = f"median error {statistics.median(speeds):.1%}"
        lines.append(f"Tokens/s: {median}, {most}; {over} beyond it.")
    return "\n".join(lines)


def _again(file: Path) -> None:
    """Predict a record's rows anew, and write them into it."""
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    add_predictions(record)
    record["predicted_by"] = source_commit()
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record["rows"]))


def main(words: list[str] | None = None) -> int:
    """Measure, predict, print, write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=None, help="of the grid; all by default")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--limit-seconds", type=float, default=120, help="for one process")
    parser.add_argument("--total-seconds", type=float, default=1800, help="for the whole run")
    parser.add_argument("--again", type=Path, default=None, help="a record to predict anew")
    parser.add_argument("--out", type=Path, default=None, help="instead of benchmarks/results")
    arguments = parser.parse_args(words)
    if arguments.again is not None:
        _again(arguments.again)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = GRID if device == "cuda" else SMALL
    cases = tuple(c for c in cases if arguments.models is None or c.model in arguments.models)
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(
            Path(scratch),
            limit_seconds=arguments.limit_seconds,
            total_seconds=arguments.total_seconds,
        )
        planned = jobs(cases, device=device, warmup=arguments.warmup, steps=arguments.steps)
        try:
            for job in planned:
                session.run(job)
        except KeyboardInterrupt:
            print("cut short: what was measured is recorded", flush=True)
    record = {**machine(), "rows": session.rows}
    write_record("plan", session.rows, folder=arguments.out)  # whatever becomes of predictions
    add_predictions(record)
    file = write_record("plan", session.rows, folder=arguments.out)
    print(table(session.rows))
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
