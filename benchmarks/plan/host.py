"""Steps that may wait for Python, with a CUDA graph and without, beside their host's figure.

    python -m benchmarks.plan.host                  # about a minute on an H200, recorded
    python -m benchmarks.plan.host --later          # predict nothing now
    python -m benchmarks.plan.host --again RECORD   # predict a record's rows anew: no GPU

Batches of 8,192 tokens of small models with a graph and without; small batches without one, as a
run has them that cannot record; and an 8B model, whose steps need none. Each row has
microseconds per small op of its process's host (`qlora_kit/plan/host.py`), by which the planner
scales the times of ops. On a host that others use as well, no figure holds.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.record import write_record
from qlora_kit.bench.predicted import add_predictions, prediction_of
from qlora_kit.bench.record import Row, machine
from qlora_kit.bench.session import Session
from qlora_kit.bench.steps import RECORDED_AFTER
from qlora_kit.bench.subject import Build, Job, Point
from qlora_kit.train.record import source_commit

Size = tuple[int, int, str, bool]
"""Rows of a batch, tokens of a row, activation policy, whether as a CUDA graph."""

_ELEMENTWISE = "recompute_elementwise"
GRID: tuple[tuple[str, str, int, tuple[Size, ...]], ...] = (
    (
        "Llama-3.2-1B",
        "lora",
        4,
        (
            (1, 512, "save", False),
            (1, 2048, _ELEMENTWISE, False),
            (1, 2048, "offload", False),
            *((4, 2048, "save", graph) for graph in (False, True)),
            *((8, 1024, "save", graph) for graph in (False, True)),
            *((2, 4096, "save", graph) for graph in (False, True)),
            *((4, 2048, "recompute_all", graph) for graph in (False, True)),
        ),
    ),
    (
        "Llama-3.2-3B",
        "lora",
        4,
        (
            (1, 2048, _ELEMENTWISE, False),
            *((4, 2048, "save", graph) for graph in (False, True)),
        ),
    ),
    ("Llama-3.1-8B", "lora", 4, ((1, 512, "save", False), (4, 2048, _ELEMENTWISE, True))),
    ("Llama-3.2-3B", "lora", 16, ((1, 2048, "save", False),)),
    ("Llama-3.2-1B", "lora_fa", 4, ((1, 2048, "save", False),)),
    ("Llama-3.2-1B", "lora", 16, ((4, 2048, "save", False),)),
)
"""Model, method, bits, sizes."""
SMALL = (("tiny", "lora", 4, ((2, 64, "save", False),)),)
"""For machines without a GPU."""


def jobs(device: str) -> list[Job]:
    """What is measured.

    Args:
        device: `cuda`, or `cpu` for a toy.

    Returns:
        A job per model and method, for one process.

    Example:
        >>> [len(job.points) for job in jobs("cuda")]
        [11, 3, 2, 1, 1, 1]
    """
    made = []
    for model, method, bits, sizes in GRID if device == "cuda" else SMALL:
        points = [
            Point(
                batch=batch,
                seq=seq,
                policy=policy,
                graph=graph,
                warmup=1 + RECORDED_AFTER if graph else 2,
                steps=4,
            )
            for batch, seq, policy, graph in sizes
        ]
        build = Build(
            impl="qlora_kit",
            model=model,
            checkpoint="",
            method=method,
            bits=bits,
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            longest=max(point.seq for point in points),
        )
        made.append(Job(build=build, points=tuple(points)))
    return made


def table(rows: Sequence[Row], gpu: str, memory_bytes: int) -> str:
    """Measured milliseconds beside those predicted for the rows' host and for the assumed one.

    Args:
        rows: of a record.
        gpu: the card's name.
        memory_bytes: of the card.

    Returns:
        Lines.
    """
    heads = f"{'graph':>6}{'us':>7}{'ms':>8}{'said':>8}{'':>7}{'assumed':>9}{'':>7}"
    heads += f"{'GiB':>8}{'held':>7}"
    lines = [f"{'model':13} {'method':11}{'size':>9} {'policy':22}{heads}"]
    for row in rows:
        if "ms_median" not in row:
            continue
        known = prediction_of(row, gpu, memory_bytes).step_s * 1e3
        other = prediction_of({**row, "host_us_per_op": None}, gpu, memory_bytes).step_s * 1e3
        ms = row["ms_median"]
        lines.append(
            f"{row['model'][:13]:13} {row['method'] + '/' + str(row['bits']):11}"
            f"{row['batch']:>3} x {row['seq']:<4} {row['policy'][:21]:22}"
            f"{'yes' if row.get('graph') else 'no':>5}{row['host_us_per_op']:8.2f}{ms:8.1f}"
            f"{known:8.1f}{known / ms - 1:+7.1%}{other:9.1f}{other / ms - 1:+7.1%}"
            f"{row['peak_allocated_gib'] or 0:8.2f}{row['peak_reserved_gib'] or 0:7.2f}"
        )
    return "\n".join(lines)


def _again(file: Path) -> int:
    record = json.loads(file.read_text(encoding="utf-8"))
    add_predictions(record)
    record["predicted_by"] = source_commit()
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record["rows"], record["gpu"], record["gpu_memory_bytes"]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, predict, print, write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--again", type=Path, metavar="RECORD", help="predict its rows anew")
    parser.add_argument("--later", action="store_true", help="predict nothing now; see --again")
    parser.add_argument("--limit-seconds", type=float, default=200)
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.again is not None:
        return _again(arguments.again)
    with tempfile.TemporaryDirectory() as scratch:
        limits = {"limit_seconds": arguments.limit_seconds}
        session = Session(Path(scratch), total_seconds=arguments.limit_seconds, **limits)
        planned = jobs("cuda" if torch.cuda.is_available() else "cpu")
        try:
            session.run_together(planned)
        except KeyboardInterrupt:
            print("cut short: what was measured is recorded", flush=True)
    record = {**machine(), "rows": session.rows}
    file = write_record("host", session.rows, folder=arguments.out)  # whatever comes of the rest
    if not arguments.later and record["gpu"] is not None:
        add_predictions(record)
        file = write_record("host", session.rows, folder=arguments.out)
        print(table(session.rows, record["gpu"], record["gpu_memory_bytes"]))
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
