"""The product for 1 to 16 rows straight from the 4-bit weight.

What every strategy must do is tested in test_nf4_linear_gpu.py; here is what this one
does besides: the small product that runs beside the large one, kernels that start
before those ahead of them have ended, how products are cut into blocks, and where it
is chosen.
"""

import itertools
import re

import pytest
import torch

from qlora_kit.ops import jit
from qlora_kit.ops.nf4_linear import cuda, gemv, hopper
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.quant.weight import NF4Weight
from tests.ops.helpers import SCALE, Options, float32_sums, make_case, poison, truth
from tests.ops.test_nf4_linear_gpu import check_decoding, strategy_arguments

SHAPES = [
    (8, 64),
    (64, 64),
    (128, 192),
    (1000, 576),
    (24, 8256),
    (8256, 64),
    (1088, 4160),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (3584, 18432),
    (28672, 8192),
]
RANKS = (16, 0, 8, 64, 1, 17, 128)
HOPPER = (132, 66, 44, 30, 25, 21, 16, 15)
"""Clusters of 1, 2, ... blocks that an H100 holds at once."""


@pytest.fixture(autouse=True)
def _sums():
    with float32_sums():
        yield


@pytest.fixture
def wherever_it_serves(monkeypatch):
    """Forward products go to it unforced, so that the backward is another strategy's."""
    for architecture in ("hopper", "other"):
        rows = ((gemv.MOST_ROWS, "gemv"),)
        monkeypatch.setitem(cuda.ROWS, (architecture, "multiply"), rows)
    monkeypatch.setattr(cuda, "_gemv_is_taken", lambda x, weight: True)


def cases():
    """Each shape with several M, options in turn."""
    ranks, rows = itertools.cycle(RANKS), itertools.cycle([1, 3, 16, 8, 5, 9, 2, 13])
    for index, (n, k) in enumerate(SHAPES):
        for m in itertools.islice(rows, 3):
            dtype = torch.float16 if m % 3 == 0 else torch.bfloat16
            nested, bias = index % 4 != 1, m % 2 == 0
            yield m, n, k, Options(rank=next(ranks), dtype=dtype, bias=bias, nested=nested)


CASES = list(cases())


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "options"), CASES, ids=str)
def test_against_float64(wherever_it_serves, m, n, k, options):
    """With and without the small product inside, over memory filled with NaN; gradients too.

    That of B is made of the small product.
    """
    case = make_case(m, n, k, options, "cuda")
    wanted = truth(case)
    _, arguments = strategy_arguments(case)["multiply"]
    results = []
    for _ in "ab":
        poison("cuda", (m, n), dtype=options.dtype)
        results.append(gemv.multiply(*arguments))
    wanted.check("y", results[0], str(case))
    assert torch.equal(*results), str(case)
    assert cuda.strategy_for(*arguments[:2]) == "gemv"
    poison("cuda", (m, n), (m, k), (m, max(1, options.rank)), dtype=options.dtype)
    y = nf4_linear(case.x, case.weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE)
    wanted.check("y", y.detach(), str(case))
    y.backward(case.dy)
    for name, leaf in case.leaves().items():
        wanted.check(name, leaf.grad, str(case))


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (1000, 576), (192, 64 * 33), (4096, 192)])
def test_each_weight_is_decoded_to_the_bit(n, k, dtype, nested):
    """In blocks of at most 16 rows with a single 1."""
    weight = make_case(1, n, k, Options(rank=0, dtype=dtype, nested=nested), "cuda").weight
    wanted = weight.dequantize(dtype)
    for start in range(0, min(k, 640), 16):
        for rows in (16, 7):
            eye = torch.eye(k, device="cuda", dtype=dtype)[start : start + rows]
            got = gemv.multiply(eye, weight, None, None, None)
            differing = (got != wanted.T[start : start + rows]).nonzero()[:5].tolist()
            assert not differing, (start, rows, differing)
    packed = weight.packed.clone()
    packed.view(-1)[5] ^= 1
    fields = {name: getattr(weight, name) for name in NF4Weight.__dataclass_fields__}
    broken = NF4Weight(**{**fields, "packed": packed})
    eye = torch.eye(k, device="cuda", dtype=dtype)[:16]
    differing = gemv.multiply(eye, broken, None, None, None) != wanted.T[:16]
    assert int(differing.sum()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 11])
