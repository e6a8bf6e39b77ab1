"""Every backend of nf4_linear against float64, forward and gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qlora_kit.core.errors import BackendError, ShapeError
from qlora_kit.ops.backend import available_backends, force_backend, known_ops
from qlora_kit.ops.nf4_linear import reference
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.quant.weight import NF4Weight

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SCALE = 0.5


def relative_error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def make_case(m, n, k, rank, dtype, device):
    """Random inputs, and the float64 weight the packed one decodes to."""
    generator = torch.Generator(device).manual_seed(m * 1000 + n + k)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    weight = NF4Weight.quantize(normal(n, k) / k**0.5)
    x = normal(m, k).to(dtype).requires_grad_()
    a = (normal(rank, k) / k**0.5).to(dtype).float().requires_grad_()
    b = (normal(n, rank) / rank**0.5).to(dtype).float().requires_grad_()
    bias = normal(n).to(dtype).requires_grad_()
    dy = normal(m, n).to(dtype)
    return x, weight, a, b, bias, dy


def truth(x, weight, a, b, bias, dy, dtype):
    """Output and gradients in float64, from the weight as the compute dtype sees it."""
    w = weight.dequantize(dtype).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, a, b, bias)]
    x64, a64, b64, bias64 = leaves
    y = x64 @ w.T + SCALE * (x64 @ a64.T) @ b64.T + bias64
    y.backward(dy.double())
    return y.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", available_backends("nf4_linear"))
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [(1, 128, 64, 8), (7, 96, 192, 3), (33, 130, 320, 16), (5, 31, 77, 4), (9, 100, 1152, 16)],
)
def test_forward_and_gradients_match_float64(backend, device, dtype, m, n, k, rank):
    """Each result carries at most a few roundings of the compute dtype."""
    if backend == "cuda" and device != "cuda":
        pytest.skip("a CUDA backend needs CUDA tensors")
    x, weight, a, b, bias, dy = make_case(m, n, k, rank, dtype, device)
    wanted, gradients = truth(x, weight, a, b, bias, dy, dtype)
    with force_backend(backend):
        y = nf4_linear(x, weight, bias, lora_a=a, lora_b=b, scale=SCALE)
        y.backward(dy)
        swapped = (weight.packed << 4) | (weight.packed >> 4)
        broken = nf4_linear(x, replace_packed(weight, swapped), bias)
    bound = 4 * EPS[dtype] if dtype != torch.float32 else 2e-6
    assert relative_error(y, wanted) < bound
    for name, leaf, gradient in zip(
        ["x", "a", "b", "bias"], (x, a, b, bias), gradients, strict=True
    ):
        assert relative_error(leaf.grad, gradient) < bound, name
    assert relative_error(broken, wanted) > 10 * bound  # the bound bites


def replace_packed(weight, packed):
    return NF4Weight(
        packed=packed,
        absmax=weight.absmax,
        nested_absmax=weight.nested_absmax,
        offset=weight.offset,
        shape=weight.shape,
        block_size=weight.block_size,
        dtype=weight.dtype,
    )


def saved_bytes(run):
    """Bytes autograd keeps for the backward, apart from what the caller holds anyway."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


@pytest.mark.parametrize("frozen_a", [False, True])
def test_only_what_gradients_need_is_saved(frozen_a):
    m, n, k, rank = 64, 96, 128, 8
    x, weight, a, b, _, _ = make_case(m, n, k, rank, torch.float32, "cpu")
    a.requires_grad_(not frozen_a)
    kept = saved_bytes(lambda: nf4_linear(x, weight, lora_a=a, lora_b=b))
    held = [*weight.tensors().values(), a, b]
    own = {t.untyped_storage().data_ptr() for t in held}
    new = {pointer: size for pointer, size in kept.items() if pointer not in own}
    x_pointer = x.untyped_storage().data_ptr()
    assert (x_pointer in new) == (not frozen_a)
    new.pop(x_pointer, None)
    assert sum(new.values()) == m * rank * 4  # X·Aᵀ and nothing else


