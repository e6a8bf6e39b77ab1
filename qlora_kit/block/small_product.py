"""LoRA's small products of a group: X·Aᵀ beside X, dY·B beside dY.

Of few rows they are torch's: what an op of ours takes of the host's time is more than it saves.
"""

import torch
from torch import Tensor

from qlora_kit.ops.low_rank_product.cuda import is_large
from qlora_kit.ops.low_rank_product.op import low_rank_product


def small_product(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """Multiply many rows with a narrow matrix.

    Args:
        x: (M, K), any distance between rows.
        factor: (K, r); a transposed view will do.
        out: (M, r), any distance between rows, written.

    Example:
        >>> wide = torch.tensor([[1.0, 2.0, 0.0]])
        >>> small_product(wide[:, :2], torch.tensor([[3.0], [4.0]]), wide[:, 2:])
        >>> wide.tolist()
        [[1.0, 2.0, 11.0]]
    """
    (m, k), r = x.shape, factor.shape[1]
    if is_large(m, k, r):
        low_rank_product(x, factor, out=out)
    else:
        torch.mm(x, factor, out=out)
