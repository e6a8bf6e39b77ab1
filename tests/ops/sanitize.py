"""Every kernel once on small shapes, for compute-sanitizer; see scripts/sanitize.sh.

    python -m tests.ops.sanitize                    # each strategy, both products, against float64
    python -m tests.ops.sanitize hopper losses      # these parts, of those that --list names
    python -m tests.ops.sanitize --every-lane       # racecheck follows a thread's own arrivals only
    python -m tests.ops.sanitize --plant overrun    # a kernel that writes past its output
    python -m tests.ops.sanitize --plant race       # a kernel without the barrier it needs

The planted mistakes show that the tool sees our kernels at all: compiled at run time,
picked by name (one by each of two beginnings), launched through the driver.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_kit.ops import jit
from qlora_kit.ops.backend import force_backend
from qlora_kit.ops.column_products.op import column_products
from qlora_kit.ops.cross_entropy.op import cross_entropy, cross_entropy_
from qlora_kit.ops.gated_activation.op import gated_activation, gated_activation_backward
from qlora_kit.ops.gather_rows.op import gather_rows
from qlora_kit.ops.jit import architecture_of
from qlora_kit.ops.low_rank_gradients import cuda as low_rank_cuda
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.ops.nf4_linear import ahead, cuda, hopper
from qlora_kit.ops.nf4_linear import low_rank as small
from qlora_kit.ops.nf4_linear.hopper_tiling import SHAPES as SHAPES_OF_BLOCKS
from qlora_kit.ops.nf4_linear.hopper_tiling import Cut
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.ops.nf4_quantize.op import quantize_weight
from qlora_kit.ops.nf4_scales.op import stretched_weight
from qlora_kit.ops.rms_norm.op import rms_norm, rms_norm_backward
from qlora_kit.ops.rotary.op import rotary_
from qlora_kit.quant.weight import NF4Weight
from tests.ops.helpers import SCALE, Options, float32_sums, make_case, truth

ROWS = (1, 9, 16, 33, 130, 300)
SHAPES = ((64, 64), (192, 576), (136, 320), (264, 512))
"""The last for `hopper`, which takes no other K than multiples of 256."""
RANKS = (0, 1, 16, 33)

_PLANTED = """
extern "C" __global__ void nf4_planted_overrun(float* out) { out[threadIdx.x + 1] = 1.0f; }
extern "C" __global__ void rms_norm_planted_race(float* out) {
    __shared__ float values[256];
    values[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = values[255 - threadIdx.x];
}
"""


def plant(name: str) -> None:
    """Launch a kernel with a mistake in it, on 256 threads and 256 floats."""
    import numpy as np
    from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

    device = Device(0)
    device.set_current()
    architecture = architecture_of(torch.device("cuda", 0))
    program = Program(_PLANTED, "c++", ProgramOptions(std="c++17", arch=architecture))
    prefix = "nf4" if name == "overrun" else "rms_norm"
    kernel = program.compile("cubin").get_kernel(f"{prefix}_planted_{name}")
    out = torch.zeros(256, device="cuda")
    stream = device.create_stream()
    torch.cuda.synchronize()
    launch(stream, LaunchConfig(grid=1, block=256), kernel, np.uint64(out.data_ptr()))
    stream.sync()


def products(m: int, n: int, k: int, options: Options, strategies: Sequence[str]) -> int:
    """Each strategy that serves a case, both products, held against float64; how many ran."""
    case = make_case(m, n, k, options, "cuda")
    wanted = truth(case)
    dtype = options.dtype
    x, bias = case.x.detach(), None if case.bias is None else case.bias.detach()
    xa = dyb = a = b = None
    if case.a is not None:
        a, b = case.a.detach().to(dtype), case.b.detach().to(dtype)
        xa = small_product(x, a)
        dyb = small_product(case.dy, b.T)
    ran = 0
    for strategy in strategies:
        module = cuda.STRATEGIES[strategy]
        if module.serves(x, case.weight):
            got = module.multiply(x, case.weight, bias, xa, b)
            wanted.check("y", got, f"{strategy}, {case}")
            ran += 1
        if hasattr(module, "multiply_transposed") and module.serves(case.dy, case.weight):
            got = module.multiply_transposed(case.dy, case.weight, dyb, a)
            wanted.check("dx", got, f"{strategy}, {case}")
            ran += 1
        if a is None or a.shape[0] % 8 != 0:  # what kernels of a small product take
            continue
        if hasattr(module, "multiply_low_rank") and module.serves(x, case.weight):
            got, _ = module.multiply_low_rank(x, case.weight, bias, a, b, SCALE)
            wanted.check("y", got, f"{strategy} with its own small product, {case}")
            ran += 1
        transposed = hasattr(module, "multiply_transposed_low_rank")
        if transposed and module.serves(case.dy, case.weight):
            got, _ = module.multiply_transposed_low_rank(case.dy, case.weight, a, b, SCALE)
            wanted.check("dx", got, f"{strategy} with its own small product, {case}")
            ran += 1
    return ran


def small_product(x: Tensor, a: Tensor) -> Tensor:
    """SCALE·x·aᵀ, summed in float32 without cuBLAS, whose 16-bit kernels racecheck cannot run."""
    return (SCALE * (x.float()[:, None] * a.float()).sum(-1)).to(x.dtype)


def elementwise(rows: int, size: int, dtype: torch.dtype) -> None:
    """The ops on rows, held against the reference: whole pieces and single values, both ways."""
    x, dy, residual = (torch.randn(rows, size, device="cuda", dtype=dtype) for _ in range(3))
    heads = torch.randn(rows, 3, size, device="cuda", dtype=dtype)
    angle = torch.randn(rows, size // 2, device="cuda").repeat(1, 2)
    gate_up = torch.randn(rows, 2 * size, device="cuda", dtype=dtype)
    weight = torch.randn(size, device="cuda")
    found = {}
    for backend in ("cuda", "reference"):
        again, act = torch.empty_like(x), torch.empty_like(x)
        with force_backend(backend):
            results = [
                rms_norm(x, weight, 1e-5, residual=residual),
                rms_norm(heads, weight, 1e-5),
                rms_norm_backward(dy, x, weight, 1e-5, residual=residual, normalized=again),
                rotary_(heads.clone(), angle.cos(), angle.sin()),
                gated_activation(gate_up, "gelu"),
                gated_activation_backward(dy, gate_up, "silu", act=act),
                column_products(dy, x),
                gather_rows(x, torch.arange(rows + 2, device="cuda") % rows),
            ]
        found[backend] = [*results, again, act]
    for got, wanted in zip(found["cuda"], found["reference"], strict=True):
        bound = 4 * torch.finfo(dtype).eps * wanted.abs().max()
        assert (got - wanted).abs().max() <= bound, (rows, size, dtype)


def losses(rows: int, classes: int, dtype: torch.dtype) -> None:
    """Cross-entropy with and without a gradient, a row ignored, held against the reference."""
    logits = torch.randn(rows, classes, device="cuda", dtype=dtype)
    targets = torch.randint(classes, (rows,), device="cuda")
    targets[1::3] = -100
    options = {"softcap": 5.0, "label_smoothing": 0.1, "ignore_index": -100}
    found = {}
    for backend in ("cuda", "reference"):
        gradient = logits.clone()
        with force_backend(backend):
            plain = cross_entropy(logits, targets, **options)
            found[backend] = plain, cross_entropy_(gradient, targets, **options), gradient
    for got, wanted in zip(found["cuda"], found["reference"], strict=True):
        bound = 4 * torch.finfo(got.dtype).eps * wanted.abs().max() + 1e-4
        assert (got - wanted).abs().max() <= bound, (rows, classes, dtype)


def codes(n: int, k: int, block_size: int, dtype: torch.dtype) -> None:
    """A weight quantized, and its rows stretched where blocks are whole: the reference's bits."""
    source = torch.randn(n, k, device="cuda", dtype=dtype)
    factors = torch.rand(n, device="cuda") + 0.5
    found = {}
    for backend in ("cuda", "reference"):
        with force_backend(backend):
            weight = quantize_weight(source, block_size=block_size)
            found[backend] = list(weight.tensors().values())
            if k % block_size == 0:
                found[backend].append(stretched_weight(weight, factors).absmax)
    for got, wanted in zip(found["cuda"], found["reference"], strict=True):
        assert torch.equal(got, wanted), (n, k, block_size, dtype)


def low_rank(rows: int, parts: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Each shape of block on two linears' gradients, one block and many, against float64."""
    columns, ranks = (list(ends) for ends in zip(*parts, strict=True))
    (n, r), (column, first) = parts[-1], parts[0]
    dy, b, xa = (torch.randn(*s, device="cuda").to(dtype) for s in ((rows, n), (n, r), (rows, r)))
    b[:column, first:], b[column:, :first] = 0, 0
    wanted = dy.double() @ b.double(), dy.double().T @ xa.double()
    rank = low_rank_cuda.kernel_rank(columns, ranks)
    for shape in low_rank_cuda.SHAPES[rank]:
        for blocks in (1, 100):
            out = torch.empty_like(xa)
            options = {"shape": shape, "blocks": blocks}
            d_b = low_rank_cuda.one_pass(dy, b, xa, columns, ranks, out, **options)
            bound = torch.finfo(dtype).eps * wanted[0].abs().max()
            assert (out - wanted[0]).abs().max() <= bound, (rows, parts, shape, blocks)
            found = d_b[:column, :first], d_b[column:, : r - first]
            blocks_of = wanted[1][:column, :first], wanted[1][column:, first:]
            for got, exact in zip(found, blocks_of, strict=True):
                assert (got - exact).abs().max() <= 1e-4, (rows, parts, shape, blocks)


def small_products(rows: int, k: int, rank: int, dtype: torch.dtype) -> None:
    """Each shape of block, alone and in teams of both kinds, both ways, against float64."""
    x, a = (torch.randn(*s, device="cuda").to(dtype) for s in ((rows, k), (rank, k)))
    wanted = SCALE * x.double() @ a.double().T
    bound = torch.finfo(dtype).eps * wanted.abs().max()
    for shape in small.SHAPES[small.kernel_rank(rank)]:
        for team, clustered in ((1, True), (2, True), (3, False)):
            for factor in (a.T, a.T.contiguous()):
                out = x.new_full((rows, rank), torch.nan)
                both = x.new_full((rows, k + rank), torch.nan) if team > 1 else None
                chosen = small.Plan(shape, min(team, -(-k // shape.columns)))
                small.run(x, factor, SCALE, out, both=both, chosen=chosen, clustered=clustered)
                assert (out - wanted).abs().max() <= bound, (rows, k, rank, shape, team)
                assert both is None or torch.equal(both, torch.cat((x, out), dim=1))


def linears(*strategies: str) -> int:
    """Strategies of nf4_linear; how many products ran."""
    ran = 0
    for index, m in enumerate(ROWS):
        for n, k in SHAPES:
            rank = RANKS[(index + k) % 4]
            dtype = (torch.bfloat16, torch.float16)[index % 2]
            options = Options(rank, dtype, bias=m % 2 == 0, nested=n != 192)
            ran += products(m, n, k, options, strategies)
    return ran


def stretches() -> int:
    """`hopper` with each shape of block, few clusters sharing its tiles; how many products ran."""
    chosen, ran = hopper.tiling, 0
    try:
        for shape in SHAPES_OF_BLOCKS:
            hopper.tiling = partial(stretch, shape, 3)
            ran += products(shape.tokens + 5, 264, 512, Options(16, bias=False), ["hopper"])
    finally:
        hopper.tiling = chosen
    return ran


def tiles() -> int:
    """`ahead` with few blocks for its tiles, which make the small product; how many ran."""
    chosen = ahead._pairs, ahead.makes_small_product
    try:
        ahead._pairs = lambda _: 2
        ahead.makes_small_product = lambda m, width, rank, pairs: rank <= 16
        return sum(
            products(600, 776, 512, Options(rank, dtype, bias=False), ["ahead"])
            for rank, dtype in ((16, torch.bfloat16), (8, torch.float16), (0, torch.float16))
        )
    finally:
        ahead._pairs, ahead.makes_small_product = chosen


def stretch(
    shape: Any, count: int, m: int, columns: int, contraction: int, _: Any, rank: int
) -> tuple[Cut, int]:
    """So many clusters, or as many as there are quads; two that share the small product."""
    quads = shape.tiles_of(m, columns) * -(-contraction // 256)
    return Cut(shape, 1, min(count, quads)), 2 if rank else 0


def public_ops() -> int:
    """nf4_dequantize and nf4_linear, both ways, at sizes that are no multiple of anything."""
    with force_backend("cuda"):
        for n, k in ((31, 77), (65, 130)):
            source = torch.randn(n, k, device="cuda")
            weight = NF4Weight.quantize(source)
            for dtype in DTYPES:
                assert torch.equal(nf4_dequantize(weight, dtype), weight.dequantize(dtype))
            case = make_case(5, n, k, Options(4), "cuda", weight)
            y = nf4_linear(case.x, weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE)
            y.backward(case.dy)
    return 2


def over(check: Callable[..., None], cases: Sequence[tuple[Any, ...]], dtypes: Any) -> int:
    """A check of every case in every dtype; how many there were."""
    for dtype in dtypes:
        for case in cases:
            check(*case, dtype)
    return len(cases) * len(dtypes)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
PARTS: dict[str, Callable[[], int]] = {
    **{name: partial(linears, name) for name in cuda.STRATEGIES},
    "stretches": stretches,
    "tiles": tiles,
    "public_ops": public_ops,
    "elementwise": partial(
        over, elementwise, ((3, 64), (5, 34), (2, 1032), (3, 4096), (1, 16_384)), DTYPES
    ),
    "losses": partial(over, losses, ((3, 7), (4, 515), (3, 4099), (3, 131_072)), DTYPES),
    "codes": partial(
        over, codes, ((31, 77, 64), (9, 4096, 64), (5, 8192, 4096), (300, 256, 32)), DTYPES
    ),
    "low_rank_gradients": partial(
        over,
        low_rank,
        [(m, [(1032, r), (1112, 2 * r)]) for m, r in ((1, 16), (70, 8), (70, 32), (37, 64))],
        HALVES,
    ),
    "low_rank_product": partial(
        over, small_products, ((1, 72, 8), (130, 392, 16), (37, 264, 8)), HALVES
    ),
}
"""What can be checked by itself: a tool that fails on one kernel says nothing of the others."""


def main() -> int:
    """Run; the exit status is the sanitizer's business, or 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--plant", choices=("overrun", "race"))
    parser.add_argument("--list", action="store_true", help="names of the parts")
    parser.add_argument("--every-lane", action="store_true", help="EVERY_LANE_ARRIVES is defined")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(PARTS))
        return 0
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    if arguments.every_lane:
        source_text = jit.source_text
        jit.source_text = lambda file: f"#define EVERY_LANE_ARRIVES\n{source_text(file)}"
    if arguments.plant:
        plant(arguments.plant)
        return 0
    with float32_sums():
        for name in arguments.parts or PARTS:
            ran = PARTS[name]()
            torch.cuda.synchronize()
            print(f"{name}: {ran} checks right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
