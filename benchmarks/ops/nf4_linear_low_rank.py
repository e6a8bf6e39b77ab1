"""LoRA's small product of many rows, beside cuBLAS and beside the kernel for few rows.

    python -m benchmarks.ops.nf4_linear_low_rank [--cases forward:8192x4096:16 ...] [--sweep]
        [--linears 2048x4096x14336:16 ...] [--seconds 0.3] [--limit 85] [--out FOLDER]

A case is a way of storing the factor (`forward`: A (r, K), `backward`: B (K, r)), rows and
columns of X, and ranks. X rotates over more memory than the L2 cache holds; all variants
are timed beside each other as qlora_kit/bench/timing.py describes. `tbs` counts X once,
whatever a variant reads.

    cublas     one product with the scale as its alpha
    few rows   kernels/nf4_linear/hopper/low_rank.cu, on Hopper, below `FEWEST_ROWS` rows
    kernel     `low_rank.run`, wherever `MOST_VALUES` puts the limit

`--sweep` adds every shape of block with every team that is a power of two, and teams that
meet in a workspace (`apart`). A linear, rows x N x K : rank, is timed as a whole, forward and dX,
as it is and with few rows' kernel or cuBLAS alone. Results are compared before anything is timed.

Without a GPU it measures plain torch at sizes that test the benchmark.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness.record import write_record
from benchmarks.ops.nf4_linear import random_weight
from qlora_kit.bench.timing import Call, Captured, device, peaks, spread
from qlora_kit.ops.nf4_linear import cuda as nf4_linear
from qlora_kit.ops.nf4_linear import hopper, low_rank, reference

WAYS = ("forward", "backward")
ROWS = {"cuda": (512, 1024, 2048, 4096, 8192, 32768), "cpu": (8, 17)}
COLUMNS = {"cuda": (4096, 8192, 14336, 28672), "cpu": (64,)}
RANKS = (8, 16)
LINEARS = {
    "cuda": tuple(
        f"{m}x{shape}:{rank}"
        for shape in ("4096x4096", "14336x4096", "4096x14336")
        for m in (512, 1024, 2048, 4096)
        for rank in (16, 64)
    ),
    "cpu": (),
}
GOAL_TBS = 2.4
"""Of X, on an H100, from `GOAL_VALUES` values of X on."""
GOAL_VALUES = 16 << 20
DTYPE = torch.bfloat16
SCALE = 0.5
L2_BYTES = 120_000_000
SECONDS = 0.25
LIMIT_SECONDS = 85.0
TOLERANCE = 2**-6
"""Relative to the largest value: two roundings, and cuBLAS may round parts of small results."""

Operands = tuple[Tensor, Tensor]
Variant = Callable[[Operands], Tensor]


@dataclass(frozen=True)
class Case:
    """Operands of one call."""

    text: str
    way: str
    m: int
    k: int
    r: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read way:MxK:r."""
        way, shape, r = text.split(":")
        m, k = map(int, shape.split("x"))
        return cls(text, way, m, k, int(r))

    @property
    def bytes_of_x(self) -> int:
        """What has to be read once."""
        return self.m * self.k * DTYPE.itemsize

    def operands(self) -> Operands:
        """X and the factor, (K, r), stored as the way says."""
        x = torch.randn(self.m, self.k, device=device(), dtype=DTYPE)
        shape = (self.r, self.k) if self.way == "forward" else (self.k, self.r)
        factor = torch.randn(shape, device=device(), dtype=DTYPE)
        return x, factor.T if self.way == "forward" else factor


def _out(operands: Operands) -> Tensor:
    x, factor = operands
    return x.new_empty((x.shape[0], factor.shape[1]))


def cublas(operands: Operands) -> Tensor:
    """One product."""
    return reference.scaled_product(*operands, SCALE)


def few_rows(case: Case, operands: Operands) -> Tensor:
    """The kernel that comes before `hopper`'s products."""
    (x, factor), out = operands, _out(operands)
    if case.way == "forward":
        hopper.product_of_few_rows("", x, factor.T, SCALE, out)
    else:
        hopper.product_of_few_rows("_transposed", x, factor, SCALE, out)
    return out


