"""Autocast for a model's own code on the meta device, where torch has none.

Linear layers get their operands in 16 bits where masters are float32, and attention casts for
itself. Weights are cast once per forward pass, and the copies live until it is differentiated,
as torch's do.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlora_kit.ops.autocast import suppose
from qlora_kit.plan.setup import FULL, Setup

_CAST = (
    nn.functional.linear,
    torch.matmul,
    torch.bmm,
    torch.addmm,
)
_ATTENTION = nn.functional.scaled_dot_product_attention
_ALIGNED = 16
"""Columns of a mask that a kernel reads are a multiple of this."""


class OwnCode(TorchFunctionMode):
    """Stands in for a GPU's autocast; see the module's text.

    Example:
        >>> x = torch.empty(2, 64, device="meta")
        >>> with OwnCode(Setup(method="full", bits=16)):
        ...     nn.functional.linear(x, x).dtype
        torch.bfloat16
    """

    def __init__(self, setup: Setup) -> None:
        """Read what is cast.

        Args:
            setup: of the run.
        """
        super().__init__()
        mixed = setup.method == FULL and setup.mixed and setup.dtype != "float32"
        self.dtype: torch.dtype | None = getattr(torch, setup.dtype) if mixed else None
        self._copies: dict[int, Tensor] = {}
        self._supposed = ExitStack()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast operands, leave the rest."""
        if self.dtype is not None and func in _CAST:
            args = tuple(self._cast(a) if isinstance(a, Tensor) else a for a in args)
        mask = (kwargs or {}).get("attn_mask")
        if func is _ATTENTION and mask is not None:
            query, key, value = args
            return _masked_attention(query, key, value, mask)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "OwnCode":
        """Begin to cast."""
        self._supposed.enter_context(suppose(self.dtype))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Let go of the copies."""
        self._copies.clear()
        super().__exit__(*raised)
        self._supposed.close()

    def _cast(self, tensor: Tensor) -> Tensor:
        """The tensor as autocast would hand it over."""
        if self.dtype is None or tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(self.dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self.dtype)
        return self._copies[id(tensor)]


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What a GPU runs where a mask is given, and the meta device would not: nothing (T, S) but it.

    Args:
        query: (B, H, T, D).
        key: (B, H or fewer, S, D).
        value: as `key`.
        mask: (B or 1, 1, T, S), booleans or summands.

    Returns:
        (B, H, T, D).
    """
    heads, width = query.shape[1], mask.shape[-1]
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    summands = mask.to(query.dtype)  # booleans become zeros and infinities
    padded = nn.functional.pad(summands, (0, -width % _ALIGNED))[..., :width]
    shape = (*query.shape[:3], width)
    made = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, padded.expand(shape), True
    )
    result: Tensor = made[0]
    return result
