"""`low_rank_gradients` in plain torch: two products, each of which reads dY."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qlora_kit.ops.layout import arithmetic_dtype

_SAFE_ODD_ROWS = 1024
"""cuBLAS leaves the last of 8,193 rows out of a 16-bit sum (docs/decisions/0008)."""


def gradients(
    dy: Tensor,
    b: Tensor,
    xa: Tensor,
    column_ends: Sequence[int],
    rank_ends: Sequence[int],
    out: Tensor,
) -> Tensor:
    """Compute dY·B and dYᵀ·XA; see `op.low_rank_gradients`.

    Args:
        dy: (M, N).
        b: (N, R), zero outside of the parts.
        xa: (M, R).
        column_ends: where each part's columns of dy end.
        rank_ends: where each part's ranks end.
        out: (M, R), written with dY·B.

    Returns:
        dB, (N, most ranks of a part) float32; float64 for float64.

    Example:
        >>> out = torch.empty(3, 1)
        >>> gradients(torch.ones(3, 2), torch.ones(2, 1), torch.ones(3, 1), [2], [1], out).tolist()
        [[3.0], [3.0]]
        >>> out.tolist()
        [[2.0], [2.0], [2.0]]
    """
    if dy.is_cuda and dy.element_size() == 2:
        torch.mm(dy, b, out=out)
    else:
        dtype = arithmetic_dtype(dy)
        out.copy_(dy.to(dtype) @ b.to(dtype))
    if len(column_ends) == 1:
        return token_sum(dy, xa)
    d_b = dy.new_zeros((dy.shape[1], widest(rank_ends)), dtype=arithmetic_dtype(dy))
    columns, ranks = (pairwise([0, *ends]) for ends in (column_ends, rank_ends))
    for (column, column_end), (rank, rank_end) in zip(columns, ranks, strict=True):
        if rank_end > rank:
            part = token_sum(dy[:, column:column_end], xa[:, rank:rank_end])
            d_b[column:column_end, : rank_end - rank] = part
    return d_b


def widest(rank_ends: Sequence[int]) -> int:
    """The most ranks of a part.

    Args:
        rank_ends: where each part's ranks end.

    Returns:
        The number.

    Example:
        >>> widest([16, 16, 24])
        16
    """
    return max(end - start for start, end in pairwise([0, *rank_ends]))


def token_sum(left: Tensor, right: Tensor) -> Tensor:
    """Multiply leftᵀ·right, the sum over a batch's tokens, into float32.

    Args:
        left: (M, p).
        right: (M, q), of the same dtype.

    Returns:
        (p, q) float32; float64 for float64.

    Example:
        >>> token_sum(torch.ones(3, 1), torch.ones(3, 2)).tolist()
        [[3.0, 3.0]]
    """
    if left.is_meta:  # as on a GPU: no wide copies
        return (left.T @ right).to(arithmetic_dtype(left))
    if not left.is_cuda or left.element_size() != 2:
        dtype = arithmetic_dtype(left)
        return left.to(dtype).T @ right.to(dtype)
    rows = left.shape[0]  # needs a GPU
    if rows % 2 and rows > _SAFE_ODD_ROWS:
        last = left[-1:].T.float() * right[-1:].float()
        return token_sum(left[:-1], right[:-1]).add_(last)
    return torch.mm(left.T, right, out_dtype=torch.float32)
