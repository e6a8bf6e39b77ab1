"""Small 16-bit results are summed in float32, whatever cuBLAS may do by default.

docs/decisions/0012-small-results-in-float32.md
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_linear import dense, reference
from qlora_kit.ops.nf4_linear.op import nf4_linear
from tests.ops.helpers import SCALE, Options, make_case, truth

STEP = 24
"""Values of the contraction between two roundings, as emulated."""


def rounded_each_step(x, w, bias):
    """What cuBLAS did: bias first, then a rounding to 16 bits after each few steps."""
    y = bias.expand(len(x), -1)
    for start in range(0, x.shape[1], STEP):
        stop = start + STEP
        y = (y.double() + x[:, start:stop].double() @ w[start:stop].double()).to(x.dtype)
    return y


def rounded_once(x, w, bias):
    """float32 sums, as `reference.product` asks for."""
    return (x.float() @ w.float() + bias.float()).to(x.dtype)


def test_many_roundings_are_out_of_bounds_and_one_is_not():
    """345 of them cost some 3%, which no bound on `nf4_linear` lets pass."""
    case = make_case(8, 17, 8256)
    wanted = truth(case).results["y"]
    x, bias, dtype = case.x.detach(), case.bias.detach(), torch.bfloat16
    xa = reference.scaled_product(x, case.a.detach().to(dtype).T, SCALE)
    w = torch.cat((case.weight.dequantize(dtype), case.b.detach().to(dtype)), dim=1).T
    both = torch.cat((x, xa), dim=1)
    assert wanted.worst(rounded_once(both, w, bias)) < 1
    wrong = rounded_each_step(both, w, bias).double() - wanted.value
    assert wrong.norm() > 3 * wanted.frobenius
    assert 0.01 < wrong.norm() / wanted.value.norm() < 0.06


class _Recorder(TorchDispatchMode):
    """The names of the products that ran."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "mm" in str(op):
            self.products.append(str(op).removeprefix("aten."))
        return op(*args, **(kwargs or {}))


def products(run):
    with _Recorder() as recorder:
        run()
    return recorder.products


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("low_rank", [True, False], ids=["lora", "frozen"])
@pytest.mark.parametrize(
    ("m", "n", "dtype", "wide"),
    [
        (8, 17, torch.bfloat16, True),
        (1, 17, torch.float16, True),
        (256, 256, torch.bfloat16, True),
        (257, 256, torch.bfloat16, False),  # cuBLAS has tiles enough
        (8, 17, torch.float32, False),  # sums are in float32 anyway
        (0, 17, torch.bfloat16, False),
    ],
)
def test_which_products_are_summed_in_float32(m, n, dtype, wide, low_rank, bias):
    with FakeTensorMode():

        def empty(*shape):
            return torch.empty(shape, dtype=dtype, device="cuda")

        x, w, small, factor = empty(m, 96), empty(96, n), empty(m, 8), empty(8, n)
        arguments = (x, w, empty(n) if bias else None)
        arguments += (small, factor) if low_rank else (None, None)
        ran = products(lambda: reference.product(*arguments))
        y = reference.product(*arguments)
    assert (y.dtype, y.shape) == (dtype, (m, n))
    assert (set(ran) == {"mm.dtype"}) == wide
    assert len(ran) == 1 + low_rank


def test_on_a_cpu_nothing_changes():
    x, w = torch.randn(3, 5).bfloat16(), torch.randn(5, 4).bfloat16()
    assert products(lambda: reference.product(x, w, None, None, None)) == ["mm.default"]


@pytest.mark.parametrize("rank", [16, 0])
@pytest.mark.parametrize(("m", "wide"), [(8, True), (4096, False)])
def test_both_directions_of_dense_go_that_way(monkeypatch, m, wide, rank):
    def decoded(weight, dtype, *, columns=None, out=None):
        more = 0 if columns is None else columns.shape[1]
        return torch.empty(weight.shape[0], weight.shape[1] + more, dtype=dtype, device="cuda")

    monkeypatch.setattr(nf4_dequantize, "dequantize", decoded)
    weight = make_case(1, 24, 128, Options(rank=0)).weight
    with FakeTensorMode():

        def empty(*shape):
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

        low_rank = [(None, None)] * 2
        if rank:
            low_rank = [(empty(m, rank), empty(24, rank)), (empty(m, rank), empty(rank, 128))]
        monkeypatch.setattr(torch.Tensor, "__setitem__", lambda *_: None)  # slices need a GPU
        monkeypatch.setattr(torch.Tensor, "__getitem__", lambda tensor, _: tensor)
        x, dy = empty(m, 128), empty(m, 24)
        ran = products(lambda: dense.multiply(x, weight, empty(24), *low_rank[0]))
        ran += products(lambda: dense.multiply_transposed(dy, weight, *low_rank[1]))
    assert (ran == ["mm.dtype", "mm.dtype"]) == wide
    assert len(ran) == 2


@pytest.fixture
def _default_reductions():
    """cuBLAS may sum in 16 bits, as users run it."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, True)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


@pytest.mark.gpu
@pytest.mark.usefixtures("_default_reductions")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("n", "k"), [(17, 8256), (33, 8256), (24, 8193), (8256, 72), (8264, 17)])
def test_odd_sizes_with_the_default_reductions(n, k, dtype):
    """Few columns and a long sum, forward and backward; y and dX are rounded once."""
    for m in (1, 2, 3, 8, 9, 16, 17, 64, 129, 1025):
        case = make_case(m, n, k, Options(dtype=dtype), "cuda")
        wanted = truth(case)
        y = nf4_linear(case.x, case.weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE)
        leaves = case.leaves()
        gradients = torch.autograd.grad(y, list(leaves.values()), case.dy)
        for name, got in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
            # xa and dY·B stay with cuBLAS: two roundings more
            error = (got.double() - wanted.results[name].value).norm()
            assert error < 3 * wanted.results[name].frobenius, (name, str(case))
