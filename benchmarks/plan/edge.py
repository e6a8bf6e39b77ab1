"""The edge of a budget: the largest run that is said to fit, and the next ones, which are not.

    python -m benchmarks.plan.edge --plan JOBS        # which runs: the planner's answer, no GPU
    python -m benchmarks.plan.edge --run JOBS         # on a GPU: measure them, write the record
    python -m benchmarks.plan.edge --again RECORD     # hold a record to the planner of today

For each edge three sizes under one budget, which torch is held to as `train` holds it
(`torch.cuda.set_per_process_memory_fraction`), with the allocator that `train` has
(`core/allocator.py`), so that fragments count:

    fits      the largest batch, or the longest row, that the planner says fits: it has to run
    tight     the next one, at least 3% more tokens: inside its margin, so it may run or not;
              `train` starts it with a warning
    refused   3% beyond the first whose predicted peak alone is more than the budget; `train`
              refuses it, and it ought to run out of memory

All models are built in one process, one after the other: importing takes longer than most of
the runs. What must not be: a run that fits and runs out of memory. Exit code 1 then.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.harness.record import write_record
from qlora_kit.bench.predicted import prediction_of
from qlora_kit.bench.record import Row
from qlora_kit.bench.recorded import most_recorded
from qlora_kit.bench.session import Session
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.subject import Build, Job, Point, read_jobs, write_jobs
from qlora_kit.core.units import GIB
from qlora_kit.plan.budget import Budget, needed_bytes
from qlora_kit.plan.edge import Remembered, largest
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.predict import CONTEXT, Prediction
from qlora_kit.plan.search import UNIT, Planner
from qlora_kit.plan.setup import FULL, Setup
from qlora_kit.train.record import source_commit

CLASSES = ("fits", "tight", "refused")
"""What the planner can say of a run."""
BEYOND = 0.03
"""Tokens more than the last that fits, or the first that is refused."""
_STEPS = {"fits": (1, 2), "tight": (0, 2), "refused": (0, 1)}
"""Steps before the timed ones, and those, after the first one."""
_GRAPH_WARMUP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One budget and a run that grows until it is full."""

    model: str
    budget: str
    """All that the process may take, the CUDA context included."""
    policy: str
    rows_of: int = 0
    """Tokens of each row of a batch that grows; 0 for one row that grows."""
    method: str = "lora"
    bits: int = 4
    optimizer: str = "adamw_8bit"
    keep_decoded: int = 0
    tiny: bool = False


_ALL, _ELEMENTWISE = "recompute_all", "recompute_elementwise"
_1B, _3B, _8B = "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B"

EDGES: tuple[Edge, ...] = (
    Edge(model=_1B, budget="4GiB", policy="save"),  # up to 4,096 tokens: a CUDA graph
    Edge(model=_1B, budget="8GiB", policy=_ELEMENTWISE, rows_of=512),
    Edge(model=_1B, budget="4GiB", policy=_ALL),
    Edge(model=_1B, budget="3GiB", policy="offload"),
    Edge(model=_1B, budget="6GiB", policy="save", method="lora_fa"),
    Edge(model=_1B, budget="24GiB", policy="save", rows_of=256, method=FULL, bits=16),
    Edge(model=_1B, budget="24GiB", policy=_ALL, rows_of=512, method=FULL, bits=16),
    Edge(model=_3B, budget="12GiB", policy=_ALL, bits=16),
    Edge(model=_3B, budget="16GiB", policy="save", rows_of=256, bits=16),
    Edge(model=_3B, budget="8GiB", policy="recompute_mlp", rows_of=512),
    Edge(model=_3B, budget="8GiB", policy="recompute_all:14,save:14"),
    Edge(model=_3B, budget="8GiB", policy=_ELEMENTWISE, method="lora_fa"),
    Edge(model=_8B, budget="8GiB", policy=_ALL, rows_of=512),
    Edge(model=_8B, budget="16GiB", policy=_ELEMENTWISE),
    Edge(model=_8B, budget="8GiB", policy="offload"),
    Edge(model=_8B, budget="24GiB", policy="recompute_mlp", keep_decoded=16, rows_of=1024),
)

TINY: tuple[Edge, ...] = (Edge(model="tiny", budget="800MiB", policy="save", tiny=True),)
"""For machines without a GPU."""


def setup_of(edge: Edge) -> Setup:
    """The run of an edge, at its smallest size."""
    full = edge.method == FULL
    return Setup(
        method=edge.method,
        bits=edge.bits,
        rank=8 if edge.tiny else 16,
        batch=1,
        seq=edge.rows_of or UNIT,
        activations=edge.policy,
        keep_decoded=edge.keep_decoded,
        optimizer="adamw_torch_fused" if full else edge.optimizer,
        step="eager" if full else "fused",
        graph=not full,
    )


