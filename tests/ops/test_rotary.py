"""Every backend of rotary_ against float64, in every layout; wrong answers do not pass."""

import pytest
import torch

from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.rotary.op import rotary_
from tests.ops.rows import DTYPES, LAYOUTS, Buffer, S, Within, device_of, values

BACKENDS = available_backends("rotary")
SHAPES = [  # tokens, heads, head dimension, turned dimensions, rows of angles
    (6, 3, 128, 128, 6),
    (6, 3, 128, 128, 3),
    (5, 40, 64, 32, 1),
    (4, 2, 80, 20, 2),
    (7, 1, 16, 16, 7),
    (3, 5, 9, 6, 3),
    (2, 300, 16, 16, 2),
    (3, 1, 2, 2, 3),
    (2, 2, 8, 0, 2),
]


def angles(rows, turned, dtype=torch.float64, scaling=1.0):
    """cos and sin in transformers' layout, scaled as YaRN scales them."""
    angle = (10 * values(rows, turned // 2)).repeat(1, 2)
    return (scaling * angle.cos()).to(dtype), (scaling * angle.sin()).to(dtype)


def rotate_half(heads):
    """transformers' words for the second point of a pair."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def truth(heads, cos, sin, inverse):
    """The result as transformers writes it, and what three roundings may be off."""
    heads = heads.double()
    repeats = heads.shape[0] // cos.shape[0]
    cos, sin = (t.double().repeat(repeats, 1).unsqueeze(1) for t in (cos, sin))
    sin = -sin if inverse else sin
    turned = heads[..., : cos.shape[-1]]
    result, slack = heads.clone(), torch.zeros_like(heads)
    result[..., : cos.shape[-1]] = turned * cos + rotate_half(turned) * sin
    sizes = (turned * cos).abs() + (rotate_half(turned) * sin).abs()
    slack[..., : cos.shape[-1]] = 2 * S * sizes
    return Within(result, slack)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_match_float64(shape, backend, layout, inverse):
    tokens, heads, width, turned, rows = shape
    device = device_of(backend)
    for dtype in DTYPES:
        for angle_dtype in (dtype, torch.float32, torch.bfloat16):
            given = values(tokens, heads, width).to(dtype)
            cos, sin = angles(rows, turned, angle_dtype, scaling=1.2)
            wanted = truth(given, cos, sin, inverse)
            buffer = Buffer((tokens, heads, width), dtype, device, layout, given)
            # angles too may be a part of something wider
            cos, sin = (
                Buffer(t.shape, angle_dtype, device, layout, t, index).view
                for index, t in enumerate((cos, sin), 1)
            )
            with force_backend(backend):
                result = rotary_(buffer.view, cos, sin, inverse=inverse)
            assert result is buffer.view
            wanted.check(result, f"{dtype}, angles in {angle_dtype}")
            assert torch.equal(result[..., turned:].cpu(), given[..., turned:])
            buffer.check_surroundings()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_answers_do_not_pass(dtype):
    given = values(6, 3, 16).to(dtype)
    cos, sin = angles(3, 16, torch.float32)
    wanted = truth(given, cos, sin, False)

    def turned(heads, cos, sin, pairs=rotate_half, repeat=lambda t: t.repeat(2, 1)):
        cos, sin = (repeat(t.double()).unsqueeze(1) for t in (cos, sin))
        return (heads.double() * cos + pairs(heads.double()) * sin).to(dtype)

    def neighbours(heads):
        pairs = heads.unflatten(-1, (-1, 2))
        return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)

    wanted.check(turned(given, cos, sin))
    wrong = {
        "the other way": turned(given, cos, -sin),
        "neighbours as pairs": turned(given, cos, sin, pairs=neighbours),
        "the next token's angles": turned(given, cos.roll(1, 0), sin.roll(1, 0)),
        "each angle for two tokens": turned(
            given, cos, sin, repeat=lambda t: t.repeat_interleave(2, 0)
        ),
        "cos and sin exchanged": turned(given, sin, cos),
        "nothing done": given,
    }
    for name, value in wrong.items():
        wanted.check_refuses(value, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(dtype):
    """Rounding both products, as models do, lies outside of the bound."""
    given = values(8, 4, 64).to(dtype)
    cos, sin = angles(8, 64, dtype)
    wanted = truth(given, cos, sin, False)
    models = given * cos.unsqueeze(1) + rotate_half(given) * sin.unsqueeze(1)
    wanted.check_refuses(models, "rounded twice")


def test_the_reference_is_exact_in_float64_and_the_inverse_is_the_gradient():
    heads = values(6, 2, 10).requires_grad_()
    cos, sin = angles(3, 8, scaling=1.3)
    dy = values(6, 2, 10, seed=1)
    repeated = [t.repeat(2, 1).unsqueeze(1) for t in (cos, sin)]
    turned = heads[..., :8] * repeated[0] + rotate_half(heads[..., :8]) * repeated[1]
    y = torch.cat((turned, heads[..., 8:]), dim=-1)
    y.backward(dy)
    got = rotary_(heads.detach().clone(), cos, sin)
    torch.testing.assert_close(got, y.detach(), rtol=0, atol=1e-15)
    dx = rotary_(dy.clone(), cos, sin, inverse=True)
    torch.testing.assert_close(dx, heads.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_pass_as_in_the_reference(backend):
    found = {}
    for name in ("reference", backend):
        device = device_of(name)
        heads = values(4, 2, 16).float()
        heads[0, 0, 3], heads[1, 1, 4], heads[2, 0, 12] = torch.nan, torch.inf, -torch.inf
        cos, sin = angles(4, 16, torch.float32)
        with force_backend(name):
            found[name] = rotary_(heads.to(device), cos.to(device), sin.to(device)).cpu()
    got, wanted = found[backend], found["reference"]
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[got.isinf()], wanted[wanted.isinf()])
    assert wanted.isnan().sum() == 2
    assert wanted.isinf().sum() == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (3, 2, 0)], ids=str)
def test_nothing_is_fine(backend, shape):
    device = device_of(backend)
    cos = torch.ones(1, shape[2], device=device)
    with force_backend(backend):
        assert rotary_(torch.ones(shape, device=device), cos, cos).shape == shape


def test_misfits_are_refused():
    heads, angle = torch.ones(4, 2, 8), torch.ones(4, 8)
    with pytest.raises(ShapeError, match=r"heads with 3 dimensions, got shape \(4, 8\)"):
        rotary_(torch.ones(4, 8), angle, angle)
    with pytest.raises(ShapeError, match="heads with its last dimension contiguous"):
        rotary_(torch.ones(4, 8, 2).transpose(1, 2), angle, angle)
    for wrong in (torch.ones(3, 8), torch.ones(0, 8), torch.ones(4, 7), torch.ones(4, 10)):
        with pytest.raises(ShapeError, match=r"rows dividing 4 and R even and at most 8"):
            rotary_(heads, wrong, wrong)
    with pytest.raises(ShapeError, match=r"got \(4, 8\) and \(2, 8\)"):
        rotary_(heads, angle, angle[:2])
    with pytest.raises(ShapeError, match=r"got torch.float32 and torch.bfloat16"):
        rotary_(heads, angle, angle.bfloat16())
    with pytest.raises(ShapeError, match="on cpu, got meta and cpu"):
        rotary_(heads, angle.to("meta"), angle)
    with pytest.raises(UserError, match="no gradient of its own"):
        rotary_(heads.requires_grad_(), angle, angle)


def test_opcheck():
    cos, sin = angles(2, 8, torch.float32)
    op = torch.ops.qlora_kit.rotary_
    torch.library.opcheck(op, (torch.randn(4, 2, 8), cos, sin, False))
    torch.library.opcheck(op, (torch.randn(4, 3, 8)[:, 1:], cos, sin, True))


def test_compiled_code_calls_the_op():
    cos, sin = angles(2, 8, torch.float32)
    given = torch.randn(4, 24)

    def turn(buffer):
        rotary_(buffer[:, :16].unflatten(1, (2, 8)), cos, sin)
        return 2 * buffer

    wanted, buffer = turn(given.clone()), given.clone()
    got = torch.compile(turn, backend="aot_eager", fullgraph=True)(buffer)
    assert torch.equal(got, wanted)
    assert torch.equal(2 * buffer, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [40, 1])
def test_many_tokens(heads):
    """As many blocks as training has; two runs give the same bits."""
    given = values(8192, heads, 128).to(torch.bfloat16)
    cos, sin = angles(2048, 128, torch.float32)
    runs = []
    for _ in range(2):
        buffer = Buffer(given.shape, torch.bfloat16, "cuda", "spare columns", given)
        rotary_(buffer.view, cos.cuda(), sin.cuda())
        buffer.check_surroundings()
        runs.append(buffer.view)
    truth(given, cos, sin, False).check(runs[0])
    assert torch.equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (20, 12), (5, 2)])
def test_from_one_tensor_into_another(backend, width, turned):
    """A source is turned into a part of a wider buffer, the values without angle along with it."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(width)
    source = torch.randn(6, 3, width, generator=generator).to(device, torch.bfloat16)
    angle = torch.randn(3, turned // 2, generator=generator).repeat(1, 2).to(device)
    buffer = torch.full((6, 3 * width + 8), 7.0, device=device, dtype=torch.bfloat16)
    heads, (cos, sin) = buffer[:, : 3 * width].unflatten(1, (3, width)), (angle.cos(), angle.sin())
    with force_backend(backend):
        got = rotary_(heads, cos, sin, source=source)
        assert torch.equal(got, rotary_(source.clone(), cos, sin))
    assert bool((buffer[:, 3 * width :] == 7).all())
    assert not torch.equal(got, source)
