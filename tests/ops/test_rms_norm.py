"""Every backend of rms_norm against float64, in every layout; wrong answers do not pass."""

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.rms_norm.cuda import plan
from qlora_kit.ops.rms_norm.op import rms_norm, rms_norm_backward
from tests.ops.rows import DTYPES, LAYOUTS, Buffer, S, Within, device_of, values

BACKENDS = available_backends("rms_norm")
SHAPES = [
    (1, 1),
    (3, 7),
    (300, 8),
    (9, 64),
    (5, 3, 128),
    (4, 2, 80),
    (3, 5, 63),
    (2, 896),
    (3, 1536),
    (3, 4096),
    (2, 5120),
    (2, 16_384),
    (2, 4099),
    (1, 40_000),
]
EPS = 1e-5
OPTIONS = [(False, False), (True, True), (False, True), (True, False)]
"""unit_offset, and whether there is a residual."""


class Case:
    """Operands in a dtype, and the truth: result and gradient with what may be off."""

    def __init__(self, shape, dtype, unit_offset, with_residual, wide_weight=True):
        self.unit_offset, self.dtype = unit_offset, dtype
        x, dy, residual = (values(*shape, seed=seed).to(dtype) for seed in range(3))
        weight = 0.3 * values(shape[-1]) + (0.0 if unit_offset else 1.0)
        self.x, self.dy = x, dy
        self.residual = residual if with_residual else None
        self.weight = weight.to(torch.float32 if wide_weight else dtype)
        self.gain = self.weight.double() + (1.0 if unit_offset else 0.0)
        self.normalized, self.result = self._forward()
        self.gradient = self._backward()

    def _scale(self):
        return (self.x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()

    @property
    def _scale_slack(self):
        """Relative: a sum of H squares, halved by the root; a division, a sum and the root."""
        return (self.x.shape[-1] ** 0.5 + 8) * S / 2 + 2 * S

    def _forward(self):
        value = F.rms_norm(self.x.double(), self.x.shape[-1:], self.gain, EPS)
        slack = (self._scale_slack + 3 * S) * value.abs()
        if self.residual is None:
            return Within(value, slack), Within(value, slack)
        total = value + self.residual.double()
        return Within(value, slack), Within(total, slack + S * total.abs())

    def _backward(self):
        x = self.x.double().requires_grad_()
        F.rms_norm(x, x.shape[-1:], self.gain, EPS).backward(self.dy.double())
        inner = self.dy.double() * self.gain
        unit = self.x.double() * self._scale()
        # scale · (inner − unit · mean): the mean is a sum of H products, then scaled
        size = (inner * unit).abs().mean(-1, keepdim=True)
        of_mean = (self.x.shape[-1] ** 0.5 + 8) * S + 2 * self._scale_slack + 6 * S
        slack = self._scale() * (
            inner.abs() * (self._scale_slack + 4 * S) + unit.abs() * size * of_mean
        )
        total = x.grad
        if self.residual is not None:
            total = total + self.residual.double()
            slack = slack + S * total.abs()
        return Within(total, slack)


def run(case, backend, layout, aliased=False):
    """All three results of a backend, written into poisoned buffers of a layout."""
    device, dtype, shape = device_of(backend), case.dtype, tuple(case.x.shape)

    def given(tensor, index):
        return None if tensor is None else Buffer(shape, dtype, device, layout, tensor, index)

    x, dy, residual = given(case.x, 0), given(case.dy, 1), given(case.residual, 2)
    out, dx, normalized = (Buffer(shape, dtype, device, layout, index=i) for i in (3, 4, 5))
    weight = case.weight.to(device)
    if aliased:
        dx = residual or dy
        normalized = dy if residual else x
    options = {"unit_offset": case.unit_offset, "residual": residual and residual.view}
    with force_backend(backend):
        if aliased:
            out = Buffer(shape, dtype, device, layout, case.x)
            result = rms_norm(out.view, weight, EPS, **options, out=out.view)
        else:
            result = rms_norm(x.view, weight, EPS, **options, out=out.view)
        assert result is out.view
        outputs = {"dx": dx.view, "normalized": normalized.view}
        gradient = rms_norm_backward(dy.view, x.view, weight, EPS, **options, **outputs)
        assert gradient is dx.view
    for buffer in (x, dy, residual, out, dx, normalized):
        if buffer is not None:
            buffer.check_surroundings()
    return out.view, dx.view, normalized.view


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradient_match_float64(shape, backend, layout):
    for index, dtype in enumerate(DTYPES):
        for position, options in enumerate(OPTIONS):
            case = Case(shape, dtype, *options, wide_weight=(index + position) % 2 == 0)
            for aliased in (False, True):
                out, dx, normalized = run(case, backend, layout, aliased)
                what = f"{dtype}, {options}, in place: {aliased}"
                case.result.check(out, f"result, {what}")
                case.gradient.check(dx, f"gradient, {what}")
                case.normalized.check(normalized, f"again, {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 128), (2, 4096)], ids=str)
def test_wrong_answers_do_not_pass(shape, dtype):
    case = Case(shape, dtype, True, True)
    x, dy, gain, residual = (
        tensor.double() for tensor in (case.x, case.dy, case.gain, case.residual)
    )
    h = shape[-1]

    def norm(x, gain, eps=EPS):
        return F.rms_norm(x, (h,), gain, eps)

    wrong = {
        "no residual": norm(x, gain),
        "no unit in the gain": norm(x, gain - 1) + residual,
        "another eps": norm(x, gain, 1e-3) + residual,
        "the mean taken off": norm(x - x.mean(-1, keepdim=True), gain) + residual,
        "one value left out": norm(x * (torch.arange(h) > 0), gain) + residual,
        "rows shifted": norm(x, gain).roll(1, 0) + residual,
        "twice rounded": norm(x, gain).to(dtype).double() * (1 + 2.0**-7) + residual,
    }
    if len(shape) == 3:
        wrong["heads normed together"] = (
            F.rms_norm(x, shape[1:], gain.expand(shape[1:]), EPS) + residual
        )
    for name, value in wrong.items():
        case.result.check_refuses(value.to(dtype), name)
    scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    inner, unit = dy * gain, x * scale
    mean = (inner * unit).mean(-1, keepdim=True)
    wrong = {
        "no mean": scale * inner + residual,
        "no gain": scale * (dy - unit * (dy * unit).mean(-1, keepdim=True)) + residual,
        "the mean added": scale * (inner + unit * mean) + residual,
        "no scale": inner - unit * mean + residual,
        "no residual": scale * (inner - unit * mean),
    }
    for name, value in wrong.items():
        case.gradient.check_refuses(value.to(dtype), name)
    case.gradient.check((scale * (inner - unit * mean) + residual).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_rounded_once(backend, dtype):
    """Rounding before the product with the weight, as models do, lies outside of the bound."""
    case = Case((40, 256), dtype, False, False)
    models = F.rms_norm(case.x.float(), (256,), None, EPS).to(dtype).float() * case.gain.float()
    case.result.check_refuses(models.to(dtype), "rounded twice")
    case.result.check(run(case, backend, "packed")[0])


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 5)], ids=str)
def test_the_reference_is_exact_in_float64(shape, unit_offset):
    """Gradients are checked in float64: there the reference computes in float64."""
    x, dy = values(*shape).requires_grad_(), values(*shape, seed=1)
    weight = values(shape[-1], seed=2)
    y = F.rms_norm(x, shape[-1:], weight + unit_offset, EPS)
    y.backward(dy)
    with torch.no_grad():
        got = rms_norm(x, weight, EPS, unit_offset=unit_offset)
        dx = rms_norm_backward(dy, x, weight, EPS, unit_offset=unit_offset)
    torch.testing.assert_close(got, y.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 128), (5, 4096), (7, 2, 33)], ids=str)
