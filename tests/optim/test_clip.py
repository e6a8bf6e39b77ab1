"""Norm and clipping over flat buffers against torch's, within bounds derived from rounding.

A sum of n squares in float32, in any order, is off by at most (n + 1)·eps relative, its root
by half of that; torch and we each pay that and a few roundings of the factor. In bfloat16
torch rounds each tensor's norm and their norm, two roundings of 2^-9 relative, and the
factor and each product one more; ours only rounds the products.
"""

import pytest
import torch
from torch import nn

from qlora_kit.optim.clip import clip_gradients, gradient_norm
from qlora_kit.optim.flat import FlatParameters
from tests.optim.tensors import give_gradients, parameters, values, zero_grad

EPS = torch.finfo(torch.float32).eps


def exact_norm(params: list[nn.Parameter]) -> float:
    return sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None) ** 0.5


@pytest.mark.parametrize("skip", [(), (0, 3)])
@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_clipping_is_torchs(max_norm: float, skip: tuple[int, ...]) -> None:
    """Norm and every gradient, clipped and not, with gradients missing."""
    ours, theirs = parameters(), parameters()
    flats = [FlatParameters(ours[:3]), FlatParameters(ours[3:])]
    give_gradients(ours, 0, skip)
    give_gradients(theirs, 0, skip)
    true = exact_norm(theirs)
    n = sum(p.numel() for p in ours)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    found = clip_gradients(flats, max_norm)
    bound = (n / 2 + 4) * EPS
    assert abs(float(found) - true) <= bound * true
    assert found.dtype == torch.float32
    assert abs(float(found - wanted)) <= 2 * bound * true
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert ((p.grad - q.grad).abs() <= 2 * (bound + 2 * EPS) * q.grad.abs()).all()
    if max_norm == 0.3:
        clipped = exact_norm(ours)
        assert clipped == pytest.approx(0.3, rel=1e-4)
        per_buffer = [float(gradient_norm([flat])) for flat in flats]
        assert max(per_buffer) < 0.299  # clipping each buffer by itself would leave both at 0.3
    else:
        untouched = parameters()
        give_gradients(untouched, 0, skip)
        assert all(
            torch.equal(p.grad, q.grad)
            for p, q in zip(ours, untouched, strict=True)
            if q.grad is not None
        )


def test_bfloat16_sums_in_float32() -> None:
    """The norm of low-precision gradients is that of their values, not of rounded norms."""
    params = parameters(((3000,), (500, 3)), dtype=torch.bfloat16)
    theirs = parameters(((3000,), (500, 3)), dtype=torch.bfloat16)
    flat = FlatParameters(params)
    give_gradients(params, 0)
    give_gradients(theirs, 0)
    true = exact_norm(params)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    found = clip_gradients([flat], 0.5)
    assert abs(float(found) - true) <= (4500 / 2 + 4) * EPS * true
    assert abs(float(wanted) - true) > 1e-4 * true  # torch's own misses that bound
    for p, q in zip(params, theirs, strict=True):
        assert ((p.grad - q.grad).abs() <= 5 * 2**-8 * q.grad.abs()).all()


def test_float16_does_not_overflow() -> None:
    """Squares above 65,504 are summed in float32."""
    params = parameters(((600,),), dtype=torch.float16)
    flat = FlatParameters(params)
    params[0].grad = torch.full((600,), 1000.0, dtype=torch.float16)
    assert float(gradient_norm([flat])) == pytest.approx(1000 * 600**0.5, rel=1e-6)


def test_no_gradients_and_not_finite_ones() -> None:
    """Nothing to clip is a norm of zero; what is not finite is reported as torch does."""
    params, theirs = parameters(), parameters()
    flat = FlatParameters(params)
    assert float(clip_gradients([flat], 1.0)) == 0.0
    assert float(gradient_norm([])) == 0.0
    for bad in (float("inf"), float("nan")):
        for group in (params, theirs):
            give_gradients(group, 0)
            group[1].grad[0, 0] = bad
        before = values(params)
        found, wanted = clip_gradients([flat], 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())
        for p, q in zip(params, theirs, strict=True):
            assert torch.equal(p.grad.nan_to_num(7.0), q.grad.nan_to_num(7.0))
        assert all(torch.equal(p, v) for p, v in zip(params, before, strict=True))
        zero_grad(params)
        give_gradients(params, 1)  # the next update starts clean
        assert float(gradient_norm([flat])) == pytest.approx(exact_norm(params), rel=1e-4)
        zero_grad(params)
