"""`nf4_linear` on CUDA: several strategies, and the one place that chooses among them.

The low-rank factor's product with A (or B, in the backward) comes first
(`low_rank`); a strategy then does the one large product with everything
added in the same pass.
`ROWS` says which strategy serves how many rows on which architecture; it was filled
in from measurements (docs/kernels.md). A choice can be forced, by
`QLORA_KIT_NF4_LINEAR=dense` or `force_strategy`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from qlora_kit.core.errors import BackendError
from qlora_kit.core.log import log_once
from qlora_kit.ops.jit import architecture_of
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_linear import (
    ahead,
    dense,
    gemv,
    hopper,
    low_rank,
    portable,
    reference,
    small_m,
)
from qlora_kit.quant.weight import NF4Weight

STRATEGIES: dict[str, ModuleType] = {
    "small_m": small_m,
    "gemv": gemv,
    "portable": portable,
    "hopper": hopper,
    "ahead": ahead,
    "dense": dense,
}
"""Each has `serves`, `multiply` and, where it has a transposed product, `multiply_transposed`."""

FUSED_ROWS = 1280
"""Most rows that `hopper` serves, in either direction."""

ROWS: dict[tuple[str, str], tuple[tuple[int, str], ...]] = {
    ("hopper", "multiply"): ((16, "gemv"), (FUSED_ROWS, "hopper"), (2**30, "ahead")),
    ("hopper", "multiply_transposed"): ((768, "hopper"), (2**30, "ahead")),
    ("other", "multiply"): ((16, "small_m"), (256, "portable")),
    ("other", "multiply_transposed"): ((256, "portable"),),
}
"""Per architecture and product: up to so many rows, this strategy; beyond, and where it cannot
serve, `dense`.

Where the weight's shape matters as well, `_gemv_is_taken` says so."""

ENVIRONMENT_VARIABLE = "QLORA_KIT_NF4_LINEAR"

_forced: ContextVar[str | None] = ContextVar("qlora_kit_forced_strategy", default=None)

serves = nf4_dequantize.serves


