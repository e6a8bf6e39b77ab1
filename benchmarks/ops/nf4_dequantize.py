"""How many weights per second each backend decodes, and the reference quantizes.

    python -m benchmarks.ops.nf4_dequantize [--out FOLDER]

One 4096 x 4096 weight, all dtypes, medians of several rounds, on the CPU and on the
GPU if there is one. The bits are the tests' business.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness.record import write_record
from qlora_kit.ops.backend import force_backend
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.quant.weight import NF4Weight

ROUNDS = 15
SIZE = 4096


def seconds(call: Callable[[], object], device: str) -> list[float]:
    """Sorted times of one call, after two to warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])


def row(what: str, device: str, dtype: torch.dtype, times: list[float]) -> dict[str, object]:
    """One measurement, in units of 10⁹ weights per second."""
    found: dict[str, object] = {
        "op": what,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "n": SIZE,
        "k": SIZE,
        "gweights_per_s": SIZE * SIZE / statistics.median(times) / 1e9,
        "ms_median": statistics.median(times) * 1e3,
        "ms_p10": times[len(times) // 10] * 1e3,
        "ms_p90": times[-1 - len(times) // 10] * 1e3,
    }
    print(f"{what:24} {device:5} {found['dtype']:9} {found['gweights_per_s']:8.2f} G weights/s")
    return found


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    for device, backend in (("cpu", "reference"), ("cuda", "cuda")):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        source = torch.randn(SIZE, SIZE, device=device)
        weight = NF4Weight.quantize(source)
        with force_backend(backend):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                times = seconds(lambda d=dtype, w=weight: nf4_dequantize(w, d), device)
                rows.append(row(f"nf4_dequantize {backend}", device, dtype, times))
        times = seconds(lambda s=source: NF4Weight.quantize(s), device)
        rows.append(row("quantize reference", device, torch.float32, times))
    print(write_record("nf4_dequantize", rows, folder=arguments.out))


if __name__ == "__main__":
    main()
