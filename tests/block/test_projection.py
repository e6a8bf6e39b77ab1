"""Linears grouped into one product, LoRA inside, against plain torch part by part.

Bounds: a product over K terms is off by about √K/2 units of rounding, and K is below 256 here:
8 units, of which 32 leave room for the products before it.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.block.operands import Operands
from qlora_kit.block.projection import Group, can_group
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.low_rank_gradients.reference import token_sum
from qlora_kit.quant.config import QuantConfig
from tests.adapters.bases import relative_error

K = 64
M = 33
UNIT = 32 * torch.finfo(torch.float32).eps


def part(
    n: int, rank: int | None, *, nf4: bool = True, bias: bool = False, config: type[LoRA] = LoRA
) -> nn.Module:
    """A frozen linear, adapted unless rank is None; everything random."""
    base: nn.Module = nn.Linear(K, n, bias=bias).requires_grad_(False)
    if nf4:
        base = NF4Linear.from_linear(base, QuantConfig())
    if rank is None:
        return base
    adapted = LoRALinear(base, f"part{n}", config(rank=rank, alpha=rank * 1.3), seed=0)
    nn.init.normal_(adapted.lora_B)
    return adapted


GROUPS = {
    "one": [(32, 4, {})],
    "q, k, v": [(64, 3, {}), (32, 8, {"nf4": False}), (16, 17, {})],
    "biases": [(32, 4, {"bias": True}), (16, 4, {}), (8, None, {"bias": True})],
    "bare": [(32, None, {}), (16, None, {"nf4": False})],
    "some": [(32, None, {}), (16, 1, {}), (8, None, {"nf4": False})],
    "frozen A": [(32, 4, {"config": LoRAFA}), (16, 9, {"config": LoRAFA})],
    "one A frozen": [(32, 4, {"config": LoRAFA}), (16, 4, {})],
}


@pytest.fixture(params=GROUPS)
def modules(request: pytest.FixtureRequest) -> Iterator[list[nn.Module]]:
    """Linears that share their input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield [part(n, rank, **options) for n, rank, options in GROUPS[request.param]]


def dense(module: nn.Module, x: Tensor) -> Tensor:
    """A part in float64, from its decoded weight."""
    base = module.base if isinstance(module, LoRALinear) else module
    weight = base.dequantize() if isinstance(base, NF4Linear) else base.weight
    y = F.linear(x, weight.double(), None if base.bias is None else base.bias.double())
    if isinstance(module, LoRALinear):
        y = y + module.scale * (x @ module.lora_A.double().T) @ module.lora_B.double().T
    return y


def run(
    modules: list[nn.Module], x: Tensor, dy: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor | None], Group]:
    """Y, dX and the adapters' gradients of a group."""
    group = Group(modules)
    Operands([group]).refresh(x.dtype)
    wide = group.input_buffer(M, x)
    wide[:, :K] = x
    y = group.forward(wide, residual)
    small = group.small(wide)
    gradient = group.gradient_buffer(M, x)
    gradient[:, : group.n] = dy
    dx, d_b = group.input_gradient(gradient, small)
    given = x if group.needs_input else None
    return y, dx, group.gradients(gradient, given, small, d_b), group


def test_forward_and_gradients(modules: list[nn.Module]) -> None:
    """Y with and without a residual, dX, dA and dB; swapped parts are found."""
    x = torch.randn(M, K)
    n = sum(module.out_features for module in modules)
    dy, residual = torch.randn(M, n), torch.randn(M, n)
    y, dx, found, group = run(modules, x, dy)
    more = run(modules, x, dy, residual)[0]

    exact = x.double().requires_grad_()
    wanted = torch.cat([dense(module, exact) for module in modules], dim=1)
    trained = [p for p in group.parameters if p.requires_grad]
    of_x, *of_trained = torch.autograd.grad(wanted, [exact, *trained], dy.double())
    assert relative_error(y, wanted) < UNIT
    assert relative_error(more, wanted + residual) < UNIT
    assert relative_error(dx, of_x) < UNIT
    given = [gradient for gradient in found if gradient is not None]
    assert [g is not None for g in found] == [p.requires_grad for p in group.parameters]
    for gradient, parameter, truth in zip(given, trained, of_trained, strict=True):
        assert gradient.shape == parameter.shape
        assert gradient.dtype == parameter.dtype
        assert relative_error(gradient, truth) < UNIT
    if len(modules) > 1:
        wrong = torch.cat([dense(module, exact) for module in modules[::-1]], dim=1)
        assert relative_error(y, wrong) > 1e3 * UNIT


