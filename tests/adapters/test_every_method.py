"""What every method promises, in one place: its start, what it trains, its gradients.

Each method of the registry with its variants, on a decoder without biases and one with them (and
`Conv1D`) and on two encoders, on NF4 and on unquantized weights. The rooms' own tests know the
formulas; here nothing is left out: a new method fails `test_no_method_is_forgotten` until it is
listed. LoftQ, which needs a checkpoint, and infixes, which need labels, are in their rooms.
"""

import copy
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import DoRA, LoRA, LoRAFA
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.registry import METHODS, OTHERS, method_name
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.nn.linear import NF4Linear
from tests import tiny_models
from tests.adapters.bases import F32_EPS, quantize

CONFIGS = {
    "lora": LoRA(rank=4),
    "rslora": LoRA(rank=4, rslora=True),
    "lora_fa": LoRAFA(rank=4),
    "patterns": LoRA(rank=4, rank_pattern={"re:.*0.*": 2}, alpha_pattern={"re:.*1.*": 5.0}),
    "embedding": LoRA(rank=4, targets=("all-linear", "re:.*(embed_tokens|wte|word_embeddings)")),
    "slices": LoRA(rank=4, targets=("c_attn",), slices={"c_attn": ("q", "v")}),
    "layers": LoRA(rank=4, layers_to_transform=(1,)),
    "pissa": LoRA(rank=4, init="pissa"),
    "dora": DoRA(rank=4),
    "adalora": AdaLoRA(rank=4),
    "glora": GLoRA(rank=2),
    "bitfit": BitFit(),
    "houlsby": Bottleneck(width=4),
    "pfeiffer": Bottleneck(kind="pfeiffer", width=4, init="zero"),
    "lin": Bottleneck(kind="lin", width=4, init="zero"),
    "adapter_drop": Bottleneck(kind="pfeiffer", width=4, init="zero", drop_layers=1),
    "top_k": TopK(blocks=1),
    "full": Full(),
    "prefix": PrefixTuning(length=3, hidden=8),
    "prompt": PromptTuning(length=3),
    "prelayer": PromptTuning(length=3, layers="all"),
}
FAMILIES = ("llama", "gpt2", "bert", "roberta")
ELSEWHERE = {"houlsby", "prefix", "prompt", "prelayer"}
"""Do not start at the base: a near identity (0.01²), and positions that a softmax sees."""
ERROR = 2000 * F32_EPS
"""Roundings of two layers, forward and backward, 14 tokens."""
LOW_RANK = r"lora_[AB]"
TRAINED = {
    "embedding": r"lora_(embedding_)?[AB]",
    "lora_fa": r"lora_B",
    "dora": r"lora_([AB]|magnitude)",
    "adalora": r"lora_[ABE]",
    "glora": r"(supports\.)?([ABC]_[du]|[DE])",
    "bitfit": r"bias",
    "houlsby": r"(down|up)\.(weight|bias)|weight|bias",
    "pfeiffer": r"(down|up)\.(weight|bias)",
    "adapter_drop": r"(down|up)\.(weight|bias)",
    "lin": r"(down|up|norm)\.(weight|bias)",
    "top_k": r"weight|bias",
    "full": r"weight|bias",
    "prefix": r"(prefix\.)?(embedding|(inner|outer)\.(weight|bias))",
    "prompt": r"(prompt\.)?\w+",
    "prelayer": r"(prompt\.)?\w+",
}
"""The end of every trained tensor's name; A and B of LoRA where nothing is said."""


def cases() -> list[tuple[str, str, int]]:
    return [
        (family, name, bits)
        for family in FAMILIES
        for name in CONFIGS
        for bits in (4, 16)
        if not (name == "full" and bits == 4) and not (name == "slices" and family != "gpt2")
    ]


def base_of(family: str, bits: int) -> nn.Module:
    model = tiny_models.build(family)
    return quantize(model) if bits == 4 else model


def answer(model: nn.Module) -> torch.Tensor:
    return model(tiny_models.tokens()).logits


def shake(adapter, scale: float = 0.1) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def in_float64(model: nn.Module) -> nn.Module:
    """The unadapted model without NF4, in float64: decoded weights in plain linears."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, NF4Linear):
            k, n = module.in_features, module.out_features
            weight = module.dequantize(torch.float32)
            dense: nn.Module
            if name.startswith("transformer.h."):  # GPT-2, whose masters are stored as (in, out)
                dense, weight = Conv1D(n, k), weight.T
            else:
                dense = nn.Linear(k, n, bias=module.bias is not None)
            with torch.no_grad():
                dense.weight.copy_(weight)
                if module.bias is not None:
                    dense.bias.copy_(module.bias)
            twin.set_submodule(name, dense)
    return twin.double().requires_grad_(False)


def test_no_method_is_forgotten():
    assert {method_name(config) for config in CONFIGS.values()} == {*METHODS, *OTHERS}


@pytest.mark.parametrize(("family", "name", "bits"), cases())
def test_the_start_and_what_is_trained(family, name, bits):
    model = base_of(family, bits)
    with torch.no_grad():
        before = answer(model)
        adapter = attach(model, CONFIGS[name], seed=3)
        off = float((answer(model) - before).abs().max() / before.abs().max())
    # a softmax over more or fewer terms is another; products of zero are exact, PiSSA's cancel
    assert (off > ERROR) if name in ELSEWHERE else off <= 64 * F32_EPS
    names = [n for n, _ in adapter.named_parameters()]
    ending = re.compile(rf"(.+\.)?({TRAINED.get(name, LOW_RANK)})")
    assert names
    assert all(ending.fullmatch(n) for n in names), names
    assert {id(p) for p in adapter.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    if name == "layers":
        assert all(re.search(r"\.1\.", n) for n in names)


@pytest.mark.parametrize(("family", "name", "bits"), cases())
def test_gradients_against_float64(family, name, bits):
    """The adapter of a float32 model beside autograd on the same adapter of a float64 twin."""
    model = base_of(family, bits)
    twin = in_float64(model)
    ours, exact = (attach(m, CONFIGS[name], seed=3) for m in (model, twin))
    if name == "pissa":  # whose start is a decomposition, in whatever precision
        exact.load_state_dict(ours.state_dict())
    shake(ours)
    with torch.no_grad():
        twin.double()
        pairs = list(zip(exact.named_parameters(), ours.named_parameters(), strict=True))
        for (n, wide), (m, narrow) in pairs:
            assert n == m
            wide.copy_(narrow)
    g = torch.randn(answer(twin).shape, generator=torch.Generator().manual_seed(0))
    logits = answer(model)
    logits.backward(g)
    truth = answer(twin)
    truth.backward(g.double())
    assert float(((logits - truth).norm() / truth.norm()).detach()) < ERROR
    floor = 1e-3 * max(float(wide.grad.norm()) for (_, wide), _ in pairs)
    bites = []
    for (n, wide), (_, narrow) in pairs:
        size = max(float(wide.grad.norm()), floor)  # a key's bias has no effect on a softmax
        found = narrow.grad.double()
        assert float((found - wide.grad).norm()) / size < ERROR, n
        bites.append(float((1.001 * found - wide.grad).norm()) / size > ERROR)
    assert any(bites)
