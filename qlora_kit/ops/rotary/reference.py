"""`rotary_` in plain torch."""

import torch
from torch import Tensor

from qlora_kit.ops.layout import arithmetic_dtype


def rotate_(
    heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool, source: Tensor | None = None
) -> None:
    """Turn pairs of values; see `op.rotary_`.

    Args:
        heads: (M, G, D), modified.
        cos: (rows, R); of each row the first half is read.
        sin: (rows, R), likewise.
        inverse: turn the other way.
        source: as heads, read instead; or None.

    Example:
        >>> heads = torch.tensor([[[1.0, 0.0, 5.0]]])
        >>> rotate_(heads, torch.zeros(1, 2), torch.ones(1, 2), False)
        >>> heads.tolist()
        [[[0.0, 1.0, 5.0]]]
    """
    dtype = arithmetic_dtype(heads)
    half = cos.shape[-1] // 2
    repeats = heads.shape[0] // max(cos.shape[0], 1)
    c = cos[:, :half].to(dtype).repeat(repeats, 1).unsqueeze(1)
    s = sin[:, :half].to(dtype).repeat(repeats, 1).unsqueeze(1)
    s = -s if inverse else s
    source = heads if source is None else source
    first, second = source[..., :half].to(dtype), source[..., half : 2 * half].to(dtype)
    turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    heads[..., : 2 * half].copy_(turned)
