"""`nf4_scales` in plain torch."""

from torch import Tensor

from qlora_kit.quant.double_quant import dequantize_absmax


def stretched(
    absmax: Tensor, nested: Tensor | None, offset: Tensor | None, factors: Tensor
) -> Tensor:
    """Decode scales and stretch those of each row; see `op.stretched_weight`.

    Args:
        absmax: (blocks,) uint8 codes, or float32.
        nested: (groups,) float32, or None.
        offset: () float32, or None.
        factors: (N,) float32; divides the blocks.

    Returns:
        (blocks,) float32.

    Example:
        >>> import torch
        >>> stretched(torch.ones(4), None, None, torch.tensor([1.0, 3.0])).tolist()
        [1.0, 1.0, 3.0, 3.0]
    """
    scales = absmax
    if nested is not None:
        assert offset is not None
        scales = dequantize_absmax(absmax, nested, offset)
    return (scales.view(factors.numel(), -1) * factors.view(-1, 1)).view(-1)
