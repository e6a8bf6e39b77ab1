"""Hopper's fused product cut in every way: blocks of a cluster that share a contraction, clusters
that take stretches of all tiles' contraction and meet in memory where a stretch ends within a tile.

What every strategy must do is tested in test_nf4_linear_gpu.py, with the cut that is chosen there.
"""

import pytest
import torch

from qlora_kit.ops import jit
from qlora_kit.ops.nf4_linear import cuda, hopper
from qlora_kit.ops.nf4_linear.hopper_tiling import (
    H100,
    SHAPES,
    SMALL_PARTS,
    SMALL_RANKS,
    Cut,
    sums_bytes,
    tiling,
)
from qlora_kit.ops.nf4_linear.op import nf4_linear
from tests.ops.helpers import SCALE, Options, float32_sums, make_case, poison, truth

LINEARS = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (1024, 4096), (264, 256)]

CASES = [  # M, N, K, options: rounded edges of tiles, quads and ranks
    (5, 1000, 2048, Options(rank=16, bias=False)),
    (70, 2056, 1280, Options(rank=24, nested=False)),
    (300, 1032, 2304, Options(rank=8, dtype=torch.float16)),
    (513, 776, 1536, Options(rank=0)),
    (600, 1288, 1024, Options(rank=48, bias=False)),
]


@pytest.fixture(autouse=True)
def _sums():
    with float32_sums():
        yield


