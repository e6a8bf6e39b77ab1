"""Every backend of gated_activation against float64, in every layout; wrong answers do not pass.

What float32 arithmetic adds to the rounding of the result, in units of s = 2**-24: expf
and erff are good to 2 units in the last place (4 s), sums and products to s. With
t = −g for silu and −2z(g) for gelu_tanh, share = 1/(1 + e^t) is off by
share·((1 − share)·(4 + 4·|t|) + 2), as t itself is rounded four times; and
(1 − share)·share·|t| is never above 0.28. Of gelu's share, 1 + erf, the error is that
of the sum: absolute, 4. So shares are off by 6 at most, in absolute terms, and act(g)
by 8·|g|. The slope adds g·share·(1 − share) times at most 1.6·(1 + 0.134·g²), or
g·density: its error is below 16·(1 + |g|)². torch's own functions stay within both.
"""

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.gated_activation.op import (
    KINDS,
    gated_activation,
    gated_activation_backward,
)
from qlora_kit.ops.layout import spread
from tests.ops.rows import DTYPES, LAYOUTS, Buffer, S, Within, device_of, values

BACKENDS = available_backends("gated_activation")
SHAPES = [(1, 1), (3, 7), (300, 8), (5, 64), (4, 600), (2, 2056), (2, 4099), (1, 9000)]


def activate(gate, kind):
    """The activation function, in torch."""
    if kind == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


class Case:
    """Operands in a dtype, and the truth: result and gradients with what may be off."""

    def __init__(self, shape, dtype, kind, spread=3.0):
        self.kind, self.dtype = kind, dtype
        rows, f = shape
        gate = spread * values(rows, f)
        self.gate_up = torch.cat((gate, values(rows, f, seed=1)), dim=1).to(dtype)
        self.dact = values(rows, f, seed=2).to(dtype)
        leaf = self.gate_up.double().requires_grad_()
        gate, up = leaf.chunk(2, dim=-1)
        result = activate(gate, kind) * up
        result.backward(self.dact.double())
        gate, up, dact = gate.detach().abs(), up.detach().abs(), self.dact.double().abs()
        self.result = Within(result.detach(), 9 * S * gate * up)
        slack = torch.cat((16 * S * (1 + gate).square() * dact * up, 9 * S * gate * dact), dim=1)
        self.gradient = Within(leaf.grad, slack)


