"""How fast this machine's host launches work: what small batches without a CUDA graph wait for.

A step's time on the host is a sum over its ops, Python included, and hosts differ by half and
more. What is measured here is a small piece of such work: functions of autograd in Python whose
ops are so short that the GPU waits for them. A plan scales the time of every op by it. It takes
about 35 ms, nothing is compiled for it, and no library's workspace is made.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ASSUMED_US = 22.0
"""Of the host that `costs.py` has its times of: a plan without a GPU at hand is for this one.
Fitted to seven steps that waited for Python on an H200's host of 11 to 13 µs; it meets them within
13%."""

_LAYERS, _OPS = 40, 5
"""Functions in a row, and ops of each, forward and backward."""
_SHAPE = (8, 64)
_WARM, _PASSES = 3, 12


class _Small(torch.autograd.Function):
    """y = x·w + x, with a gradient of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        y = torch.empty_like(x)
        torch.mul(x, w, out=y)
        ctx.save_for_backward(x, w)
        return y.add_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = gradients
        x, w = ctx.saved_tensors
        return (dy * w).add_(dy), dy * x


def host_us_per_op(
    device: str | torch.device = "cpu", *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Measure the host's time for one small op, what leads to it included.

    Args:
        device: where the ops would run; on a GPU nothing waits for them.
        clock: seconds since some moment.

    Returns:
        Microseconds, the median of some passes.

    Example:
        >>> ticks = iter(range(1000))
        >>> host_us_per_op(clock=lambda: next(ticks) * 1e-3)  # a pass of 200 ops takes 1 ms
        5.0
    """
    x = torch.ones(_SHAPE, device=device)
    weights = [torch.ones(_SHAPE, device=device, requires_grad=True) for _ in range(_LAYERS)]
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(_WARM + _PASSES):
            if x.is_cuda:  # needs a GPU
                torch.cuda.synchronize()
            began = clock()
            y = x
            for weight in weights:
                y = _Small.apply(y, weight)
            torch.autograd.grad(y, weights, x)
            times.append(clock() - began)
    finally:
        if collecting:
            gc.enable()
    return round(1e6 * statistics.median(times[_WARM:]) / (_LAYERS * _OPS), 2)
