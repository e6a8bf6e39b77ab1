"""Bases for adapter tests: tiny models quantized by us and by bitsandbytes, and toy linears."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig

SKIP = ("lm_head", "classifier", "score")

F32_EPS = 2.0**-23
BF16_EPS = 2.0**-8

LINEARS = ("nf4", "nf4_single", "linear", "conv1d", "nf4_conv1d")


def make_linear(kind: str, k: int = 96, n: int = 80, dtype: torch.dtype = torch.float32):
    """A frozen random linear (K to N), and its weight (N, K) in float64."""
    conv = kind.endswith("conv1d")
    layer: nn.Module = Conv1D(n, k) if conv else nn.Linear(k, n)
    with torch.no_grad():
        layer.bias.normal_()
        layer.weight.normal_(0, k**-0.5)
    layer = layer.to(dtype)
    if kind.startswith("nf4"):
        quantized = NF4Linear.from_linear(layer, QuantConfig(double_quant=kind != "nf4_single"))
        weight = quantized.dequantize(dtype)
        layer = quantized
    else:
        weight = layer.weight.detach().T if conv else layer.weight.detach()
    return layer.requires_grad_(False), weight.double()


def freeze(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def quantize(model: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """Replace every linear but the heads by its NF4 twin, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and not set(SKIP) & set(name.split(".")):
            twin = NF4Linear.from_linear(module, config or QuantConfig(), name=name)
            model.set_submodule(name, twin)
    return model


def load_plain(folder: Path, *, classifier: bool = False) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def load_nf4(folder: Path, *, classifier: bool = False) -> nn.Module:
    return quantize(load_plain(folder, classifier=classifier))


def load_bitsandbytes(
    folder: Path, *, classifier: bool = False, skip: tuple[str, ...] = SKIP, **options: int
) -> PreTrainedModel:
    """The same folder with bitsandbytes' NF4 and double quantization, float32 compute.

    In training mode: in evaluation mode bitsandbytes repacks weights for CPUs with
    AVX512-BF16 and rounds their scales to bfloat16, which is another model (1% off).
    Tiny models have no dropout, so the mode makes no other difference.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(skip),
    )
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}, **options
    )
    return model.train()


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm())
