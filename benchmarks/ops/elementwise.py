"""How close rms_norm, rotary_ and gated_activation come to copying the same bytes.

    python -m benchmarks.ops.elementwise [--seconds 1] [--without-compiled] [--sweep] [--out FOLDER]

Ours, the reference compiled by torch.compile, and a copy of as many bytes (half read,
half written) beside each other; benchmarks/ops/nf4_dequantize.py says how. Operands
rotate over more memory than the L2 cache holds; rotary_ alone works in place. `us` is
the GPU's time; `host_us`, of the rows with M = 16, is what one call costs the CPU when
nothing waits for the GPU.

`--sweep` times rms_norm with other numbers of threads for a row. Without a GPU it all
runs on small operands, which tests the benchmark and nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.record import write_record
from benchmarks.ops.nf4_dequantize import DTYPE, L2_BYTES, measure
from qlora_kit.bench.timing import Call, device, peaks
from qlora_kit.ops.gated_activation import reference as gated_reference
from qlora_kit.ops.gated_activation.op import gated_activation, gated_activation_backward
from qlora_kit.ops.rms_norm import cuda as norm_cuda
from qlora_kit.ops.rms_norm import reference as norm_reference
from qlora_kit.ops.rms_norm.op import rms_norm, rms_norm_backward
from qlora_kit.ops.rotary import reference as rotary_reference
from qlora_kit.ops.rotary.op import rotary_

EPS = 1e-5
SMALL = 16
HOST_CALLS = 300
THREADS = (128, 256, 512)
TOLERANCE = 2**-6
"""Of ours against the compiled reference, relative to the largest value: two roundings."""

Operands = tuple[Tensor, ...]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    shape: tuple[int, ...]
    """The shape of its main input."""
    inputs: tuple[tuple[int, ...], ...]
    """Shapes of what is read, in `DTYPE`, the main input first."""
    outputs: tuple[tuple[int, ...], ...]
    """Shapes of what is written; empty if the main input is."""
    ours: Function
    theirs: Function
    """The same in plain torch, to be compiled."""
    shared: Operands = field(default=())
    """Small operands that all calls use."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        outputs = self.outputs or self.inputs[:1]
        return DTYPE.itemsize * sum(torch.Size(shape).numel() for shape in self.inputs + outputs)

    def operands(self, copies: int) -> list[Operands]:
        """Several sets of operands: what is read, what is written, what is shared."""

        def one() -> Operands:
            read = (torch.randn(shape, device=device(), dtype=DTYPE) for shape in self.inputs)
            written = (torch.empty(shape, device=device(), dtype=DTYPE) for shape in self.outputs)
            return (*read, *written, *self.shared)

        return [one() for _ in range(copies)]


