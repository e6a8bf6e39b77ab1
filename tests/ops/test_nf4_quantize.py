"""Every backend of nf4_quantize gives the codec's bits on the same device."""

import pytest
import torch

from qlora_kit.core.errors import NonFiniteError, ShapeError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.nf4_quantize.op import nf4_quantize, nf4_quantize_absmax, quantize_weight
from qlora_kit.quant.config import BLOCK_SIZES
from qlora_kit.quant.double_quant import DYNAMIC_MAP_VALUES, quantize_absmax
from qlora_kit.quant.nf4 import NF4_VALUES, quantize_nf4
from qlora_kit.quant.weight import NF4Weight

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [1, 2, 7, 31, 33, 64, 1000, 4095, 4096, 4097, 12_321, 100_003, (40, 3, 129)]


def normal(count):
    """Normal weights, with a stretch of zeros of both signs."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values[count // 3 : count // 2] = 0
    values[::17] = -0.0
    return values


def ties(count):
    """Midpoints between two codes, and their neighbours in float32, in blocks of scale 1."""
    generator = torch.Generator().manual_seed(count)
    table = torch.tensor(NF4_VALUES)
    middles = (table[:-1] + table[1:]) / 2
    values = middles[torch.randint(15, (count,), generator=generator)]
    steps = torch.tensor([1.0, 1 + 2**-23, 1 - 2**-24])
    values = values * steps[torch.randint(3, (count,), generator=generator)]
    values[::32] = 1.0
    return values


KINDS = {
    "normal": normal,
    "ties": ties,
    "below the smallest divisor": lambda count: normal(count) * 1e-41,
    "next to overflow": lambda count: normal(count).clamp(-3, 3) * 1e38,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", available_backends("nf4_quantize"))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_equal_the_codec(backend, device, size, kind):
    if backend == "cuda" and device != "cuda":
        pytest.skip("a CUDA backend needs CUDA tensors")
    shape = (size,) if isinstance(size, int) else size
    source = KINDS[kind](torch.Size(shape).numel()).view(shape).to(device)
    for dtype in DTYPES:
        weight = source.to(dtype)
        if not weight.isfinite().all():
            continue  # float16 ends earlier
        for block_size in BLOCK_SIZES:
            wanted, wanted_absmax = quantize_nf4(weight, block_size=block_size)
            if device != "cpu":
                torch.full((1 << 20,), 255, dtype=torch.uint8, device=device)  # poisoned memory
            with force_backend(backend):
                packed, absmax = nf4_quantize(weight, block_size=block_size)
            assert packed.shape == wanted.shape
            assert torch.equal(packed, wanted), (dtype, block_size)
            assert torch.equal(absmax, wanted_absmax), (dtype, block_size)


def test_ties_tell_rounding_up_from_rounding_down():
    """The cases above would fail if ties went to the higher code."""
    source = ties(4096)
    down, _ = quantize_nf4(source)
    up, _ = quantize_nf4(-source.flip(0))  # mirrored, a tie's lower code is the higher one
    codes = torch.stack((down >> 4, down & 15), dim=-1).flatten()
    mirrored = torch.stack((up >> 4, up & 15), dim=-1).flatten().flip(0)
    assert (codes != 15 - mirrored).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", available_backends("nf4_quantize"))
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 3000, 70_001])
@pytest.mark.parametrize("kind", ["normal", "equal", "ties", "tiny"])
def test_bits_of_nested_scales_equal_the_codec(backend, device, blocks, kind):
    if backend == "cuda" and device != "cuda":
        pytest.skip("a CUDA backend needs CUDA tensors")
    generator = torch.Generator().manual_seed(blocks)
    absmax = torch.randn(blocks, generator=generator).abs()
    if kind == "equal":
        absmax.fill_(0.7)
    if kind == "tiny":
        absmax *= 1e-37
    if kind == "ties":  # symmetric about zero, so that the mean is nearly that
        table = torch.tensor(DYNAMIC_MAP_VALUES)
        middles = (table[:-1] + table[1:]) / 2
        absmax = middles[torch.randint(255, (blocks,), generator=generator)]
    absmax = absmax.to(device)
    wanted = quantize_absmax(absmax)
    with force_backend(backend):
        got = nf4_quantize_absmax(absmax)
    for have, want in zip(got, wanted, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_equals_the_codecs(device, double_quant):
    source = normal(96 * 320).view(96, 320).to(device, torch.bfloat16).requires_grad_()
    wanted = NF4Weight.quantize(source.detach(), double_quant=double_quant)
    got = quantize_weight(source, double_quant=double_quant)
    assert got.shape == wanted.shape
    assert got.dtype == torch.bfloat16
    tensors = wanted.tensors()
    assert got.tensors().keys() == tensors.keys()
    for name, tensor in got.tensors().items():
        assert torch.equal(tensor, tensors[name]), name
        assert not tensor.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 5000, 10_000])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_what_is_not_finite_is_refused(device, bad, place, block_size):
    for dtype in DTYPES:
        source = torch.randn(73, 137, device=device).to(dtype)  # the last block is short
        source.view(-1)[place] = bad
        with pytest.raises(NonFiniteError, match="here holds 1 NaN or infinite values of 10001"):
            quantize_weight(source, block_size=block_size, name="here")


def test_misfits_are_refused():
    with pytest.raises(ShapeError, match="block_size in"):
        nf4_quantize(torch.randn(4, 64), block_size=48)
    with pytest.raises(ShapeError, match="non-empty float weight"):
        nf4_quantize(torch.ones(4, dtype=torch.int32))
    with pytest.raises(ShapeError, match="non-empty float32 vector"):
        nf4_quantize_absmax(torch.ones(2, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    source = torch.randn(33, 65, device=device, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.qlora_kit.nf4_quantize, (source, 64))
    scales = (torch.rand(300, device=device), torch.tensor(0.5, device=device))
    torch.library.opcheck(torch.ops.qlora_kit.nf4_quantize_scales, scales)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (4097, 4095), (28_672, 8192)])
def test_large_weights_and_views(shape):
    """Each block of threads takes many tiles; and views that are unaligned or transposed."""
    source = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    for weight in (source, source.view(-1)[1:], source.T, source[1:]):
        wanted, wanted_absmax = quantize_nf4(weight)
        packed, absmax = nf4_quantize(weight)
        assert torch.equal(packed, wanted)
        assert torch.equal(absmax, wanted_absmax)


@pytest.mark.gpu
def test_quantizing_takes_no_float32_copy():
    """Memory beside the weight: its codes and scales. As asked for: blocks that are there may be
    given whole where little would be left of them."""
    source = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    nf4_quantize(source)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    packed, absmax = nf4_quantize(source)
    grown = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert packed.nbytes < grown <= packed.nbytes + absmax.nbytes + 4096


@pytest.mark.gpu
def test_in_a_graph():
    source = torch.randn(512, 1024, device="cuda")
    wanted = nf4_quantize(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nf4_quantize(source)
        scales = torch.ops.qlora_kit.nf4_quantize_scales(captured[1], wanted[1].mean())
    for tensor in (*captured, *scales):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
    assert torch.equal(scales[0], quantize_absmax(wanted[1])[0])
