"""What prefixes and prompts have to know of a model: its decoder, layers, widths and inputs."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.core.errors import AdapterError


@dataclass(frozen=True, slots=True)
class PromptShape:
    """Sizes of a model, read off its configuration."""

    place: str
    """Dotted name of the base model: embeddings, layers and final norm, without a head."""
    layers: int
    width: int
    """Of hidden states, d."""
    kv_heads: int
    """Heads of keys and values; with grouped-query attention fewer than those of queries."""
    head_dim: int
    causal: bool

    @property
    def kv_width(self) -> int:
        """Columns of K, and of V."""
        return self.kv_heads * self.head_dim


def prompt_shape(model: nn.Module) -> PromptShape:
    """Read a model's sizes.

    Args:
        model: of transformers.

    Returns:
        The sizes.

    Raises:
        AdapterError: it is not a decoder or an encoder of transformers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
        >>> prompt_shape(LlamaForCausalLM(config)).kv_width
        8
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        raise AdapterError(
            f"prefixes and prompts are for decoders and encoders of transformers, not for "
            f"{type(model).__name__}."
        )
    place = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    encoder = not any(getattr(m, "is_causal", False) for m in model.modules())
    return PromptShape(
        place=place,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        causal=not encoder,
    )


def blocks(model: nn.Module, shape: PromptShape) -> list[nn.Module]:
    """The layers of a base model.

    Args:
        model: the whole model.
        shape: its sizes.

    Returns:
        As many as the configuration says, in order.

    Raises:
        AdapterError: there is no such list.
    """
    base = model.get_submodule(shape.place)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == shape.layers:
            return list(module)
    raise AdapterError(f"{type(model).__name__} has no list of {shape.layers} layers.")


def as_keywords(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call.

    Args:
        module: that is called.
        args: by place.
        kwargs: by name.

    Returns:
        All of them by name.

    Example:
        >>> as_keywords(nn.Identity(), (1,), {})
        {'input': 1}
    """
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def cached_tokens(call: dict[str, Any]) -> int:
    """Tokens that a call's cache holds already.

    Args:
        call: arguments of a base model by name.

    Returns:
        Their number; 0 without a cache.

    Example:
        >>> cached_tokens({"past_key_values": None})
        0
    """
    cache = call.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def call_size(call: dict[str, Any]) -> tuple[int, int, torch.device]:
    """Batch, length and device of a call of a base model.

    Args:
        call: its arguments by name.

    Returns:
        (B, T, device).

    Example:
        >>> call_size({"input_ids": torch.ones(2, 3)})[:2]
        (2, 3)
    """
    given = call.get("input_ids")
    tensor: Tensor = call["inputs_embeds"] if given is None else given
    return tensor.shape[0], tensor.shape[1], tensor.device