def norm_cases(shape: tuple[int, ...]) -> list[Case]:
    """The norm alone, with a residual, and its backward as a decoder layer calls it."""
    weight = (torch.rand(shape[-1], device=device(), dtype=DTYPE),)

    def plain(x: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        norm_reference.forward(x, weight, EPS, False, None, out)
        return out

    def added(x: Tensor, residual: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        norm_reference.forward(x, weight, EPS, False, residual, out)
        return out

    def backward(
        x: Tensor, dy: Tensor, residual: Tensor, dx: Tensor, normalized: Tensor, weight: Tensor
    ) -> Tensor:
        norm_reference.backward(dy, x, weight, EPS, False, residual, dx, normalized)
        return dx

    def ours_backward(
        x: Tensor, dy: Tensor, residual: Tensor, dx: Tensor, normalized: Tensor, weight: Tensor
    ) -> Tensor:
        options = {"residual": residual, "dx": dx, "normalized": normalized}
        return rms_norm_backward(dy, x, weight, EPS, **options)

    def ours(x: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS, out=out)

    def ours_added(x: Tensor, residual: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS, residual=residual, out=out)

    first = Case("rms_norm", shape, (shape,), (shape,), ours, plain, weight)
    if len(shape) == 3:
        return [first]
    second = Case("rms_norm + residual", shape, (shape,) * 2, (shape,), ours_added, added, weight)
    third = Case(
        "rms_norm_backward", shape, (shape,) * 3, (shape,) * 2, ours_backward, backward, weight
    )
    return [first, second, third]


def rotary_case(shape: tuple[int, int, int]) -> Case:
    """Queries and keys of one projection, turned together."""
    tokens, _, width = shape
    angle = torch.randn(tokens, width // 2, device=device()).repeat(1, 2)

    def theirs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary_reference.rotate_(heads, cos, sin, False)
        return heads

    return Case("rotary_", shape, (shape,), (), rotary_, theirs, (angle.cos(), angle.sin()))


def gated_cases(rows: int, f: int, kind: str = "silu") -> list[Case]:
    """The activation, and its backward with the forward's result again."""
    wide, narrow = (rows, 2 * f), (rows, f)

    def forward(gate_up: Tensor, out: Tensor) -> Tensor:
        gated_reference.forward(gate_up, kind, out)
        return out

    def backward(gate_up: Tensor, dact: Tensor, d_gate_up: Tensor, act: Tensor) -> Tensor:
        gated_reference.backward(dact, gate_up, kind, d_gate_up, act)
        return d_gate_up

    def ours(gate_up: Tensor, out: Tensor) -> Tensor:
        return gated_activation(gate_up, kind, out=out)

    def ours_backward(gate_up: Tensor, dact: Tensor, d_gate_up: Tensor, act: Tensor) -> Tensor:
        return gated_activation_backward(dact, gate_up, kind, d_gate_up=d_gate_up, act=act)

    name = f"gated_activation {kind}"
    back = f"gated_backward {kind}"
    return [
        Case(name, wide, (wide,), (narrow,), ours, forward),
        Case(back, wide, (wide, narrow), (wide, narrow), ours_backward, backward),
    ]


def all_cases() -> list[Case]:
    """What is measured: at training's sizes on a GPU."""
    if device() == "cpu":
        return [*norm_cases((8, 64)), rotary_case((8, 4, 16)), *gated_cases(8, 32)]
    cases = []
    for rows in (8192, 2048, SMALL):
        cases += norm_cases((rows, 4096))
        if rows != 2048:
            cases += norm_cases((rows, 40, 128))
            cases += [rotary_case((rows, 40, 128)), *gated_cases(rows, 14_336)]
    cases += [*gated_cases(8192, 14_336, "gelu_tanh"), *gated_cases(8192, 14_336, "gelu")]
    return [*cases, *norm_cases((8192, 2560)), *norm_cases((8192, 8192))]


def check(case: Case, compiled: Function | None) -> None:
    """Ours computes what the reference does."""
    operands = case.operands(1)[0]
    got = case.ours(*(tensor.clone() for tensor in operands)).double()
    wanted = (compiled or case.theirs)(*operands).double()
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE, f"{case.op} {case.shape}: off by {error:.2e}"


def host_microseconds(call: Call, copies: int) -> float:
    """What a call costs the CPU, in microseconds; the GPU's queue is never full."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for i in range(HOST_CALLS):
            call(i % copies)
        times.append((time.perf_counter() - start) / HOST_CALLS)
        if device() == "cuda":
            torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def rows_of(
    case: Case, variants: dict[str, Call], copies: int, seconds: float
) -> list[dict[str, object]]:
    """Time the variants of a case and print them."""
    found = []
    shape = "x".join(map(str, case.shape))
    for row in measure(variants, copies, case.moved, seconds):
        name = str(row["impl"])
        made: dict[str, object] = {"op": case.op, "device": device(), "dtype": "bfloat16"}
        made |= {"shape": shape, **row, "us": 1e3 * float(str(row["ms_median"]))}
        if name in variants and (case.shape[0] == SMALL or device() == "cpu"):
            made["host_us"] = host_microseconds(variants[name], copies)
        host = f"  host {made['host_us']:6.1f} us" if "host_us" in made else ""
        print(
            f"{case.op:26} {shape:>12} {name:12} {made['us']:8.1f} us {row['tbs']:5.2f} TB/s "
            f"{row['of_copy']:6.1%} of a copy{host}",
            flush=True,
        )
        found.append(made)
    return found


def compare(case: Case, with_compiled: bool, seconds: float) -> list[dict[str, object]]:
    """Ours beside the compiled reference."""
    torch.compiler.reset()
    compiled = torch.compile(case.theirs, dynamic=False) if with_compiled else None
    check(case, compiled)
    copies = copies_of(case)
    sets = case.operands(copies)
    variants: dict[str, Call] = {"ours": lambda i: case.ours(*sets[i])}
    if compiled is not None:
        variants["compiled"] = lambda i: compiled(*sets[i])
    return rows_of(case, variants, copies, seconds)


def sweep(case: Case, seconds: float) -> list[dict[str, object]]:
    """One case of the norm with other numbers of threads for a row."""
    copies = copies_of(case)
    sets = case.operands(copies)

    def variant(threads: int) -> Call:
        def run(i: int) -> None:
            if case.op == "rms_norm_backward":
                x, dy, residual, dx, normalized, weight = sets[i]
                arguments = (dy, x, weight, EPS, False, residual, dx, normalized)
                norm_cuda.backward(*arguments, threads=threads)
                return
            *read, out, weight = sets[i]
            residual = read[1] if len(read) > 1 else None
            norm_cuda.forward(read[0], weight, EPS, False, residual, out, threads=threads)

        return run

    variants = {f"{count} threads": variant(count) for count in THREADS}
    return rows_of(case, variants, copies, seconds)


def copies_of(case: Case) -> int:
    """Sets of operands that do not fit into the L2 cache together."""
    return max(2, min(64, -(-L2_BYTES // case.moved))) if device() == "cuda" else 2


def summary(rows: list[dict[str, object]]) -> str:
    """One line per case: ours beside the copy and, where it was timed, the compiled reference."""
    lines = []
    for row in (row for row in rows if row["impl"] == "ours"):
        same = {
            str(other["impl"]): other
            for other in rows
            if (other["op"], other["shape"]) == (row["op"], row["shape"])
        }
        us = float(str(row["us"]))
        line = f"{row['op']:26} {row['shape']:>12} {us:8.1f} us {row['of_copy']:6.1%} of a copy"
        if "compiled" in same:
            line += f", {float(str(same['compiled']['us'])) / us:.2f}x as fast as compiled"
        if "host_us" in row:
            hosts = [f"{name} {x['host_us']:.0f} us" for name, x in same.items() if "host_us" in x]
            line += f"; host: {', '.join(hosts)}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="per case, about")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds; no case starts later")
    parser.add_argument("--without-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--sweep", action="store_true", help="threads for a row of rms_norm")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.limit
    limits = peaks()
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for case in all_cases():
            if time.monotonic() > end:
                print(f"{case.op} {case.shape}: not measured, the time is up")
                continue
            rows += compare(case, not arguments.without_compiled, arguments.seconds)
            if arguments.sweep and case.op.startswith("rms_norm") and device() == "cuda":
                rows += sweep(case, arguments.seconds)
            if device() == "cuda":
                torch.cuda.empty_cache()
    file = write_record("elementwise", rows, peaks=limits, folder=arguments.out)
    print(f"\ncopy: {limits['copy_tbs']:.2f} TB/s; record: {file}\n{summary(rows)}")


if __name__ == "__main__":
    main()