@pytest.mark.parametrize("shape", [(1024, 1024), (64, 1024)])
def test_a_chain_of_products_waits_for_what_it_reads(m, shape):
    """Products that start early, each reading what the last one wrote, into memory used before."""
    (n, k), dtype = shape, torch.bfloat16
    up = make_case(m, n, k, Options(rank=16, bias=True), "cuda")
    down = make_case(m, k, n, Options(rank=16, bias=False), "cuda")

    def chain(x, strategy):
        with cuda.force_strategy(strategy), torch.no_grad():
            for _ in range(12):
                y = nf4_linear(x, up.weight, up.bias, lora_a=up.a, lora_b=up.b, scale=SCALE)
                x = nf4_linear(y, down.weight, lora_a=down.a, lora_b=down.b, scale=SCALE)
                x = x / x.float().norm().to(dtype) * k**0.5
            return x

    first = chain(up.x.detach(), "gemv")
    for _ in range(20):
        assert torch.equal(chain(up.x.detach(), "gemv"), first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph, inputs = torch.cuda.CUDAGraph(), up.x.detach().clone()
    with torch.cuda.stream(side):
        chain(inputs, "gemv")
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        held = torch.empty_like(inputs)
        held.copy_(inputs)  # no kernel stands before the first product, but a copy
        captured = chain(held, "gemv")
    for seed in range(3):
        inputs.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, chain(inputs, "gemv"))


@pytest.mark.gpu
def test_a_weight_written_just_before_is_read_as_written():
    """A product may start before the copy that brings its weight has ended; it must not read."""
    case = make_case(4, 4096, 4096, Options(rank=16, bias=False), "cuda")
    weight, codes = case.weight, case.weight.packed.clone()
    with cuda.force_strategy("gemv"), torch.no_grad():
        wanted = nf4_linear(case.x, weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
        plain = nf4_linear(case.x, weight)
        for _ in range(20):
            weight.packed.fill_(0)
            weight.packed.add_(codes)
            got = nf4_linear(case.x, weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
            assert torch.equal(got, wanted)
            weight.packed.fill_(0)
            weight.packed.add_(codes)
            assert torch.equal(nf4_linear(case.x, weight), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [2, 8, 16])
@pytest.mark.parametrize("rank", [0, 16])
def test_nan_and_infinity_stay_in_their_rows(m, rank):
    case = make_case(m, 192, 320, Options(rank=rank, bias=False), "cuda")
    with torch.no_grad():
        case.x[0, 5], case.x[m - 1, 190] = torch.inf, torch.nan
    wanted = truth(case).results["y"].value
    with cuda.force_strategy("gemv"), torch.no_grad():
        got = nf4_linear(case.x, case.weight, lora_a=case.a, lora_b=case.b, scale=SCALE)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())
    assert got[1 : m - 1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (1000, 576), (4096, 4096), (4096, 14336)])
def test_the_small_product_made_beside(m, n, k):
    """Its result is returned, and the words it counts in are zero again."""
    case = make_case(m, n, k, Options(rank=24, bias=False), "cuda")
    a, b = case.a.detach().bfloat16(), case.b.detach().bfloat16()
    x = case.x.detach()
    wanted = SCALE * x.double() @ a.T.double()
    sums = 2**-23 * k**0.5 * x.double().norm(dim=1, keepdim=True)
    bound = 2**-8 * wanted.abs() + SCALE * sums * a.double().norm(dim=1)
    for _ in range(3):
        poison("cuda", (m, n), (m, 24), dtype=torch.bfloat16)
        y, xa = gemv.multiply_low_rank(x, case.weight, None, a, b, SCALE)
        assert ((xa.double() - wanted).abs() <= 1.01 * bound).all()
        assert not gemv.WORDS.take(x.device).any()
    # Where those who make it never meet, each block makes all of it, to the same bits.
    gemv.WORDS.take(x.device)[0] = 1000
    again, small = gemv.multiply_low_rank(x, case.weight, None, a, b, SCALE)
    assert torch.equal(again, y)
    assert torch.equal(small, xa)
    assert not gemv.WORDS.take(x.device).any()


