"""The trace: lifetimes, sizes as torch's allocator counts them, workspaces, phases."""

import pytest
import torch
from torch import nn

from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.trace import Trace, counted_bytes

GPU = find_gpu("h100")
MIB = 1 << 20


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("size", "counted"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (513, 1024),
        (10 * MIB - 512, 10 * MIB - 512),  # from a piece of 20 MiB, which is split
        (10 * MIB + 512, 10 * MIB + 512),  # the rest, almost 2 MiB, is split off
        (11 * MIB + 512, 12 * MIB),  # the rest, below 1 MiB, is not
        (12 * MIB, 12 * MIB),
    ],
)
def test_sizes_are_counted_as_the_allocator_does(size: int, counted: int):
    assert counted_bytes(size) == counted


def test_the_peak_is_of_what_lives_at_once():
    with Trace(GPU) as trace:
        x = meta(MIB)  # 4 MiB
        y = x + 1  # 8
        del x  # 4
        z = y * 2  # 8
        del y, z
        w = meta(3, MIB)  # 12
    assert trace.peak_bytes() == 12 * MIB
    assert trace.peak_bytes() != 20 * MIB, "what was freed still counts"
    assert [block.size for block in trace.peak()[1]] == [12 * MIB]
    del w


def test_views_and_owned_tensors_are_not_counted():
    weight = meta(1024, 1024)
    with Trace(GPU, [weight]) as trace:
        half = weight[:512].T
        other = weight.view(-1)
        made = meta(256, 1024)
        part = made[1:]
    assert trace.peak_bytes() == MIB
    del half, other, part


def test_what_autograd_keeps_lives_until_the_backward():
    x, weight = meta(MIB), nn.Parameter(meta(MIB))
    with Trace(GPU, [x, weight]) as trace:
        with trace.during("forward"):
            y = (x * weight).exp()  # keeps y, and the product dies
        alive = sum(b.size for b in trace.blocks if b.died is None)
        assert alive == 4 * MIB
        with trace.during("backward"):
            torch.autograd.backward(y, meta(MIB))
        del y
    gradient = trace.block_of(weight.grad)
    assert gradient is not None
    assert gradient.phase == "backward"
    assert {b.phase for b in trace.blocks} == {"forward", "backward"}


def test_a_workspace_counts_while_its_kernel_runs_and_no_longer():
    q = meta(1, 1024, 8, 128, dtype=torch.bfloat16)
    k = meta(1, 1024, 2, 128, dtype=torch.bfloat16)
    lse = meta(8 * 1024)
    out = torch.empty_like(q)
    rule = (1.0, None, None, False, None, 0)
    with Trace(GPU, [q, k, lse, out]) as trace:
        found = torch.ops.qlora_kit.attention_backward.default(q, q, k, k, out, lse, *rule)
        after = meta(1)
    results = counted_bytes(q.nbytes) + 2 * counted_bytes(k.nbytes)
    total, _, workspace = trace.peak()
    # dQ in float32, a sum per query, dK and dV once per query head
    assert workspace == counted_bytes(1024 * 8 * 129 * 4 + 2 * q.nbytes)
    assert total == results + workspace
    del found, after


def test_a_decoded_weight_is_known_as_one():
    packed, out = meta(2048, 1, dtype=torch.uint8), None
    with Trace(GPU, [packed]) as trace:
        out = meta(64, 64, dtype=torch.bfloat16)
        other = meta(64, 64, dtype=torch.bfloat16)
        torch.ops.qlora_kit.nf4_dequantize_into.default(packed, None, out)
    assert [block.decoded for block in trace.blocks] == [True, False]
    assert trace.seconds["decode"] > 0
    del out, other


def test_products_that_are_not_run_cost_what_they_do():
    """Into `out`, the result is `out` itself; the same arithmetic without it costs the same."""
    bfloat16 = torch.bfloat16
    x, w, c, out = (meta(256, 256, dtype=bfloat16) for _ in range(4))
    for into, made in (
        (lambda: torch.mm(x, w, out=out), lambda: torch.mm(x, w)),
        (lambda: torch.addmm(c, x, w, out=out), lambda: torch.addmm(c, x, w)),
    ):
        with Trace(GPU) as one:
            assert into() is out
        with Trace(GPU) as other:
            made()
        assert one.seconds == other.seconds
        assert one.seconds["product"] > 0
        assert one.launching == other.launching
    real = torch.ones(2, 2)
    with Trace(GPU):
        torch.mm(torch.full((2, 2), 3.0), real.clone(), out=real)
    assert real.tolist() == [[6.0, 6.0], [6.0, 6.0]]