def test_gradients_without_a_gradient_of_x(modules: list[nn.Module]) -> None:
    """The first layer's way: dY·B is then computed for dA alone."""
    x = torch.randn(M, K)
    dy = torch.randn(M, sum(module.out_features for module in modules))
    _, _, wanted, group = run(modules, x, dy)
    gradient = group.gradient_buffer(M, x).fill_(torch.nan)
    gradient[:, : group.n] = dy
    wide = group.input_buffer(M, x)
    wide[:, :K] = x
    group.fill_small(wide)
    given = x if group.needs_input else None
    found = group.gradients(gradient, given, group.small(wide), filled=False)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or torch.equal(ours, theirs)


def test_spare_columns_belong_to_the_result() -> None:
    """Room for dY·B beside Y, in the same memory."""
    group = Group([part(32, 4), part(16, 4)])
    Operands([group]).refresh(torch.float32)
    wide = group.input_buffer(M, torch.empty(0)).normal_()
    y = group.forward(wide, spare=True)
    assert y.shape == (M, 48)
    assert y.stride() == (48 + 16, 1)
    assert torch.equal(y, group.forward(wide))


@pytest.mark.parametrize(("rank", "columns"), [(1, 8), (8, 8), (9, 16), (17, 24)])
def test_ranks_are_padded_with_zeros(rank: int, columns: int) -> None:
    """To a multiple of 8; the padding contributes nothing and has no gradient."""
    group = Group([part(32, rank), part(16, None), part(8, 2)])
    assert group.r == columns + 8
    Operands([group]).refresh(torch.float32)
    filled = torch.zeros(group.n, group.r, dtype=torch.bool)
    filled[:32, :rank] = True
    filled[48:, columns : columns + 2] = True
    assert torch.equal(group.b != 0, filled)
    assert torch.equal((group.a != 0).any(1), filled.any(0))


def test_what_the_gradients_need() -> None:
    """X only for a trained A, X·Aᵀ only for a trained B."""
    trained, frozen = part(32, 4), part(32, 4, config=LoRAFA)
    cases: list[tuple[list[nn.Module], tuple[bool, bool]]] = [
        ([trained], (True, True)),
        ([frozen], (False, True)),
        ([trained, frozen], (True, True)),
        ([part(32, None)], (False, False)),
    ]
    for modules, wanted in cases:
        group = Group(modules)
        assert (group.needs_input, group.needs_small) == wanted
    assert Group([part(32, None)]).small(torch.empty(M, K)) is None


def test_masters_are_rounded_once() -> None:
    """s·A is rounded after the product, B as it is; both follow the masters."""
    module = part(32, 3)
    assert isinstance(module, LoRALinear)
    group = Group([module])
    operands = Operands([group, Group([part(8, None)])])
    for factor in (1.0, 0.7):
        with torch.no_grad():
            module.lora_A.mul_(factor)
            module.lora_B.mul_(factor)
        operands.refresh(torch.bfloat16)
        assert torch.equal(group.a[:3], (module.lora_A * module.scale).bfloat16())
        assert torch.equal(group.b[:, :3], module.lora_B.bfloat16())
    operands.refresh(torch.float32)
    assert group.a.dtype == torch.float32
    assert torch.equal(group.b[:, :3], module.lora_B)


def test_bfloat16_masters() -> None:
    """Masters in the compute dtype, and no gradient is recorded on the way."""
    config = LoRA(rank=2, alpha=2.6, dtype="bfloat16")
    adapted = LoRALinear(nn.Linear(K, 8).requires_grad_(False), "p", config, seed=0)
    group = Group([adapted])
    Operands([group]).refresh(torch.bfloat16)
    assert torch.equal(group.a[:2], adapted.lora_A * 1.3)
    assert not group.a.requires_grad


def test_what_can_be_grouped() -> None:
    frozen = nn.Linear(K, 8).requires_grad_(False)
    assert can_group(frozen)
    assert can_group(part(8, 2))
    assert not can_group(nn.Linear(K, 8))
    assert not can_group(nn.Embedding(4, 4).requires_grad_(False))
    dropping = LoRALinear(frozen, "p", LoRA(rank=2, dropout=0.5), seed=0)
    assert not can_group(dropping.train())
    assert can_group(dropping.eval())
    dropping.train().enabled = False
    assert can_group(dropping)
    assert Group([dropping]).r == 0
    assert Group([dropping]).parameters == []


@pytest.mark.parametrize("m", [1, 2, 7, 1500, 1501])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_token_sum_adds_in_float32(dtype: torch.dtype, m: int) -> None:
    """All rows count, the last one too; a sum in 16 bits would be off by more."""
    left, right = torch.randn(m, 24).to(dtype), torch.randn(m, 40)[:, 3:35].to(dtype)
    truth = left.double().T @ right.double()
    found = token_sum(left, right)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide
    unit = 4 * m**0.5 * torch.finfo(wide).eps
    assert relative_error(found, truth) < unit
    assert relative_error(found.to(torch.bfloat16), truth) > unit
    if m > 1:
        assert relative_error(token_sum(left[:-1], right[:-1]), truth) > unit