def kernel(
    operands: Operands, chosen: low_rank.Plan | None = None, clustered: bool | None = None
) -> Tensor:
    """Ours, or plain torch where there is no GPU."""
    if device() == "cpu":
        return cublas(operands)
    out = _out(operands)
    low_rank.run(*operands, SCALE, out, chosen=chosen, clustered=clustered)
    return out


def variants_of(case: Case, sweep: bool) -> dict[str, Variant]:
    """By name."""
    found: dict[str, Variant] = {"cublas": cublas, "kernel": kernel}
    if device() == "cpu":
        return found
    if torch.cuda.get_device_capability() == (9, 0):
        found["few rows"] = partial(few_rows, case)
    if sweep:
        for shape in low_rank.SHAPES[low_rank.kernel_rank(case.r)]:
            for team in (1, 2, 4, 8):
                chosen = low_rank.Plan(shape, team)
                found[f"{shape.tokens}/{team}"] = partial(kernel, chosen=chosen)
        found["apart"] = partial(kernel, clustered=False)
    return found


def check(case: Case, variants: dict[str, Variant]) -> None:
    """All agree, and ours has the same bits twice."""
    operands = case.operands()
    wanted = cublas(operands).double()
    for name, variant in variants.items():
        got = variant(operands)
        error = ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= TOLERANCE, f"{case.text}, {name}: off by {error:.2e}"
        if name != "cublas":
            assert torch.equal(got, variant(operands)), f"{case.text}, {name}: other bits"


def timed(calls: dict[str, Callable[[int], object]], copies: int, seconds: float):
    """Median, spread of every call, each in turn."""
    kept: dict[tuple[str, int], object] = {}  # so that each call writes to memory of its own

    def keeping(name: str, call: Callable[[int], object]) -> Call:
        def run(i: int) -> None:
            kept[name, i] = call(i)

        return run

    captured = Captured()
    for name, call in calls.items():
        captured.add(name, keeping(name, call), copies, copies)
    return {name: spread(values) for name, values in captured.time(copies, seconds).items()}


