"""Whether a launch may read a weight before the kernel ahead of it has ended.

A kernel that begins early reads its weight before it waits. What an ordinary kernel has just
written is only promised to be in memory after that wait, so the first launch since a weight was
written begins as usual.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qlora_kit.quant.weight import NF4Weight

_Versions = tuple[tuple[int, int], ...]

_KNOWN: MutableMapping[Tensor, dict[int, _Versions]] = WeakIdKeyDictionary()
"""Packed weights, or what they are views of, to addresses in them to where the weight there and its
scales lay at its last launch, and in which version."""


def may_be_read_early(weight: NF4Weight) -> bool:
    """Tell whether nobody has written a weight since its last launch; this is one.

    Args:
        weight: on any device.

    Returns:
        True from the second launch on, until torch counts another version of the weight or its
        scales; in a captured graph from the first on.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(64, 64))
        >>> may_be_read_early(weight), may_be_read_early(weight)
        (False, True)
    """
    now = tuple(
        (part.data_ptr(), 0 if part.is_inference() else part._version)
        for part in (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
        if part is not None
    )
    whole = weight.packed if weight.packed._base is None else weight.packed._base
    known = _KNOWN.setdefault(whole, {})
    before = known.get(weight.packed.data_ptr())
    known[weight.packed.data_ptr()] = now
    if before is None:
        return weight.packed.is_cuda and torch.cuda.is_current_stream_capturing()
    return before == now
