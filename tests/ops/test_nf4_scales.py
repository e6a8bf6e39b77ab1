"""Every backend of nf4_scales gives the reference's bits; a weight with them has stretched rows."""

import pytest
import torch

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.nf4_scales.op import stretched_weight
from qlora_kit.quant.weight import NF4Weight
from tests.ops.rows import device_of

SHAPES = [(1, 64), (3, 64), (5, 128), (70, 320), (257, 1024), (1000, 192)]


def make(shape, double_quant, block_size=64):
    """A weight, and factors around one."""
    generator = torch.Generator().manual_seed(sum(shape))
    source = torch.randn(shape, generator=generator)
    factors = 1.0 + 0.1 * torch.randn(shape[0], generator=generator)
    return NF4Weight.quantize(source, double_quant=double_quant, block_size=block_size), factors


@pytest.mark.parametrize("backend", available_backends("nf4_scales"))
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_stretched(shape, double_quant, backend):
    weight, factors = make(shape, double_quant)
    device = device_of(backend)
    with force_backend(backend):
        got = stretched_weight(weight.to(device), factors.to(device)[:, None])
    scales = got.absmax.cpu().view(shape[0], -1)
    assert torch.equal(scales, by_hand(weight, factors))
    decoded = weight.dequantize(torch.float32)
    wanted = decoded.double() * factors.double()[:, None]
    # two roundings of float32 beside the decoded value's
    error = (got.to("cpu").dequantize(torch.float32) - wanted).abs()
    assert (error <= 3 * 2.0**-24 * wanted.abs()).all()
    if shape[0] > 1:
        assert not torch.equal(
            got.absmax.cpu().view(shape[0], -1), by_hand(weight, factors.flip(0))
        )


def by_hand(weight, factors):
    """Scales times factors, (N, blocks of a row)."""
    return weight.scales().view(weight.shape[0], -1) * factors[:, None]


@pytest.mark.parametrize("backend", available_backends("nf4_scales"))
def test_factors_of_one_change_no_bit(backend):
    weight, _ = make((33, 128), True)
    device = device_of(backend)
    with force_backend(backend):
        got = stretched_weight(weight.to(device), torch.ones(33, device=device)).to("cpu")
    assert torch.equal(got.dequantize(torch.bfloat16), weight.dequantize(torch.bfloat16))


def test_what_is_refused():
    weight, factors = make((4, 64), True)
    for wrong in (factors[:3], factors.double()):
        with pytest.raises(ShapeError, match="4 float32 factors"):
            stretched_weight(weight, wrong)
    across, factors = make((4, 96), True)
    with pytest.raises(ShapeError, match="whole blocks of 64"):
        stretched_weight(across, factors)


def test_on_the_meta_device():
    weight, factors = make((4, 64), True)
    found = stretched_weight(weight.to("meta"), factors.to("meta"))
    assert (found.absmax.shape, found.absmax.dtype) == ((4,), torch.float32)
