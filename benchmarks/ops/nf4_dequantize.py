"""How close decoding NF4 comes to copying the same bytes, and how fast a CPU does it.

    python -m benchmarks.ops.nf4_dequantize [--shapes 4096x4096 ...] [--out FOLDER]

On a GPU: our kernels, bitsandbytes and a copy of as many bytes, half read and half
written, beside each other as qlora_kit/bench/timing.py describes. Weights and
results rotate over more memory than the L2 cache holds, results too: a buffer that is
written again and again would never leave the cache. `of_copy` is the copy's time over
the variant's: the part of the bandwidth it reaches. Bits are the tests' business.

On a CPU: how many weights per second the reference decodes and quantizes.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.record import write_record
from qlora_kit.bench.timing import Call, Captured, device, peaks, spread
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.quant.weight import NF4Weight

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "28672x8192")
L2_BYTES = 120_000_000
DTYPE = torch.bfloat16
RANK = 16
SECONDS = 2.0
"""Per shape."""
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / 64 / 256
CPU_SIZE = 4096


def parser(text: str) -> argparse.ArgumentParser:
    """The options that benchmarks of the codec share."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxK")
    made.add_argument("--out", type=Path, default=None)
    return made


def measure(
    variants: dict[str, Call], copies: int, moved: int, seconds: float = SECONDS
) -> list[dict[str, object]]:
    """Time variants beside a copy of `moved` bytes, half read and half written.

    What a variant returns for the i-th weight is kept until all are timed, so that each
    writes to memory of its own.
    """
    kept: dict[tuple[str, int], object] = {}
    sources = [
        torch.randint(100, (moved // 2,), device=device(), dtype=torch.uint8) for _ in range(copies)
    ]
    targets = [torch.empty_like(source) for source in sources]

    def keeping(name: str, call: Call) -> Call:
        def run(i: int) -> None:
            kept[name, i] = call(i)

        return run

    captured = Captured()
    for name, call in variants.items():
        captured.add(name, keeping(name, call), copies, copies)
    captured.add("copy", lambda i: targets[i].copy_(sources[i]), copies, copies)
    captured.time(copies, seconds / 4)  # until the card is warm
    times = captured.time(copies, seconds)
    copy = statistics.median(times["copy"])
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        found = spread(values)
        speed = {"tbs": moved / found["ms_median"] / 1e9, "of_copy": copy / found["ms_median"]}
        rows.append({"impl": name, **found, **speed})
    return rows


def show(shape: str, rows: list[dict[str, object]]) -> None:
    """Print the rows of one shape."""
    for row in rows:
        print(
            f"{shape:>12} {row['impl']:22} {row['ms_median']:8.4f} ms "
            f"{row['tbs']:5.2f} TB/s  {row['of_copy']:6.1%} of a copy"
        )


def variants(n: int, k: int, copies: int) -> dict[str, Call]:
    """Every way to decode one of several weights."""
    import bitsandbytes.functional as bnb

    theirs = [
        bnb.quantize_4bit(
            torch.randn(n, k, device="cuda", dtype=DTYPE),
            quant_type="nf4",
            compress_statistics=True,
        )
        for _ in range(copies)
    ]
    ours = [
        NF4Weight(
            packed=packed,
            absmax=state.absmax,
            nested_absmax=state.state2.absmax,
            offset=state.offset,
            shape=(n, k),
            block_size=64,
            dtype=DTYPE,
        )
        for packed, state in theirs
    ]
    columns = torch.randn(n, RANK, device="cuda", dtype=DTYPE)
    decoded = bnb.dequantize_4bit(*theirs[0])
    assert torch.equal(nf4_dequantize(ours[0]), decoded), "not the bits of bitsandbytes"

    return {
        "ours": lambda i: nf4_dequantize(ours[i]),
        "ours, with columns": lambda i: nf4_dequantize(ours[i], columns=columns),
        "ours, transposed": lambda i: nf4_dequantize(ours[i], transposed=True),
        "bitsandbytes": lambda i: bnb.dequantize_4bit(*theirs[i]),
    }


def on_gpu(shapes: list[str]) -> list[dict[str, object]]:
    """Rows of all shapes."""
    rows = []
    for shape in shapes:
        n, k = map(int, shape.split("x"))
        copies = max(2, -(-L2_BYTES // (n * k // 2)))
        moved = int(n * k * (BYTES_PER_WEIGHT + DTYPE.itemsize))
        found = measure(variants(n, k, copies), copies, moved)
        show(shape, found)
        common = {"op": "nf4_dequantize", "device": "cuda", "dtype": "bfloat16", "n": n, "k": k}
        rows += [common | row for row in found]
        torch.cuda.empty_cache()
    return rows


def on_cpu() -> list[dict[str, object]]:
    """Rows of the reference, one weight, all dtypes."""
    source = torch.randn(CPU_SIZE, CPU_SIZE)
    weight = NF4Weight.quantize(source)
    calls: list[tuple[str, torch.dtype, Callable[[], object]]] = [
        ("nf4_dequantize reference", dtype, lambda d=dtype: nf4_dequantize(weight, d))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    calls.append(("quantize reference", torch.float32, lambda: NF4Weight.quantize(source)))
    rows = []
    for op, dtype, call in calls:
        captured = Captured()
        captured.add("cpu", lambda _, call=call: call(), 1, 1)
        found = spread(captured.time(1, SECONDS)["cpu"])
        speed = CPU_SIZE**2 / found["ms_median"] / 1e6
        row = {
            "op": op,
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "n": CPU_SIZE,
            "k": CPU_SIZE,
            "gweights_per_s": speed,
            **found,
        }
        print(f"{op:24} {row['dtype']:9} {speed:8.2f} G weights/s")
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, write the record."""
    arguments = parser(__doc__).parse_args()
    if torch.cuda.is_available():
        limits = peaks()
        rows = on_gpu(arguments.shapes)
    else:
        limits, rows = {}, on_cpu()
    print(write_record("nf4_dequantize", rows, peaks=limits, folder=arguments.out))


if __name__ == "__main__":
    main()
