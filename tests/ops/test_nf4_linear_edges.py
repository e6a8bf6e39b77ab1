"""nf4_linear at its edges: odd memory, partial gradients, NaN and infinity, no rows, equal bits.

All of it holds for every backend, so that each test runs on a CPU as well.
"""

import pytest
import torch

from qlora_kit.core.errors import BackendError
from qlora_kit.ops.nf4_linear import cuda
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.quant.weight import NF4Weight
from tests.ops.helpers import SCALE, Options, float32_sums, make_case, poison, truth

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
REGIMES = [1, 7, 16, 40, 130, 300, 2049]
"""Rows that meet every strategy."""

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _sums():
    with float32_sums():
        yield


def small(m, device, **fields):
    return make_case(m, 192, 256, Options(**fields), device)


def call(case, x=None, weight=None):
    x = case.x if x is None else x
    weight = weight or case.weight
    return nf4_linear(x, weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE)


def shifted(tensor, elements=1):
    """The same values at an address that far from an aligned one."""
    storage = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    view = storage[elements:].view(tensor.shape)
    view.copy_(tensor.detach())
    return view


def strided(tensor):
    """The same values with a gap after each."""
    wide = tensor.new_full((*tensor.shape, 2), float("nan"))
    wide[..., 0] = tensor.detach()
    return wide[..., 0]


