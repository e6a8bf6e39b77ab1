"""LoRA's two products with dY: one pass over it beside the two cuBLAS products they replace.

    python -m benchmarks.ops.low_rank_gradients [--cases 8192:4096,1024,1024:16 ...] [--sweep]
        [--seconds 1] [--limit 240] [--out FOLDER]

A case is tokens, the columns of linears that share an input, and the ranks of each. dY
and dY·B, X and X·Aᵀ stand beside each other in one buffer, as in the training step;
buffers rotate over more memory than the L2 cache holds, all variants beside each other as
qlora_kit/bench/timing.py describes. `tbs` counts dY once, whatever a variant reads.

    two products   dY·B in place, then dYᵀ·XA of each linear: `torch.mm`, float32 sums
    one pass       as the op would choose its block, wherever `FEWEST_VALUES` puts the limit

`--sweep` adds every shape of block there is, with dY kept in the L2 cache (`keep`), the
second kernel not overlapped with the first (`apart`), a block on every other processor
(`half`), and one per processor where two fit (`one`). Results are compared before anything
is timed.

Without a GPU it measures plain torch at sizes that test the benchmark.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.record import write_record
from qlora_kit.bench.timing import Call, Captured, device, peaks, spread
from qlora_kit.ops.low_rank_gradients import cuda, reference
from qlora_kit.ops.low_rank_gradients.op import low_rank_gradients

GROUPS = ("14336,14336", "4096,1024,1024", "4096")
"""gate and up; q, k and v; o, or down: of a Llama of 8B parameters."""
CASES = {
    "cuda": (
        *(f"{m}:{columns}:16" for m in (8192, 2048, 1024) for columns in GROUPS),
        *(f"{m}:{columns}:{rank}" for rank in (32, 64) for columns in GROUPS for m in (8192, 2048)),
        "8193:4096:16",
    ),
    "cpu": ("64:40,24:8", "33:64:16"),
}
GOALS_US = {"8192:14336,14336:16": 215, "8192:4096,1024,1024:16": 55, "8192:4096:16": 40}
DTYPE = torch.bfloat16
INPUT_COLUMNS = 4096
L2_BYTES = 120_000_000
SECONDS = 1.0
LIMIT_SECONDS = 240.0
TOLERANCE = 2**-6
"""Of dY·B, relative to its largest value: two roundings, and cuBLAS may round parts."""
SUM_TOLERANCE = 2**-12
"""Of dB: float32 sums in another order."""

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
Results = tuple[Tensor, list[Tensor]]
Variant = Callable[[Operands], Results]


@dataclass(frozen=True)
class Case:
    """Operands of one call."""

    text: str
    m: int
    widths: tuple[int, ...]
    rank: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read tokens:columns,...:rank."""
        m, widths, rank = text.split(":")
        return cls(text, int(m), tuple(map(int, widths.split(","))), int(rank))

    @property
    def n(self) -> int:
        """Columns of dY."""
        return sum(self.widths)

    @property
    def ends(self) -> list[tuple[int, int]]:
        """Where columns and ranks of the parts end."""
        return [(sum(self.widths[: i + 1]), (i + 1) * self.rank) for i in range(len(self.widths))]

    @property
    def bytes_of_dy(self) -> int:
        """What has to be read once."""
        return self.m * self.n * DTYPE.itemsize

    def operands(self) -> Operands:
        """dY, B, XA and where dY·B goes, in buffers as the training step has them."""
        r = self.rank * len(self.widths)
        wide = torch.randn(self.m, self.n + r, device=device(), dtype=DTYPE)
        x = torch.randn(self.m, INPUT_COLUMNS + r, device=device(), dtype=DTYPE)
        b = torch.zeros(self.n, r, device=device(), dtype=DTYPE)
        column = 0
        for end, rank_end in self.ends:
            b[column:end, rank_end - self.rank : rank_end].normal_()
            column = end
        return wide[:, : self.n], b, x[:, INPUT_COLUMNS:], wide[:, self.n :]


def sums(case: Case, dy: Tensor, xa: Tensor) -> list[Tensor]:
    """Compute dB of each linear, as the training step asks cuBLAS for it."""
    found, column = [], 0
    for end, rank_end in case.ends:
        part = xa[:, rank_end - case.rank : rank_end]
        found.append(reference.token_sum(dy[:, column:end], part))
        column = end
    return found


def two_products(case: Case, operands: Operands) -> Results:
    """What the kernel replaces."""
    dy, b, xa, out = operands
    return torch.mm(dy, b, out=out), sums(case, dy, xa)


def one_pass(
    case: Case,
    operands: Operands,
    *,
    shape: cuda.Shape | None = None,
    blocks: int | None = None,
    keep: bool = False,
    overlap: bool = True,
) -> Results:
    """The kernel, or plain torch where there is no GPU."""
    dy, b, xa, out = operands
    if device() == "cuda":
        columns, ranks = (list(ends) for ends in zip(*case.ends, strict=True))
        run = partial(cuda.one_pass, shape=shape, blocks=blocks, keep=keep, overlap=overlap)
        d_b = run(dy, b, xa, columns, ranks, out)
    else:
        d_b = low_rank_gradients(dy, b, xa, parts=case.ends, out=out)[1]
    return out, list(d_b.split(case.widths))


