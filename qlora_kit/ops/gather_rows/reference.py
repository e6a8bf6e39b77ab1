"""`gather_rows` in plain torch."""

import torch
from torch import Tensor

_ALL_ONES = 255


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Copy rows; see `op.gather_rows`. Waits for the ids where the table is elsewhere.

    Args:
        table: (V, H), V at least 1.
        ids: any shape, int64.

    Returns:
        (*ids.shape, H) where the ids are.

    Example:
        >>> found = gather_rows(torch.arange(6.0).view(3, 2), torch.tensor([2, 3]))
        >>> found.tolist()
        [[4.0, 5.0], [nan, nan]]
    """
    rows, width = table.shape
    wanted = ids.reshape(-1).to(table.device)
    found = table.index_select(0, wanted.clamp(0, rows - 1))
    outside = (wanted < 0) | (wanted >= rows)
    found.view(torch.uint8).masked_fill_(outside[:, None], _ALL_ONES)
    return found.to(ids.device).view(*ids.shape, width)