def test_repeats_have_the_same_bits(shape, backend):
    """And the backward's `normalized` has those of the forward's result."""
    for dtype in DTYPES:
        case = Case(shape, dtype, True, False)
        first = run(case, backend, "spare columns")
        again = run(case, backend, "spare columns")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(first[0], first[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h", [64, 2048, 33])
def test_nan_and_infinity_pass_as_in_the_reference(backend, h):
    x = values(4, h).float()
    x[0, 3], x[1, 4], x[2, 5] = torch.nan, torch.inf, -torch.inf
    weight, device = torch.ones(h), device_of(backend)
    found = {}
    for name in ("reference", backend):
        with force_backend(name):
            where = device_of(name)
            y = rms_norm(x.to(where), weight.to(where), EPS)
            dx = rms_norm_backward(torch.ones_like(y), x.to(where), weight.to(where), EPS)
            found[name] = y.cpu(), dx.cpu()
    for got, wanted in zip(found[backend], found["reference"], strict=True):
        assert torch.equal(got.isnan(), wanted.isnan()), device
        assert torch.equal(got.isinf(), wanted.isinf())
        assert got[3].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 4, 64), (2, 0, 64)], ids=str)
def test_nothing_is_fine(backend, shape):
    x = torch.ones(shape, device=device_of(backend))
    weight = torch.ones(shape[-1], device=device_of(backend))
    with force_backend(backend):
        assert rms_norm(x, weight, EPS, residual=x).shape == shape
        assert rms_norm_backward(x, x, weight, EPS, normalized=x.clone()).shape == shape


