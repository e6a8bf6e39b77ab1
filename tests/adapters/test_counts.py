"""Parameter counts of the papers' set-ups, from the configuration alone: no weights are made."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.selective.config import BitFit, Full, TopK

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


def deberta_xxl() -> DebertaV2Config:
    return DebertaV2Config(
        hidden_size=1536,
        num_hidden_layers=48,
        num_attention_heads=24,
        intermediate_size=6144,
        vocab_size=128100,
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


def houlsby(width: int) -> Bottleneck:
    """Without the layer norms, as the papers' tables count."""
    return Bottleneck(width=width, norms="freeze")


CASES = {
    "RoBERTa-base, r8 on q,v": (roberta(768, 12, 12), 8, ("query", "value"), 294_912),
    "RoBERTa-large, r8 on q,v": (roberta(1024, 24, 16), 8, ("query", "value"), 786_432),
    # GPT-2 fuses q, k and v; r4 on the fused layer has as many as r4 on q and v apart
    "GPT-2 M, r4": (gpt2(1024, 24, 16), 4, ("c_attn",), 393_216),
    "GPT-2 L, r4": (gpt2(1280, 36, 20), 4, ("c_attn",), 737_280),
    "GPT-3, r8 on q,v": (gpt3(), 8, ("q_proj", "v_proj"), 37_748_736),
    "GPT-3, r4 on q,k,v,o": (gpt3(), 4, ATTENTION, 37_748_736),
    "GPT-3, r1 on q,v": (gpt3(), 1, ("q_proj", "v_proj"), 4_718_592),
    "DeBERTa-XXL, r16 on q,v": (deberta_xxl(), 16, ("query_proj", "value_proj"), 4_718_592),
    "Llama-3.1-8B, r16 on all seven": (llama_8b(), 16, "all-linear", 41_943_040),
}


def gpt3_own() -> GPT2Config:
    """GPT-3's blocks with the biases they have."""
    return gpt2(12288, 96, 96)


MORE = {
    **{
        f"GPT-3, Houlsby r{width}": (gpt3_own(), houlsby(width), count)
        for width, count in (
            (1, 7_078_080),
            (4, 21_234_432),
            (8, 40_109_568),
            (16, 77_859_840),
            (64, 304_361_472),
        )
    },
    "RoBERTa-large, Pfeiffer r16": (
        roberta(1024, 24, 16),
        Bottleneck(kind="pfeiffer", width=16),
        811_392,
    ),
    "RoBERTa-large, Houlsby r8": (roberta(1024, 24, 16), houlsby(8), 835_968),
    "GPT-2 M, Top2": (gpt2(1024, 24, 16), TopK(blocks=2, final_norm=False), 25_192_448),
    "GPT-2 M, Top2 + ln_f": (gpt2(1024, 24, 16), TopK(blocks=2), 25_194_496),
    "RoBERTa-base, BitFit": (roberta(768, 12, 12), BitFit(), 102_144),
    "Prefix GPT-2 M, l 5": (gpt2(1024, 24, 16), PrefixTuning(length=5, hidden=None), 245_760),
    "Prefix GPT-2 M, l 10": (gpt2(1024, 24, 16), PrefixTuning(length=10, hidden=None), 491_520),
    "GPT-2 L, full": (gpt2(1280, 36, 20), Full(), 774_030_080),
}


@pytest.mark.parametrize("case", MORE)
def test_published_counts_of_other_methods(case):
    config, method, count = MORE[case]
    model = on_meta(config)
    adapter = attach(model, method)
    assert adapter.num_trainable == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def on_meta(config: PreTrainedConfig):
    auto = (
        AutoModel if isinstance(config, DebertaV2Config | RobertaConfig) else AutoModelForCausalLM
    )
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


def test_a_prefix_saves_what_the_table_counts():
    """The MLP is there while training, and dropped from what is saved."""
    adapter = attach(on_meta(gpt2(1024, 24, 16)), PrefixTuning(length=5, hidden=512))
    assert adapter.num_trainable == 5 * 1024 + 1024 * 512 + 512 + 512 * 49_152 + 49_152
    assert sum(t.numel() for t in adapter.files().modules.values()) == 245_760


def test_prompts_and_grouped_queries():
    assert attach(on_meta(gpt3_own()), PromptTuning(length=256)).num_trainable == 256 * 12_288
    prelayer = PromptTuning(length=8, layers="all")
    assert attach(on_meta(gpt3_own()), prelayer).num_trainable == 96 * 12_288 * 8
    # Llama-3.1-8B: K and V have 8 heads of 128 columns, not 4,096
    prefix = PrefixTuning(length=10, hidden=None)
    assert attach(on_meta(llama_8b()), prefix).num_trainable == 10 * 32 * 2 * 1024