def sizes_of(edge: Edge, *, gpu: str = "h100") -> dict[str, Setup]:
    """The three sizes of an edge.

    Args:
        edge: a budget and a run.
        gpu: kind of card, for kernels' workspaces.

    Returns:
        Class to setup; each was predicted to be of its class.
    """
    planner = Planner(config_of(edge.model), find_gpu(gpu), Budget.of(edge.budget))
    base = setup_of(edge)

    def sized(n: int) -> Setup:
        return base.with_tokens(batch=n) if edge.rows_of else base.with_tokens(seq=n * UNIT)

    def free(n: int) -> int:
        made = planner.predict(sized(n))
        return planner.budget.gpu_bytes - made.peak_bytes - made.outside

    most = max(1, (1 << 17) // (edge.rows_of or UNIT))
    fits = largest(Remembered(lambda n: planner.room(sized(n))), most, guess=8)
    tight = _beyond(fits, lambda n: not planner.fits(sized(n)))
    refused = largest(Remembered(free), most, guess=tight) + 1
    refused = _beyond(refused, lambda n: free(n) < 0)
    found = {name: sized(n) for name, n in zip(CLASSES, (fits, tight, refused), strict=True)}
    for name, setup in found.items():
        said = class_of(planner.predict(setup), planner.budget.gpu_bytes)
        if said != name and (name, said) != ("tight", "refused"):  # where a row is a large step
            raise AssertionError(f"{edge}: {setup.batch} x {setup.seq} is {said}, not {name}")
    return found


def _beyond(n: int, wanted: Callable[[int], bool]) -> int:
    """The first number at least 3% larger for which something is so."""
    n = max(n + 1, ceil(n * (1 + BEYOND)))
    while not wanted(n):
        n += 1
    return n


def class_of(made: Prediction, budget_bytes: int) -> str:
    """What `train` would say of a run under a budget.

    Args:
        made: its prediction.
        budget_bytes: what it may take.

    Returns:
        One of `CLASSES`.
    """
    if made.peak_bytes + made.outside > budget_bytes:
        return "refused"
    return "fits" if needed_bytes(made) <= budget_bytes else "tight"


def jobs(edges: Sequence[Edge], *, device: str = "cuda") -> list[Job]:
    """What is measured: a job per model and method, what fits before what does not.

    Args:
        edges: budgets and runs.
        device: `cuda` or `cpu`.

    Returns:
        Jobs for one process.
    """
    found: dict[Build, list[tuple[str, Point]]] = {}
    for edge in edges:
        base = setup_of(edge)
        cap = (Budget.of(edge.budget).gpu_bytes - CONTEXT) / GIB
        full = edge.method == FULL
        build = Build(
            impl="full" if full else "qlora_kit",
            model=edge.model,
            checkpoint="",
            method=edge.method,
            bits=edge.bits,
            rank=base.rank,
            optimizer=base.optimizer,
            masters="float32" if full else "library",
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
        )
        for name, setup in sizes_of(edge).items():
            if edge.tiny and name == "refused":  # a toy needs 46,000 tokens for that
                continue
            warmup, steps = _STEPS[name]
            point = Point(
                batch=setup.batch,
                seq=setup.seq,
                policy=edge.policy,
                graph=setup.graph,
                keep_decoded=edge.keep_decoded,
                cap_gib=cap,
                warmup=_GRAPH_WARMUP if _recorded(edge.model, setup) else warmup,
                steps=steps,
                cases=(name,),
            )
            found.setdefault(build, []).append((name, point))
    made = []
    for build, points in found.items():
        ordered = sorted(points, key=lambda pair: CLASSES.index(pair[0]))
        build = replace(build, longest=max(point.seq for _, point in points))
        made.append(Job(build=build, points=tuple(point for _, point in ordered)))
    return made


def _recorded(model: str, setup: Setup) -> bool:
    return setup.graph and setup.tokens <= most_recorded(model)


def judge(rows: Sequence[Row], gpu: str, memory_bytes: int) -> None:
    """Say of each row what the planner of today says.

    Args:
        rows: of a record, changed in place: `predicted_gib`, `needed_gib`, `budget_gib` and
            `class`.
        gpu: the card's name.
        memory_bytes: of the card.
    """
    for row in rows:
        made = prediction_of(row, gpu, memory_bytes)
        budget = round(row["cap_gib"] * GIB) + CONTEXT
        row["predicted_gib"] = made.peak_bytes / GIB
        row["predicted_tokens_per_s"] = made.tokens_per_s
        row["needed_gib"] = needed_bytes(made) / GIB
        row["budget_gib"] = budget / GIB
        row["class"] = class_of(made, budget)


def outcome(row: Row) -> str:
    """How a run ended: `ran`, `out of memory`, or why nothing is known."""
    if row.get("oom"):
        return "out of memory"
    return "ran" if "tokens_per_s" in row else str(row.get("error") or row.get("skipped"))


def _unrecorded(row: Row) -> str:
    """A word where a step would have become a CUDA graph, had there been room."""
    small = row["batch"] * row["seq"] <= most_recorded(row["model"])
    wanted = row["graphs"] and small and outcome(row) == "ran"
    return ", no graph" if wanted and not row.get("graph") else ""


def said_of(row: Row) -> str:
    """What the planner said: today, or when the runs were chosen."""
    return str(row.get("class") or row["cases"][0])


def wrong(rows: Sequence[Row]) -> list[Row]:
    """Runs that were said to fit and ran out of memory."""
    return [row for row in rows if said_of(row) == "fits" and outcome(row) == "out of memory"]


def table(rows: Sequence[Row]) -> str:
    """A line a run, and how often what was said came true.

    Args:
        rows: of a record.

    Returns:
        Lines.
    """
    heads = f"{'GiB: needed':>12} {'peak':>6} {'measured':>9} {'reserved':>9} {'of':>6}"
    lines = [f"{'model':13} {'method':10} {'size':>11} {'policy':24} {'said':8}{heads}"]
    for row in rows:
        method = f"{row['method']}/{row['bits']}"
        figures = ("needed_gib", "predicted_gib", "peak_allocated_gib", "peak_reserved_gib")
        cells = [f"{row[n]:.2f}" if row.get(n) is not None else "-" for n in figures]
        policy = f"{row['policy']}, {row['keep_decoded']}" if row["keep_decoded"] else row["policy"]
        lines.append(
            f"{row['model'][:13]:13} {method:10} {row['batch']:>3} x {row['seq']:<6}"
            f"{policy[:24]:24} {said_of(row):8}{cells[0]:>12} {cells[1]:>6} {cells[2]:>9} "
            f"{cells[3]:>9} {row['cap_gib']:>6.2f}  {outcome(row)[:40]}{_unrecorded(row)}"
        )
    counts = Counter((said_of(row), outcome(row)) for row in rows)
    ends = ("ran", "out of memory")
    lines += ["", f"{'':30}" + "".join(f"{end:>16}" for end in ends)]
    named = {"fits": ("fits",), "does not fit": ("tight", "refused")}
    named |= {"  tight: a warning": ("tight",), "  refused": ("refused",)}
    for label, classes in named.items():
        cells = [f"{sum(counts[c, end] for c in classes):>16}" for end in ends]
        lines.append(f"{label:30}" + "".join(cells))
    lines.append(f"said to fit and ran out of memory: {len(wrong(rows))} (must be 0)")
    return "\n".join(lines)


def _again(file: Path) -> int:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if record["gpu"] is not None:
        judge(record["rows"], record["gpu"], record["gpu_memory_bytes"])
        record["predicted_by"] = source_commit()
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record["rows"]))
    return 1 if wrong(record["rows"]) else 0


def _run(planned: Sequence[Job], arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        limits = {"limit_seconds": arguments.limit_seconds}
        session = Session(Path(scratch), total_seconds=arguments.limit_seconds, **limits)
        try:
            session.run_together(planned)
        except KeyboardInterrupt:
            print("cut short: what was measured is recorded", flush=True)
    file = write_record("plan_edge", session.rows, folder=arguments.out)
    print(table(session.rows))
    print(file)
    return 1 if wrong(session.rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, measure or judge; 1 if a run that fits ran out of memory."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan.edge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plan", type=Path, metavar="JOBS")
    what.add_argument("--run", type=Path, metavar="JOBS")
    what.add_argument("--again", type=Path, metavar="RECORD")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU: tests the benchmark")
    parser.add_argument("--limit-seconds", type=float, default=200)
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.again is not None:
        return _again(arguments.again)
    if arguments.run is not None:
        return _run(read_jobs(arguments.run), arguments)
    made = jobs(TINY, device="cpu") if arguments.tiny else jobs(EDGES)
    write_jobs(arguments.plan, made)
    for job in made:
        for point in job.points:
            size = f"{point.batch} x {point.seq}"
            print(job.build.model, job.build.method, size, point.policy, *point.cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
