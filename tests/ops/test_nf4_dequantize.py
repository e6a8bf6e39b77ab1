"""Every backend of nf4_dequantize gives the reference's bits."""

import pytest
import torch

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.quant.weight import NF4Weight

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SHAPES = [(64, 64), (3, 7), (1, 1), (33, 129), (1000, 1024), (4, 32, 128), (77, 2055)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", available_backends("nf4_dequantize"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 4096])
def test_bits_equal_the_reference(backend, device, shape, double_quant, block_size):
    if backend == "cuda" and device != "cuda":
        pytest.skip("a CUDA backend needs CUDA tensors")
    source = torch.randn(shape)
    source.view(-1)[::97] = 0
    weight = NF4Weight.quantize(source, double_quant=double_quant, block_size=block_size)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with force_backend(backend):
            got = nf4_dequantize(weight.to(device), dtype)
        assert got.shape == shape
        assert torch.equal(got.cpu(), weight.dequantize(dtype))


def test_the_default_dtype_is_the_weights_own():
    weight = NF4Weight.quantize(torch.randn(4, 64, dtype=torch.float16))
    assert nf4_dequantize(weight).dtype == torch.float16
    with pytest.raises(ShapeError, match="needs a dtype"):
        nf4_dequantize(weight, torch.float64)


def test_opcheck():
    weight = NF4Weight.quantize(torch.randn(33, 64))
    fields = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    arguments = (*fields, [33, 64], 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.qlora_kit.nf4_dequantize, arguments)


@pytest.mark.gpu
def test_on_two_streams_and_in_a_graph():
    weight = NF4Weight.quantize(torch.randn(512, 1024)).to("cuda")
    wanted = nf4_dequantize(weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = nf4_dequantize(weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nf4_dequantize(weight)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(other, wanted)
    assert torch.equal(captured, wanted)
