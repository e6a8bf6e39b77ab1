"""NF4Linear: plain bytes that no cast can spoil."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.core.errors import NonFiniteError, ShapeError
from qlora_kit.nn.linear import NF4Linear, byte_specs
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.weight import NF4Weight

CONFIGS = [QuantConfig(), QuantConfig(double_quant=False), QuantConfig(block_size=128)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(64, 128), (77, 31)])
def test_equals_the_dense_layer_on_decoded_weights(config, bias, sizes):
    linear = nn.Linear(*sizes, bias=bias)
    layer = NF4Linear.from_linear(linear, config)
    x = torch.randn(3, 5, sizes[0])
    wanted = nn.functional.linear(x, layer.dequantize(), linear.bias)
    torch.testing.assert_close(layer(x), wanted)
    assert (layer.dequantize() - linear.weight).norm() / linear.weight.norm() < 0.12
    assert all(not parameter.requires_grad for parameter in layer.parameters())


def test_conv1d_is_transposed():
    conv = Conv1D(96, 64)
    layer = NF4Linear.from_linear(conv, QuantConfig())
    assert layer.transposed
    assert layer.shape == (96, 64)
    x = torch.randn(2, 64)
    assert (layer(x) - conv(x)).norm() / conv(x).norm() < 0.15


def test_parameters_are_the_bytes_promised():
    layer = NF4Linear.from_linear(nn.Linear(192, 100), QuantConfig())
    sizes = byte_specs((100, 192), QuantConfig(), "weight")
    for name, size in sizes.items():
        parameter = layer.get_parameter(name)
        assert parameter.dtype == torch.uint8
        assert parameter.numel() == size
    assert sizes["weight_absmax"] == 300
    assert sizes["weight_nested_absmax"] == 8


@pytest.mark.parametrize("config", CONFIGS)
def test_casts_leave_the_scales_alone(config):
    layer = NF4Linear.from_linear(nn.Linear(128, 64), config)
    before = layer.dequantize(torch.float32)
    layer.half()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), before)


def test_a_state_dict_round_trip_keeps_every_bit():
    source = NF4Linear.from_linear(nn.Linear(128, 64), QuantConfig())
    target = NF4Linear(128, 64, bias=True, config=QuantConfig())
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dequantize(), source.dequantize())


def test_the_low_rank_branch_is_added():
    layer = NF4Linear.from_linear(nn.Linear(64, 96), QuantConfig())
    x, a, b = torch.randn(2, 64), torch.randn(4, 64), torch.randn(96, 4)
    torch.testing.assert_close(layer(x, a, b, 0.5), layer(x) + 0.5 * x @ a.T @ b.T)


def test_autocast_decides_the_compute_dtype():
    layer = NF4Linear.from_linear(nn.Linear(64, 96), QuantConfig())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


def test_misfits_and_nan_are_refused():
    layer = NF4Linear(64, 96, config=QuantConfig())
    with pytest.raises(ShapeError, match="set_weight needs"):
        layer.set_weight(NF4Weight.quantize(torch.randn(64, 96)))
    with pytest.raises(ShapeError, match="set_weight needs"):
        layer.set_weight(NF4Weight.quantize(torch.randn(96, 64), double_quant=False))
    linear = nn.Linear(64, 64)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight"):
        NF4Linear.from_linear(linear, QuantConfig(), name="q_proj")


def test_printing_says_what_it_is():
    assert "nf4" in repr(NF4Linear(64, 96, config=QuantConfig()))