@pytest.mark.gpu
def test_two_streams_at_once():
    cases = [make_case(m, n, k, device="cuda") for m, n, k in ((3, 1024, 2048), (8, 2048, 1024))]
    streams = [torch.cuda.Stream() for _ in cases]

    def run(case):
        with cuda.force_strategy("gemv"), torch.no_grad():
            lora = {"lora_a": case.a, "lora_b": case.b, "scale": SCALE}
            return nf4_linear(case.x, case.weight, case.bias, **lora)

    alone = [run(case) for case in cases]
    torch.cuda.synchronize()
    for _ in range(5):
        got = [[], []]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
        for _ in range(8):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    got[index].append(run(cases[index]))
        torch.cuda.synchronize()
        for wanted, many in zip(alone, got, strict=True):
            assert all(torch.equal(y, wanted) for y in many)


@pytest.mark.gpu
def test_the_common_tests_reach_it():
    weight = make_case(1, 192, 256, Options(rank=0), "cuda").weight
    ran = check_decoding(weight, torch.bfloat16, "cuda")
    assert ("gemv", "multiply") in ran


def bfloat16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def test_serves_what_the_kernels_can_take():
    weight = make_case(1, 128, 192, Options(rank=0)).weight
    assert gemv.serves(bfloat16(1, 192), weight)
    assert gemv.serves(bfloat16(16, 128).half(), weight)
    for rows in (0, 17):
        assert not gemv.serves(bfloat16(rows, 192), weight)
    assert not gemv.serves(bfloat16(3, 192).float(), weight)
    assert not gemv.serves(bfloat16(192, 3).T, weight)
    assert not gemv.serves(bfloat16(3 * 192 + 1)[1:].view(3, 192), weight)
    for n, k, block in ((128, 96, 64), (100, 128, 64), (128, 128, 32)):
        other = make_case(1, n, k, Options(rank=0, block_size=block)).weight
        assert not gemv.serves(bfloat16(3, k), other)


