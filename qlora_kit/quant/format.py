"""One NF4 weight as the tensors of a file: bitsandbytes' 4-bit layout.

A parameter `P` becomes up to six tensors. Their bytes, shapes and names equal
those bitsandbytes writes, so that either library reads the other's files:

    P                                     ((n+1)//2, 1) uint8, high nibble first
    P.absmax                              (blocks,) uint8, or float32 without double quantization
    P.quant_map                           (16,) float32, the NF4 table
    P.nested_absmax                       (ceil(blocks/256),) float32
    P.nested_quant_map                    (256,) float32, the dynamic map
    P.quant_state.bitsandbytes__nf4       uint8, UTF-8 JSON

The JSON holds, in this order: quant_type, blocksize, dtype, shape and, with
double quantization, nested_blocksize, nested_dtype, nested_offset. docs/format.md
is the normative text; `FORMAT_VERSION` changes with it.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from qlora_kit.core.errors import FormatError
from qlora_kit.quant.config import BLOCK_SIZES
from qlora_kit.quant.double_quant import GROUP_SIZE, dynamic_map
from qlora_kit.quant.nf4 import nf4_table
from qlora_kit.quant.weight import NF4Weight

FORMAT_VERSION = 1
"""Version of docs/format.md this module reads and writes."""

STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
"""Ending of the tensor that holds the JSON; its presence marks an NF4 weight."""

COMPANION_SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    STATE_SUFFIX,
)
"""Endings of the tensors that accompany the packed weight."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CPU = torch.device("cpu")


def is_companion(name: str) -> bool:
    """Tell whether a tensor of a checkpoint accompanies a packed weight.

    Args:
        name: a tensor's full name.

    Returns:
        True for scales, maps and the JSON; False for the packed weight itself.

    Example:
        >>> is_companion("model.q_proj.weight.absmax"), is_companion("model.q_proj.weight")
        (True, False)
    """
    return name.endswith(COMPANION_SUFFIXES)


def to_bnb_tensors(weight: NF4Weight) -> dict[str, Tensor]:
    """The tensors bitsandbytes would write for a weight.

    Args:
        weight: the weight; not modified, its tensors are not copied.

    Returns:
        Suffix to tensor, in bitsandbytes' order; "" is the packed weight.

    Example:
        >>> list(to_bnb_tensors(NF4Weight.quantize(torch.randn(4, 64))))[:3]
        ['', '.absmax', '.quant_map']
    """
    device = weight.packed.device
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        "": weight.packed,
        ".absmax": weight.absmax,
        ".quant_map": nf4_table(device).clone(),
    }
    if weight.nested_absmax is not None:
        assert weight.offset is not None
        tensors[".nested_absmax"] = weight.nested_absmax
        tensors[".nested_quant_map"] = dynamic_map(device).clone()
        state["nested_blocksize"] = GROUP_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.offset.item()
    encoded = json.dumps(state).encode()
    tensors[STATE_SUFFIX] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(device)
    return tensors


