"""What one adapted linear keeps for its backward, to the byte, and what frozen blocks keep.

LoRA, LoRA-FA, AdaLoRA and GLoRA have theirs in their rooms, fused layers in `tests/block`.
"""

import pytest
import torch
from torch import nn

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.bottleneck.layer import BottleneckLinear
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.dora import DoRALinear
from qlora_kit.adapters.lora.embedding import LoRAEmbedding
from qlora_kit.adapters.lora.pissa import PiSSALinear
from qlora_kit.adapters.lora.sliced import SlicedLoRALinear
from qlora_kit.adapters.selective.bitfit import TrainedBias
from qlora_kit.adapters.selective.config import TopK
from tests import tiny_models
from tests.adapters.bases import LINEARS, make_linear, quantize
from tests.adapters.lora.test_layer import saved_bytes

K, N, RANK, ROWS = 96, 80, 4, 24
X, Y, NARROW = (4 * ROWS * width for width in (K, N, RANK))
"""Bytes of float32 inputs, outputs, and products of r columns."""
SLICES = {"q": (0, 48), "v": (64, 80)}


def inputs() -> torch.Tensor:
    return torch.randn(2, ROWS // 2, K, requires_grad=True)


@pytest.mark.parametrize("kind", LINEARS)
def test_variants_of_lora(kind):
    """x once and r columns; DoRA its unstretched output; no weight, and never a decoded one."""
    base = make_linear(kind, K, N)[0]
    dora = DoRALinear(base, "p", DoRA(rank=RANK), seed=0)
    assert saved_bytes(dora, inputs()) == X + NARROW + Y + 2 * 4 * N  # lengths and factors
    pissa = PiSSALinear(base, "p", LoRA(rank=RANK, init="pissa"), seed=0)
    assert saved_bytes(pissa, inputs()) == X + 2 * NARROW + 2 * 4 * RANK * (K + N)  # both pairs
    sliced = SlicedLoRALinear(base, "p", LoRA(rank=RANK), SLICES, seed=0)
    assert saved_bytes(sliced, inputs()) == X + 2 * NARROW + 4 * N * 2 * RANK  # B by blocks


@pytest.mark.parametrize("kind", LINEARS)
def test_bottlenecks_keep_h_and_not_x(kind):
    sizes = {
        "houlsby": Y + 2 * NARROW,  # before and behind GELU
        "pfeiffer": Y + NARROW,
        "lin": 2 * Y + NARROW + 2 * 4 * ROWS,  # h and its norm, mean and deviation
    }
    for name, wanted in sizes.items():
        config = Bottleneck(kind=name, width=RANK)
        layer = BottleneckLinear(make_linear(kind, K, N)[0], "p", config, seed=0)
        assert saved_bytes(layer, inputs()) == wanted, name


@pytest.mark.parametrize("kind", LINEARS)
def test_a_trained_bias_keeps_nothing(kind):
    model = nn.Sequential(make_linear(kind, K, N)[0])
    x = inputs()
    TrainedBias(model[0], "0", torch.float32).install(model)
    assert saved_bytes(model, x) == 0
    if kind == "linear":  # the measure sees an x that is kept
        model[0].weight.requires_grad_(True)
        assert saved_bytes(model, x) == X


def test_an_embedding_keeps_tokens():
    table = nn.Embedding(50, 64).requires_grad_(False)
    layer = LoRAEmbedding(table, "p", LoRA(rank=RANK), seed=0)
    ids = torch.randint(0, 50, (2, ROWS // 2))
    assert saved_bytes(layer, ids) == ids.nbytes + NARROW


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_below_the_trained_blocks_nothing_is_kept(family, bits):
    """No tensor that a frozen block makes is part of the graph; with LoRA it is."""
    for config, wanted in ((TopK(blocks=1), [False, True]), (LoRA(rank=2), [True, True])):
        model = tiny_models.build(family)
        model = quantize(model) if bits == 4 else model
        attach(model, config)
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
        seen: list[bool] = []
        for block in lists[0]:
            block.register_forward_hook(
                lambda _m, _i, out, seen=seen: seen.append(
                    (out[0] if isinstance(out, tuple) else out).requires_grad
                )
            )
        model(tiny_models.tokens())
        assert seen == wanted
