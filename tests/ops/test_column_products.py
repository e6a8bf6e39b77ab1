"""Every backend of column_products against float64, in every layout; wrong answers do not pass.

A sum of M products in float32 is off by no more than M + 2 units of 2**-24 of the sum of
magnitudes, whatever the order.
"""

import pytest
import torch

from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.column_products.cuda import divide
from qlora_kit.ops.column_products.op import column_products
from tests.ops.rows import DTYPES, LAYOUTS, Buffer, S, Within, device_of, values

BACKENDS = available_backends("column_products")
SHAPES = [(1, 8), (1, 1), (3, 7), (8, 256), (33, 264), (300, 64), (1025, 40), (2000, 2056)]


def truth(a, b):
    """The sums, and how far off they may be."""
    products = a.double() * b.double()
    return Within(products.sum(0), (len(a) + 2) * S * products.abs().sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_match_float64(shape, dtype, backend, layout):
    device = device_of(backend)
    a, b = values(*shape).to(dtype), values(*shape, seed=1).to(dtype)
    first = Buffer(shape, dtype, device, layout, a)
    second = Buffer(shape, dtype, device, layout, b, index=1)
    with force_backend(backend):
        got = column_products(first.view, second.view)
        again = column_products(first.view, second.view)
    assert got.shape == shape[1:]
    assert got.dtype == torch.float32
    assert torch.equal(got, again)
    wanted = truth(a, b)
    wanted.check(got)
    if shape[0] > 1:
        wanted.check_refuses(got + (a[-1] * b[-1]).float().to(got.device), "a row twice")
    if shape[1] > 8:
        wanted.check_refuses(got.roll(1), "a column off")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    a = torch.empty(0, 16, device=device_of(backend))
    with force_backend(backend):
        assert column_products(a, a).tolist() == [0.0] * 16


def test_float64():
    a, b = values(9, 5), values(9, 5, seed=1)
    torch.testing.assert_close(column_products(a, b), (a * b).sum(0))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 8192, 8193])
@pytest.mark.parametrize("n", [8, 264, 4096, 28672])
@pytest.mark.parametrize("resident", [8, 528])
def test_strips_cover_all_rows_once(rows, n, resident):
    columns, strips = divide(rows, n, 2, resident)
    strip = -(-rows // strips)
    assert (columns - 1) * 256 < n <= columns * 256
    assert (strips - 1) * strip < rows <= strips * strip


def test_what_is_refused():
    a = torch.ones(2, 3)
    with pytest.raises(ShapeError, match="b"):
        column_products(a, torch.ones(3, 3))
    with pytest.raises(UserError):
        column_products(a.requires_grad_(), torch.ones(2, 3))


def test_on_the_meta_device():
    a = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    found = column_products(a, a)
    assert (found.shape, found.dtype) == ((6,), torch.float32)
