"""Which parameter of the model each tensor of a checkpoint becomes.

A checkpoint's names are not the model's: transformers adds or strips the base
model's prefix, renames parts, and stacks per-expert tensors into one parameter
while it loads. An adapter and the rule for what is quantized speak of the model's
modules, so an export has to follow those steps without loading anything. It asks
transformers' own table and renaming function, on a model whose parameters live on
the meta device and take no memory.

Of the conversions that combine tensors only the stacking of experts is
understood (`Entry.part`); a tensor that goes through another one can be copied,
not changed, and `Entry.opaque` says so.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from qlora_kit.checkpoint.source import Source
from qlora_kit.core.errors import SourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint and where it goes.

    Example:
        >>> Entry(name="h.0.attn.c_attn.weight", param="transformer.h.0.attn.c_attn.weight").part
    """

    name: str
    """Key in the checkpoint."""
    param: str | None
    """Parameter or buffer of the model; None if the model has no use for the tensor."""
    part: int | None = None
    """Place in a stacked parameter, row-major; None if the tensor is the whole parameter."""
    opaque: bool = False
    """Whether loading converts the tensor in a way that is not followed here."""


def build_skeleton(
    source: Source, *, task_type: str | None = None, num_labels: int | None = None
) -> PreTrainedModel:
    """Build the model of a checkpoint on the meta device.

    Args:
        source: the checkpoint.
        task_type: PEFT's name of the task an adapter was trained for; `SEQ_CLS` gives
            the classification model, otherwise config.json's architecture counts.
        num_labels: classes of a classification model.

    Returns:
        The model, without memory for its parameters.

    Raises:
        SourceError: transformers does not know the architecture.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps({"model_type": "gpt2",
        ...     "n_layer": 1, "n_embd": 4, "n_head": 1, "architectures": ["GPT2LMHeadModel"]}))
        >>> model = build_skeleton(Source(folder=folder, config={}, tensors={}))
        >>> type(model).__name__, model.device.type
        ('GPT2LMHeadModel', 'meta')
    """
    import transformers

    try:
        config = AutoConfig.from_pretrained(source.folder)
    except ValueError as error:
        raise SourceError(
            f"transformers {transformers.__version__} does not know the architecture of "
            f"{source.folder}: {error}"
        ) from error
    config.quantization_config = None
    del config.quantization_config
    names = config.architectures or []
    with torch.device("meta"):
        if task_type == "SEQ_CLS":
            if num_labels is not None:
                config.num_labels = num_labels
            return AutoModelForSequenceClassification.from_config(config)
        for name in names:
            class_ = getattr(transformers, name, None)
            if class_ is not None:
                return class_(config)
    raise SourceError(
        f"{source.folder / 'config.json'} names the architectures {names}, none of which "
        f"transformers {transformers.__version__} has. Models with code of their own cannot be "
        "exported."
    )


def map_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Entry]:
    """Follow transformers' renaming for every tensor of a checkpoint.

    Args:
        model: from `build_skeleton`.
        names: the checkpoint's weights, NF4 companions left out.

    Returns:
        Checkpoint name to its entry, in the given order.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with torch.device("meta"):
        ...     model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=1))
        >>> map_names(model, ["wte.weight"])["wte.weight"].param
        'transformer.wte.weight'
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    entries: dict[str, Entry] = {}
    stacks: dict[str, list[tuple[tuple[Any, ...], str]]] = {}
    for name in names:
        param, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if param not in wanted:
            plain, _ = rename_source_key(name, [], [], prefix, wanted)
            param, pattern = (plain, None) if plain in wanted else (None, None)
        converter = by_pattern.get(pattern) if pattern is not None else None
        entries[name] = Entry(name=name, param=param, opaque=converter is not None)
        if converter is not None and param is not None and _stacks_experts(converter):
            place = converter.source_patterns.index(pattern)
            stacks.setdefault(param, []).append(((_natural(name, place)), name))
    for param, members in stacks.items():
        for part, (_, name) in enumerate(sorted(members)):
            entries[name] = Entry(name=name, param=param, part=part)
    return entries


def _stacks_experts(converter: WeightConverter) -> bool:
    """Whether a converter stacks per-expert matrices, joining several along their rows."""
    kinds = [type(operation) for operation in converter.operations]
    if len(converter.source_patterns) == 1:
        return kinds == [MergeModulelist] and converter.operations[0].dim == 0
    return (
        kinds == [MergeModulelist, Concatenate]
        and converter.operations[0].dim == 0
        and converter.operations[1].dim == 1
    )


def _natural(name: str, place: int) -> tuple[Any, ...]:
    """Sort key: by expert first, then by the projection's place in the stack."""
    return (*(int(n) for n in re.findall(r"\d+", name.rsplit(".", 2)[0])), place)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out).

    Args:
        module: of the model.

    Returns:
        True for GPT-2's Conv1D.

    Example:
        >>> is_transposed(nn.Linear(2, 3)), is_transposed(Conv1D(3, 2))
        (False, True)
    """
    return isinstance(module, Conv1D)
