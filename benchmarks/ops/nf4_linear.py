"""How long nf4_linear takes beside a dense bf16 linear and bitsandbytes' NF4 one.

    python -m benchmarks.ops.nf4_linear [--m 1 16 ...] [--shapes 4096x4096 ...] [--out FOLDER]

Each variant is a CUDA graph that runs once over a set of weights larger than the
L2 cache, so no weight is read from it. Variants are replayed in turn, and the
medians of many rounds are compared: the card is power capped, and whoever runs
first on a cold card looks fast. Ours carries LoRA r 16; dense and bitsandbytes
carry none; `peft` is bitsandbytes followed by the two LoRA products, as PEFT runs
them. Correctness is tests/ops/test_nf4_linear.py, to be run first.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from benchmarks.harness.record import write_record
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.quant.weight import NF4Weight

RANK = 16
L2_BYTES = 120_000_000
ROUNDS = 21
DTYPE = torch.bfloat16
SHAPES = ("4096x4096", "14336x4096", "4096x14336", "28672x8192")
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Case:
    """Enough weights of one shape to outgrow the L2 cache, in every variant's form."""

    def __init__(self, n: int, k: int) -> None:
        copies = max(2, -(-L2_BYTES // (n * k // 2)))
        self.n, self.k = n, k
        self.dense = [torch.randn(n, k, device="cuda", dtype=DTYPE) / k**0.5 for _ in range(copies)]
        self.bnb = [
            bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in self.dense
        ]
        self.ours = [
            NF4Weight(
                packed=packed,
                absmax=state.absmax,
                nested_absmax=state.state2.absmax,
                offset=state.offset,
                shape=(n, k),
                block_size=64,
                dtype=DTYPE,
            )
            for packed, state in self.bnb
        ]
        self.a = torch.randn(RANK, k, device="cuda", dtype=DTYPE) / k**0.5
        self.b = torch.randn(n, RANK, device="cuda", dtype=DTYPE)

    def forward(self, m: int) -> dict[str, Callable[[int], object]]:
        """One forward call on the i-th weight, per variant."""
        x = torch.randn(m, self.k, device="cuda", dtype=DTYPE)

        def peft(i: int) -> object:
            y = self._bnb_forward(x, i)
            return y + (x @ self.a.T @ self.b.T) * 0.5

        return {
            "ours": lambda i: nf4_linear(x, self.ours[i], lora_a=self.a, lora_b=self.b, scale=0.5),
            "dense": lambda i: x @ self.dense[i].T,
            "bitsandbytes": lambda i: self._bnb_forward(x, i),
            "peft": peft,
        }

    def _bnb_forward(self, x: torch.Tensor, i: int) -> torch.Tensor:
        import bitsandbytes

        packed, state = self.bnb[i]
        return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)

    def backward(self, m: int) -> dict[str, Callable[[int], object]]:
        """Run dX on the i-th weight, per variant; ours with dA and dB as well."""
        x = torch.randn(m, self.k, device="cuda", dtype=DTYPE)
        dy = torch.randn(m, self.n, device="cuda", dtype=DTYPE)
        xa = x @ self.a.T

        def ours(i: int) -> object:
            w = self.ours[i]
            fields = (w.packed, w.absmax, w.nested_absmax, w.offset, [self.n, self.k], 64)
            return torch.ops.qlora_kit.nf4_linear_backward(
                dy, x, *fields, self.a, self.b, xa, 0.5, True, True, True, False
            )

        def theirs(i: int) -> object:
            packed, state = self.bnb[i]
            return dy @ bnb.dequantize_4bit(packed, state)

        def peft(i: int) -> object:
            dx = theirs(i)
            dyb = (dy @ self.b) * 0.5
            return dx + dyb @ self.a, dyb.T @ x, dy.T @ (xa * 0.5)

        return {
            "ours": ours,
            "dense": lambda i: dy @ self.dense[i],
            "bitsandbytes": theirs,
            "peft": peft,
        }


def capture(call: Callable[[int], object], copies: int) -> torch.cuda.CUDAGraph:
    """One graph that calls a variant once per weight."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for i in range(copies):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for i in range(copies):
            call(i)
    return graph


def interleaved(graphs: dict[str, torch.cuda.CUDAGraph], copies: int) -> dict[str, list[float]]:
    """Milliseconds per call of each variant, over many rounds."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_index in range(ROUNDS + 3):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if round_index >= 3:
                times[name].append(start.elapsed_time(stop) / copies)
    return times


def peaks() -> dict[str, float]:
    """Sustained bf16 product and copy rates of this card."""
    a = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
    b = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    product = interleaved({"x": capture(lambda i: a @ b, 20)}, 20)["x"]
    copy = interleaved({"x": capture(lambda i: target.copy_(source), 5)}, 5)["x"]
    return {
        "bf16_tflops": 2 * 8192**3 / statistics.median(product) / 1e9,
        "copy_tbs": 2 * 2**30 / statistics.median(copy) / 1e9,
    }


def measure(case: Case, m: int, which: str, limits: dict[str, float]) -> list[dict[str, object]]:
    """Rows of one shape, one M and one direction."""
    variants = case.forward(m) if which == "forward" else case.backward(m)
    copies = len(case.dense)
    graphs = {name: capture(call, copies) for name, call in variants.items()}
    times = interleaved(graphs, copies)
    n, k = case.n, case.k
    flops = 2 * m * n * k
    moved = n * k * 0.516 + 2 * m * (n + k)
    floor = max(flops / limits["bf16_tflops"], moved / limits["copy_tbs"]) / 1e9
    rows = []
    for name, values in times.items():
        values.sort()
        rows.append(
            {
                "n": n,
                "k": k,
                "m": m,
                "pass": which,
                "impl": name,
                "rank": RANK if name in ("ours", "peft") else 0,
                "ms_median": statistics.median(values),
                "ms_p10": values[len(values) // 10],
                "ms_p90": values[-len(values) // 10],
                "floor_ms": floor,
            }
        )
    return rows


def main() -> None:
    """Measure, print a table of ratios, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxK")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    limits = peaks()
    print({name: round(value, 2) for name, value in limits.items()})
    rows: list[dict[str, object]] = []
    for shape in arguments.shapes:
        n, k = map(int, shape.split("x"))
        case = Case(n, k)
        for which in ("forward", "backward"):
            for m in arguments.m:
                found = measure(case, m, which, limits)
                rows += found
                ms = {row["impl"]: row["ms_median"] for row in found}
                ratios = "  ".join(
                    f"{name} {ms[name] / ms['dense']:5.2f}" for name in ms if name != "dense"
                )
                print(f"{shape:>12} {which:8} M {m:5}  dense {ms['dense']:8.4f} ms  {ratios}")
        del case
        torch.cuda.empty_cache()
    print(write_record("nf4_linear", rows, peaks=limits, folder=arguments.out))


if __name__ == "__main__":
    main()