LAYOUTS = {
    "odd address": shifted,
    "strided": strided,
    "transposed": lambda tensor: tensor.detach().T.contiguous().T,
    "a slice of wider rows": lambda tensor: torch.nn.functional.pad(tensor.detach(), (3, 5))[
        :, 3:-5
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", REGIMES)
def test_any_memory_layout(m, layout, device):
    """x, dY, A and B as views that are strided or start at odd addresses."""
    case = small(m, device)
    wanted = truth(case)
    change = LAYOUTS[layout]
    case.x = change(case.x).requires_grad_()
    case.dy = change(case.dy)
    case.a, case.b = (change(t).requires_grad_() for t in (case.a, case.b))
    y = call(case)
    y.backward(case.dy)
    wanted.check("y", y.detach(), str(case))
    for name, leaf in case.leaves().items():
        wanted.check(name, leaf.grad, str(case))


@pytest.mark.parametrize("m", REGIMES)
def test_leading_dimensions_and_an_expanded_gradient(m, device):
    """`sum` hands the backward a dY of stride 0."""
    case = small(2 * m, device)
    case.dy = torch.ones_like(case.dy)
    wanted = truth(case)
    y = call(case, x=case.x.view(2, m, -1))
    assert y.shape == (2, m, 192)
    y.sum().backward()
    for name, leaf in case.leaves().items():
        wanted.check(name, leaf.grad, str(case))


@pytest.mark.parametrize("lora", ["none", "frozen", "frozen a", "frozen b", "trained"])
@pytest.mark.parametrize("frozen_x", [False, True])
@pytest.mark.parametrize("m", REGIMES)
def test_only_the_gradients_asked_for(m, frozen_x, lora, device):
    case = small(m, device, rank=0 if lora == "none" else 16)
    wanted = truth(case)
    case.x.requires_grad_(not frozen_x)
    if lora != "none":
        case.a.requires_grad_(lora in ("trained", "frozen b"))
        case.b.requires_grad_(lora in ("trained", "frozen a"))
    case.bias.requires_grad_(m % 2 == 0)
    y = call(case)
    wanted.check("y", y.detach(), str(case))
    wants = {name: leaf.requires_grad for name, leaf in case.leaves().items()}
    assert y.requires_grad == any(wants.values())
    if y.requires_grad:
        y.backward(case.dy)
    for name, leaf in case.leaves().items():
        assert (leaf.grad is not None) == wants[name], name
        if wants[name]:
            wanted.check(name, leaf.grad, str(case))


def same_kind(got, wanted):
    """NaN, infinity and minus infinity stand where they stand in the truth."""
    return (
        torch.equal(got.isnan(), wanted.isnan())
        and torch.equal(got.isposinf(), wanted.isposinf())
        and torch.equal(got.isneginf(), wanted.isneginf())
    )


@pytest.mark.parametrize("rank", [0, 3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("m", [m for m in REGIMES if m > 4])
def test_nan_and_infinity_pass_through(m, dtype, rank, device):
    """As in the dense op, in their rows; the bits of all other rows stay."""
    case = small(m, device, rank=rank, dtype=dtype)
    dirty = [0, m // 2, m - 1]
    clean = [i for i in range(m) if i not in dirty]
    before = call(case)
    before.backward(case.dy)
    before, dx = before.detach().clone(), case.x.grad.clone()
    with torch.no_grad():
        for matrix in (case.x, case.dy):
            for row, value in zip(dirty, ("nan", "inf", "-inf"), strict=True):
                matrix[row, 7 * row % 100] = float(value)
    case.x.grad = None
    y = call(case)
    y.backward(case.dy)
    results = truth(case).results
    for got, old, value in (
        (y.detach(), before, results["y"].value),
        (case.x.grad, dx, results["dx"].value),
    ):
        assert value[dirty].isnan().any()
        assert same_kind(got, value)
        assert torch.equal(got[clean], old[clean])


@pytest.mark.parametrize("m", [0])
@pytest.mark.parametrize("rank", [0, 16])
def test_no_rows(m, rank, device):
    case = small(m, device, rank=rank)
    y = call(case)
    assert y.shape == (0, 192)
    y.backward(case.dy)
    assert case.x.grad.shape == (0, 256)
    for name, leaf in case.leaves().items():
        assert leaf.grad.shape == leaf.shape, name
        assert not leaf.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(192, 256), (1024, 4096)])
@pytest.mark.parametrize("m", REGIMES)
def test_two_runs_give_equal_bits(m, shape, dtype, device):
    if device == "cpu" and shape[0] > 192:
        pytest.skip("large, for a GPU")
    case = make_case(m, *shape, Options(dtype=dtype), device)
    runs = []
    for _ in range(3):
        for leaf in case.leaves().values():
            leaf.grad = None
        poison(device, case.dy.shape, case.x.shape, dtype=dtype)
        y = call(case)
        y.backward(case.dy)
        runs.append([y.detach(), *(leaf.grad for leaf in case.leaves().values())])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("m", REGIMES)
def test_a_weight_at_odd_addresses(m, nested, device):
    """An expert cut out of a stack may start anywhere."""
    case = small(m, device, nested=nested)
    old = case.weight
    case.weight = NF4Weight(
        packed=shifted(old.packed),
        absmax=shifted(old.absmax),
        nested_absmax=shifted(old.nested_absmax) if nested else None,
        offset=shifted(old.offset) if nested else None,
        shape=old.shape,
        block_size=old.block_size,
        dtype=old.dtype,
    )
    wanted = truth(case)
    y = call(case)
    y.backward(case.dy)
    wanted.check("y", y.detach(), str(case))
    wanted.check("dx", case.x.grad, str(case))


@pytest.mark.parametrize("expert", [0, 1, 2])
@pytest.mark.parametrize("m", [3, 60, 600])
def test_an_expert_of_a_stack(m, expert, device):
    stack = NF4Weight.quantize(torch.randn(3, 96, 192, device=device))
    case = make_case(m, 96, 192, Options(), device, stack.select(expert))
    wanted = truth(case)
    y = call(case)
    y.backward(case.dy)
    wanted.check("y", y.detach(), str(case))
    wanted.check("dx", case.x.grad, str(case))


def test_unknown_strategies_are_refused(device, monkeypatch):
    with pytest.raises(BackendError, match="no strategy"), cuda.force_strategy("no such"):
        pass
    x = torch.zeros(2, 256, device=device, dtype=torch.bfloat16)
    weight = small(2, device).weight
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, "no such")
    with pytest.raises(BackendError, match="no strategy"):
        cuda.strategy_for(x, weight)
    with cuda.force_strategy("dense"):  # the nearer choice wins
        assert cuda.strategy_for(x, weight) == "dense"


def test_a_strategy_that_cannot_serve_is_refused(device):
    """By name, and nothing steps in for it."""
    weight = small(2, device).weight
    x = torch.zeros(17, 256, device=device, dtype=torch.bfloat16)
    with cuda.force_strategy("small_m"):
        assert cuda.strategy_for(x[:16], weight) == "small_m"
        with pytest.raises(BackendError, match="small_m"):
            cuda.strategy_for(x, weight)
        with pytest.raises(BackendError, match="small_m"):
            cuda.strategy_for(x[:16].float(), weight)
        if device == "cuda":
            with pytest.raises(BackendError, match="small_m"):
                nf4_linear(x, weight)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(64, 28672), (28672, 64)])
def test_more_than_two_to_the_31_elements(n, k, device):
    """The last rows of x and of y lie beyond what 32 bits address."""
    if device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs a GPU with 40 GiB")
    m = 2**31 // 28672 + 1000
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16).requires_grad_()
    case = make_case(300, n, k, Options(), device)
    y = call(case, x=x)
    y.backward(torch.ones((), device=device, dtype=torch.bfloat16).expand(m, n))
    case.x = x.detach()[-300:].clone().requires_grad_()
    case.dy = torch.ones_like(case.dy)
    wanted = truth(case)
    wanted.check("y", y.detach()[-300:], "the last rows of y")
    wanted.check("dx", x.grad[-300:], "the last rows of dX")
