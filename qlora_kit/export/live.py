"""Write a model that is loaded, and describe NF4 weights in config.json.

What a loaded model holds is in memory already, so its tensors are written as they
are: NF4 weights under bitsandbytes' names, everything else in one dtype. Shared
tensors are written once, as transformers ties them again.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.checkpoint.source import OUR_QUANT_METHOD
from qlora_kit.checkpoint.tensor_file import TensorInfo
from qlora_kit.checkpoint.writer import ShardWriter
from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.nn.experts import NF4Experts
from qlora_kit.nn.linear import NF4Linear, byte_specs
from qlora_kit.nn.swap import nf4_modules, weight_shapes
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.format import FORMAT_VERSION, to_bnb_tensors

Style = Literal["bitsandbytes", "qlora_kit"]


def quantization_config(
    style: Style, config: QuantConfig, model: nn.Module, quantized: set[str], dtype: str
) -> dict[str, Any]:
    """Describe the quantization for config.json.

    Args:
        style: whose description.
        config: block size, double quantization, patterns.
        model: to name the linears that are not quantized.
        quantized: names of the modules that are.
        dtype: bitsandbytes computes in.

    Returns:
        The `quantization_config` object.

    Example:
        >>> found = quantization_config("qlora_kit", QuantConfig(), nn.Module(), set(), "float32")
        >>> found["quant_method"], found["block_size"], found["skip"]
        ('qlora_kit_nf4', 64, ['lm_head'])
    """
    if style == "qlora_kit":
        own = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
        return {"quant_method": OUR_QUANT_METHOD, "format_version": FORMAT_VERSION, **own}
    skipped = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in quantized
    ]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def write_model(
    model: PreTrainedModel, folder: Path, style: Style, dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write a loaded model's weights and configuration.

    Args:
        model: with NF4 modules, without adapters.
        folder: existing folder.
        style: `bitsandbytes` or `qlora_kit`.
        dtype: of everything that is not quantized.
        shard_bytes: data per file.

    Raises:
        AdapterError: an adapter is attached.
        ConfigError: the model has no NF4 weight.
    """
    found = dict(nf4_modules(model))
    attached = [name for name, _ in model.named_parameters() if ".lora_" in name]
    if attached:
        raise AdapterError(
            f"the model has an adapter attached ({attached[0]}). Save the adapter, then give the "
            "base's folder and the adapter's: save_quantized(base, out, adapter=folder)."
        )
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no NF4 weight to write. Load it with quant=QuantConfig(), "
            "or give its folder instead."
        )
    dense_experts = {
        path
        for path, module in found.items()
        if style == "bitsandbytes" and isinstance(module, NF4Experts)
    }
    tensors = dict(_tensors(model, found, dense_experts, dtype))
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with ShardWriter(folder, infos, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    _write_config(model, folder, style, set(found) - dense_experts, dtype)


def _tensors(
    model: PreTrainedModel,
    found: dict[str, NF4Linear | NF4Experts],
    dense_experts: set[str],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor to write, by name; shared ones once."""
    tied = model.all_tied_weights_keys
    state = {name: t for name, t in model.state_dict().items() if name not in tied}
    params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for path, module in found.items():
        for leaf, shape in weight_shapes(module).items():
            for key in byte_specs(shape, module.config, leaf):
                del state[f"{path}.{key}"]
            if path in dense_experts:
                assert isinstance(module, NF4Experts)
                yield f"{path}.{leaf}", module.dequantize(leaf, dtype)
                continue
            weight = module.nf4_weight if isinstance(module, NF4Linear) else module.nf4_weight(leaf)
            for suffix, tensor in to_bnb_tensors(weight).items():
                yield f"{path}.{leaf}{suffix}", tensor
    for name, tensor in state.items():
        cast = tensor.is_floating_point() and name in params
        yield name, tensor.to(dtype) if cast else tensor


def _write_config(
    model: PreTrainedModel,
    folder: Path,
    style: Style,
    quantized: set[str],
    dtype: torch.dtype,
) -> None:
    """Write config.json and the generation config of a loaded model."""
    name = str(dtype).removeprefix("torch.")
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    first = next(module for path, module in nf4_modules(model) if path in quantized)
    loaded = getattr(model.config, "quantization_config", None)
    patterns = {
        key: tuple(value)
        for key in ("skip", "target")
        if (value := getattr(loaded, key, None)) is not None
    }
    own = QuantConfig(
        block_size=first.config.block_size, double_quant=first.config.double_quant, **patterns
    )
    config |= {
        "architectures": [type(model).__name__],
        "dtype": name,
        "quantization_config": quantization_config(style, own, model, quantized, name),
    }
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
