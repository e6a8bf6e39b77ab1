"""Write a model with NF4 weights, merged with an adapter if one is given.

Two styles share the same bytes and tensor names, those of bitsandbytes:

- `bitsandbytes`: config.json says so, and plain transformers with bitsandbytes
  (or vLLM, TGI, ...) loads it. It has no fused experts in 4 bits: they are
  written in 16 bits.
- `qlora_kit`: loads with this package; fused experts are NF4 too.

Weights no adapter touches keep exactly the codes training had. A merged weight is
quantized again after the change was added, which costs some of what was learned:
`deviation.compare` says how much.

Checkpoints are streamed one NF4 weight at a time. The JSON of a weight contains
a number that is known only then, while its length has to be in the file's header
before: it is padded with spaces, which JSON allows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.checkpoint.source import open_source
from qlora_kit.checkpoint.tensor_file import TensorInfo
from qlora_kit.checkpoint.writer import ShardWriter
from qlora_kit.core.atomic import atomic_directory
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.units import parse_bytes
from qlora_kit.export.items import Item, MergePlan
from qlora_kit.export.live import Style, quantization_config, write_model
from qlora_kit.export.merge import (
    DTYPES,
    copy_side_files,
    dense_info,
    dense_parts,
    pick_device,
    write_config,
)
from qlora_kit.export.naming import is_transposed
from qlora_kit.export.plan import make_plan
from qlora_kit.export.rows import InMemory, Rows, chunks, nf4_weight
from qlora_kit.nn.experts import is_fused_experts
from qlora_kit.nn.swap import quantizable
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.double_quant import GROUP_SIZE
from qlora_kit.quant.format import STATE_SUFFIX, to_bnb_tensors
from qlora_kit.quant.weight import NF4Weight

STATE_BYTES = 256
"""Room for the JSON of one weight."""


@dataclass(kw_only=True)
class _Target:
    """One NF4 weight of the output and what it is made from."""

    param: str
    shape: tuple[int, ...]
    transposed: bool
    config: QuantConfig
    members: list[Item] = field(default_factory=list)


def save_quantized(
    base_or_model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    style: Style = "bitsandbytes",
    adapter: str | Path | None = None,
    into: Literal["quantized", "original"] = "quantized",
    quant: QuantConfig | None = None,
    dtype: str = "bfloat16",
    max_shard: str | int = "5GB",
    overwrite: bool = False,
    device: str = "auto",
    revision: str | None = None,
) -> Path:
    """Write a 4-bit model.

    Args:
        base_or_model: a folder, GGUF file or hub id; or a loaded model without adapters.
        out: folder to create.
        style: `bitsandbytes` or `qlora_kit`.
        adapter: folder of an adapter to merge.
        into: what the change is added to before quantizing again: the decoded weights
            (`quantized`) or the original ones.
        quant: how to quantize; None: as the adapter was trained, or the defaults.
            Weights that are NF4 already and do not change keep their own.
        dtype: of everything that is not quantized.
        max_shard: largest weight file.
        overwrite: replace `out` if it exists.
        device: where to compute; `auto` takes a GPU if there is one.
        revision: branch, tag or commit of a hub id.

    Returns:
        The folder.

    Raises:
        ConfigError: an option has an unknown value or does not apply to a model.
        SourceError: base or adapter cannot be found, or `out` exists.
        FormatError: a file is malformed.
        AdapterError: the adapter does not fit, or the model has one attached.
        NonFiniteError: a weight holds NaN or infinity.

    Example:
        >>> save_quantized("base", "out", style="gptq")
        Traceback (most recent call last):
        qlora_kit.core.errors.ConfigError: style must be bitsandbytes or qlora_kit, got 'gptq'.
    """
    if style not in ("bitsandbytes", "qlora_kit"):
        raise ConfigError(f"style must be bitsandbytes or qlora_kit, got {style!r}.")
    if into not in ("quantized", "original"):
        raise ConfigError(f"into must be quantized or original, got {into!r}.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    shard_bytes, place, folder = parse_bytes(max_shard), pick_device(device), Path(out)
    if isinstance(base_or_model, PreTrainedModel):
        if adapter is not None or quant is not None:
            raise ConfigError(
                "a loaded model is written as it is. To merge an adapter or quantize anew, give "
                "the base's folder or hub id instead."
            )
        with atomic_directory(folder, overwrite=overwrite) as partial:
            write_model(base_or_model, partial, style, DTYPES[dtype], shard_bytes)
        return folder
    files = None if adapter is None else read_adapter(adapter)
    source = open_source(base_or_model, revision=revision)
    if files is None:
        into = "quantized" if source.is_nf4 else "original"
    plan = make_plan(source, files, into=into, device=place)
    config = quant or (files.base.quant if files is not None else None) or QuantConfig()
    with atomic_directory(folder, overwrite=overwrite) as partial:
        targets = _targets(plan, config, style)
        _write(plan, targets, partial, DTYPES[dtype], shard_bytes)
        modules = {param.rpartition(".")[0] for param in targets}
        settings = quantization_config(style, config, plan.model, modules, dtype)
        write_config(plan, partial, {"dtype": dtype, "quantization_config": settings})
        copy_side_files(source, None if adapter is None else Path(adapter), partial)
    return folder


def _targets(plan: MergePlan, config: QuantConfig, style: Style) -> dict[str, _Target]:
    """Parameters to write as NF4, with the items they are made from, in stacked order."""
    stored = plan.source.quantized_names()
    modules = set() if stored else set(quantizable(plan.model, config))
    targets: dict[str, _Target] = {}
    for item in plan.in_stack_order():
        if item.param is None or item.param not in plan.params:
            continue
        path, _, leaf = item.param.rpartition(".")
        if leaf == "bias" or (path not in modules and item.stored not in stored):
            continue
        module = plan.model.get_submodule(path)
        if style == "bitsandbytes" and is_fused_experts(module):
            continue
        if item.param not in targets:
            transposed = is_transposed(module)
            shape = tuple(plan.model.get_parameter(item.param).shape)
            targets[item.param] = _Target(
                param=item.param,
                shape=shape[::-1] if transposed else shape,
                transposed=transposed,
                config=config,
            )
        targets[item.param].members.append(item)
    for target in targets.values():
        first = target.members[0]
        if first.stored in stored and not first.changed:
            target.config = plan.source.quant_of(first.stored)
    return targets


def _write(
    plan: MergePlan,
    targets: dict[str, _Target],
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write a plan's items, those of targets as NF4 under the model's names."""
    infos: list[TensorInfo] = []
    for item in plan.in_stack_order():
        target = targets.get(item.param or "")
        if target is None:
            infos.append(dense_info(item, dtype))
        elif item is target.members[0]:
            infos += _infos(target)
    with ShardWriter(folder, infos, shard_bytes) as writer:
        for item in plan.in_stack_order():
            target = targets.get(item.param or "")
            if target is None:
                for part in dense_parts(item, dtype):
                    writer.write_part(item.name, part)
            elif item is target.members[0]:
                for suffix, tensor in _padded(_quantize(plan, target, dtype)).items():
                    writer.write(target.param + suffix, tensor)