def measure(case: Case, sweep: bool, seconds: float) -> list[dict[str, object]]:
    """Time a case; the variants' rows."""
    variants = variants_of(case, sweep)
    check(case, variants)
    copies = 2
    if device() == "cuda":
        copies = max(2, min(64, -(-L2_BYTES // case.bytes_of_x)))
    sets = [case.operands() for _ in range(copies)]
    calls = {name: (lambda i, call=call: call(sets[i])) for name, call in variants.items()}
    times = timed(calls, copies, seconds)
    base = times["cublas"]["ms_median"]
    chosen = _chosen(case)
    rows: list[dict[str, object]] = []
    for name, found in times.items():
        made: dict[str, object] = {"op": "nf4_linear_low_rank", "case": case.text, "impl": name}
        made |= {"way": case.way, "m": case.m, "k": case.k, "rank": case.r, "plan": chosen}
        made |= {"device": device(), **found, "us": 1e3 * found["ms_median"]}
        made |= {"of_cublas": found["ms_median"] / base}
        rows.append(made | {"tbs": case.bytes_of_x / found["ms_median"] / 1e9})
    return rows


def _chosen(case: Case) -> str:
    """Rows of a block and blocks of a team."""
    if device() == "cpu":
        return ""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    shape, team = low_rank.plan(case.m, case.k, low_rank.kernel_rank(case.r), processors)
    return f"{shape.tokens}/{team}"


def measure_linear(text: str, seconds: float) -> list[dict[str, object]]:
    """Time a linear as a whole, with the kernel and without."""
    shape, r = text.split(":")
    m, n, k, rank = *map(int, shape.split("x")), int(r)
    copies = max(2, min(32, -(-L2_BYTES // (m * k * 2))))
    make = partial(torch.randn, device="cuda", dtype=DTYPE)
    weights = [random_weight(n, k) for _ in range(2)]
    xs, dys = ([make(m, size) for _ in range(copies)] for size in (k, n))
    a, b, small = make(rank, k) / k**0.5, make(n, rank), make(m, rank)
    calls: dict[str, Callable[[int], object]] = {}
    flags = (True, False, False, False)

    def forward(i: int) -> object:
        return nf4_linear.forward(xs[i], weights[i % 2], None, a, b, SCALE)

    def backward(i: int) -> object:
        return nf4_linear.backward(dys[i], None, weights[i % 2], a, b, small, SCALE, *flags)[0]

    def without(call: Callable[[int], object], i: int) -> object:
        with patch.object(low_rank, "FEWEST_ROWS", 1 << 40):
            return call(i)

    for name, call in (("forward", forward), ("dx", backward)):
        calls[f"{name} with"], calls[f"{name} without"] = call, partial(without, call)
    times = timed(calls, copies, seconds)
    rows: list[dict[str, object]] = []
    for name, found in times.items():
        base = times[f"{name.split()[0]} without"]["ms_median"]
        made: dict[str, object] = {"op": "nf4_linear", "case": text, "impl": name}
        made |= {"m": m, "n": n, "k": k, "rank": rank, "device": device(), **found}
        rows.append(made | {"us": 1e3 * found["ms_median"], "of": found["ms_median"] / base})
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """One line a case: ours, its rate, and its time over the others'."""
    by = {row["impl"]: row for row in rows}
    first = rows[0]
    if first["op"] == "nf4_linear":
        ways = (
            f"{way} {by[f'{way} with']['us']:8.1f} us, {by[f'{way} with']['of']:6.3f} of without"
            for way in ("forward", "dx")
        )
        print(f"{first['case']:>20} " + "   ".join(ways), flush=True)
        return
    ours = by["kernel"]
    missed = device() == "cuda" and first["m"] * first["k"] >= GOAL_VALUES
    missed = missed and ours["tbs"] < GOAL_TBS
    others = " ".join(
        f"{name} {row['us']:.1f} us ({ours['us'] / row['us']:.2f})"
        for name, row in by.items()
        if name != "kernel"
    )
    print(
        f"{first['case']:>24} {first['plan']:>5} {ours['us']:8.1f} us {ours['tbs']:5.2f} TB/s"
        f"{' MISS' if missed else '     '} over {others}",
        flush=True,
    )


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = [
        f"{way}:{m}x{k}:{r}"
        for m in ROWS[device()]
        for k in COLUMNS[device()]
        for r in RANKS
        for way in WAYS
    ]
    parser.add_argument("--cases", nargs="*", default=shapes, metavar="WAY:MxK:R")
    parser.add_argument("--linears", nargs="*", default=LINEARS[device()], metavar="MxNxK:R")
    parser.add_argument("--sweep", action="store_true", help="every shape of block and team")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per case, about")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="no case starts later")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    start = time.perf_counter()
    limits = peaks()
    rows: list[dict[str, object]] = []
    todo = [partial(measure_linear, text, arguments.seconds) for text in arguments.linears]
    todo += [
        partial(measure, Case.parse(text), arguments.sweep, arguments.seconds)
        for text in arguments.cases
    ]
    with torch.no_grad():
        for index, task in enumerate(todo):
            if time.perf_counter() - start > arguments.limit:
                print(f"{len(todo) - index} cases left out: {arguments.limit:.0f} s are over")
                break
            rows += (found := task())
            show(found)
            if device() == "cuda":
                torch.cuda.empty_cache()
    ours = [row for row in rows if row["impl"] == "kernel"]
    if ours:
        worst = max(ours, key=lambda row: row["of_cublas"])
        print(f"\ncopy: {limits['copy_tbs']:.2f} TB/s; kernel over cublas: median ", end="")
        print(f"{statistics.median(row['of_cublas'] for row in ours):.2f}, ", end="")
        print(f"worst {worst['of_cublas']:.2f} at {worst['case']}")
    print(write_record("nf4_linear_low_rank", rows, peaks=limits, folder=arguments.out))


if __name__ == "__main__":
    main()
