"""The NF4 codec equals bitsandbytes bit for bit on a CPU, and is as accurate as NF4 can be."""

from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_kit.core.errors import NonFiniteError, ShapeError
from qlora_kit.quant.double_quant import dequantize_absmax, dynamic_map, quantize_absmax
from qlora_kit.quant.nf4 import NF4_VALUES, dequantize_nf4, nf4_table, quantize_nf4
from qlora_kit.quant.weight import NF4Weight
from tests.quant import by_bitsandbytes

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 64), (3, 7), (1, 1), (5, 13), (33, 129), (100, 65), (2, 3, 64), (1030, 1021)]


def case(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A weight with one awkward property."""
    weight = torch.randn(shape)
    flat = weight.view(-1)
    if kind == "zero blocks":
        flat[: min(128, flat.numel())] = 0
    elif kind == "outliers":
        flat[:: max(1, flat.numel() // 5)] = 3e4
    elif kind == "denormals":
        weight *= 1e-40 if dtype == torch.float32 else 1e-7
    elif kind == "ties":
        table = nf4_table(CPU)
        middles = (table[:-1] + table[1:]) / 2
        flat[:] = middles[torch.arange(flat.numel()) % 15]
        flat[::64] = 1.0
    return weight.to(dtype)


@pytest.mark.parametrize("kind", ["normal", "zero blocks", "outliers", "denormals", "ties"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_scales_and_values_equal_bitsandbytes(kind, shape, dtype):
    weight = case(kind, shape, dtype)
    packed, absmax = quantize_nf4(weight)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)
    for out in DTYPES:
        expected = by_bitsandbytes.decoded(theirs, state, out)
        assert torch.equal(dequantize_nf4(packed, absmax, shape, dtype=out), expected)


@pytest.mark.parametrize("block_size", [32, 128, 1024, 4096])
def test_every_block_size_equals_bitsandbytes(block_size):
    weight = torch.randn(200, 99)
    packed, absmax = quantize_nf4(weight, block_size=block_size)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("count", [1, 2, 63, 256, 257, 5000, 70_000])
@pytest.mark.parametrize("kind", ["uniform", "equal", "outlier", "wide"])
def test_double_quantization_equals_bitsandbytes(count, kind):
    absmax = torch.rand(count)
    if kind == "equal":
        absmax[:] = 0.5
    elif kind == "outlier":
        absmax[0] = 1000.0
    elif kind == "wide":
        absmax = torch.exp(6 * torch.randn(count))
    codes, nested, offset = quantize_absmax(absmax)
    mean = absmax.mean()
    theirs, state = bnb.quantize_blockwise(absmax - mean, blocksize=256)
    assert torch.equal(codes, theirs)
    assert torch.equal(nested, state.absmax)
    assert torch.equal(offset, mean)
    assert torch.equal(
        dequantize_absmax(codes, nested, offset), bnb.dequantize_blockwise(theirs, state) + mean
    )


def test_the_maps_equal_bitsandbytes():
    assert torch.equal(nf4_table(CPU), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(CPU), bnb.create_dynamic_map())


def test_the_table_follows_from_normal_quantiles():
    """The published construction, in exact arithmetic, up to float32 rounding of its positions."""
    edge = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf

    def tail(count):
        return [quantile(edge + (0.5 - edge) * i / count) for i in range(count)]

    levels = sorted([*tail(8), 0.0, *(-value for value in tail(7))])
    expected = torch.tensor(levels, dtype=torch.float64) / max(levels)
    error = (torch.tensor(NF4_VALUES, dtype=torch.float64) - expected).abs().max()
    assert error < 1e-6
    shifted = torch.tensor(NF4_VALUES[1:] + NF4_VALUES[:1], dtype=torch.float64)
    assert (shifted - expected).abs().max() > 1e-2


def test_error_on_normal_weights_is_nf4s():
    """Relative RMS error 0.0920 on N(0, 1); no weight is further off than half the widest gap."""
    weight = torch.randn(2048, 512)
    packed, absmax = quantize_nf4(weight)
    decoded = dequantize_nf4(packed, absmax, tuple(weight.shape))
    error = (decoded - weight).view(-1, 64)
    assert (error.norm() / weight.norm()).item() == pytest.approx(0.0920, abs=0.0005)
    assert (error.abs() / absmax.unsqueeze(1)).max() <= 0.15191
    swapped = dequantize_nf4((packed << 4) | (packed >> 4), absmax, tuple(weight.shape))
    assert (swapped - weight).norm() / weight.norm() > 1  # nibble order matters


def test_quantizing_again_changes_nothing():
    weight = NF4Weight.quantize(torch.randn(64, 128), double_quant=False)
    again = NF4Weight.quantize(weight.dequantize(), double_quant=False)
    assert torch.equal(again.packed, weight.packed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_weights_are_refused_by_name(value, dtype):
    weight = torch.randn(64, 64, dtype=dtype)
    weight[3, 5] = value
    with pytest.raises(NonFiniteError, match=r"layers\.0\.q_proj\.weight holds 1 NaN"):
        NF4Weight.quantize(weight, name="layers.0.q_proj.weight")


def test_unusable_input_is_refused():
    with pytest.raises(ShapeError, match="block_size"):
        quantize_nf4(torch.randn(4, 4), block_size=48)
    with pytest.raises(ShapeError, match="non-empty float"):
        quantize_nf4(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ShapeError, match="non-empty float"):
        quantize_nf4(torch.zeros(0, 4))
    packed, absmax = quantize_nf4(torch.randn(4, 64))
    with pytest.raises(ShapeError, match="needs 256 bytes and 8 scales"):
        dequantize_nf4(packed, absmax, (8, 64))
    with pytest.raises(ShapeError, match="float32 vector"):
        quantize_absmax(torch.randn(4, 4))
    with pytest.raises(ShapeError, match="group scales"):
        dequantize_absmax(torch.zeros(300, dtype=torch.uint8), torch.ones(1), torch.ones(()))
