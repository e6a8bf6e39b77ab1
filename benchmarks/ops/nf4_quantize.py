"""How close quantizing to NF4 comes to copying the same bytes.

    python -m benchmarks.ops.nf4_quantize [--shapes 4096x4096 ...] [--out FOLDER]

Needs a GPU. Ours, bitsandbytes' kernels and a copy of as many bytes, half read and
half written, beside each other; benchmarks/ops/nf4_dequantize.py says how, and times
the reference on a CPU. `nested` adds the 8-bit scales, as both would store them. Our
codec in plain torch is timed on the first shape alone: it takes many passes.
"""

import statistics

import torch

from benchmarks.harness.record import write_record
from benchmarks.ops.nf4_dequantize import DTYPE, L2_BYTES, measure, parser, show
from qlora_kit.bench.timing import Call, peaks
from qlora_kit.ops.nf4_quantize.op import nf4_quantize, nf4_quantize_absmax
from qlora_kit.quant.double_quant import dynamic_map
from qlora_kit.quant.nf4 import quantize_nf4

BYTES_PER_WEIGHT = DTYPE.itemsize + 0.5 + 4 / 64


def variants(n: int, k: int, copies: int, with_reference: bool) -> dict[str, Call]:
    """Every way to quantize one of several weights."""
    import bitsandbytes  # noqa: F401  (registers its ops)

    weights = [torch.randn(n, k, device="cuda", dtype=DTYPE) for _ in range(copies)]
    dynamic = dynamic_map(torch.device("cuda"))
    wanted, wanted_absmax = quantize_nf4(weights[0])
    packed, absmax = nf4_quantize(weights[0])
    assert torch.equal(packed, wanted), "not the codec's codes"
    assert torch.equal(absmax, wanted_absmax), "not the codec's scales"

    def nested(i: int) -> object:
        packed, absmax = nf4_quantize(weights[i])
        return packed, nf4_quantize_absmax(absmax)

    def theirs(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(weights[i], 64, "nf4", torch.uint8)
        return packed, absmax

    def theirs_nested(i: int) -> object:
        packed, absmax = theirs(i)
        centred = absmax - absmax.mean()
        return packed, torch.ops.bitsandbytes.quantize_blockwise(centred, dynamic, 256)

    found: dict[str, Call] = {
        "ours": lambda i: nf4_quantize(weights[i]),
        "ours, nested": nested,
        "bitsandbytes": theirs,
        "bitsandbytes, nested": theirs_nested,
    }
    if with_reference:
        found["reference"] = lambda i: quantize_nf4(weights[i])
    return found


def main() -> None:
    """Measure, print, write the record."""
    arguments = parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; nf4_dequantize times the reference on a CPU")
    limits = peaks()
    rows: list[dict[str, object]] = []
    for index, shape in enumerate(arguments.shapes):
        n, k = map(int, shape.split("x"))
        copies = max(2, -(-L2_BYTES // (n * k * DTYPE.itemsize)))
        moved = int(n * k * BYTES_PER_WEIGHT)
        found = measure(variants(n, k, copies, index == 0), copies, moved)
        show(shape, found)
        common = {"op": "nf4_quantize", "device": "cuda", "dtype": "bfloat16", "n": n, "k": k}
        rows += [common | row for row in found]
        torch.cuda.empty_cache()
    best = statistics.median(float(str(row["of_copy"])) for row in rows if row["impl"] == "ours")
    print(f"ours reaches {best:.1%} of a copy's bandwidth (median of the shapes)")
    print(write_record("nf4_quantize", rows, peaks=limits, folder=arguments.out))


if __name__ == "__main__":
    main()