def _quantize(plan: MergePlan, target: _Target, dtype: torch.dtype) -> NF4Weight:
    """One NF4 weight: the stored one, the original quantized, or the merged one quantized."""
    first, changed = target.members[0], any(item.changed for item in target.members)
    assert first.stored is not None or changed
    members: list[Rows] = []
    for item in target.members:
        if changed or item.stored is None:
            members.append(item.rows())
        elif item.stored in plan.source.quantized_names():
            weight = plan.source.read_weight(item.stored)
            assert isinstance(weight, NF4Weight)
            return weight
        else:
            members.append(plan.stored_rows(item.stored))
    if target.transposed:  # chunks of the turned matrix would be columns: hold it whole
        members = [InMemory(torch.cat(list(chunks(rows))).T.contiguous()) for rows in members]
    return nf4_weight(
        members,
        target.config,
        shape=target.shape,
        dtype=dtype if changed else first.dtype,
        name=target.param,
    )


def _infos(target: _Target) -> Iterator[TensorInfo]:
    """What one NF4 weight will be stored as."""
    count = math.prod(target.shape)
    blocks = -(-count // target.config.block_size)
    double_quant = target.config.double_quant
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "": (((count + 1) // 2, 1), torch.uint8),
        ".absmax": ((blocks,), torch.uint8 if double_quant else torch.float32),
        ".quant_map": ((16,), torch.float32),
        STATE_SUFFIX: ((STATE_BYTES,), torch.uint8),
    }
    if double_quant:
        tensors[".nested_absmax"] = ((-(-blocks // GROUP_SIZE),), torch.float32)
        tensors[".nested_quant_map"] = ((256,), torch.float32)
    for suffix, (shape, dtype) in tensors.items():
        yield TensorInfo(target.param + suffix, shape, dtype)


def _padded(weight: NF4Weight) -> dict[str, Tensor]:
    """Bitsandbytes' tensors of a weight, its JSON padded to `STATE_BYTES`."""
    tensors = to_bnb_tensors(weight)
    state = tensors[STATE_SUFFIX]
    assert state.numel() <= STATE_BYTES, state.numel()
    room = STATE_BYTES - state.numel()
    tensors[STATE_SUFFIX] = torch.nn.functional.pad(state, (0, room), value=ord(" "))
    return tensors
