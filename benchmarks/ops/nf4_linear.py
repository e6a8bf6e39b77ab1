"""How long nf4_linear takes beside a dense bf16 linear and bitsandbytes' NF4 one.

    python -m benchmarks.ops.nf4_linear                 # the whole grid, about two minutes
    python -m benchmarks.ops.nf4_linear --quick         # two shapes, five M, half a minute
    python -m benchmarks.ops.nf4_linear --strategies    # each strategy by itself, for the table

Every variant runs over a set of weights larger than the L2 cache, so that no weight is
read from it; how calls are timed is in qlora_kit/bench/timing.py. Ours carries LoRA
of rank 16; `dense` (cuBLAS) and `bitsandbytes` carry none; `peft` is bitsandbytes with
LoRA computed as PEFT does it. Three passes: `forward`; `backward_dx`, the gradient of x
alone; `backward`, all gradients. In the last, dense still computes dX alone.

Weights are random codes and scales, and all variants share them. What each variant
returns is compared before it is timed; correctness itself is tests/ops, to be run first.
Only the whole grid is recorded under benchmarks/results; parts of it go to --out.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.record import write_record
from benchmarks.ops.nf4_linear_targets import judge, strategy_table, summary
from qlora_kit.bench.timing import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    Call,
    Captured,
    device,
    peaks,
    spread,
)
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.ops.nf4_linear import cuda
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.quant.double_quant import dynamic_map
from qlora_kit.quant.nf4 import NF4_VALUES
from qlora_kit.quant.weight import NF4Weight

RANK = 16
SCALE = 0.5
L2_BYTES = 120_000_000
DTYPE = torch.bfloat16
SHAPES = ("4096x4096", "14336x4096", "4096x14336", "28672x8192", "8192x28672")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PASSES = ("forward", "backward_dx", "backward")
QUICK = {"shapes": SHAPES[:2], "m": (1, 16, 128, 1024, 4096), "seconds": 25.0}
SETUP_SECONDS = 0.1
"""Of one point of the grid: operands, first calls, capture."""
SHORTEST_MS = 0.3
"""Of one replay: well above the resolution of an event."""
BYTES_PER_WEIGHT = 0.516


def random_weight(n: int, k: int) -> NF4Weight:
    """A double-quantized weight of random codes and likely scales, made at once."""
    blocks = n * k // 64
    where = device()
    return NF4Weight(
        packed=torch.randint(256, (n * k // 2, 1), device=where, dtype=torch.uint8),
        absmax=torch.randint(256, (blocks,), device=where, dtype=torch.uint8),
        nested_absmax=torch.rand(-(-blocks // 256), device=where) / k**0.5 + 0.5 / k**0.5,
        offset=torch.tensor(2.5 / k**0.5, device=where),
        shape=(n, k),
        block_size=64,
        dtype=DTYPE,
    )


def quant_state(weight: NF4Weight) -> object:
    """The same bytes as bitsandbytes describes them."""
    from bitsandbytes.functional import QuantState

    where = weight.packed.device
    nested = QuantState(
        absmax=weight.nested_absmax,
        blocksize=256,
        code=dynamic_map(where),
        dtype=torch.float32,
    )
    return QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=torch.tensor(NF4_VALUES, device=where),
        blocksize=64,
        quant_type="nf4",
        dtype=DTYPE,
        offset=weight.offset,
        state2=nested,
    )


def copies_of(n: int, k: int) -> int:
    """How many weights of a shape outgrow the L2 cache."""
    return max(2, -(-L2_BYTES // (n * k // 2))) if device() == "cuda" else 2


class Case:
    """Enough weights of one shape to outgrow the L2 cache, and every way to use them."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k, self.copies = n, k, copies_of(n, k)
        self.ours = [random_weight(n, k) for _ in range(self.copies)]
        self.dense = [nf4_dequantize(w, DTYPE) for w in self.ours]
        self.states = [quant_state(w) for w in self.ours]
        self.a = torch.randn(RANK, k, device=device(), dtype=DTYPE) / k**0.5
        self.b = torch.randn(n, RANK, device=device(), dtype=DTYPE)

    def operands(self, m: int) -> None:
        """Make x and dY of so many rows."""
        self.x = torch.randn(m, self.k, device=device(), dtype=DTYPE)
        self.dy = torch.randn(m, self.n, device=device(), dtype=DTYPE)
        self.xa = self.x @ self.a.T

    def variants(self, which: str) -> dict[str, Call]:
        """One call of each implementation."""
        if which == "forward":
            return {
                "ours": self.our_forward,
                "dense": lambda i: self.x @ self.dense[i].T,
                "bitsandbytes": self.bnb_forward,
                "peft": self.peft_forward,
            }
        calls: dict[str, Call] = {
            "ours": self.our_dx if which == "backward_dx" else self.our_backward,
            "dense": lambda i: self.dy @ self.dense[i],
            "peft": self.peft_dx if which == "backward_dx" else self.peft_backward,
        }
        return calls | ({"bitsandbytes": self.bnb_dx} if which == "backward_dx" else {})

    def strategies(self, which: str) -> dict[str, Call]:
        """One call of dense, and of each strategy that serves the rows at hand."""
        product, rows, ours = "multiply", self.x, self.our_forward
        if which != "forward":
            product, rows, ours = "multiply_transposed", self.dy, self.our_dx
        calls = {"dense": self.variants(which)["dense"]}
        for name, module in cuda.STRATEGIES.items() if device() == "cuda" else ():
            if hasattr(module, product) and module.serves(rows, self.ours[0]):
                calls[f"ours:{name}"] = forced(name, ours)
        return calls

    def strategy(self, which: str) -> str:
        """The strategy that our code would take."""
        if device() != "cuda":
            return "reference"
        if which == "forward":
            return cuda.strategy_for(self.x, self.ours[0])
        return cuda.strategy_for(self.dy, self.ours[0], "multiply_transposed")

    def our_forward(self, i: int) -> Tensor:
        """Base, LoRA and all."""
        return nf4_linear(self.x, self.ours[i], lora_a=self.a, lora_b=self.b, scale=SCALE)

    def our_dx(self, i: int) -> Tensor:
        """DX with LoRA's part."""
        return self._our_gradients(i, False)[0]

    def our_backward(self, i: int) -> tuple[Tensor, ...]:
        """DX, dA and dB."""
        return self._our_gradients(i, True)

    def _our_gradients(self, i: int, all_of_them: bool) -> tuple[Tensor, ...]:
        w = self.ours[i]
        x, xa = (self.x, self.xa) if all_of_them else (None, self.xa[:, :0])
        gradients: tuple[Tensor, ...] = torch.ops.qlora_kit.nf4_linear_backward(
            self.dy,
            x,
            *(w.packed, w.absmax, w.nested_absmax, w.offset, [self.n, self.k], 64),
            *(self.a, self.b, xa, SCALE),
            *(True, all_of_them, all_of_them, False),
        )
        return gradients

    def bnb_forward(self, i: int) -> Tensor:
        """The base alone."""
        import bitsandbytes

        packed = self.ours[i].packed
        return bitsandbytes.matmul_4bit(self.x, packed.t(), quant_state=self.states[i])

    def bnb_dx(self, i: int) -> Tensor:
        """DX of the base alone, as bitsandbytes' autograd computes it."""
        import bitsandbytes.functional as bnb

        return self.dy @ bnb.dequantize_4bit(self.ours[i].packed, self.states[i])

    def peft_forward(self, i: int) -> Tensor:
        """As peft/tuners/lora/bnb.py does it: a copy of the result, two products, a sum."""
        y = self.bnb_forward(i).clone()
        return y + (self.x @ self.a.T @ self.b.T) * SCALE

    def peft_dx(self, i: int) -> Tensor:
        """DX, in the steps autograd takes."""
        return self.bnb_dx(i) + (self.dy * SCALE) @ self.b @ self.a

    def peft_backward(self, i: int) -> tuple[Tensor, ...]:
        """DX, dA and dB, in the steps autograd takes."""
        scaled = self.dy * SCALE
        dxa = scaled @ self.b
        return self.bnb_dx(i) + dxa @ self.a, dxa.T @ self.x, scaled.T @ self.xa


