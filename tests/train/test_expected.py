"""What a training is held to: model FLOPs, counted from its modules."""

import pytest
import torch

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.bench.flops import step_flops
from qlora_kit.train.expected import model_flops
from tests import tiny_models


def test_model_flops_are_those_of_the_benchmarks():
    """Counted from a model's modules as from its shape; trained A counts."""
    for method, shape in (("lora", LoRA(rank=4)), ("lora_fa", None)):
        model = tiny_models.build("llama")
        config = shape or make_adapter_config("lora_fa", LoRA(rank=4))
        attach(model.requires_grad_(False), config)
        wanted = step_flops(model.config, 20, 4, method).total
        assert model_flops(model, 20) == pytest.approx(wanted, rel=1e-12)
        assert model_flops(model, 40) > wanted


def test_model_flops_count_the_ranks_of_every_method_that_has_them():
    """AdaLoRA and DoRA multiply what LoRA multiplies; PiSSA's start is a frozen pair besides."""
    model = tiny_models.build("llama")
    lora = step_flops(model.config, 20, 4, "lora").total
    base = lora - 6 * sum(4 * (m.in_features + m.out_features) for m in linears(model))
    for shape, wanted in (
        (AdaLoRA(rank=4), lora),
        (DoRA(rank=4), lora),
        (LoRA(rank=4, init="pissa"), lora + (lora - base) * 4 / 6),
    ):
        model = tiny_models.build("llama")
        attach(model.requires_grad_(False), shape)
        assert model_flops(model, 20) == pytest.approx(wanted, rel=1e-12)


def linears(model):
    """The linears of the layers."""
    return [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