def run(case, backend, layout, aliased=False):
    """All three results of a backend, written into poisoned buffers of a layout."""
    device, dtype = device_of(backend), case.dtype
    rows, width = case.gate_up.shape
    gate_up = Buffer((rows, width), dtype, device, layout, case.gate_up)
    dact = Buffer((rows, width // 2), dtype, device, layout, case.dact, index=1)
    out, act = (Buffer((rows, width // 2), dtype, device, layout, index=i) for i in (2, 3))
    d_gate_up = Buffer((rows, width), dtype, device, layout, index=4)
    if aliased:
        d_gate_up, act = gate_up, dact
    with force_backend(backend):
        result = gated_activation(gate_up.view, case.kind, out=out.view)
        outputs = {"d_gate_up": d_gate_up.view, "act": act.view}
        gradient = gated_activation_backward(dact.view, gate_up.view, case.kind, **outputs)
    assert result is out.view
    assert gradient is d_gate_up.view
    for buffer in (gate_up, dact, out, act, d_gate_up):
        buffer.check_surroundings()
    return out.view, d_gate_up.view, act.view


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_match_float64(shape, backend, layout, kind):
    for dtype in DTYPES:
        for aliased in (False, True):
            case = Case(shape, dtype, kind)
            out, d_gate_up, act = run(case, backend, layout, aliased)
            what = f"{dtype}, in place: {aliased}"
            case.result.check(out, f"result, {what}")
            case.gradient.check(d_gate_up, f"gradient, {what}")
            case.result.check(act, f"again, {what}")
            assert torch.equal(out, act)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_magnitude(backend, kind):
    """Gates from the smallest to where the functions are 0 or 1."""
    for dtype in DTYPES:
        case = Case((40, 64), dtype, kind, spread=1.0)
        magnitudes = torch.logspace(-6, 2, 40, dtype=torch.float64).unsqueeze(1)
        case.gate_up[:, :64] = (magnitudes * case.gate_up[:, :64].double()).to(dtype)
        gate, up = case.gate_up.double().chunk(2, dim=-1)
        with force_backend(backend):
            got = gated_activation(case.gate_up.to(device_of(backend)), kind)
        value = activate(gate, kind) * up
        Within(value, 9 * S * (gate * up).abs()).check(got, str(dtype))


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_over_one_half_of_the_input(backend, half):
    for f in (64, 33):
        case = Case((5, f), torch.bfloat16, "silu")
        gate_up = case.gate_up.to(device_of(backend))
        other = gate_up.chunk(2, dim=1)[1 - half].clone()
        with force_backend(backend):
            out = gated_activation(gate_up, "silu", out=gate_up.chunk(2, dim=1)[half])
        case.result.check(out)
        assert torch.equal(gate_up.chunk(2, dim=1)[1 - half], other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_answers_do_not_pass(kind, dtype):
    case = Case((8, 96), dtype, kind)
    gate, up = case.gate_up.double().chunk(2, dim=-1)
    dact, f = case.dact.double(), gate.shape[1]
    wrong = {other: activate(gate, other) * up for other in KINDS if other != kind}
    wrong |= {
        "gate and up exchanged": activate(up, kind) * gate,
        "no up": activate(gate, kind),
        "no gate": activate(torch.ones_like(gate), kind) * up,
        "one column shifted": activate(gate, kind) * up.roll(1, 1),
    }
    for name, value in wrong.items():
        case.result.check_refuses(value.to(dtype), name)
    right = case.gradient.value
    case.gradient.check(right.to(dtype))
    wrong = {
        "halves exchanged": right.roll(f, 1),
        "no gradient of gate": torch.cat((dact * up, right[:, f:]), dim=1),
        "the slope without its second term": torch.cat(
            (dact * up * activate(gate, kind) / gate, right[:, f:]), dim=1
        ),
        "no dact": right / torch.cat((dact, dact), dim=1),
    }
    for name, value in wrong.items():
        case.gradient.check_refuses(value.to(dtype), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_rounded_once(kind, dtype):
    """Rounding the activation before the product, as models do, lies outside of the bound."""
    case = Case((16, 128), dtype, kind)
    gate, up = case.gate_up.chunk(2, dim=-1)
    case.result.check_refuses(activate(gate, kind) * up, "rounded twice")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_exact_in_float64(kind):
    gate_up, dact = values(6, 20).requires_grad_(), values(6, 10, seed=1)
    gate, up = gate_up.chunk(2, dim=-1)
    y = activate(gate, kind) * up
    y.backward(dact)
    act = torch.empty_like(dact)
    got = gated_activation_backward(dact, gate_up.detach(), kind, act=act)
    torch.testing.assert_close(got, gate_up.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(act, y.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_repeats_have_the_same_bits(kind, backend):
    for dtype in DTYPES:
        case = Case((5, 600), dtype, kind)
        first, again = (run(case, backend, "spare columns") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_pass_as_in_the_reference(kind, backend):
    gates = torch.tensor([torch.nan, -torch.inf, 0.0, -0.0, 1e-30, 200.0, -200.0, 3.0, torch.inf])
    if kind == "gelu":
        gates = gates[:-1]  # on a CPU, torch's gelu is NaN there
    ups = torch.tensor([1.0, torch.nan, torch.inf, 0.0, -torch.inf])
    gate_up = torch.cartesian_prod(gates, ups).T.contiguous().view(1, -1)
    dact = torch.ones(1, gate_up.shape[1] // 2)
    found = {}
    for name in ("reference", backend):
        device = device_of(name)
        with force_backend(name):
            act = torch.empty_like(dact, device=device)
            gradients = gated_activation_backward(
                dact.to(device), gate_up.to(device), kind, act=act
            )
        found[name] = torch.cat((gradients, act), dim=1).cpu()
    got, wanted = found[backend], found["reference"]
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[got.isinf()], wanted[wanted.isinf()])
    assert wanted.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0)], ids=str)
def test_nothing_is_fine(backend, shape):
    gate_up = torch.ones(shape, device=device_of(backend))
    with force_backend(backend):
        act = gated_activation(gate_up, "silu")
        assert act.shape == (shape[0], shape[1] // 2)
        assert gated_activation_backward(act, gate_up, "silu", act=act).shape == shape


def test_misfits_are_refused():
    gate_up, dact = torch.ones(4, 8), torch.ones(4, 4)
    with pytest.raises(ShapeError, match=r"kind in \('silu', 'gelu_tanh', 'gelu'\), got 'relu'"):
        gated_activation(gate_up, "relu")
    with pytest.raises(ShapeError, match=r"gate_up of shape \(M, 2F\), got \(4, 7\)"):
        gated_activation(torch.ones(4, 7), "silu")
    with pytest.raises(ShapeError, match=r"gate_up with 2 dimensions"):
        gated_activation(torch.ones(2, 2, 8), "silu")
    with pytest.raises(ShapeError, match=r"needs out of shape \(4, 4\)"):
        gated_activation(gate_up, "silu", out=torch.ones(4, 8))
    with pytest.raises(ShapeError, match=r"needs dact of shape \(4, 4\)"):
        gated_activation_backward(gate_up, gate_up, "silu")
    with pytest.raises(ShapeError, match=r"needs act of shape \(4, 4\)"):
        gated_activation_backward(dact, gate_up, "silu", act=gate_up)
    with pytest.raises(ShapeError, match=r"needs d_gate_up of shape \(4, 8\)"):
        gated_activation_backward(dact, gate_up, "silu", d_gate_up=dact)
    with pytest.raises(UserError, match="no gradient of its own"):
        gated_activation(torch.ones(4, 8, requires_grad=True), "silu")
    with pytest.raises(UserError, match="no gradient of its own"):
        gated_activation_backward(dact.requires_grad_(), gate_up, "silu")


def test_opcheck():
    gate_up, dact = torch.randn(4, 8), torch.randn(4, 4)
    op = torch.ops.qlora_kit
    torch.library.opcheck(op.gated_activation, (gate_up, "silu", torch.empty(4, 4)))
    for act in (None, torch.empty(4, 4)):
        arguments = (dact, gate_up, "gelu", torch.empty(4, 8), act)
        torch.library.opcheck(op.gated_activation_backward, arguments)


def test_compiled_code_calls_the_op():
    gate_up = torch.randn(4, 8)

    def both(gate_up):
        act = gated_activation(gate_up, "silu")
        wide = 2 * gate_up
        return act, gated_activation_backward(act, wide, "silu", d_gate_up=wide, act=act)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(gate_up), both(gate_up), strict=True):
        assert torch.equal(got, wanted)


def test_every_step_is_taken_once():
    """By which the CUDA kernels of gated_activation and rotary divide their work."""
    for rows in (1, 2, 300):
        for steps in (1, 3, 31, 64, 255, 256, 257, 1792, 5000):
            (along, parts), block, together = spread(rows, steps)
            assert block % 32 == 0
            assert block <= 256
            assert along * together >= rows > (along - 1) * together
            assert parts * block >= together * steps
            assert parts == 1 or together == 1


@pytest.mark.gpu
@pytest.mark.parametrize("f", [14_336, 4099])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(kind, f):
    """As many blocks as training has, in place, in a part of a wider buffer."""
    case = Case((4097, f), torch.bfloat16, kind)
    out, d_gate_up, act = run(case, "cuda", "spare columns", aliased=True)
    case.result.check(out)
    case.gradient.check(d_gate_up)
    case.result.check(act)
