"""`low_rank_product` in plain torch: one product."""

import torch
from torch import Tensor


def product(x: Tensor, factor: Tensor, scale: float, out: Tensor) -> None:
    """Compute scale·x·factor; see `op.low_rank_product`.

    Args:
        x: (M, K).
        factor: (K, r).
        scale: the factor on the result.
        out: (M, r), written.

    Example:
        >>> out = torch.empty(1, 1)
        >>> product(torch.ones(1, 2), torch.ones(2, 1), 0.5, out)
        >>> out.item()
        1.0
    """
    if scale == 1:
        torch.mm(x, factor, out=out)
    else:  # beta = 0: what `out` held is not read
        torch.addmm(out, x, factor, beta=0, alpha=scale, out=out)
