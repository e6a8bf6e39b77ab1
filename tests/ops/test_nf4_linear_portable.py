"""The fused product for every GPU since Ampere, in both directions, against float64."""

import re
from math import prod

import pytest
import torch

from qlora_kit.ops import jit
from qlora_kit.ops.nf4_linear import portable
from qlora_kit.quant.weight import NF4Weight

DTYPES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Largest relative error of one rounding; over many, 0.42 of it in the mean square."""
SHAPES = [
    (128, 64),
    (192, 128),
    (320, 192),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
]
ROWS = (1, 2, 15, 16, 17, 33, 64, 65, 127, 128, 200, 257, 1024)
LOW_RANK = [  # rank, bias
    (0, False),
    (4, True),
    (16, True),
    (16, False),
    (24, False),
    (64, True),
    (0, True),
]


def quantized(n, k, device, *, double_quant=True):
    generator = torch.Generator(device).manual_seed(n + k)
    source = torch.randn((n, k), generator=generator, device=device) / k**0.5
    return NF4Weight.quantize(source, double_quant=double_quant)


def with_fields(weight, **fields):
    named = {name: getattr(weight, name) for name in NF4Weight.__dataclass_fields__}
    return NF4Weight(**{**named, **fields})


class Case:
    """One direction of one weight, its inputs for the most rows, and float64 sums of them."""

    def __init__(self, n, k, dtype, transposed):
        rows = max(ROWS)
        generator = torch.Generator("cuda").manual_seed(n * 3 + k)
        self.weight, self.dtype, self.transposed = quantized(n, k, "cuda"), dtype, transposed
        w = self.weight.dequantize(dtype).double()
        self.w = w if transposed else w.T
        depth, self.columns = self.w.shape

        def normal(*shape):
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        self.x, self.low = normal(rows, depth), normal(rows, 64)
        self.adapter = normal(64, self.columns) if transposed else normal(self.columns, 64)
        self.bias = normal(self.columns)
        self.exact = self.x.double() @ self.w
        self.sizes = self.x.double().abs() @ self.w.abs()

    def operands(self, m, rank, with_bias):
        """Arguments of the product."""
        low = self.low[:m, :rank].contiguous() if rank else None
        adapter = self.adapter[:rank] if self.transposed else self.adapter[:, :rank]
        adapter = adapter.contiguous() if rank else None
        return self.x[:m], low, adapter, self.bias if with_bias else None

    def run(self, m, rank, with_bias, weight=None):
        x, low, adapter, bias = self.operands(m, rank, with_bias)
        weight = weight or self.weight
        if self.transposed:
            return portable.multiply_transposed(x, weight, low, adapter)
        return portable.multiply(x, weight, bias, low, adapter)

    def wanted(self, m, rank, with_bias):
        """The exact result, and the sum of the magnitudes it is made of."""
        _, low, adapter, bias = self.operands(m, rank, with_bias)
        exact, sizes = self.exact[:m], self.sizes[:m]
        if low is not None:
            adapter = (adapter if self.transposed else adapter.T).double()
            exact = exact + low.double() @ adapter
            sizes = sizes + low.double().abs() @ adapter.abs()
        if bias is not None and not self.transposed:
            exact, sizes = exact + bias.double(), sizes + bias.double().abs()
        return exact, sizes

    def error(self, got, wanted):
        """Error in units of its bounds: of the whole, and of the worst element.

        One rounding of the output in either. An element is a float32 sum of depth / 16 products
        of 16, each of which may lose 2**-22 of what has been added up.
        """
        exact, sizes = wanted
        difference = (got.double() - exact).abs()
        rounding = ROUNDING[self.dtype]
        sums = (self.w.shape[0] / 16 + 8) * 2**-22 * sizes
        each = difference / (rounding * exact.abs() + sums + 1e-7)
        return max((difference.norm() / (0.5 * rounding * exact.norm())).item(), each.max().item())


def poison(case, m):
    """Fill with NaN what the allocator will hand to the result and the workspace."""
    size = m * case.columns
    held = [torch.full((size * splits,), torch.nan, device="cuda") for splits in (1, 2, 4, 8)]
    held += [torch.full((size,), torch.nan, device="cuda", dtype=case.dtype) for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_against_float64(n, k, dtype, transposed):
    """Poisoned outputs and workspaces, two runs of the same bits, at few and many rows."""
    case = Case(n, k, dtype, transposed)
    pairs = [(m, LOW_RANK[i % len(LOW_RANK)]) for i, m in enumerate(ROWS)]
    pairs += [(m, low_rank) for m in (17, 65, 129) for low_rank in LOW_RANK]
    for m, (rank, with_bias) in pairs:
        assert portable.serves(case.x[:m], case.weight)
        poison(case, m)
        got = case.run(m, rank, with_bias)
        again = case.run(m, rank, with_bias)
        assert case.error(got, case.wanted(m, rank, with_bias)) < 1, (m, rank, with_bias)
        assert torch.equal(got, again), (m, rank, with_bias)

    wanted = case.wanted(65, 16, with_bias=True)
    weight = case.weight
    swapped = (weight.packed << 4) | (weight.packed >> 4)
    shifted = weight.absmax.roll(1)
    for wrong in ({"packed": swapped}, {"absmax": shifted}):
        got = case.run(65, 16, True, with_fields(weight, **wrong))
        assert case.error(got, wanted) > 10  # the bounds bite


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(64, 64), (320, 192), (192, 1088), (1024, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_weight_is_decoded_to_the_bit(n, k, dtype, double_quant):
    """A product with the identity is the decoded weight, with nothing to round."""
    weight = quantized(n, k, "cuda", double_quant=double_quant)
    decoded = weight.dequantize(dtype)

    def identity(size):
        return torch.eye(size, device="cuda", dtype=dtype)

    assert torch.equal(portable.multiply(identity(k), weight, None, None, None), decoded.T)
    assert torch.equal(portable.multiply_transposed(identity(n), weight, None, None), decoded)
    packed = weight.packed.clone()
    packed[n * k // 4] ^= 1
    changed = portable.multiply(identity(k), with_fields(weight, packed=packed), None, None, None)
    assert (changed != decoded.T).sum() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("m", [2, 40, 70, 300])
@pytest.mark.parametrize("rank", [0, 5])
def test_nan_and_infinity_stay_in_their_rows(m, rank):
    weight = quantized(192, 320, "cuda")
    for transposed in (False, True):
        depth, columns = (192, 320) if transposed else (320, 192)
        x = torch.randn(m, depth, device="cuda", dtype=torch.bfloat16)
        low = torch.randn(m, rank, device="cuda", dtype=torch.bfloat16)
        adapter = torch.randn(rank, columns, device="cuda", dtype=torch.bfloat16)
        x[0, 5], x[m - 1, depth - 1] = torch.inf, torch.nan
        w = weight.dequantize(torch.bfloat16)
        if transposed:
            got = portable.multiply_transposed(x, weight, low, adapter)
        else:
            w = w.T
            got = portable.multiply(x, weight, None, low, adapter.T.contiguous())
        wanted = x.double() @ w.double() + low.double() @ adapter.double()
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.isinf(), wanted.isinf())
        assert got[1 : m - 1].isfinite().all()


@pytest.mark.gpu
def test_unaligned_adapters_are_taken():
    weight = quantized(128, 192, "cuda")
    x = torch.randn(33, 192, device="cuda", dtype=torch.float16)
    storage = torch.randn(33 * 8 + 128 * 8 + 1, device="cuda", dtype=torch.float16)
    low, adapter = storage[1 : 1 + 33 * 8].view(33, 8), storage[1 + 33 * 8 :].view(128, 8)
    wanted = x.double() @ weight.dequantize(torch.float16).double().T
    wanted += low.double() @ adapter.double().T
    got = portable.multiply(x, weight, None, low, adapter)
    assert ((got - wanted).norm() / wanted.norm()).item() < 0.5 * ROUNDING[torch.float16]


def bfloat16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def test_serves_what_the_kernel_can_take():
    weight = quantized(128, 192, "cpu")
    assert portable.serves(bfloat16(1, 192), weight)
    assert portable.serves(bfloat16(4000, 128).half(), weight)
    assert not portable.serves(bfloat16(0, 192), weight)
    assert not portable.serves(bfloat16(3, 192).float(), weight)
    assert not portable.serves(bfloat16(192, 3).T, weight)
    assert not portable.serves(bfloat16(3 * 192 + 1)[1:].view(3, 192), weight)
    for shape in ((96, 192), (128, 96)):
        assert not portable.serves(bfloat16(3, shape[1]), quantized(*shape, "cpu"))
    other = NF4Weight.quantize(torch.randn(128, 192), block_size=128)
    assert not portable.serves(bfloat16(3, 192), other)
    codes = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8)[1:].unsqueeze(1)
    assert not portable.serves(bfloat16(3, 192), with_fields(weight, packed=codes))
    apart = torch.empty(2 * weight.absmax.numel(), dtype=torch.uint8)[::2]
    assert not portable.serves(bfloat16(3, 192), with_fields(weight, absmax=apart))


@pytest.mark.parametrize("processors", [16, 84, 108, 132])
def test_tiling_covers_the_contraction_in_bounded_workspace(processors):
    for n, k in [*SHAPES, (28672, 8192), (64, 28672)]:
        for m in (*ROWS, 8193):
            tokens, splits = portable.tiling(m, n, k, processors)
            assert tokens in (32, 64, 128)
            steps = -(-k // 64 // splits)
            assert (splits - 1) * steps < k // 64 <= splits * steps  # none is idle
            if splits > 1:
                assert steps >= 4
                assert splits * m * n * 4 <= 128 * 1024 * processors


def test_tiling_fills_the_gpu():
    assert portable.tiling(17, 4096, 14336, 108)[1] >= 4
    assert portable.tiling(1024, 14336, 4096, 108) == (128, 1)
    assert portable.tiling(33, 14336, 4096, 108)[0] == 64  # half a tile of 128 would be idle


def test_stages_are_as_large_as_the_source_says():
    text = (jit.kernels_folder() / "nf4_linear" / "portable.cu").read_text()
    condition, *sizes = re.search(
        r"#if (.*__CUDA_ARCH__.*)\n"
        r".*FEW_TOKENS_BYTES = (\d+) \* 1024, MANY_TOKENS_BYTES = (\d+) \* 1024;\n#else\n"
        r".*FEW_TOKENS_BYTES = (\d+) \* 1024, MANY_TOKENS_BYTES = (\d+) \* 1024;",
        text,
    ).groups()
    named = {int(number) for number in re.findall(r"__CUDA_ARCH__ == (\d+)", condition)}
    capabilities = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    for major, minor in capabilities:
        few, many = sizes[:2] if major * 100 + minor * 10 in named else sizes[2:]
        for tokens, kib in ((32, few), (64, few), (128, many)):
            assert portable.stages_bytes((major, minor), tokens) == int(kib) * 1024


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m", [5, 65, 1024])
def test_launches_cover_the_result(monkeypatch, transposed, m):
    launches = []

    class Recorder:
        def launch(self, name, grid, block, arguments, *, device, shared=0):
            launches.append((name, grid, block, arguments, shared))

    monkeypatch.setattr(portable, "_KERNELS", Recorder())
    monkeypatch.setattr(portable, "_properties", lambda device: (108, (8, 0)))
    n, k = 320, 1024
    weight = quantized(n, k, "cpu")
    if transposed:
        rows, depth = k, n
        low, adapter = bfloat16(m * 4 + 1)[1:].view(m, 4), bfloat16(4, k)
        out = portable.multiply_transposed(bfloat16(m, n), weight, low, adapter)
    else:
        rows, depth = n, k
        low, adapter = bfloat16(m, 4), bfloat16(n, 4)
        out = portable.multiply(bfloat16(m, k), weight, bfloat16(n), low, adapter)
    assert out.shape == (m, rows)
    tokens, splits = portable.tiling(m, rows, depth, 108)
    name, grid, block, arguments, shared = launches[0]
    direction = "transposed_" if transposed else ""
    assert name == f"nf4_portable_{direction}bfloat16_{tokens}"
    assert (block, shared) == (128, portable.stages_bytes((8, 0), tokens))
    assert grid[0] * tokens >= m
    assert grid[1] * 128 >= rows
    assert grid[2] == splits
    steps = arguments[-1]
    assert grid[2] * steps * 64 >= depth
    assert all(a.data_ptr() % 16 == 0 for a in arguments[6:9])
    assert arguments[10:14] == (m, rows, depth, 4)
    assert len(launches) == (2 if splits > 1 else 1)
    if splits > 1:
        name, blocks, block, arguments, shared = launches[1]
        assert name == "nf4_portable_add_bfloat16"
        assert blocks * block * 4 >= m * rows
        assert prod(arguments[0].shape) == splits * m * rows