def forced(strategy: str, call: Call) -> Call:
    """The call with one strategy."""

    def run(i: int) -> object:
        with cuda.force_strategy(strategy):
            return call(i)

    return run


def compare(case: Case, which: str, first: dict[str, object]) -> dict[str, float]:
    """Which variants disagree with dense: the base alone, or the base with LoRA.

    Args:
        case: the operands.
        which: the pass.
        first: what each variant returned.

    Returns:
        The relative error of each that does; more than roundings of bfloat16 make.
    """
    base = first["dense"].float()
    if which == "forward":
        lora = (case.xa @ case.b.T).float() * SCALE
    else:
        lora = (case.dy @ case.b @ case.a).float() * SCALE
    wrong = {}
    for name, result in first.items():
        got = result[0] if isinstance(result, tuple) else result
        wanted = base if name in ("dense", "bitsandbytes") else base + lora
        error = ((got.float() - wanted).norm() / wanted.norm()).item()
        if not error < 0.02:
            wrong[name] = error
            print(f"WRONG by {error:.3g}: {name} {which} of {tuple(got.shape)}; run tests/ops")
    return wrong


def floor_ms(n: int, k: int, m: int, limits: dict[str, float]) -> float:
    """What one call costs at least: by arithmetic or by bytes, at the measured rates."""
    moved = n * k * BYTES_PER_WEIGHT + 2 * m * (n + k)
    return max(2 * m * n * k / limits["bf16_tflops"], moved / limits["copy_tbs"]) / 1e9


def calls_of(copies: int, floor: float) -> int:
    """Calls in one replay: every weight equally often, and not too short."""
    return copies * min(4, max(1, math.ceil(SHORTEST_MS / (copies * floor))))


