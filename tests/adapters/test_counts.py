"""Parameter counts of the papers' set-ups, from the configuration alone: no weights are made."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from qlora_kit.adapters.config import LoRA, LoRAFA
from qlora_kit.adapters.inject import attach

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def roberta(hidden: int, layers: int, heads: int) -> RobertaConfig:
    return RobertaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
    )


def gpt2(hidden: int, layers: int, heads: int) -> GPT2Config:
    return GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads)


def gpt3() -> LlamaConfig:
    """GPT-3's attention: 96 layers of four 12288 x 12288 projections. The rest is not counted."""
    return LlamaConfig(
        hidden_size=12288,
        num_hidden_layers=96,
        num_attention_heads=96,
        intermediate_size=4 * 12288,
        vocab_size=50257,
    )


def llama_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    )


CASES = {
    "RoBERTa-base, r8 on q,v": (roberta(768, 12, 12), 8, ("query", "value"), 294_912),
    "RoBERTa-large, r8 on q,v": (roberta(1024, 24, 16), 8, ("query", "value"), 786_432),
    # GPT-2 fuses q, k and v; r4 on the fused layer has as many as r4 on q and v apart
    "GPT-2 M, r4": (gpt2(1024, 24, 16), 4, ("c_attn",), 393_216),
    "GPT-2 L, r4": (gpt2(1280, 36, 20), 4, ("c_attn",), 737_280),
    "GPT-3, r8 on q,v": (gpt3(), 8, ("q_proj", "v_proj"), 37_748_736),
    "GPT-3, r4 on q,k,v,o": (gpt3(), 4, ATTENTION, 37_748_736),
    "GPT-3, r1 on q,v": (gpt3(), 1, ("q_proj", "v_proj"), 4_718_592),
    "DeBERTa-XXL, r16 on q,v": (roberta(1536, 48, 24), 16, ("query", "value"), 4_718_592),
    "Llama-3.1-8B, r16 on all seven": (llama_8b(), 16, "all-linear", 41_943_040),
}


def on_meta(config: PreTrainedConfig):
    auto = AutoModel if isinstance(config, RobertaConfig) else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("case", CASES)
def test_published_counts(case):
    config, rank, targets, count = CASES[case]
    model = on_meta(config)
    adapter = attach(model, LoRA(rank=rank, targets=targets))
    assert adapter.num_trainable == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_lora_fa_trains_b_alone():
    model = on_meta(llama_8b())
    adapter = attach(model, LoRAFA(rank=16))
    b_alone = 32 * 16 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert adapter.num_trainable == b_alone
    assert sum(t.numel() for t in adapter.state_dict().values()) == 41_943_040