@contextmanager
def force_strategy(name: str) -> Iterator[None]:
    """Run every nf4_linear inside the block with one strategy.

    Args:
        name: a member of `STRATEGIES`.

    Yields:
        Nothing.

    Raises:
        BackendError: no strategy has this name. A call it cannot serve raises too.

    Example:
        >>> with force_strategy("dense"):
        ...     pass
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def strategy_for(x: Tensor, weight: NF4Weight, product: str = "multiply") -> str:
    """Choose the strategy of a call.

    Args:
        x: (M, K), or (M, N) for the transposed product.
        weight: (N, K).
        product: `multiply` or `multiply_transposed`.

    Returns:
        A member of `STRATEGIES`.

    Raises:
        BackendError: a strategy was forced that is unknown or cannot serve the call.
    """
    forced = _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        _check_name(forced)
        if not _can_serve(forced, x, weight, product):
            raise BackendError(
                f"nf4_linear cannot run with the forced strategy {forced!r}: {product} of "
                f"{tuple(x.shape)} {x.dtype} with a weight of shape {weight.shape} on {x.device}."
            )
        return forced
    for most, name in ROWS[_architecture(x.device), product]:
        taken = x.shape[0] <= most and (name != "gemv" or _gemv_is_taken(x, weight))
        if taken and _can_serve(name, x, weight, product):
            return name
    return "dense"


def _check_name(name: str) -> None:
    if name not in STRATEGIES:
        raise BackendError(
            f"no strategy of nf4_linear is called {name!r}; known: {', '.join(STRATEGIES)}."
        )


def _can_serve(name: str, x: Tensor, weight: NF4Weight, product: str) -> bool:
    module = STRATEGIES[name]
    return hasattr(module, product) and bool(module.serves(x, weight))


def _gemv_is_taken(x: Tensor, weight: NF4Weight) -> bool:
    """Whether `gemv` is faster than `hopper`, as far as both have been timed.

    It costs less to begin and more per weight and row. On 4096 x 4096 it takes 0.72 to 0.93 of the
    time, on 4096 x 14336 0.80 to 0.93 up to 8 rows and 1.11 for 16; on the other sizes 1.05 and
    more.
    """
    shape = tuple(weight.shape)
    return shape == (4096, 4096) or (shape == (4096, 14336) and x.shape[0] <= 8)


def _architecture(device: torch.device) -> str:
    return "hopper" if architecture_of(device) == "sm_90a" else "other"


def _ready(x: Tensor) -> Tensor:
    """The tensor, contiguous and aligned to 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def forward(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute y = x·Wᵀ + (scale·x·Aᵀ)·Bᵀ + bias; see `reference.forward`.

    Args:
        x: (M, K), on a CUDA device.
        weight: (N, K).
        bias: (N,) or None.
        lora_a: (r, K) or None.
        lora_b: (N, r) or None.
        scale: factor on the low-rank product.

    Returns:
        y: (M, N) in the dtype of x.
        xa: (M, r) = scale·x·Aᵀ in the dtype of x; (M, 0) without LoRA.
    """
    x = _ready(x)
    bias = None if bias is None else _ready(bias.to(x.dtype))
    name = strategy_for(x, weight)
    log_once(f"nf4_linear: {name}")
    module = STRATEGIES[name]
    if lora_a is None or lora_b is None or not lora_a.shape[0]:
        y = module.multiply(x, weight, bias, None, None)
        return y, x.new_empty((x.shape[0], 0))
    a, b = _ready(lora_a.to(x.dtype)), _ready(lora_b.to(x.dtype))
    if hasattr(module, "multiply_low_rank") and a.shape[0] % 8 == 0:
        y, xa = module.multiply_low_rank(x, weight, bias, a, b, scale)
        return y, xa
    xa = low_rank.product(x, a.T, scale)
    return module.multiply(x, weight, bias, xa, b), xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor,
    scale: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`; see `reference.backward`, which has the same arguments.

    Args:
        dy: (M, N), on a CUDA device.
        x: (M, K), needed for dA only.
        weight: (N, K).
        lora_a: (r, K) or None.
        lora_b: (N, r) or None.
        xa: (M, r), the forward's second result.
        scale: factor on the low-rank product.
        need_dx: whether dX is wanted.
        need_da: whether dA is wanted.
        need_db: whether dB is wanted.
        need_dbias: whether the bias gradient is wanted.

    Returns:
        dx: (M, K) in the dtype of dy.
        da: (r, K) in the dtype of lora_a.
        db: (N, r) in the dtype of lora_b.
        dbias: (N,) float32.
    """
    dy = _ready(dy)
    dx, dyb = dy.new_empty(0), None
    if need_dx:
        dx, dyb = _input_gradient(dy, weight, lora_a, lora_b, scale)
    elif need_da and lora_b is not None:
        dyb = low_rank.product(dy, _ready(lora_b.to(dy.dtype)), scale)
    small = reference.small_gradients(dy, x, dyb, xa, lora_a, lora_b, need_da, need_db, need_dbias)
    return dx, *small


def _input_gradient(
    dy: Tensor, weight: NF4Weight, lora_a: Tensor | None, lora_b: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """dX, and dYB = scale·dY·B where there is LoRA."""
    name = strategy_for(dy, weight, "multiply_transposed")
    log_once(f"nf4_linear backward: {name}")
    module = STRATEGIES[name]
    if lora_a is None or lora_b is None:
        return module.multiply_transposed(dy, weight, None, None), None
    if not lora_a.shape[0]:
        empty = dy.new_empty((dy.shape[0], 0))
        return module.multiply_transposed(dy, weight, None, None), empty
    a, b = _ready(lora_a.to(dy.dtype)), _ready(lora_b.to(dy.dtype))
    if hasattr(module, "multiply_transposed_low_rank") and a.shape[0] % 8 == 0:
        dx, dyb = module.multiply_transposed_low_rank(dy, weight, a, b, scale)
        return dx, dyb
    dyb = low_rank.product(dy, b, scale)
    return module.multiply_transposed(dy, weight, dyb, a), dyb
