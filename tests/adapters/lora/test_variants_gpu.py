"""Variants of LoRA on a GPU: bfloat16 on NF4, against float64 on the same decoded weights."""

import pytest
import torch

from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.dora import DoRALinear
from qlora_kit.adapters.lora.layer import LowRankLinear
from qlora_kit.adapters.lora.pissa import PiSSALinear
from qlora_kit.adapters.lora.sliced import SlicedLoRALinear
from tests.adapters.bases import BF16_EPS, make_linear, relative_error

pytestmark = pytest.mark.gpu

RANK, K, N = 16, 1024, 768
SPANS = {"q": (0, 512), "v": (640, 768)}


def moved(method: str, kind: str) -> tuple[LowRankLinear, torch.Tensor]:
    base, weight = make_linear(kind, K, N, torch.bfloat16)
    base, weight = base.cuda(), weight.cuda()
    if kind.startswith("nf4"):
        weight = base.dequantize(torch.bfloat16).double()
    layer: LowRankLinear
    if method == "dora":
        layer = DoRALinear(base, "proj", DoRA(rank=RANK), seed=0)
    elif method == "pissa":
        layer = PiSSALinear(base, "proj", LoRA(rank=RANK, init="pissa"), seed=0)
    else:
        layer = SlicedLoRALinear(base, "proj", LoRA(rank=RANK), SPANS, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        layer.lora_B.add_(0.02 * torch.randn_like(layer.lora_B))
        if isinstance(layer, DoRALinear):
            layer.lora_magnitude.mul_(1 + 0.2 * torch.rand_like(layer.lora_magnitude))
    return layer, weight


def merged(
    layer: LowRankLinear, weight: torch.Tensor, parts: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The weight that the layer stands for, of float64 parts."""
    a, b = parts["lora_A"], parts["lora_B"]
    if isinstance(layer, SlicedLoRALinear):
        wide = torch.zeros(N, 2 * RANK, dtype=torch.float64, device="cuda")
        wide[:512, :RANK], wide[640:, RANK:] = b[:512], b[512:]
        return weight + layer.scale * wide @ a
    changed = weight + layer.scale * b @ a
    if isinstance(layer, PiSSALinear):
        return changed - layer.scale * layer.start_b.double() @ layer.start_a.double()
    length = changed.norm(dim=1, keepdim=True).detach()
    return parts["lora_magnitude"][:, None] * changed / length


@pytest.mark.parametrize("kind", ["nf4", "linear", "nf4_conv1d"])
@pytest.mark.parametrize("method", ["dora", "pissa", "slices"])
def test_values_and_gradients_match_float64(method: str, kind: str) -> None:
    layer, weight = moved(method, kind)
    generator = torch.Generator("cuda").manual_seed(0)
    x, g = (
        torch.randn(300, size, generator=generator, device="cuda", dtype=torch.bfloat16)
        for size in (K, N)
    )
    x.requires_grad_()
    parts = {n: p.detach().double().requires_grad_() for n, p in layer.trainable().items()}
    x64 = x.detach().double().requires_grad_()
    y = x64 @ merged(layer, weight, parts).T + layer.base.bias.double()
    y.backward(g.double())
    out = layer(x)
    out.backward(g)
    found = [out.detach(), x.grad, *(p.grad for p in layer.trainable().values())]
    wanted = [y.detach(), x64.grad, *(p.grad for p in parts.values())]
    bound = 4 * BF16_EPS  # A, B and products in bfloat16
    for value, truth in zip(found, wanted, strict=True):
        assert relative_error(value, truth) < bound
        assert relative_error(1.05 * value, truth) > bound


def test_a_step_of_dora_does_not_wait_for_the_gpu() -> None:
    layer, _ = moved("dora", "nf4")
    x = torch.randn(64, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
