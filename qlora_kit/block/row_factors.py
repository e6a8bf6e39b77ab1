"""Factors on the rows of decoded weights (DoRA), of all layers of a model in a few launches.

A row is stretched by its scales, one float32 per 64 weights, before the weight is decoded: no
pass over the decoded weight, and no second rounding.

With A' (R, K) and B (n, R) the operands of a group, ‖V‖ the row lengths of V = W + B·A' and m the
trained lengths, f = m/‖V‖. What is rounded to the compute dtype is f - 1, which is small: f itself
lies near one, where neighbours in bfloat16 are 0.8% apart. The one product that reads W is W·A'ᵀ,
the 4-bit weight applied to R rows; all else is done for all groups of one shape at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora.dora import row_lengths
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.layout import arithmetic_dtype
from qlora_kit.ops.nf4_scales.op import has_whole_rows

if TYPE_CHECKING:
    from qlora_kit.block.projection import Group, Part

MOST_VALUES = 1 << 24
"""Of B that are looked at together: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class RowFactors:
    """Of one group; f - 1 as rounded counts everywhere."""

    change: Tensor
    """(n,) f - 1 in the compute dtype."""
    factor: Tensor
    """(n, 1) f in float32, for W's scales; dB is f ⊙ what B's stretched rows would get."""
    per_length: Tensor
    """(n,) 1/m in float32, zero where m is: dm is the sum of dY ⊙ Y times this."""


def can_stretch(module: nn.Module) -> bool:
    """Whether the rows of a linear's weight can be stretched while it is decoded.

    Args:
        module: the base.

    Returns:
        False for a 4-bit weight of which blocks run across rows.

    Example:
        >>> can_stretch(nn.Linear(2, 2))
        True
    """
    if not isinstance(module, NF4Linear):
        return True
    return has_whole_rows(module.nf4_weight)


def stretch(groups: Sequence["Group"]) -> None:
    """Work out the factors of groups, and stretch the rows of their B.

    Args:
        groups: with A and B as they were just rounded; `rows` is set and `b` modified.
    """
    alike: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        parts = [(part.rows.stop, part.ranks.stop, part.lengths is None) for part in group.parts]
        alike.setdefault((group.k, *parts), []).append(group)
    for found in alike.values():
        step = max(1, MOST_VALUES // (found[0].n * found[0].r))
        for start in range(0, len(found), step):
            _stretch(found[start : start + step])


def _stretch(groups: Sequence["Group"]) -> None:
    """Groups of one shape, L of them."""
    n, r, count = groups[0].n, groups[0].r, len(groups)
    a, b = torch.stack([g.a for g in groups]), torch.stack([g.b for g in groups])
    dtype = arithmetic_dtype(b)
    of_parts = [_of_part(part, g, dtype) for g in groups for part in g.parts]
    products, wanted, squares = zip(*of_parts, strict=True)
    cross = torch.cat(products, dim=1).view(r, count, n).permute(1, 2, 0)
    m = torch.cat(wanted).view(count, n)
    change = m / row_lengths(torch.cat(squares).view(count, n), a, b, cross) - 1.0
    for part in groups[0].parts:
        if part.lengths is None:
            change[:, part.rows] = 0.0
    change = change.to(b.dtype)
    torch._foreach_copy_([g.b for g in groups], list(torch.addcmul(b, b, change[:, :, None])))
    factor = (change.to(dtype) + 1.0)[:, :, None]
    per_length = torch.where(m == 0, 0.0, 1.0 / m)
    for group, *rows in zip(groups, change, factor, per_length, strict=True):
        group.rows = RowFactors(*rows)


def _of_part(part: "Part", group: "Group", dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A'·Wᵀ (r, rows), m and ‖Ŵ‖² (rows,); of rows without trained lengths anything."""
    if part.lengths is None:
        rows = part.shape[0]
        ones = group.b.new_ones(rows, dtype=dtype)
        return group.b.new_zeros((group.r, rows)), ones, ones
    m, squares = part.lengths
    return part.multiply(group.a), m.to(dtype), squares.to(dtype)
