"""Buffers, bounds and layouts that the tests of elementwise ops share.

A result is held against float64 arithmetic on the operands as the op sees them, value
by value. With u the unit roundoff of the dtype and s = 2**-24 that of float32, a
result y that is computed in float32 and rounded once lies within

    u·|y| + (float32 roundings on the way) · s · (what they round)

of the truth; each op's tests add up the second term. Factors of second order are
covered by 1.01. Below the smallest normal number a rounding costs half the smallest
subnormal one, whatever the value.
"""

from dataclasses import dataclass

import pytest
import torch

from tests.ops.helpers import UNIT

S = 2.0**-24
SECOND_ORDER = 1.01
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUBNORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}

LAYOUTS = {"packed": (0, 0), "spare columns": (16, 0), "odd distance": (3, 0), "shifted": (16, 1)}
"""Values between the rows, and before the first."""


def device_of(backend):
    """Where a backend is tested: `cuda` with a GPU, the reference always on the CPU."""
    return "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"


class Buffer:
    """A tensor that is a part of a wider buffer of NaN, which must stay NaN around it."""

    def __init__(self, shape, dtype, device, layout="packed", values=None, index=0):
        spare, shift = LAYOUTS[layout]
        spare += 16 * index if spare else 0  # no two of a call alike: strides must not be mixed up
        rows, *rest = shape
        width = torch.Size(rest).numel()
        self.all = torch.full((rows * (width + spare) + shift,), torch.nan, dtype=dtype).to(device)
        strides = (width + spare, *torch.empty(rest, device="meta").stride())
        self.view = self.all.as_strided(shape, strides, shift)
        self._place = shape, strides, shift
        if values is not None:
            self.view.copy_(values)

    def check_surroundings(self):
        around = torch.ones_like(self.all, dtype=torch.bool)
        around.as_strided(*self._place).fill_(False)
        assert self.all[around].isnan().all(), "values outside of the result were written"


@dataclass
class Within:
    """A true value, and how far from it a result may lie."""

    value: torch.Tensor
    """In float64, on the CPU."""
    slack: torch.Tensor
    """What float32 arithmetic may add to the rounding of the result."""

    def allowed(self, dtype):
        return SECOND_ORDER * (UNIT[dtype] * self.value.abs() + self.slack) + SUBNORMAL[dtype]

    def check(self, got, what=""):
        error = (got.double().cpu() - self.value).abs()
        over = error / self.allowed(got.dtype)
        assert (over <= 1).all(), f"{what}: {over.max().item():.3g} times what is allowed"

    def check_refuses(self, got, what=""):
        """The bound bites: this wrong answer is not within it."""
        with pytest.raises(AssertionError, match="times what is allowed"):
            self.check(got, what)


def values(*shape, seed=0):
    """Normal values in float64, reproducible."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
