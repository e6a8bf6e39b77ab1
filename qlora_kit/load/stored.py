"""What a checkpoint holds, read from the headers of its files before any weight.

The quantizer needs it twice: to learn the dtype each weight is stored in, so that
it is quantized from there whatever the model computes in, and to find which
modules of an NF4 checkpoint are quantized, and how. Asking the files instead of
the configuration makes every bitsandbytes checkpoint load, whatever its writer
left out.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qlora_kit.checkpoint.tensor_file import TensorInfo, read_header, read_tensor
from qlora_kit.core.errors import FormatError
from qlora_kit.load.conversion import split_name
from qlora_kit.nn.experts import is_fused_experts, unsupported_reason
from qlora_kit.quant.config import BLOCK_SIZES, QuantConfig
from qlora_kit.quant.format import STATE_SUFFIX

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of a checkpoint is."""

    folder: Path
    """Folder of the file."""
    info: TensorInfo
    """Its place in the file."""


def read_headers(files: Iterable[str | Path] | None) -> dict[str, StoredTensor]:
    """Describe every tensor of a checkpoint.

    Args:
        files: safetensors files; others, and None, are taken for empty.

    Returns:
        Tensor name to where it is.

    Raises:
        FormatError: a file is malformed.
    """
    found: dict[str, StoredTensor] = {}
    for file in files or ():
        path = Path(file)
        if path.suffix == ".safetensors":
            for name, info in read_header(path).items():
                found[name] = StoredTensor(path.parent, info)
    return found


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """How one NF4 weight is stored."""

    config: QuantConfig
    """Block size and double quantization."""
    packed: TensorInfo
    """Of the packed weight."""


def stored_weights(
    stored: Mapping[str, StoredTensor], model: PreTrainedModel
) -> dict[str, StoredWeight]:
    """Find the NF4 weights of a checkpoint and the parameters they stand for.

    Args:
        stored: as `read_headers` returns it.
        model: on the meta device, its modules not yet replaced.

    Returns:
        Full parameter name in the model to how it is stored. Weights of modules this
        model does not have (another task's head) are left out.

    Raises:
        FormatError: a weight cannot be loaded into this model as NF4.
    """
    rename = _renaming(model)
    found: dict[str, StoredWeight] = {}
    for marker, tensor in stored.items():
        if not marker.endswith(STATE_SUFFIX):
            continue
        name = marker.removesuffix(STATE_SUFFIX)
        target = rename(name)
        path, leaf = split_name(target)
        if not _has(model, path, leaf):
            if ".experts." in f".{name}":
                raise FormatError(
                    f"{name} is one expert stored on its own, but this version of transformers "
                    "fuses experts. Name the original 16-bit model instead: it is quantized while "
                    "it loads."
                )
            continue
        if name not in stored:
            raise FormatError(f"{name} missing. The checkpoint is incomplete.")
        config = _settings(tensor, f"{name}.nested_absmax" in stored)
        module = model.get_submodule(path)
        reason = unsupported_reason(module, config) if is_fused_experts(module) else None
        if reason is not None:
            raise FormatError(f"{name} is NF4, but cannot be used as such: {reason}.")
        found[target] = StoredWeight(config, stored[name].info)
    if not found:
        raise FormatError(
            f"config.json says the model is quantized, but no weight of {type(model).__name__} "
            "is stored as NF4. The folder mixes two models, or another tool wrote it."
        )
    return found


def stored_dtypes(
    stored: Mapping[str, StoredTensor],
    model: PreTrainedModel,
    names: Iterable[str],
    fallback: torch.dtype,
) -> dict[str, torch.dtype]:
    """The dtype each weight to be quantized has in the checkpoint.

    Args:
        stored: as `read_headers` returns it.
        model: on the meta device.
        names: full parameter names in the model.
        fallback: for a checkpoint whose files are not known.

    Returns:
        Name to float32, float16 or bfloat16. A weight put together of several tensors
        gets the widest dtype of the checkpoint's matrices.
    """
    matrices = [t.info for t in stored.values() if len(t.info.shape) > 1]
    floats = {info.dtype for info in matrices if info.dtype in _FLOATS}
    widest = torch.float32 if len(floats) > 1 else next(iter(floats), fallback)
    rename = _renaming(model)
    direct = {rename(info.name): info.dtype for info in matrices}
    found = {name: direct.get(name, widest) for name in names}
    return {name: d if d in _FLOATS else torch.float32 for name, d in found.items()}


def _settings(marker: StoredTensor, double_quant: bool) -> QuantConfig:
    """Block size from the JSON beside a weight; everything else in it is checked on reading."""
    with torch.device("cpu"):  # transformers builds models under torch.device("meta")
        raw = read_tensor(marker.folder, marker.info)
    try:
        block_size = json.loads(bytes(raw.flatten().tolist()))["blocksize"]
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{marker.info.name} is damaged: {error!r}.") from error
    if block_size not in BLOCK_SIZES:
        raise FormatError(f"{marker.info.name}: blocksize {block_size!r} is not supported.")
    return replace(QuantConfig(), block_size=block_size, double_quant=double_quant)


class _renaming:  # noqa: N801  a function with state
    """Name in the checkpoint to name in the model, as transformers renames it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._renamings = [
            entry
            for entry in get_model_conversion_mapping(model)
            if isinstance(entry, WeightRenaming)
        ]
        self._prefix = model.base_model_prefix
        self._names = model.state_dict()

    def __call__(self, name: str) -> str:
        renamed, _ = rename_source_key(name, self._renamings, [], self._prefix, self._names)
        if renamed not in self._names:
            renamed, _ = rename_source_key(name, [], [], self._prefix, self._names)
        return renamed


def _has(model: nn.Module, path: str, leaf: str) -> bool:
    try:
        return isinstance(getattr(model.get_submodule(path), leaf, None), torch.Tensor)
    except AttributeError:
        return False