def test_a_cut_covers_the_product_and_fits():
    for n, k in LINEARS:
        for m in (1, 16, 33, 64, 128, 250, 256, 512, 1024, 1536):
            for rank in (0, 16, 64):
                (shape, split, clusters), makers = tiling(m, n, k, H100, rank)
                tiles, quads = shape.tiles_of(m, n), -(-k // 256)
                assert shape.tokens >= min(m, 32)
                assert 1 <= clusters <= tiles * quads
                assert rank or not makers
                if clusters == tiles:
                    assert split * shape.sharing <= len(H100)
                else:  # all run at once
                    assert split == 1
                    assert clusters + makers <= H100[shape.sharing - 1]


def test_a_part_of_a_chip_and_products_beyond_32_bits():
    """Where blocks that make the small product find no room, none do; counts fit a word."""
    for count in (2, 8, 14, 16, 17, 40):
        clusters = tuple(count // size for size in range(1, 9))
        for m in (1, 8, 64, 512):
            (shape, split, most), makers = tiling(m, 4096, 4096, clusters, 16)
            assert most + makers <= clusters[shape.sharing - 1] or most == shape.tiles_of(m, 4096)
            assert split * shape.sharing <= len(clusters)
    for m, columns, contraction in (
        (32768, 28672, 8192),
        (16384, 128256, 4096),
        (4096, 262144, 5376),
    ):
        cut, _ = tiling(m, columns, contraction, H100, 16)
        quads = cut.shape.tiles_of(m, columns) * -(-contraction // 256)
        assert quads * cut.clusters < 1 << 32
        assert quads * cut.shape.tiles_of(m, columns) >= 1 << 32  # a tile each would not fit


def test_numbers_are_those_of_the_sources():
    folder = jit.kernels_folder() / "nf4_linear" / "hopper"
    small, shape = ((folder / name).read_text() for name in ("small.cuh", "shape.cuh"))
    assert f"constexpr int RANKS = {SMALL_RANKS};" in small
    assert f"constexpr int MOST_PARTS = {SMALL_PARTS};" in small
    assert "SMALL_TOKENS = GROUPS == 4 ? 16 : 32, SMALL_AHEAD = 4;" in shape
    assert "OWN_SUMS = TOKENS <= 16;" in shape
    for block in SHAPES:
        assert block.small_tokens == (16 if block.groups == 4 else 32)
        assert block.own_sums == (block.tokens <= 16)
        counts = f"{block.tokens}, {block.stages}, {block.groups}, {block.tiles})"
        for name in ("bfloat16", "float16"):
            source = folder / f"{name}_{block.tokens}x{block.columns}.cu"
            assert counts in source.read_text()


@pytest.mark.gpu
def test_a_weight_written_just_before_is_read_as_written():
    """A product may start before the copy that brings its weight has ended; it must not read."""
    case = make_case(64, 4096, 4096, Options(rank=16, bias=False), "cuda")
    weight, codes = case.weight, case.weight.packed.clone()
    with cuda.force_strategy("hopper"), torch.no_grad():
        wanted = nf4_linear(case.x, weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
        for _ in range(20):
            weight.packed.fill_(0)
            weight.packed.add_(codes)
            got = nf4_linear(case.x, weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
            assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_a_product_waits_for_the_one_whose_result_it_takes():
    """Products of a chain in little memory; each may begin before the one ahead has ended."""
    first, second = (make_case(40, 2048, 2048, Options(rank=16, bias=False), "cuda") for _ in "ab")

    def chain():
        x = first.x.detach()
        with cuda.force_strategy("hopper"), torch.no_grad():
            for case in (first, second) * 10:
                y = nf4_linear(x, case.weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
                x = y / y.float().norm(dim=1, keepdim=True).to(y.dtype)
                del y
                x = nf4_linear(x, case.weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
                x = nf4_linear(x, case.weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
        return x

    chain()
    again = chain()
    assert again.isfinite().all()
    for _ in range(5):
        assert torch.equal(chain(), again)


def test_stretches_where_rounds_would_leave_the_chip_idle():
    (shape, split, clusters), _ = tiling(512, 28672, 8192, H100)  # 224 tiles: 3.4 rounds of pairs
    assert (shape.tokens, shape.columns, split, clusters) == (256, 128, 1, 66)
    (shape, split, clusters), _ = tiling(512, 4096, 14336, H100)  # 32 tiles, each made by two pairs
    assert (shape.tokens, split, clusters) == (256, 1, 64)


def test_tiles_that_go_up_evenly_are_not_shared():
    (shape, split, clusters), makers = tiling(512, 8192, 28672, H100, 16)  # 64 tiles of pairs
    assert (shape.tokens, split, clusters, makers) == (256, 1, 64, 0)
    assert [shape.whole for shape in SHAPES] == [shape.tokens > 32 for shape in SHAPES]


def test_only_shared_tiles_take_memory():
    cut, _ = tiling(512, 28672, 8192, H100)
    assert sums_bytes(cut, 224) == 2 * 66 * 2 * 256 * 128 * 4
    assert sums_bytes(cut._replace(clusters=56), 224) == 0


def test_shapes_fit_a_processor():
    for shape in SHAPES:
        assert shape.shared <= 227 * 1024
        assert shape.stages * (shape.tokens * 128 + shape.columns * 36) >= shape.sums * 4


def ways(m, columns, contraction):
    """Cuts of each shape of block that has a tile's worth of rows: one of each kind."""
    quads = -(-contraction // 256)
    most = next((shape.tokens for shape in SHAPES if shape.tokens >= m), 256)
    for shape in SHAPES:
        if shape.tokens > most:
            continue
        tiles = shape.tiles_of(m, columns)
        counts = {1, 2, 3, tiles - 1, tiles + 1, 3 * tiles - 1, tiles * quads}
        for count in sorted(counts):
            if 0 < count <= min(tiles * quads, H100[shape.sharing - 1]):
                yield Cut(shape, 1, count)
        yield Cut(shape, min(quads, 2), tiles)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "options"), CASES, ids=str)
def test_every_cut_against_float64(monkeypatch, m, n, k, options):
    """Forward and dX, over memory filled with NaN, sums that clusters leave among it; twice."""
    case = make_case(m, n, k, options, "cuda")
    wanted = truth(case)
    cuts = {True: list(ways(m, n, k)), False: list(ways(m, k, n))}
    for i in range(max(map(len, cuts.values()))):
        chosen = {forward: some[i % len(some)] for forward, some in cuts.items()}

        def cut(rows, columns, contraction, clusters, rank, chosen=chosen, i=i):
            return chosen[(columns, contraction) == (n, k)], 1 + i % 3 if rank else 0

        monkeypatch.setattr(hopper, "tiling", cut)
        found = []
        for _ in "ab":
            for leaf in case.leaves().values():
                leaf.grad = None
            poison_for(case, chosen.values())
            with cuda.force_strategy("hopper"):
                y = nf4_linear(
                    case.x, case.weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE
                )
                poison_for(case, chosen.values())
                y.backward(case.dy)
            grads = {name: leaf.grad for name, leaf in case.leaves().items()}
            found.append({"y": y.detach()} | grads)
        for name, got in found[0].items():
            wanted.check(name, got, f"{case} {chosen}")
            assert torch.equal(got, found[1][name]), (name, chosen)


def poison_for(case, cuts):
    """NaN where results, the small product and what clusters leave will be."""
    m, (n, k) = case.x.shape[0], case.weight.shape
    poison("cuda", (m, n), (m, k), (m, max(1, case.options.rank)), dtype=case.options.dtype)
    for shape, _, clusters in cuts:
        poison("cuda", (2 * clusters * shape.sharing, shape.sums), dtype=torch.float32)


@pytest.mark.gpu
def test_sums_of_clusters_are_waited_for(monkeypatch):
    """A count that says too early that all are there makes the result another one."""
    case = make_case(256, 2048, 4096, Options(rank=16, bias=False), "cuda")
    shape = next(shape for shape in SHAPES if (shape.tokens, shape.columns) == (256, 128))
    monkeypatch.setattr(hopper, "tiling", lambda *_: (Cut(shape, 1, 20), 0))
    x, weight = case.x.detach(), case.weight
    right = hopper.multiply(x, weight, None, None, None)
    dense = x.double() @ weight.dequantize(case.options.dtype).double().T
    assert (right - dense).norm() < 0.005 * dense.norm()
    planned, count, words = hopper._plan, 0, None

    def with_count(*arguments):
        nonlocal words
        plan = planned(*arguments)
        words = plan.meeting.arrived
        assert not words.any()
        words.fill_(count)
        plan.meeting.sums.fill_(float("nan"))
        return plan

    monkeypatch.setattr(hopper, "_plan", with_count)
    assert torch.equal(hopper.multiply(x, weight, None, None, None), right)
    assert not words.any()
    count = 2
    assert not torch.equal(hopper.multiply(x, weight, None, None, None), right)
    words.zero_()


@pytest.mark.gpu
def test_cut_tiles_on_two_streams_and_in_a_graph(monkeypatch):
    """Each launch has counters and sums of its own, zero again in every replay."""
    shape = next(shape for shape in SHAPES if (shape.tokens, shape.columns) == (128, 128))
    monkeypatch.setattr(hopper, "tiling", lambda *_: (Cut(shape, 1, 61), 2))
    cases = [make_case(250 + i, 4096, 2048, Options(rank=16, bias=False), "cuda") for i in (0, 1)]
    streams = [torch.cuda.Stream() for _ in cases]

    def run(case):
        with cuda.force_strategy("hopper"), torch.no_grad():
            return nf4_linear(case.x, case.weight, lora_a=case.a, lora_b=case.b, scale=SCALE)

    wanted = [run(case) for case in cases]
    assert not hopper.WORDS.take(cases[0].x.device, 80).any()  # zero again for the next launch
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for case, stream, kept in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(run(case))
    torch.cuda.synchronize()
    for kept, right in zip(results, wanted, strict=True):
        assert all(torch.equal(got, right) for got in kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cases[0])
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, wanted[0])
