"""Models of real shapes with random weights, made where they will run.

Speed and memory do not depend on what the weights say, so nothing is downloaded:
a module is built on the meta device and filled on the GPU, layer by layer. NF4
weights get random codes and plausible scales. Never use these for quality.
"""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import quantizable, swap
from qlora_kit.quant.config import QuantConfig


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


SHAPES: dict[str, PretrainedConfig] = {
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, tied=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, tied=True),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, tied=False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Llama-3.3-70B": _llama(8192, 28672, 80, 64, tied=False),
}
"""Public configurations, by the name of the model they belong to."""


def random_model(
    config: PretrainedConfig, quant: QuantConfig | None, *, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of this configuration with random weights.

    Args:
        config: of a causal language model.
        quant: how the base is stored; None for a dense one.
        device: where it is made.
        dtype: the model computes in.

    Returns:
        The model, on `device`; no weight ever existed elsewhere.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quant is not None:
        names = quantizable(model, quant)
        swap(model, dict.fromkeys(names, quant), dtype=dtype)
    for name, module in list(model.named_modules()):
        if "rotary" in type(module).__name__.lower():  # its buffers are computed, not stored
            with torch.device(device):
                model.set_submodule(name, type(module)(config))
            continue
        _fill(module, device)
    model.tie_weights()
    return model.eval()


def _fill(module: nn.Module, device: str) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.dtype == torch.uint8:
            data.random_(0, 256)
        elif parameter.dim() > 1:
            data.normal_(0, 0.02)
        else:
            data.fill_(1.0 if name == "weight" else 0.0)
        setattr(module, name, nn.Parameter(data, requires_grad=False))
    if isinstance(module, NF4Linear):
        for name, value in {"weight_nested_absmax": 0.01, "weight_offset": 0.05}.items():
            module.get_parameter(name).data.view(torch.float32).fill_(value)