def measure(
    case: Case,
    m: int,
    which: str,
    limits: dict[str, float],
    seconds: float,
    each_strategy: bool = False,
) -> list[dict[str, object]]:
    """Rows of one shape, one M and one pass."""
    start = time.perf_counter()
    floor = floor_ms(case.n, case.k, m, limits)
    calls = calls_of(case.copies, floor)
    captured = Captured()
    variants = case.strategies(which) if each_strategy else case.variants(which)
    for name, call in variants.items():
        captured.add(name, call, calls, case.copies)
    wrong = compare(case, which, captured.first)
    captured.first.clear()
    times = captured.time(calls, seconds - (time.perf_counter() - start))
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        impl, _, strategy = name.partition(":")
        row: dict[str, object] = {"n": case.n, "k": case.k, "m": m, "pass": which, "impl": impl}
        row["rank"] = RANK if impl in ("ours", "peft") else 0
        row["strategy"] = strategy or (case.strategy(which) if impl == "ours" else None)
        if name in wrong:
            row["wrong_by"] = wrong[name]
        rows.append(row | spread(values) | {"rounds": len(values), "floor_ms": floor})
    return rows


def points(arguments: argparse.Namespace) -> Iterator[tuple[int, int, str, int]]:
    """The grid: N, K, pass and M, few rows before many."""
    for shape in arguments.shapes:
        n, k = map(int, shape.split("x"))
        for which in arguments.passes:
            for m in sorted(arguments.m):
                yield n, k, which, m


def estimate(grid: list[tuple[int, int, str, int]], limits: dict[str, float], rounds: int) -> float:
    """About how many seconds the grid takes at so many rounds."""
    total = 0.0
    for n, k, _, m in grid:
        copies, floor = copies_of(n, k), floor_ms(n, k, m, limits)
        one = calls_of(copies, floor) * (1.5 * floor + 0.01) * 4 / 1e3
        total += SETUP_SECONDS + (2 + rounds) * one
    return total


def is_whole(grid: list[tuple[int, int, str, int]]) -> bool:
    """Whether all shapes and M are there, in the passes that have targets."""
    whole = points(parse([]))
    return {point for point in whole if point[2] != "backward"} <= set(grid)


def line(rows: list[dict[str, object]], each_strategy: bool = False) -> str:
    """One line of the table: milliseconds of dense, the others' ratios to it."""
    (dense,) = (float(str(row["ms_median"])) for row in rows if row["impl"] == "dense")
    ratios = {
        row["strategy"] if each_strategy else row["impl"]: float(str(row["ms_median"])) / dense
        for row in rows
        if row["impl"] != "dense"
    }
    first = rows[0]
    shape = f"{first['n']}x{first['k']}"
    return (
        f"{shape:>11} {first['pass']:11} M {first['m']:5}  dense bf16 {dense:8.4f} ms  "
        f"floor {float(str(first['floor_ms'])) / dense:4.2f}  "
        + "  ".join(f"{name} {ratio:5.2f}" for name, ratio in ratios.items())
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", metavar="NxK")
    parser.add_argument("--passes", nargs="+", choices=PASSES)
    parser.add_argument("--seconds", type=float, help="scales the number of rounds (default: 150)")
    parser.add_argument("--quick", action="store_true", help="part of the grid")
    parser.add_argument("--strategies", action="store_true", help="time each strategy by itself")
    parser.add_argument("--out", type=Path, help="folder of the record; needed for a part")
    arguments = parser.parse_args(argv)
    whole = {"shapes": SHAPES, "m": ROWS, "seconds": 150.0}
    for name, value in (QUICK if arguments.quick else whole).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.passes = arguments.passes or (PASSES[:2] if arguments.strategies else PASSES)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print a line per point and what it means, write the record; 1 if one is wrong."""
    arguments = parse(argv)
    limits = peaks()
    grid = list(points(arguments))
    print({name: round(value, 2) for name, value in limits.items()})
    least, most = (estimate(grid, limits, rounds) for rounds in (FEWEST_ROUNDS, MOST_ROUNDS))
    expected = max(least, min(most, arguments.seconds))
    print(f"{len(grid)} points, about {expected:.0f} s (at least {least:.0f}, full {most:.0f})")
    rows: list[dict[str, object]] = []
    end, case, made = time.perf_counter() + arguments.seconds, None, (0, 0)
    try:
        for index, (n, k, which, m) in enumerate(grid):
            if case is None or made != (n, k):
                case = None  # the old weights go before the new ones come
                case, made = Case(n, k), (n, k)
            case.operands(m)
            share = (end - time.perf_counter()) / (len(grid) - index)
            found = measure(case, m, which, limits, share, arguments.strategies)
            rows += found
            verdict = "" if arguments.strategies else judge(found)
            print(line(found, arguments.strategies), verdict, flush=True)
            if device() == "cuda" and torch.cuda.memory_reserved() > 16 << 30:
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        grid = grid[:index]
        print(f"cut short after {index} points")
    print(strategy_table(rows) if arguments.strategies else summary(rows))
    bench = "nf4_linear_strategies" if arguments.strategies else "nf4_linear"
    wrong = any("wrong_by" in row for row in rows)
    if arguments.out or (is_whole(grid) and not wrong):
        print(write_record(bench, rows, peaks=limits, folder=arguments.out))
    else:
        print("a part of the grid, or wrong: not recorded (with --out FOLDER it is, there)")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
