"""Models of real shapes with random weights, made where they will run.

Speed and memory do not depend on what the weights say, so nothing is downloaded:
a module is built on the meta device and filled on the GPU, layer by layer. NF4
weights get random codes and plausible scales. Never use these for quality.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import quantizable, swap
from qlora_kit.quant.config import QuantConfig

_SCALES = {"weight_nested_absmax": 0.004, "weight_offset": 0.02}
"""Weights then deviate by 0.01: with more, gradients of deep models drown in their rounding."""


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

    Example:
        >>> from qlora_kit.bench.shapes import TINY
        >>> model = random_model(TINY, QuantConfig(), device="cpu", dtype=torch.float32)
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'NF4Linear'
    """
    config = deepcopy(config)  # the model keeps it, and what is changed in it stays changed
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
        if any(True for _ in module.buffers(recurse=False)):
            _compute_buffers(model, module, device)
        _fill(module, device)
    model.tie_weights()
    return model.eval()


def _compute_buffers(model: PreTrainedModel, module: nn.Module, device: str) -> None:
    """Constants that no checkpoint holds, such as the factor of Gemma's embeddings."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        persistent = name not in module._non_persistent_buffers_set
        here = torch.empty_like(buffer, device=device)
        module.register_buffer(name, here, persistent=persistent)
    model._init_weights(module)  # the parameters are on the meta device still


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
        for name, value in _SCALES.items():
            module.get_parameter(name).data.view(torch.float32).fill_(value)
