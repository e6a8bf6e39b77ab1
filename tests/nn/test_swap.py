"""Which layers are quantized; every loader test relies on it."""

import logging

import pytest
import torch
from transformers import BertForSequenceClassification, GptOssConfig, GptOssForCausalLM

from qlora_kit.core.errors import ConfigError
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import nf4_modules, quantizable, swap, weight_shapes
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat

PER_LAYER = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "bert": ["query", "key", "value", "dense", "dense", "dense"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj", "experts"],
}


@pytest.mark.parametrize("family", PER_LAYER)
def test_every_linear_of_the_blocks_and_no_head(family):
    chosen = quantizable(tiny_models.build(family), QuantConfig(skip=()))
    endings = [name.rpartition(".")[2] for name in chosen]
    assert endings == PER_LAYER[family] * tiny_models.LAYERS
    assert all(".0." in name or ".1." in name for name in chosen)


def test_heads_and_poolers():
    model = tiny_models.build("bert", num_labels=2)
    assert isinstance(model, BertForSequenceClassification)
    chosen = quantizable(model, QuantConfig(skip=()))
    assert not [n for n in chosen if "pooler" in n or "classifier" in n]
    assert quantizable(model, QuantConfig(target=("classifier",))) == ["classifier"]


def test_a_pattern_also_selects_what_lies_in_a_module():
    model = tiny_models.build("llama")
    mlp = quantizable(model, QuantConfig(target=("mlp",)))
    assert len(mlp) == 6
    first = quantizable(model, QuantConfig(skip=(r"re:model\.layers\.1",)))
    assert len(first) == 7
    assert all(name.startswith("model.layers.0.") for name in first)


def test_part_of_a_name_is_no_match():
    with pytest.raises(ConfigError, match="matches no linear layer"):
        quantizable(tiny_models.build("llama"), QuantConfig(target=("proj",)))


def test_experts_that_cannot_be_quantized_are_left_with_a_warning(caplog):
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_local_experts=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        chosen = quantizable(model, QuantConfig())
    assert chosen
    assert not [name for name in chosen if "experts" in name]
    assert "they have biases" in caplog.text


def test_swap_leaves_empty_modules_of_the_right_sizes():
    with torch.device("meta"):
        model = tiny_models.build("gpt2")
    names = quantizable(model, QuantConfig())
    swap(model, dict.fromkeys(names, QuantConfig()), dtype=torch.bfloat16)
    assert [name for name, _ in nf4_modules(model)] == names
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(layer, NF4Linear)
    assert layer.transposed
    assert weight_shapes(layer) == {"weight": (192, 64)}
    assert layer.weight.shape == (192 * 64 // 2, 1)
    assert layer.bias.dtype == torch.bfloat16
    assert all(p.device.type == "meta" for p in layer.parameters())
