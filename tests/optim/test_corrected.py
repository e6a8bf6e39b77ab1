"""LoRA-FA's corrected gradient is the minimiser of ‖s·ĝ·A − G‖_F.

The minimiser is computed in float64 from G itself, by least squares, with no inverse. Ours
multiplies the float32 gradient g by M = (A·Aᵀ)⁻¹/s², rounded to float32: elementwise off by
at most (r + 2)·eps·|g|·|M|, r products and sums and the rounding of M, and by what g itself
is off: autograd's products in float32 over tokens and features.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.bnb_adamw import FlatBnbAdamW
from qlora_kit.optim.corrected import CorrectedGradient, inverse_gram
from tests.optim.tensors import counted

EPS = torch.finfo(torch.float32).eps


def adapted(
    n: int, k: int, rank: int = 4, seed: int = 0, alpha: float = 6.0, dtype: str = "float32"
) -> LoRALinear:
    config = LoRAFA(rank=rank, alpha=alpha, corrected_gradient=True, dtype=dtype)
    return LoRALinear(nn.Linear(k, n).requires_grad_(False), f"m{seed}", config, seed=seed)


def minimiser(g_full: Tensor, module: LoRALinear) -> Tensor:
    """argmin over ĝ of ‖s·ĝ·A − G‖_F, (N, r) float64, by least squares."""
    a = module.lora_A.detach().double() * module.scale
    return torch.linalg.lstsq(a.T, g_full.double().T).solution.T


def backward(module: LoRALinear, rows: int = 9, seed: int = 1) -> Tensor:
    """One backward pass; returns the gradient of the whole weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, module.in_features, generator=generator)
    dy = torch.randn(rows, module.out_features, generator=generator)
    module(x).backward(dy)
    return dy.double().T @ x.double()


@pytest.mark.parametrize(("n", "k", "rank"), [(12, 32, 4), (5, 17, 3), (64, 24, 16), (3, 8, 1)])
def test_it_is_the_minimiser(n: int, k: int, rank: int) -> None:
    """Within float32's rounding; the plain gradient is far away."""
    module = adapted(n, k, rank)
    wanted = minimiser(backward(module), module)
    plain = module.lora_B.grad.double()
    CorrectedGradient([module]).apply()
    m = inverse_gram(module.lora_A.detach()[None], torch.tensor([module.scale]))[0].double()
    bound = EPS * (plain.abs() @ m.abs()) * (rank + 2 + k + 9)
    assert ((module.lora_B.grad.double() - wanted).abs() <= bound).all()
    assert (bound < (plain - wanted).abs().max() / 100).all()  # the bound bites
    assert module.lora_A.grad is None


def test_modules_of_several_shapes_at_once() -> None:
    """Batched, each gets its own; ops grow with the shapes, not with the modules."""

    def make(layers: int) -> list[LoRALinear]:
        shapes = [(12, 32, 4), (12, 32, 4), (20, 32, 4), (12, 32, 8)]
        return [
            adapted(*shape, seed=10 * i + j)
            for i in range(layers)
            for j, shape in enumerate(shapes)
        ]

    counts = []
    for layers in (1, 5):
        modules = make(layers)
        wanted = [minimiser(backward(m, seed=i), m) for i, m in enumerate(modules)]
        modules[1].lora_B.grad = None  # took no part in this update
        correction = CorrectedGradient(modules)
        correction.apply()
        for i, module in enumerate(modules):
            if i == 1:
                assert module.lora_B.grad is None
                continue
            error = (module.lora_B.grad.double() - wanted[i]).abs().max()
            assert error < 1e4 * EPS * wanted[i].abs().max()
        for i, module in enumerate(modules):
            module.zero_grad()
            backward(module, seed=i)
        with counted() as names:
            correction.apply()
        counts.append(list(names))
    assert counts[0] == counts[1]
    assert counts[0].count("bmm") == 3


def test_the_inverse_follows_a_change_of_a() -> None:
    """Computed once while A stays; again after a checkpoint was loaded into it."""
    module = adapted(12, 32)
    correction = CorrectedGradient([module])
    backward(module)
    correction.apply()
    module.zero_grad()
    backward(module)
    with counted() as names:
        correction.apply()
    assert not any("linalg" in name or "eigh" in name for name in names)
    with torch.no_grad():
        module.lora_A.copy_(torch.randn(4, 32, generator=torch.Generator().manual_seed(3)))
    module.zero_grad()
    wanted = minimiser(backward(module), module)
    correction.apply()
    assert (module.lora_B.grad - wanted).abs().max() < 1e4 * EPS * wanted.abs().max()


def test_dependent_rows_of_a_give_the_smallest_minimiser() -> None:
    """A of lower rank than r has many minimisers; the pseudo-inverse gives the smallest."""
    module = adapted(12, 32)
    with torch.no_grad():
        module.lora_A[3] = module.lora_A[0] * 2
    g_full = backward(module)
    CorrectedGradient([module]).apply()
    a = module.lora_A.detach().double() * module.scale
    reached = module.lora_B.grad.double() @ a
    nearest = g_full @ torch.linalg.pinv(a) @ a
    assert (reached - nearest).abs().max() < 1e4 * EPS * nearest.abs().max()


def test_bfloat16_masters_round_once() -> None:
    """Computed in float32, rounded when written back."""
    module = adapted(12, 32, dtype="bfloat16")
    backward(module)
    g = module.lora_B.grad.double()
    a = module.lora_A.detach().double()
    wanted = g @ torch.linalg.inv(a @ a.T) / module.scale**2
    CorrectedGradient([module]).apply()
    error = (module.lora_B.grad.double() - wanted).abs()
    assert (error <= 2**-8 * wanted.abs() + 1e-5 * wanted.abs().max()).all()


@pytest.mark.parametrize("kind", [FlatAdamW, FlatBnbAdamW, torch.optim.SGD])
def test_any_optimizer_may_follow(kind: Any) -> None:
    """On flat gradients and on separate ones, accumulated over two batches."""
    module = adapted(130, 64, rank=32)
    optimizer = kind([module.lora_B], lr=0.1)
    wanted = minimiser(backward(module, seed=1) + backward(module, seed=2), module)
    if not isinstance(optimizer, torch.optim.SGD):
        optimizer.clip_grad_norm(None)  # gathered before: `.grad` is a view by now
    CorrectedGradient([module]).apply()
    assert (module.lora_B.grad - wanted).abs().max() < 1e4 * EPS * wanted.abs().max()
    before = module.lora_B.detach().clone()
    optimizer.step()
    step = module.lora_B.detach() - before
    large = wanted.abs() > 1e-3 * wanted.abs().max()
    assert torch.equal(step.sign()[large], -wanted.sign()[large].float())


def test_it_is_refused_where_a_is_trained(tmp_path: Path) -> None:
    """By the run's configuration, and by the adapter's."""
    fields = LoRA(corrected_gradient=True)
    assert make_adapter_config("lora_fa", fields).corrected_gradient
    for method in ("lora", "rslora"):
        with pytest.raises(ConfigError, match="method lora_fa"):
            make_adapter_config(method, fields)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
    adapter = attach(model, LoRA(rank=2, corrected_gradient=True))
    with pytest.raises(AdapterError, match=r"layers\.0 trains its A"):
        CorrectedGradient.of(adapter)
    adapter.detach_from_model()
    assert CorrectedGradient.of(attach(model, LoRA(rank=2))) is None
