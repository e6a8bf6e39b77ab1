"""Which modules of a model are quantized, and putting NF4 modules in their place.

One rule, asked by the loader and by everything that has to agree with it. A
module is quantized if it is an `nn.Linear`, a GPT-2 `Conv1D` or a stack of fused
experts, and none of these holds:

- it belongs to the head: it lies outside the base model (`lm_head`, `score`,
  `classifier`, BERT's `cls`) or in a pooler, which is trained with the head;
- its weight is tied to another one, or the model keeps it in float32;
- `skip` matches it or a module it lies in.

With `target`, only what it matches (itself or a module it lies in) is quantized;
that may include a head. The rule needs no weights: a model on the meta device is
enough.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import logger
from qlora_kit.core.patterns import matches, matches_any
from qlora_kit.nn.experts import PROJECTIONS, NF4Experts, is_fused_experts, unsupported_reason
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig


def quantizable(model: PreTrainedModel, config: QuantConfig) -> list[str]:
    """Names of the modules to quantize, in the model's order.

    Args:
        model: not modified; may be on the meta device.
        config: its `skip` and `target` patterns.

    Returns:
        Dotted module names.

    Raises:
        ConfigError: a target pattern matches nothing, or nothing is left to quantize.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes))
        >>> quantizable(model, QuantConfig(target=("mlp",)))[0]
        'model.layers.0.mlp.gate_proj'
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D) or is_fused_experts(module)
    }
    _check_targets(candidates, config)
    excluded = _tied_or_float32(model, candidates)
    heads = _heads(model, candidates)
    chosen = []
    for name, module in candidates.items():
        wanted = name not in heads if not config.target else _lies_in(name, config.target)
        if not wanted or name in excluded or _lies_in(name, config.skip):
            continue
        if is_fused_experts(module):
            reason = unsupported_reason(module, config)
            if reason is not None:
                logger.warning(
                    "%s stays in 16 bits: its experts cannot be stacked, %s", name, reason
                )
                continue
        chosen.append(name)
    if not chosen:
        raise ConfigError(
            f"nothing to quantize in {type(model).__name__}: skip={config.skip} and "
            f"target={config.target} leave none of its {len(candidates)} linear layers. "
            "Change the patterns, or load with quant=None for a 16-bit base."
        )
    return chosen


def swap(model: nn.Module, configs: Mapping[str, QuantConfig], *, dtype: torch.dtype) -> None:
    """Replace modules by empty NF4 modules on the meta device.

    Args:
        model: modified in place.
        configs: module name to how its weight is stored.
        dtype: the model computes in.
    """
    for name, config in configs.items():
        source = model.get_submodule(name)
        if is_fused_experts(source):
            model.set_submodule(name, NF4Experts(source, config, dtype=dtype, device="meta"))
        else:
            model.set_submodule(name, _empty_linear(source, config, dtype))


def _empty_linear(source: nn.Module, config: QuantConfig, dtype: torch.dtype) -> NF4Linear:
    weight = source.get_parameter("weight")
    transposed = not isinstance(source, nn.Linear)
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    return NF4Linear(
        in_features,
        out_features,
        bias=source.bias is not None,
        config=config,
        dtype=dtype,
        device="meta",
        transposed=transposed,
    )


def nf4_modules(model: nn.Module) -> Iterator[tuple[str, NF4Linear | NF4Experts]]:
    """The NF4 modules of a model.

    Args:
        model: any module.

    Yields:
        Dotted name and module.

    Example:
        >>> layers = nn.Sequential(nn.ReLU(), NF4Linear(64, 64, config=QuantConfig()))
        >>> [name for name, _ in nf4_modules(layers)]
        ['1']
    """
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear | NF4Experts):
            yield name, module


def weight_shapes(module: NF4Linear | NF4Experts) -> dict[str, tuple[int, ...]]:
    """Names and full shapes of an NF4 module's weights.

    Args:
        module: the module.

    Returns:
        `{"weight": (N, K)}`, or one (E, N, K) per stacked projection.
    """
    return {"weight": module.shape} if isinstance(module, NF4Linear) else dict(module.shapes)


def _lies_in(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern selects a module or one it lies in."""
    parts = name.split(".")
    return any(matches_any(".".join(parts[:end]), patterns) for end in range(len(parts), 0, -1))


def _check_targets(candidates: Mapping[str, nn.Module], config: QuantConfig) -> None:
    for pattern in config.target:
        if not any(_lies_in(name, (pattern,)) for name in candidates):
            endings = sorted({name.rpartition(".")[2] for name in candidates})
            raise ConfigError(
                f"the target pattern {pattern!r} matches no linear layer. This model's are called: "
                f"{', '.join(endings)}."
            )


def _heads(model: PreTrainedModel, names: Mapping[str, nn.Module]) -> set[str]:
    """Layers outside the base model or in a pooler, and the output embeddings."""
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    output = model.get_output_embeddings()
    return {
        name
        for name, module in names.items()
        if id(module) not in inside or module is output or matches(name, r"re:(.*\.)?pooler(\..*)?")
    }


def _tied_or_float32(model: PreTrainedModel, names: Mapping[str, nn.Module]) -> set[str]:
    """Layers whose weight is shared, or that the model wants in float32 whatever the dtype."""
    tied = model.all_tied_weights_keys
    shared = {*tied, *tied.values()}
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return {
        name
        for name in names
        if any(f"{name}.{weight}" in shared for weight in ("weight", *PROJECTIONS))
        or any(re.search(pattern.replace("*", ".*"), f"{name}.") for pattern in kept)
    }
