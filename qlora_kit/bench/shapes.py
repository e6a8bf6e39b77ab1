"""Shapes of public models, as configurations: what a benchmark needs to know of a model.

Speed and memory do not depend on what weights say, so a configuration is enough: weights are
made at random where they run (`random_model.py`), or only counted on the meta device
(`sizes.py`). A user's own model is named by its folder or its hub id.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from qlora_kit.core.errors import ConfigError


def _llama(hidden: int, ffn: int, layers: int, heads: int, *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )


def _qwen3(hidden: int, ffn: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    )


def _gemma3(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, window: int
) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        sliding_window=window,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def _llama_1(hidden: int, ffn: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
    )


SHAPES: dict[str, PretrainedConfig] = {
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, tied=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, tied=True),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, tied=False),
    "Gemma-3-1B": _gemma3(1152, 6912, 26, 4, 1, 512),
    "Gemma-3-4B": _gemma3(2560, 10240, 34, 8, 4, 1024),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Llama-3.3-70B": _llama(8192, 28672, 80, 64, tied=False),
}
"""Public configurations, by the name of the model they belong to."""

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
"""For machines without a GPU."""

MODELS: dict[str, PretrainedConfig] = {"tiny": TINY, **SHAPES}
"""What can be trained in a benchmark, by name."""

LLAMA_1: dict[str, LlamaConfig] = {
    "7B": _llama_1(4096, 11008, 32, 32),
    "13B": _llama_1(5120, 13824, 40, 40),
    "33B": _llama_1(6656, 17920, 60, 52),
    "65B": _llama_1(8192, 22016, 80, 64),
}
"""The models of QLoRA's memory breakdown (arXiv:2302.13971, table 2)."""

GPT_2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
"""The model of LoRA's table of latencies, `GPT-2-medium`."""

GPT_3 = OPTConfig(
    vocab_size=50257,
    hidden_size=12288,
    ffn_dim=49152,
    num_hidden_layers=96,
    num_attention_heads=96,
    word_embed_proj_dim=12288,
    max_position_embeddings=2048,
)
"""The model of LoRA's claim of checkpoints 10,000 times smaller, in the architecture that has its
shapes (arXiv:2005.14165, table 2.1)."""


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: of `MODELS`, `GPT-2-medium`, a folder with a `config.json`, or a hub id.

    Returns:
        The configuration; no weights are looked at and no code is run.

    Raises:
        ConfigError: there is no such model.

    Example:
        >>> config_of("Llama-3.1-8B").num_hidden_layers
        32
    """
    if name in MODELS:
        return MODELS[name]
    if name == "GPT-2-medium":
        return GPT_2_MEDIUM
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = f"there is no configuration in {name}" if Path(name).exists() else f"no {name!r}"
        raise ConfigError(
            f"{what}: it is neither a folder with a config.json, nor a hub id that can be reached, "
            f"nor one of {', '.join(MODELS)} ({str(error).splitlines()[0][:120]})."
        ) from error
