"""A young adapter's part of a linear survives where the sum is rounded once, not where twice.

B starts at zero, so for some updates delta = s·B·A·x is a small part of the unit in the last place
(ulp) of y = W·x in bfloat16. Added to y after y was rounded, it is lost wherever it is below half
a unit: y is on the grid already, and rounding goes back there. Added in the product's float32
accumulator, it moves y across the border of two grid points as often as its share of a unit says:
any one element is off by up to half a unit as before, the mean is not.

What is kept is the mean effect in units of delta: sum((with - without)·delta) / sum(delta²),
1 for exact arithmetic.
"""

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.block.operands import Operands
from qlora_kit.block.projection import Group
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig

M, N, K, RANK = 512, 256, 256, 16
DTYPE = torch.bfloat16
UNIT = torch.finfo(DTYPE).eps / 2
POINTS = 512
"""Values per unit in the last place, evenly spaced: an average is off by one of them."""


def kept(with_it: Tensor, without: Tensor, delta: Tensor) -> float:
    """Share of delta's effect that is left, on average."""
    effect = with_it.double() - without.double()
    return float((effect * delta).sum() / delta.square().sum())


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.4, 0.49, 0.7, 1.3])
def test_one_rounding_keeps_a_share_of_an_ulp_on_average_and_two_lose_it(share: float) -> None:
    """The law by itself: one gives delta, two give delta rounded to whole units."""
    ulp = torch.finfo(DTYPE).eps  # of [1, 2)
    y = 1 + ulp * (torch.arange(64 * POINTS, dtype=torch.float64) + 0.5) / POINTS
    delta = torch.full_like(y, share * ulp)
    once = kept((y + delta).to(DTYPE), y.to(DTYPE), delta)
    twice = kept((y.to(DTYPE) + delta.to(DTYPE)).to(DTYPE), y.to(DTYPE), delta)
    bound = 1 / (POINTS * share)
    assert abs(once - 1) <= bound
    assert twice == pytest.approx(round(share) / share, abs=UNIT)
    assert abs(twice - 1) > 10 * bound  # the bound bites


@pytest.fixture(scope="module")
def linear() -> LoRALinear:
    """An adapted NF4 linear whose B is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Linear(K, N, bias=False).to(DTYPE)
        base = NF4Linear.from_linear(dense, QuantConfig())
        return LoRALinear(base, "q_proj", LoRA(rank=RANK, alpha=2 * RANK), seed=0)


def fused(linear: LoRALinear, x: Tensor) -> Tensor:
    """As a fused layer computes it."""
    group = Group([linear])
    Operands([group]).refresh(DTYPE)
    wide = group.input_buffer(len(x), x)
    wide[:, :K] = x
    return group.forward(wide).clone()


def alone(linear: LoRALinear, x: Tensor) -> Tensor:
    """As a linear of its own computes it."""
    return linear(x).detach()


def apart(linear: LoRALinear, x: Tensor) -> Tensor:
    """y rounded, then what the adapter adds: three products, as separate modules do it."""
    y = x @ linear.base.dequantize(DTYPE).T
    return y + linear.scale * (x @ linear.lora_A.to(DTYPE).T @ linear.lora_B.to(DTYPE).T)


@pytest.mark.parametrize("log2_step", [-17, -15, -13])
@torch.no_grad()
def test_a_young_adapter_acts_in_a_linear_that_rounds_once(
    linear: LoRALinear, log2_step: int
) -> None:
    """B after one step of Adam, every element the learning rate with some sign.

    The part of a unit that y is off the grid is as good as random, so an element's effect has
    a variance of at most ulp·|delta|, and what is kept one of sum(ulp·|delta|·delta²) over
    the square of sum(delta²): five standard deviations, and one rounding of x·Aᵀ beside them.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=generator).to(DTYPE)
    sign = torch.randn(N, RANK, generator=generator).sign()
    exact = x.double() @ linear.base.dequantize(DTYPE).double().T
    small = linear.scale * (x.double() @ linear.lora_A.to(DTYPE).double().T)
    delta = small @ (2.0**log2_step * sign.double()).T
    ulp = torch.exp2(exact.abs().log2().floor()) * torch.finfo(DTYPE).eps
    assert (delta.abs() / ulp).median() < 0.25
    spread = (ulp * delta.abs() * delta.square()).sum().sqrt() / delta.square().sum()
    bound = 5 * float(spread) + UNIT

    found = {}
    for way in (fused, alone, apart):
        linear.lora_B.zero_()
        without = way(linear, x)
        linear.lora_B.copy_(2.0**log2_step * sign)
        found[way] = kept(way(linear, x), without, delta)
    assert abs(found[fused] - 1) <= bound
    assert abs(found[alone] - 1) <= bound
    assert abs(kept((exact + delta).to(DTYPE), exact.to(DTYPE), delta) - 1) <= bound
    assert found[apart] < 1 - 2 * bound  # two roundings are found by the same bound
