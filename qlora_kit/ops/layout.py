"""What ops on rows ask of the tensors they are given.

A matrix may be a part of a wider buffer: its rows then lie further apart than they
are long. Values of one row always lie side by side.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError, UserError

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What such ops compute on; float64 only in plain torch, where gradients are checked."""


def check_rows(op: str, name: str, tensor: Tensor, dims: Sequence[int]) -> None:
    """Refuse an input that has no rows of neighbouring floats.

    Args:
        op: the op's name, for the error.
        name: the argument's name, for the error.
        tensor: what came.
        dims: numbers of dimensions that will do.

    Raises:
        ShapeError: the dimensions, dtype or strides do not fit.

    Example:
        >>> check_rows("rms_norm", "x", torch.ones(4, 6)[:, :5], (2, 3))
    """
    if tensor.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        raise ShapeError(
            f"{op} needs {name} with {wanted} dimensions, got shape {tuple(tensor.shape)}."
        )
    if tensor.dtype not in DTYPES:
        raise ShapeError(f"{op} needs {name} in {DTYPES}, got {tensor.dtype}.")
    _check_neighbours(op, name, tensor)


def check_like(
    op: str, name: str, tensor: Tensor | None, like: Tensor, shape: Sequence[int]
) -> None:
    """Refuse a tensor that does not belong beside another one.

    Args:
        op: the op's name, for the error.
        name: the argument's name, for the error.
        tensor: what came; None passes.
        like: has the wanted dtype and device.
        shape: the wanted shape.

    Raises:
        ShapeError: shape, dtype, device or strides do not fit.

    Example:
        >>> x = torch.ones(4, 6)
        >>> check_like("rms_norm", "out", torch.empty(4, 8)[:, :6], x, x.shape)
    """
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ShapeError(
            f"{op} needs {name} of shape {tuple(shape)} in {like.dtype} on {like.device}, got "
            f"{tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}."
        )
    _check_neighbours(op, name, tensor)


def check_unrecorded(op: str, *tensors: Tensor | None) -> None:
    """Refuse a call whose gradient autograd would be expected to record.

    Args:
        op: the op's name, for the error.
        *tensors: the call's inputs; None passes.

    Raises:
        UserError: gradients are recorded, and one of the tensors needs one.

    Example:
        >>> with torch.no_grad():
        ...     check_unrecorded("rms_norm", torch.ones(1, requires_grad=True))
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise UserError(
            f"{op} has no gradient of its own, and one of its inputs requires one. Call it and its "
            "backward from a torch.autograd.Function, or under torch.no_grad()."
        )


def _check_neighbours(op: str, name: str, tensor: Tensor) -> None:
    """Refuse rows whose values do not lie side by side."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ShapeError(
            f"{op} needs {name} with its last dimension contiguous, got strides "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}. Call .contiguous() first."
        )


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which plain torch computes: float32, or float64 for float64.

    Args:
        tensor: an input.

    Returns:
        The dtype.

    Example:
        >>> arithmetic_dtype(torch.ones(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


PIECE_BYTES = 16
"""What a thread reads or writes at once."""
THREADS = 256
"""Most threads of a block, where kernels do not say otherwise."""


def in_pieces(width: int, *tensors: Tensor | None) -> bool:
    """Tell whether rows are whole 16-byte pieces at 16-byte addresses.

    Args:
        width: values per row, or per part of a row.
        *tensors: of one dtype, their last dimension contiguous; None counts as fitting.

    Returns:
        Whether all of them fit.

    Example:
        >>> buffer = torch.empty(4, 24, dtype=torch.bfloat16)
        >>> in_pieces(16, buffer[:, :16]), in_pieces(16, buffer[:, 1:17]), in_pieces(12, buffer)
        (True, False, False)
    """
    for tensor in tensors:
        if tensor is None:
            continue
        size = tensor.element_size()
        if width * size % PIECE_BYTES or tensor.data_ptr() % PIECE_BYTES:
            return False
        if any(stride * size % PIECE_BYTES for stride in tensor.stride()[:-1]):
            return False
    return True


@lru_cache(maxsize=1024)
def spread(rows: int, steps: int) -> tuple[tuple[int, int], int, int]:
    """How rows of equally many steps are divided among blocks, one step a thread.

    Args:
        rows: how many rows; at least 1.
        steps: steps of each; at least 1.

    Returns:
        grid: blocks along the rows, and blocks along one row.
        block: threads of a block, a multiple of 32.
        together: rows of a block; 1 where a row takes several blocks.

    Example:
        >>> spread(8192, 1792), spread(100, 96)
        (((8192, 7), 256, 1), ((50, 1), 192, 2))
    """
    if steps > THREADS:
        parts = -(-steps // THREADS)
        return (rows, parts), _warps(-(-steps // parts)), 1
    together = min(THREADS // steps, rows)
    return (-(-rows // together), 1), _warps(together * steps), together


def _warps(threads: int) -> int:
    """The number rounded up to whole warps."""
    return -(-threads // 32) * 32