def empty_weight(n, k):
    """Of that shape; nobody reads its values."""
    return NF4Weight(
        packed=torch.empty(n * k // 2, 1, dtype=torch.uint8),
        absmax=torch.empty(n * k // 64, dtype=torch.uint8),
        nested_absmax=torch.empty(-(-n * k // 64 // 256)),
        offset=torch.empty(()),
        shape=(n, k),
        block_size=64,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("architecture", "n", "k", "m", "forward", "backward"),
    [
        ("sm_90a", 4096, 4096, 1, "gemv", "hopper"),
        ("sm_90a", 4096, 4096, 8, "gemv", "hopper"),
        ("sm_90a", 4096, 4096, 16, "gemv", "hopper"),
        ("sm_90a", 4096, 4096, 17, "hopper", "hopper"),
        ("sm_90a", 14336, 4096, 1, "hopper", "hopper"),
        ("sm_90a", 4096, 14336, 1, "gemv", "hopper"),
        ("sm_90a", 4096, 14336, 8, "gemv", "hopper"),
        ("sm_90a", 4096, 14336, 9, "hopper", "hopper"),
        ("sm_90a", 8192, 28672, 1, "hopper", "hopper"),
        ("sm_90a", 2048, 4096, 1, "hopper", "hopper"),
        ("sm_90a", 4096, 2048, 1, "hopper", "hopper"),
        ("sm_90a", 14336, 4096, 768, "hopper", "hopper"),
        ("sm_90a", 14336, 4096, 769, "hopper", "ahead"),
        ("sm_90a", 4096, 14336, 1281, "ahead", "ahead"),
        ("sm_90a", 4096, 14400, 2048, "dense", "dense"),
        ("sm_90a", 8, 4096, 2048, "ahead", "ahead"),
        ("sm_80", 4096, 14336, 2048, "dense", "dense"),
        ("sm_90a", 64, 192, 4, "dense", "dense"),
        ("sm_80", 4096, 4096, 1, "small_m", "portable"),
    ],
)
def test_where_it_and_others_are_chosen(monkeypatch, architecture, n, k, m, forward, backward):
    """It on Hopper and forward, where it is faster; nowhere else."""
    for module in (cuda, hopper):
        monkeypatch.setattr(module, "architecture_of", lambda device: architecture)
    weight = empty_weight(n, k)
    for dtype in (torch.bfloat16, torch.float16):
        x, dy = bfloat16(m, k).to(dtype), bfloat16(m, n).to(dtype)
        assert cuda.strategy_for(x, weight) == forward
        assert cuda.strategy_for(dy, weight, "multiply_transposed") == backward


@pytest.mark.parametrize("clusters", [HOPPER, (108,), (16,), (148, 74, 48, 36, 0, 0, 0, 0)])
@pytest.mark.parametrize("tokens", [8, 16])
def test_tiling_covers_the_product(clusters, tokens):
    for n, k in [*SHAPES, (8192, 28672)]:
        groups, split = gemv.tiling(n, k, tokens, clusters)
        tiles = -(-n // 16)
        assert 1 <= groups <= min(tiles, clusters[split - 1])
        if split > 1:  # blocks of a cluster meet once
            assert -(-tiles // groups) <= gemv._PASS
            assert split <= -(-k // 128)


def test_tiling_fills_the_gpu():
    for n, k in ((4096, 4096), (14336, 4096), (28672, 8192)):
        assert gemv.tiling(n, k, 8, HOPPER) == (132, 1)


def test_numbers_are_those_of_the_sources():
    folder = jit.kernels_folder() / "nf4_linear" / "gemv"
    for dtype in ("bfloat16", "float16"):
        text = (folder / f"{dtype}.cu").read_text()
        found = re.findall(r"nf4_gemv_(\d+), \w+, (\d+), (\d+)\)", text)
        assert {int(m): int(warps) for m, _, warps in found} == gemv._WARPS
        assert all(int(m) == 8 * int(tiles) for m, tiles, _ in found)
    assert f"MOST_MAKERS = {gemv._MAKERS};" in (folder / "small.cuh").read_text()
    assert f"MOST_TILES = {gemv._PASS};" in (folder / "forward.cuh").read_text()


@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("words", [True, False])
def test_launches(monkeypatch, m, words):
    """One launch for both products; where there are no words to count in, one for the large one."""
    launches = []

    class Recorder:
        def launch(self, name, grid, block, arguments, **rest):
            launches.append((name, grid, block, arguments, rest))

    monkeypatch.setattr(gemv, "_KERNELS", {torch.bfloat16: Recorder()})
    monkeypatch.setattr(gemv, "_clusters", lambda *_: HOPPER)
    monkeypatch.setattr(gemv, "_overlaps", lambda device: True)
    state = torch.zeros(8, dtype=torch.int32) if words else None
    monkeypatch.setattr(gemv.WORDS, "take", lambda device: state)
    n, k, rank = 320, 1024, 24
    weight = make_case(1, n, k, Options(rank=0)).weight
    a, b = bfloat16(rank, k), bfloat16(n, rank)
    y, xa = gemv.multiply_low_rank(bfloat16(m, k), weight, bfloat16(n), a, b, 0.5)
    assert y.shape == (m, n)
    assert xa.shape == (m, rank)
    tokens = 8 if m <= 8 else 16
    ((name, grid, block, arguments, rest),) = launches
    assert name == f"nf4_gemv_{tokens}"
    assert block == 32 * (gemv._WARPS[tokens] + words)
    assert rest["shared"] <= 99 * 1024  # what every GPU since Ampere gives a block
    assert rest["cluster"] <= 8
    assert grid > 0
    assert rank in [value for value in arguments if isinstance(value, int)]
    partial = [t for t in arguments if isinstance(t, torch.Tensor) and t.dtype == torch.float32]
    if words:
        assert any(value is state for value in arguments)
        assert partial[-1].numel() == 32 * 16 * rank
