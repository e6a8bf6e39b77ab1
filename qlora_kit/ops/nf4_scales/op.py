"""`nf4_scales`: an NF4 weight with stretched rows, by stretching its scales alone.

A scale stands for 64 weights, so that f ⊙ W (DoRA) costs a hundredth of a pass over W, and the
decoded weight is rounded once. Every backend gives the same bits: the scale as the format has it,
times its row's factor, in float32. Frozen: no gradient.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.nf4_scales import cuda, reference
from qlora_kit.quant.weight import NF4Weight

OP = "nf4_scales"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def has_whole_rows(weight: NF4Weight) -> bool:
    """Whether no block of scales runs from one row into the next.

    Args:
        weight: of any shape.

    Returns:
        True if its rows can be stretched.

    Example:
        >>> [has_whole_rows(NF4Weight.quantize(torch.ones(2, k))) for k in (128, 96)]
        [True, False]
    """
    return weight.shape[-1] % weight.block_size == 0


def stretched_weight(weight: NF4Weight, factors: Tensor) -> NF4Weight:
    """Stretch the rows of a weight.

    Args:
        weight: (N, K), K a multiple of the block size. Not modified.
        factors: (N,) or (N, 1) float32, one per row.

    Returns:
        A weight that shares the codes, with float32 scales.

    Raises:
        ShapeError: blocks run across rows, or the factors are not one per row.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> weight = NF4Weight.quantize(torch.ones(2, 64))
        >>> stretched_weight(weight, torch.tensor([1.0, 3.0])).dequantize()[:, 0]
        tensor([1., 3.])
    """
    rows = prod(weight.shape[:-1])
    if not has_whole_rows(weight) or factors.numel() != rows or factors.dtype != torch.float32:
        raise ShapeError(
            f"{OP} needs rows of whole blocks of {weight.block_size} and {rows} float32 factors "
            f"for a weight of shape {weight.shape}, got {tuple(factors.shape)} in {factors.dtype}."
        )
    scales: Tensor = torch.ops.qlora_kit.nf4_scales.default(
        weight.absmax, weight.nested_absmax, weight.offset, factors.reshape(-1)
    )
    return replace(weight, absmax=scales, nested_absmax=None, offset=None)


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "nf4_scales(Tensor absmax, Tensor? nested, Tensor? offset, Tensor factors) -> Tensor"
)


def _scales(
    absmax: Tensor, nested: Tensor | None, offset: Tensor | None, factors: Tensor
) -> Tensor:
    found: Tensor = resolve(OP, absmax).stretched(absmax, nested, offset, factors)
    return found


# By hand, as docs/decisions/0005 says.
_LIBRARY.impl("nf4_scales", _scales, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::nf4_scales")
def _(absmax: Tensor, nested: Tensor | None, offset: Tensor | None, factors: Tensor) -> Tensor:
    return absmax.new_empty(absmax.numel(), dtype=torch.float32)
