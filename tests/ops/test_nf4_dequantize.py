"""Every backend of nf4_dequantize gives the reference's bits, whatever part and layout is asked."""

import pytest
import torch

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.nf4_dequantize import reference
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.quant.weight import NF4Weight

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 64), (3, 7), (1, 1), (33, 129), (1000, 1024), (4, 32, 128), (77, 2055)]
PARTS = [  # shape, rows
    ((64, 64), None),
    ((64, 64), (0, 0)),
    ((64, 64), (7, 8)),
    ((70, 96), (1, 69)),  # starts inside a block
    ((40, 77), (3, 30)),  # starts inside a byte
    ((9, 10), (1, 9)),  # starts at an unaligned byte
    ((130, 320), (2, 130)),
    ((4, 32, 128), (16, 80)),  # runs across experts
    ((515, 1024), (3, 515)),
]


def make_weight(shape, *, device="cpu", **options):
    """A weight with zeros, and with a block of nothing else where there is room."""
    source = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    source.view(-1)[::97] = 0
    source.view(-1)[128:192] = 0
    return NF4Weight.quantize(source, **options).to(device)


def poison(device):
    """Leave NaN in the memory that results will be given."""
    if device != "cpu":
        torch.full((1 << 22,), float("nan"), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", available_backends("nf4_dequantize"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_bits_equal_the_reference(backend, device, shape, double_quant, block_size):
    if backend == "cuda" and device != "cuda":
        pytest.skip("a CUDA backend needs CUDA tensors")
    weight = make_weight(shape, double_quant=double_quant, block_size=block_size)
    for dtype in DTYPES:
        poison(device)
        with force_backend(backend):
            got = nf4_dequantize(weight.to(device), dtype)
        assert got.shape == shape
        assert torch.equal(got.cpu(), weight.dequantize(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", available_backends("nf4_dequantize"))
@pytest.mark.parametrize(("shape", "rows"), PARTS)
@pytest.mark.parametrize("rank", [None, 0, 3, 16])
@pytest.mark.parametrize("transposed", [True, False])
def test_parts_equal_what_torch_cuts_from_the_whole(backend, device, shape, rows, rank, transposed):
    if backend == "cuda" and device != "cuda":
        pytest.skip("a CUDA backend needs CUDA tensors")
    for double_quant, block_size in ((True, 64), (False, 64), (True, 4096), (True, 32)):
        weight = make_weight(shape, double_quant=double_quant, block_size=block_size)
        for dtype in DTYPES:
            wanted = weight.dequantize(dtype).flatten(0, -2)
            wanted = wanted if rows is None else wanted[slice(*rows)]
            columns = None
            if rank is not None:
                columns = torch.randn(len(wanted), rank).to(dtype)
                wanted = torch.cat((wanted, columns), dim=1)
                columns = columns.to(device)
            wanted = wanted.T if transposed else wanted
            poison(device)
            with force_backend(backend):
                got = nf4_dequantize(
                    weight.to(device), dtype, rows=rows, transposed=transposed, columns=columns
                )
            assert got.is_contiguous()
            if rows is None and not transposed and rank is None:
                wanted = wanted.view(shape)
            assert torch.equal(got.cpu(), wanted)


def test_a_wrong_slice_would_be_seen():
    """Neighbouring rows, swapped nibbles and another block's scale all differ in bits."""
    weight = make_weight((70, 96))
    right = reference.dequantize(weight, torch.bfloat16, rows=(1, 69))
    assert not torch.equal(right, reference.dequantize(weight, torch.bfloat16, rows=(0, 68)))
    fields = {name: getattr(weight, name) for name in ("nested_absmax", "offset", "block_size")}
    fields |= {"shape": weight.shape, "dtype": weight.dtype}
    swapped = NF4Weight(
        packed=weight.packed << 4 | weight.packed >> 4, absmax=weight.absmax, **fields
    )
    shifted = NF4Weight(packed=weight.packed, absmax=weight.absmax.roll(1), **fields)
    for wrong in (swapped, shifted):
        assert not torch.equal(right, reference.dequantize(wrong, torch.bfloat16, rows=(1, 69)))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_unaligned_codes_and_columns(shift, transposed):
    """Views into larger buffers, as experts and sharded weights are."""
    weight = make_weight((96, 256), device="cuda")
    buffer = torch.empty(weight.packed.numel() + shift, 1, dtype=torch.uint8, device="cuda")
    buffer[shift:] = weight.packed
    moved = NF4Weight(
        packed=buffer[shift:],
        absmax=weight.absmax,
        nested_absmax=weight.nested_absmax,
        offset=weight.offset,
        shape=weight.shape,
        block_size=64,
        dtype=weight.dtype,
    )
    assert moved.packed.data_ptr() % 16 == shift
    for dtype in DTYPES:
        wide = torch.randn(96, 16 + shift, device="cuda").to(dtype)
        for columns in (None, wide[:, shift:], torch.randn(96 * 16 + 1, device="cuda")[1:]):
            if columns is not None:
                columns = columns.reshape(96, 16) if columns.dim() == 1 else columns
                columns = columns.to(dtype)
            options = {"transposed": transposed, "columns": columns}
            wanted = reference.dequantize(weight, dtype, **options)
            poison("cuda")
            assert torch.equal(nf4_dequantize(moved, dtype, **options), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (4097, 4095), (14336, 4096), (1, 33_000_001)])
def test_large_weights(shape):
    """Sizes at which each block of threads takes many tiles."""
    from qlora_kit.ops.nf4_dequantize import cuda

    weight = NF4Weight.quantize(torch.randn(shape, device="cuda"))
    for dtype in DTYPES:
        out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        assert cuda.dequantize(weight, dtype, out=out) is out
        assert torch.equal(out, weight.dequantize(dtype))


@pytest.mark.gpu
def test_more_than_two_billion_weights():
    """Indices beyond 32 bits."""
    shape = (70_000, 32_768)
    codes = torch.randint(256, (shape[0] * shape[1] // 2, 1), dtype=torch.uint8, device="cuda")
    weight = NF4Weight(
        packed=codes,
        absmax=torch.rand(shape[0] * shape[1] // 64, device="cuda"),
        nested_absmax=None,
        offset=None,
        shape=shape,
        block_size=64,
        dtype=torch.bfloat16,
    )
    whole = nf4_dequantize(weight)
    last = (69_000, 70_000)
    wanted = reference.dequantize(weight, torch.bfloat16, rows=last)
    assert torch.equal(whole[slice(*last)], wanted)
    assert torch.equal(nf4_dequantize(weight, rows=last), wanted)
    assert torch.equal(nf4_dequantize(weight, rows=last, transposed=True), wanted.T)


def test_the_default_dtype_is_the_weights_own():
    weight = NF4Weight.quantize(torch.randn(4, 64, dtype=torch.float16))
    assert nf4_dequantize(weight).dtype == torch.float16
    with pytest.raises(ShapeError, match="needs a dtype"):
        nf4_dequantize(weight, torch.float64)


def test_misfits_are_refused():
    weight = NF4Weight.quantize(torch.randn(4, 64))
    for rows in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(ShapeError, match=r"rows within \(0, 4\)"):
            nf4_dequantize(weight, rows=rows)
    for columns in (torch.ones(3, 8), torch.ones(4), torch.ones(4, 8).half()):
        with pytest.raises(ShapeError, match=r"columns of shape \(4, r\) in torch.float32"):
            nf4_dequantize(weight, columns=columns)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [(), ((1, 30),), (None, True), ((1, 30), True, "columns"), (None, False, "columns")],
)
def test_opcheck(device, options):
    weight = make_weight((33, 64), device=device)
    fields = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    arguments = (*fields, [33, 64], 64, torch.bfloat16, *options)
    if options[-1:] == ("columns",):
        height = 33 if options[0] is None else options[0][1] - options[0][0]
        columns = torch.randn(height, 8, device=device, dtype=torch.bfloat16)
        arguments = (*arguments[:-1], columns)
    torch.library.opcheck(torch.ops.qlora_kit.nf4_dequantize, arguments)


@pytest.mark.gpu
def test_on_two_streams_and_in_a_graph():
    weight = NF4Weight.quantize(torch.randn(512, 1024)).to("cuda")
    columns = torch.randn(512, 16, device="cuda")
    for options in ({}, {"transposed": True}, {"columns": columns}):
        wanted = nf4_dequantize(weight, **options)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = nf4_dequantize(weight, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = nf4_dequantize(weight, **options)
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(other, wanted)
        assert torch.equal(captured, wanted)
