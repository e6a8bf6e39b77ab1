"""Costs of single ops: arithmetic, traffic, kinds."""

import pytest
import torch

from qlora_kit.ops.nf4_linear.hopper_tiling import H100, sums_bytes, tiling
from qlora_kit.plan import costs
from qlora_kit.plan.costs import cost_of
from qlora_kit.plan.gpus import GPUS, Attention, find_gpu, recognise
from qlora_kit.plan.trace import Trace

GPU = find_gpu("h100")
HALF = torch.bfloat16


def seconds(function) -> dict[str, float]:
    with Trace(GPU) as trace:
        function()
    return dict(trace.seconds)


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=HALF, device="meta")


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, y: torch.mm(x, w),
        lambda x, w, y: torch.mm(x, w, out=y),
        lambda x, w, y: torch.addmm(y, x, w),
        lambda x, w, y: torch.addmm(y, x, w, out=torch.empty_like(y)),
    ],
)
def test_a_large_product_takes_its_arithmetic(product):
    x, w, y = half(8192, 4096), half(4096, 16384), half(8192, 16384)
    narrow = 4096 / (4096 + costs._FILLING)  # tiles are filled and emptied
    wanted = 2 * 8192 * 4096 * 16384 / GPU.matrix_flops / narrow
    assert seconds(lambda: product(x, w, y))["product"] == pytest.approx(wanted, rel=0.01)


def test_a_thin_product_takes_its_traffic():
    x, w = half(8192, 4096), half(4096, 16)
    found = seconds(lambda: x @ w)["product"]
    assert found == pytest.approx((x.nbytes + w.nbytes + 8192 * 32) / GPU.bandwidth, rel=0.2)
    assert found > 2 * 2 * 8192 * 4096 * 16 / GPU.matrix_flops, "only arithmetic counts"


def test_products_of_float32_are_slower():
    x, y = half(4096, 4096), torch.empty(4096, 4096, device="meta")
    assert seconds(lambda: y @ y)["product"] > 8 * seconds(lambda: x @ x)["product"]


def test_views_and_allocations_cost_nothing():
    x = half(1024, 1024)
    assert seconds(lambda: (x.T, x.view(-1), x.new_empty(5), x[:3])) == {}
    assert "elementwise" in seconds(lambda: x + 1)


def test_attention_takes_longer_per_token_in_longer_rows():
    rule = (1.0, None, None, False, None, 0)
    long, short = half(1, 16384, 8, 128), half(16, 1024, 8, 128)

    def attend(q: torch.Tensor) -> float:
        op = torch.ops.qlora_kit.attention.default
        return cost_of(op, ((q, q, q, *rule), {}), None, GPU).seconds

    assert 4 < attend(long) / attend(short) < 16


def test_a_window_saves_work():
    q = half(1, 16384, 8, 128)
    op = torch.ops.qlora_kit.attention.default
    whole = cost_of(op, ((q, q, q, 1.0, None, None, False, None, 0), {}), None, GPU).seconds
    narrow = cost_of(op, ((q, q, q, 1.0, 1024, None, False, None, 0), {}), None, GPU).seconds
    # each token sees 1,024 others instead of 8,192 on average
    assert narrow == pytest.approx(whole * 1024 / 8192, rel=0.1)


@pytest.mark.parametrize("gpu", ["h100", "h200", "rtx-a6000"])
def test_attention_needs_room_for_gradients_of_every_query_head(gpu: str):
    """Measured as 0.56 GiB at 300,000 tokens of four heads on one of keys: dK and dV for each."""
    q, k = half(1, 1024, 8, 128), half(1, 1024, 2, 128)
    rule = (1.0, None, None, False, None, 0)
    op = torch.ops.qlora_kit.attention_backward.default

    def workspace(keys: torch.Tensor) -> int:
        sums = torch.empty(8192, device="meta")
        inputs = ((q, q, keys, keys, q, sums, *rule), {})
        return cost_of(op, inputs, None, find_gpu(gpu)).workspace

    assert workspace(q) == 4 * q.numel() + 4 * 8192  # dQ in float32, and a sum per query
    assert workspace(k) == workspace(q) + 2 * q.nbytes


def test_known_gpus_are_recognised():
    for gpu in GPUS:
        assert recognise(gpu.name.replace("-", " "), gpu.memory_bytes).name == gpu.name
    assert recognise("NVIDIA A100-SXM4-40GB", 40 << 30).name == "a100-40gb"
    assert recognise("NVIDIA H200", 140 << 30).memory_bytes == 140 << 30
    assert Attention(peak=2.0, half=100).rate(300) == 1.5


@pytest.mark.parametrize(
    ("gpu", "rows", "shared"), [("h100", 512, True), ("h100", 1600, False), ("l40s", 512, False)]
)
def test_tiles_that_clusters_share_take_memory(gpu, rows, shared):
    """Of a narrow weight more than decoding it; on Hopper, where the fused product serves."""
    cost = costs._linear_pass(
        half(rows, 4096), half(1), 1024, 4096, 0, find_gpu(gpu), beside=0
    ).workspace
    cut, _ = tiling(rows, 1024, 4096, H100)
    sums = sums_bytes(cut, cut.shape.tiles_of(rows, 1024))
    assert cost == (max(sums, 1024 * 4096 * 2) if shared else 1024 * 4096 * 2)
    assert sums > 1024 * 4096 * 2 or not shared