def from_bnb_tensors(tensors: Mapping[str, Tensor], *, name: str) -> NF4Weight:
    """Read one weight back from its tensors.

    Args:
        tensors: suffix to tensor, as `to_bnb_tensors` returns them. Packed bytes
            may be stored under another dtype (bitsandbytes' `quant_storage`).
        name: the weight's full name, for errors.

    Returns:
        The weight; tensors are used as they are, not copied.

    Raises:
        FormatError: a tensor is missing or does not fit, the code or a map is
            not ours, or the JSON is damaged.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(4, 64))
        >>> from_bnb_tensors(to_bnb_tensors(weight), name="w").shape
        (4, 64)
    """
    state = _read_state(tensors, name)
    nested = "nested_offset" in state
    needed = ["", ".absmax", ".quant_map"]
    needed += [".nested_absmax", ".nested_quant_map"] if nested else []
    missing = [suffix or "the packed weight" for suffix in needed if suffix not in tensors]
    if missing:
        raise FormatError(f"{name}: {', '.join(missing)} missing. The checkpoint is incomplete.")
    _check_map(tensors[".quant_map"], nf4_table(_CPU), f"{name}.quant_map", "NF4")
    if nested:
        _check_map(
            tensors[".nested_quant_map"], dynamic_map(_CPU), f"{name}.nested_quant_map", "dynamic"
        )
    shape = tuple(state["shape"])
    packed = tensors[""].contiguous().view(torch.uint8).reshape(-1, 1)
    absmax = tensors[".absmax"]
    nested_absmax = tensors[".nested_absmax"].reshape(-1) if nested else None
    blocks = -(-prod(shape) // state["blocksize"])
    sizes = {
        "the packed weight": (packed.numel(), (prod(shape) + 1) // 2),
        ".absmax": (absmax.numel(), blocks),
    }
    if nested_absmax is not None:
        sizes[".nested_absmax"] = (nested_absmax.numel(), -(-blocks // GROUP_SIZE))
    for what, (came, wanted) in sizes.items():
        if came != wanted:
            raise FormatError(
                f"{name}: {what} has {came} elements, but shape {shape} in blocks of "
                f"{state['blocksize']} needs {wanted}. The checkpoint is damaged."
            )
    if absmax.dtype != (torch.uint8 if nested else torch.float32):
        raise FormatError(
            f"{name}.absmax is {absmax.dtype}, needed "
            f"{'uint8 (double quantization)' if nested else 'float32'}."
        )
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32) if nested else None
    return NF4Weight(
        packed=packed,
        absmax=absmax.reshape(-1),
        nested_absmax=nested_absmax,
        offset=None if offset is None else offset.to(packed.device),
        shape=shape,
        block_size=state["blocksize"],
        dtype=_DTYPES[state["dtype"]],
    )


def _read_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON of a weight, with every field checked."""
    if STATE_SUFFIX not in tensors:
        other = [key for key in tensors if ".quant_state." in key]
        if other:
            raise FormatError(
                f"{name} is stored as {other[0].rpartition('__')[2]}, only nf4 is supported. "
                "Quantize the 16-bit model to NF4 instead."
            )
        raise FormatError(f"{name}: {STATE_SUFFIX} missing. This is not an NF4 weight.")
    try:
        state = json.loads(bytes(tensors[STATE_SUFFIX].cpu().flatten().tolist()))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(f"{name}{STATE_SUFFIX} is not JSON: {error}.") from error
    if not isinstance(state, dict):
        raise FormatError(f"{name}{STATE_SUFFIX} must hold a JSON object.")
    _check_state(state, f"{name}{STATE_SUFFIX}")
    return state


def _check_state(state: dict[str, Any], where: str) -> None:
    """Refuse a JSON object with a missing or impossible field, naming it."""
    shape = state.get("shape")
    valid_shape = (
        isinstance(shape, list)
        and len(shape) >= 1
        and all(type(size) is int and size > 0 for size in shape)
    )
    checks = {
        "quant_type": state.get("quant_type") == "nf4",
        "blocksize": state.get("blocksize") in BLOCK_SIZES,
        "dtype": state.get("dtype") in _DTYPES,
        "shape": valid_shape,
    }
    if "nested_offset" in state or "nested_blocksize" in state:
        checks["nested_blocksize"] = state.get("nested_blocksize") == GROUP_SIZE
        checks["nested_dtype"] = state.get("nested_dtype", "float32") == "float32"
        checks["nested_offset"] = isinstance(state.get("nested_offset"), float | int)
    for key, valid in checks.items():
        if not valid:
            raise FormatError(f"{where}: {key} is {state.get(key)!r}, which is not supported.")


def _check_map(stored: Tensor, ours: Tensor, where: str, kind: str) -> None:
    if stored.shape != ours.shape or not torch.equal(stored.cpu().float(), ours):
        raise FormatError(
            f"{where} is not the {kind} map this package decodes with. The checkpoint was written "
            "with other code values; quantize the 16-bit model again."
        )