def test_misfits_are_refused():
    x, weight = torch.ones(4, 8), torch.ones(8)
    with pytest.raises(ShapeError, match=r"x with 2 or 3 dimensions, got shape \(8,\)"):
        rms_norm(torch.ones(8), weight, EPS)
    with pytest.raises(ShapeError, match=r"x in .*got torch.int64"):
        rms_norm(torch.ones(4, 8, dtype=torch.int64), weight, EPS)
    with pytest.raises(ShapeError, match="last dimension contiguous, got strides"):
        rms_norm(torch.ones(8, 4).T, weight, EPS)
    with pytest.raises(ShapeError, match=r"weight of shape \(8,\) on cpu, got \(4,\)"):
        rms_norm(x, torch.ones(4), EPS)
    with pytest.raises(ShapeError, match="needs residual of shape"):
        rms_norm(x, weight, EPS, residual=torch.ones(4, 9))
    with pytest.raises(ShapeError, match=r"needs out of shape .*torch.float32.*bfloat16"):
        rms_norm(x, weight, EPS, out=torch.ones(4, 8, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match="needs dy of shape"):
        rms_norm_backward(torch.ones(3, 8), x, weight, EPS)
    with pytest.raises(ShapeError, match="needs normalized with its last dimension contiguous"):
        rms_norm_backward(x, x, weight, EPS, normalized=torch.ones(8, 4).T)


def test_a_lost_gradient_is_refused():
    x, weight = torch.ones(4, 8, requires_grad=True), torch.ones(8)
    with pytest.raises(UserError, match="no gradient of its own"):
        rms_norm(x, weight, EPS)
    with pytest.raises(UserError, match="no gradient of its own"):
        rms_norm_backward(torch.ones(4, 8), x, weight, EPS)
    with torch.no_grad():
        rms_norm(x, weight, EPS)


def test_opcheck():
    x, dy = (torch.randn(4, 3, 8) for _ in range(2))
    weight, out = torch.ones(8), torch.empty(4, 3, 8)
    op = torch.ops.qlora_kit
    torch.library.opcheck(op.rms_norm, (x, weight, EPS, False, None, out))
    torch.library.opcheck(op.rms_norm, (x, weight, EPS, True, dy, out))
    arguments = (dy, x, weight, EPS, False, None, out, torch.empty_like(out))
    torch.library.opcheck(op.rms_norm_backward, arguments)
    torch.library.opcheck(op.rms_norm_backward, (*arguments[:-1], None))


def test_compiled_code_calls_the_op():
    x, weight = torch.randn(4, 8), torch.ones(8)

    def both(x, weight):
        y = rms_norm(x, weight, EPS)
        rms_norm(y, weight, EPS, residual=x, out=y)
        return y, rms_norm_backward(y, x, weight, EPS, residual=y, normalized=y)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(x, weight), both(x, weight), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_every_plan_covers_its_row(item_bytes):
    piece = 16 // item_bytes
    for h in [*range(piece, 4096, piece), *range(4096, 40_000, 8 * piece)]:
        for threads in (128, 256, 512):
            chosen = plan(h, item_bytes, True, threads)
            assert chosen.block % chosen.threads == 0
            assert chosen.block % 32 == 0
            assert chosen.block <= 512
            assert chosen.threads == chosen.block or 32 % chosen.threads == 0
            if chosen.kernel == "any":
                assert h // piece > 512 * 4
                continue
            slots = chosen.threads * int(chosen.kernel)
            assert h // piece <= slots < 2 * h // piece + 128 * int(chosen.kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (100_003, 64), (4097, 40, 128)], ids=str)
def test_many_rows(shape):
    """As many blocks as training has, in place, in a part of a wider buffer."""
    case = Case(shape, torch.bfloat16, False, True, wide_weight=False)
    out, dx, normalized = run(case, "cuda", "spare columns", aliased=True)
    case.result.check(out)
    case.gradient.check(dx)
    case.normalized.check(normalized)


@pytest.mark.gpu
def test_in_a_graph():
    x, dy = (torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(4096, device="cuda")
    wanted = rms_norm(x, weight, EPS), rms_norm_backward(dy, x, weight, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rms_norm(x, weight, EPS), rms_norm_backward(dy, x, weight, EPS)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
