"""`gather_rows`: rows of a table by their numbers; the table may lie in host memory.

A GPU reads page-locked host memory at its own address, so that the rows a batch needs come over
the link without the CPU's part: nothing waits for the ids. Any dtype: bits are copied.

The op has no gradient: tables in host memory are frozen.
"""

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.gather_rows import cuda, reference
from qlora_kit.ops.layout import PIECE_BYTES, check_unrecorded

OP = "gather_rows"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Copy rows of a table.

    Args:
        table: (V, H) of any dtype, V at least 1, values of a row side by side; on the device of
            the ids, or on the CPU. Where it is page-locked and its rows are whole pieces of 16
            bytes, ids on a GPU are looked up without waiting for them.
        ids: any shape, int64. Rows outside of [0, V) get all bits set: NaN in floating dtypes.

    Returns:
        (*ids.shape, H) in the table's dtype, contiguous, on the device of the ids.

    Raises:
        UserError: autograd records, and the table requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> gather_rows(torch.arange(6).view(3, 2), torch.tensor([[2, 0]])).tolist()
        [[[4, 5], [0, 1]]]
    """
    check_unrecorded(OP, table)
    if table.dim() != 2 or not table.shape[0] or (table.stride(1) != 1 and table.shape[1] > 1):
        raise ShapeError(
            f"{OP} needs table of shape (V, H), V at least 1, its rows contiguous, got shape "
            f"{tuple(table.shape)} with strides {table.stride()}."
        )
    if ids.dtype != torch.int64:
        raise ShapeError(f"{OP} needs ids in int64, got {ids.dtype}.")
    if table.device != ids.device and table.device.type != "cpu":
        raise ShapeError(
            f"{OP} needs table on the device of the ids ({ids.device}) or on the CPU, got "
            f"{table.device}."
        )
    found: Tensor = torch.ops.qlora_kit.gather_rows.default(table, ids)
    return found


def never_waits(table: Tensor, like: Tensor) -> bool:
    """Tell whether lookups in a table, once it is page-locked, do not wait for the ids.

    Args:
        table: (V, H), on the CPU.
        like: on the device of the ids.

    Returns:
        Whether a kernel serves that device, and rows are whole pieces of 16 bytes.

    Raises:
        BackendError: a forced backend cannot serve that GPU.

    Example:
        >>> never_waits(torch.ones(3, 8), torch.ones(1))
        False
    """
    whole = table.shape[0] > 0 and table.shape[1] * table.element_size() % PIECE_BYTES == 0
    return whole and like.is_cuda and resolve(OP, like) is cuda


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define("gather_rows(Tensor table, Tensor ids) -> Tensor")


def _gather(table: Tensor, ids: Tensor) -> Tensor:
    found: Tensor = resolve(OP, ids).gather_rows(table, ids)
    return found


# By hand, as docs/decisions/0005 says.
_LIBRARY.impl("gather_rows", _gather, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::gather_rows")
def _(table: Tensor, ids: Tensor) -> Tensor:
    return ids.new_empty((*ids.shape, table.shape[1]), dtype=table.dtype)