def test_without_lora_nothing_is_saved():
    x, weight, *_ = make_case(8, 96, 128, 8, torch.float32, "cpu")
    kept = saved_bytes(lambda: nf4_linear(x, weight))
    own = {t.untyped_storage().data_ptr() for t in weight.tensors().values()}
    assert set(kept) <= own


@pytest.mark.parametrize("lora", ["none", "trained", "frozen a"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(lora, with_bias):
    x, weight, a, b, bias, _ = make_case(5, 96, 64, 8, torch.float32, "cpu")
    a.requires_grad_(lora == "trained")
    adapter = (None, None) if lora == "none" else (a, b)
    fields = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    arguments = (x, *fields, [96, 64], 64, bias if with_bias else None, *adapter, SCALE)
    torch.library.opcheck(torch.ops.qlora_kit.nf4_linear, arguments)


def test_opcheck_of_the_backward():
    x, weight, a, b, _, dy = make_case(5, 96, 64, 8, torch.float32, "cpu")
    fields = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    leaves = [t.detach() for t in (a, b)]
    xa = (x @ a.T).detach()
    flags = (True, True, True, True)
    arguments = (dy, x.detach(), *fields, [96, 64], 64, *leaves, xa, SCALE, *flags)
    torch.library.opcheck(torch.ops.qlora_kit.nf4_linear_backward, arguments)


def test_compiled_equals_eager():
    x, weight, a, b, bias, dy = make_case(5, 96, 64, 8, torch.float32, "cpu")

    def layer(x):
        return nf4_linear(x, weight, bias, lora_a=a, lora_b=b, scale=SCALE).relu()

    eager = layer(x)
    eager.backward(dy)
    wanted, x.grad = x.grad.clone(), None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.backward(dy)
    assert torch.equal(compiled, eager)
    assert torch.equal(x.grad, wanted)


def test_flops_are_counted():
    m, n, k, rank = 5, 96, 64, 8
    x, weight, a, b, _, _ = make_case(m, n, k, rank, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        y = nf4_linear(x, weight, lora_a=a, lora_b=b)
    assert counter.get_total_flops() == 2 * m * (n * k + rank * (n + k))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # dX and its two low-rank products, dA, dB
    assert counter.get_total_flops() == 2 * m * (n * k + rank * (n + k) + rank * k + rank * n)


@pytest.mark.parametrize("shape", [(0, 64), (2, 3, 64), (64,), (4, 1, 1, 64)])
def test_leading_dimensions_and_zero_rows(shape):
    weight = NF4Weight.quantize(torch.randn(96, 64))
    x = torch.randn(shape, requires_grad=True)
    y = nf4_linear(x, weight)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 96)
    assert x.grad.shape == x.shape
    torch.testing.assert_close(y, x @ weight.dequantize().T)


def test_non_contiguous_input():
    weight = NF4Weight.quantize(torch.randn(96, 64))
    x = torch.randn(64, 10).T
    torch.testing.assert_close(nf4_linear(x, weight), x.contiguous() @ weight.dequantize().T)


def test_nan_passes_through():
    weight = NF4Weight.quantize(torch.randn(96, 64))
    x = torch.randn(3, 64)
    x[1, 2] = float("nan")
    y = nf4_linear(x, weight)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


def test_misfits_are_refused():
    weight = NF4Weight.quantize(torch.randn(96, 64))
    x, a, b = torch.randn(2, 64), torch.randn(4, 64), torch.randn(96, 4)
    with pytest.raises(ShapeError, match=r"x of shape \(\.\.\., 64\)"):
        nf4_linear(torch.randn(2, 65), weight)
    with pytest.raises(ShapeError, match="needs x in"):
        nf4_linear(x.double(), weight)
    with pytest.raises(ShapeError, match="bias of shape"):
        nf4_linear(x, weight, torch.zeros(64))
    with pytest.raises(ShapeError, match="together"):
        nf4_linear(x, weight, lora_a=a)
    with pytest.raises(ShapeError, match="lora_a"):
        nf4_linear(x, weight, lora_a=a, lora_b=b.T)
    with pytest.raises(ShapeError, match="an \\(N, K\\) weight"):
        nf4_linear(x, NF4Weight.quantize(torch.randn(2, 96, 64)))


def test_a_forced_backend_that_is_missing_raises(monkeypatch):
    weight = NF4Weight.quantize(torch.randn(96, 64))
    x = torch.randn(2, 64)
    with force_backend("cuda"), pytest.raises(BackendError, match="forced backend 'cuda'"):
        nf4_linear(x, weight)
    monkeypatch.setenv("QLORA_KIT_BACKEND", "cuda")
    with pytest.raises(BackendError, match="QLORA_KIT_BACKEND"):
        nf4_linear(x, weight)
    with force_backend("reference"):  # the nearer choice wins
        nf4_linear(x, weight)
    with pytest.raises(BackendError, match="no backend is called"), force_backend("tpu"):
        pass
    with pytest.raises(BackendError, match="no op is called"):
        available_backends("nf5_linear")
    assert "nf4_linear" in known_ops()


SHAPES = [  # (N, K) of Llama-3 8B and 70B, Qwen3 8B, Gemma 3 4B, and awkward ones
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (12288, 4096),
    (10240, 2560),
    (2560, 2048),
    (1000, 576),
    (17, 8256),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_at_real_sizes(n, k, dtype):
    """Both ways of the CUDA backend, poisoned memory under every output, two runs of equal bits."""
    for m in (1, 2, 3, 8, 9, 16, 17, 64, 129, 1025):
        x, weight, a, b, bias, dy = make_case(m, n, k, 16, dtype, "cuda")
        wanted, gradients = truth(x, weight, a, b, bias, dy, dtype)
        with force_backend("cuda"):
            poison = [torch.full((m, n), float("nan"), device="cuda", dtype=dtype) for _ in "ab"]
            del poison  # the allocator hands the same memory to the outputs
            y = nf4_linear(x, weight, bias, lora_a=a, lora_b=b, scale=SCALE)
            y.backward(dy)
            again = nf4_linear(x, weight, bias, lora_a=a, lora_b=b, scale=SCALE)
        assert relative_error(y, wanted) < 2 * EPS[dtype], m
        assert torch.equal(y, again), m
        for leaf, gradient in zip((x, a, b, bias), gradients, strict=True):
            assert relative_error(leaf.grad, gradient) < 4 * EPS[dtype], m


@pytest.mark.gpu
def test_cuda_takes_unaligned_rows_and_passes_nan_through():
    weight = NF4Weight.quantize(torch.randn(256, 512)).to("cuda")
    storage = torch.randn(8 * 512 + 1, device="cuda", dtype=torch.bfloat16)
    x = storage[1:].view(8, 512)
    wanted = x.double() @ weight.dequantize(torch.bfloat16).double().T
    assert relative_error(nf4_linear(x, weight), wanted) < 2 * EPS[torch.bfloat16]
    x[3, 5] = float("nan")
    x[4, 6] = float("inf")
    y = nf4_linear(x, weight)
    assert y[3].isnan().all()
    assert not torch.isfinite(y[4]).any()
    assert torch.isfinite(y[[0, 1, 2, 5, 6, 7]]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1025, 4097, 8193, 16385])
def test_no_row_is_left_out_of_a_long_sum(rows, dtype):
    """docs/decisions/0008-the-last-row.md"""
    left = torch.randn(rows, 2048, device="cuda").to(dtype)
    right = torch.randn(rows, 128, device="cuda").to(dtype)
    wanted = left.double().T @ right.double()
    error = reference.transposed_product(left, right).double() - wanted
    last = left[-1:].double().T @ right[-1:].double()
    share = (error * last).sum() / (last * last).sum()
    assert share.abs() < 0.25, f"{share:.2f} of the last row"
    assert error.norm() < 2 * torch.finfo(dtype).eps * wanted.norm()