def variants_of(case: Case, sweep: bool) -> dict[str, Variant]:
    """The variants of one pass by name."""
    found: dict[str, Variant] = {"one pass": partial(one_pass, case)}
    if not sweep or device() == "cpu":
        return found
    columns, ranks = (list(ends) for ends in zip(*case.ends, strict=True))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for shape in cuda.SHAPES[cuda.kernel_rank(columns, ranks)]:
        found[f"{shape}"] = partial(one_pass, case, shape=shape)
        found[f"{shape} keep"] = partial(one_pass, case, shape=shape, keep=True)
        found[f"{shape} apart"] = partial(one_pass, case, shape=shape, overlap=False)
        found[f"{shape} half"] = partial(one_pass, case, shape=shape, blocks=processors // 2)
        if shape.blocks > 1:
            found[f"{shape} one"] = partial(one_pass, case, shape=shape, blocks=processors)
    return found


def check(case: Case, found: Results, wanted: Results, name: str) -> None:
    """Both results agree with the two products'."""
    pairs = [(found[0], wanted[0], TOLERANCE)]
    pairs += [(a, b, SUM_TOLERANCE) for a, b in zip(found[1], wanted[1], strict=True)]
    for got, exact, tolerance in pairs:
        error = ((got.double() - exact.double()).abs().max() / exact.abs().max()).item()
        assert error <= tolerance, f"{case.text}, {name}: off by {error:.2e}"


def check_all(case: Case, variants: dict[str, Variant]) -> None:
    """Every variant gives what the two products do, and the same bits twice."""
    operands = case.operands()
    dyb, d_b = two_products(case, operands)
    wanted = dyb.clone(), d_b
    for name, variant in variants.items():
        runs = []
        for _ in range(2):
            operands[3].fill_(torch.nan)
            dyb, d_b = variant(operands)
            runs.append((dyb.clone(), d_b))
        check(case, runs[0], wanted, name)
        for first, again in zip((runs[0][0], *runs[0][1]), (runs[1][0], *runs[1][1]), strict=True):
            assert torch.equal(first, again), f"{case.text}, {name}: other bits the second time"


def measure(case: Case, sweep: bool, seconds: float) -> list[dict[str, object]]:
    """Time a case; the variants' rows, the fastest first."""
    variants = variants_of(case, sweep)
    check_all(case, variants)
    copies = 2
    if device() == "cuda":
        copies = max(2, min(64, -(-L2_BYTES // case.bytes_of_dy)))
    sets = [case.operands() for _ in range(copies)]
    kept: dict[tuple[str, int], object] = {}  # so that each call writes to memory of its own
    calls: dict[str, Callable[[Operands], object]] = {
        "two products": partial(two_products, case),
        "dY B alone": lambda operands: torch.mm(operands[0], operands[1], out=operands[3]),
        "dB alone": lambda operands: sums(case, operands[0], operands[2]),
        **variants,
    }

    def keeping(name: str, call: Callable[[Operands], object]) -> Call:
        def run(i: int) -> None:
            kept[name, i] = call(sets[i])

        return run

    captured = Captured()
    for name, call in calls.items():
        captured.add(name, keeping(name, call), copies, copies)
    captured.time(copies, seconds / 4)  # until the card is warm
    times = captured.time(copies, seconds)
    both = statistics.median(times["two products"])
    rows: list[dict[str, object]] = []
    for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        found = spread(values)
        made: dict[str, object] = {"op": "low_rank_gradients", "case": case.text, "impl": name}
        made |= {"m": case.m, "n": case.n, "rank": case.rank, "device": device(), **found}
        made |= {"us": 1e3 * found["ms_median"], "of_two_products": found["ms_median"] / both}
        rows.append(made | {"tbs": case.bytes_of_dy / found["ms_median"] / 1e9})
    return rows


def show(rows: list[dict[str, object]], names: tuple[str, ...] = ()) -> None:
    """Print rows, all or those of some variants."""
    for row in rows:
        if names and row["impl"] not in names:
            continue
        goal = GOALS_US.get(str(row["case"])) if row["impl"] == "one pass" else None
        wanted = f"  goal {goal} us" if goal else ""
        print(
            f"{row['case']:>24} {row['impl']:16} {row['us']:8.1f} us {row['tbs']:5.2f} TB/s "
            f"{row['of_two_products']:6.1%} of two products{wanted}",
            flush=True,
        )


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES[device()], metavar="M:N,...:R")
    parser.add_argument("--sweep", action="store_true", help="every shape of block")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per case, about")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="no case starts later")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    start = time.perf_counter()
    limits = peaks()
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for text in arguments.cases:
            if time.perf_counter() - start > arguments.limit:
                print(f"{text} and what comes after it left out: {arguments.limit:.0f} s are over")
                break
            rows += (found := measure(Case.parse(text), arguments.sweep, arguments.seconds))
            show(found)
            if device() == "cuda":
                torch.cuda.empty_cache()
    print(f"\ncopy: {limits['copy_tbs']:.2f} TB/s")
    show(rows, ("one pass", "two products"))
    print(write_record("low_rank_gradients", rows, peaks=limits, folder=arguments.out))


if __name__ == "__main__":
    main()
