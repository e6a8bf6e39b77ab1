"""The product for many rows whose weights are decoded in the same launch, ahead of tensor cores.

What every strategy must do is tested in test_nf4_linear_gpu.py; here is what this one does besides:
blocks that wait for others' weights, launches at once, and how a product is cut into blocks.
"""

import pytest
import torch

from qlora_kit.ops import jit
from qlora_kit.ops.nf4_linear import ahead, cuda
from qlora_kit.ops.nf4_linear.op import nf4_linear
from tests.ops.helpers import SCALE, Options, float32_sums, make_case, poison, truth

CASES = [  # M, N, K, options: either width of blocks, edges of tiles, chunks and ranks
    (1, 8, 256, Options(rank=8)),
    (127, 264, 512, Options(rank=0, bias=False)),
    (129, 1000, 256, Options(rank=24, nested=False)),
    (256, 4096, 1024, Options(rank=16, dtype=torch.float16)),
    (300, 8200, 768, Options(rank=64, bias=False)),
    (513, 136, 1280, Options(rank=72, nested=False, dtype=torch.float16)),
    (1025, 5120, 2560, Options(rank=17)),
    (2049, 1024, 4096, Options(rank=128, bias=False)),
    (4097, 2048, 1536, Options(rank=16, nested=False)),
    (6000, 64, 8192, Options(rank=0)),  # many tiles of dX, of one stage each
]
MANY_TILES = [  # groups of rows of which the last is narrower, or one; the small product inside
    (4353, 2304, 256, Options(rank=16)),
    (5000, 256, 2304, Options(rank=8, bias=False, nested=False)),
    (700, 12296, 512, Options(rank=8, dtype=torch.float16)),
    (700, 512, 12288, Options(rank=16, dtype=torch.float16, bias=False)),
]


@pytest.fixture(autouse=True)
def _sums():
    with float32_sums():
        yield


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "options"), CASES + MANY_TILES, ids=str)
def test_against_float64(m, n, k, options):
    """All gradients, over memory filled with NaN, the decoded weight's among it; twice the same."""
    case = make_case(m, n, k, options, "cuda")
    wanted = truth(case)
    found = []
    with cuda.force_strategy("ahead"):
        for _ in "ab":
            for leaf in case.leaves().values():
                leaf.grad = None
            poison("cuda", (m, n), (m, k), (n, k), (m, max(1, options.rank)), dtype=options.dtype)
            y = nf4_linear(
                case.x, case.weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE
            )
            poison("cuda", (m, n), (m, k), (n, k), (m, max(1, options.rank)), dtype=options.dtype)
            y.backward(case.dy)
            grads = {name: leaf.grad for name, leaf in case.leaves().items()}
            found.append({"y": y.detach()} | grads)
    for name, got in found[0].items():
        wanted.check(name, got, str(case))
        assert torch.equal(got, found[1][name]), name


@pytest.mark.gpu
def test_a_tile_waits_for_its_weights(monkeypatch):
    """Again and again, over what the last launch decoded; and with strips said to be there."""
    case = make_case(700, 4096, 2048, Options(rank=16, bias=False), "cuda")
    other = make_case(700, 4096, 2048, Options(rank=16, bias=False, nested=False), "cuda")
    first = [ahead.multiply(c.x.detach(), c.weight, None, None, None) for c in (case, other)]
    for c, got in zip((case, other), first, strict=True):
        right = c.x.detach().double() @ c.weight.dequantize(c.options.dtype).double().T
        assert (got - right).norm() < 0.005 * right.norm()
    for _ in range(50):  # both decode into the same memory, in turn
        for c, wanted in zip((case, other), first, strict=True):
            assert torch.equal(ahead.multiply(c.x.detach(), c.weight, None, None, None), wanted)
    spaces = ahead._workspace

    def too_early(*arguments):
        """Counts that are full before anything is decoded."""
        space = spaces(*arguments)
        space.decoded.fill_(float("nan"))
        strips = space.columns * 128 // (32 * 128)
        space.state[ahead._WORDS_BEFORE :] = strips  # no small product here
        return space

    monkeypatch.setattr(ahead, "_workspace", too_early)
    wrong = ahead.multiply(case.x.detach(), case.weight, None, None, None)
    assert not torch.equal(wrong, first[0])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [700, 2600])  # with help of those who multiply, and without
@pytest.mark.parametrize("pairs", [1, 5])
def test_a_tile_waits_for_none_that_comes_after_it(monkeypatch, m, pairs):
    """However few blocks find room, all tiles are made, and the same."""
    case = make_case(m, 1032, 512, Options(rank=16), "cuda")
    x, dy, bias = case.x.detach(), case.dy, case.bias.detach()
    arguments = case.a.detach().to(x.dtype), case.b.detach().to(x.dtype), SCALE
    monkeypatch.setattr(ahead, "makes_small_product", lambda *_: True)
    monkeypatch.setattr(ahead, "columns_of", lambda *_: 256)
    wanted = (
        *ahead.multiply_low_rank(x, case.weight, bias, *arguments),
        *ahead.multiply_transposed_low_rank(dy, case.weight, *arguments),
    )
    monkeypatch.setattr(ahead, "_pairs", lambda _: pairs)
    for _ in "ab":
        poison("cuda", *(w.shape for w in wanted), (1032, 512), dtype=x.dtype)
        found = (
            *ahead.multiply_low_rank(x, case.weight, bias, *arguments),
            *ahead.multiply_transposed_low_rank(dy, case.weight, *arguments),
        )
        assert all(torch.equal(got, right) for got, right in zip(found, wanted, strict=True))


@pytest.mark.gpu
def test_a_tile_waits_for_the_small_product(monkeypatch):
    """It is what a kernel before would have made; said to be there too early, it is not."""
    case = make_case(2600, 8192, 512, Options(rank=16, bias=False), "cuda")
    x = case.x.detach()
    a, b = (v.detach().to(x.dtype) for v in (case.a, case.b))
    y, small = ahead.multiply_low_rank(x, case.weight, None, a, b, SCALE)
    exact = SCALE * x.double() @ a.double().T
    assert (small - exact).abs().max() <= torch.finfo(x.dtype).eps * exact.abs().max()
    other = ahead.multiply(x, case.weight, None, small, b)
    assert (y - other).abs().max() <= torch.finfo(x.dtype).eps * y.abs().max()
    spaces = ahead._workspace

    def too_early(*arguments):
        """Counts of `small` that are full before anything is made."""
        space = spaces(*arguments)
        space.state[-2 * -(-2600 // 256) :] = ahead._MULTIPLIERS
        return space

    monkeypatch.setattr(ahead, "_workspace", too_early)
    poison("cuda", (2600, 16), dtype=x.dtype)
    wrong, again = ahead.multiply_low_rank(x, case.weight, None, a, b, SCALE)
    assert torch.equal(again, small)
    assert not torch.equal(wrong, y)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(300, 72, 256), (700, 4096, 1024), (300, 5000, 2048)])
def test_who_decodes_changes_nothing(monkeypatch, m, n, k):
    """Those who multiply help, or not; where strips are fewer than warps, too."""
    case = make_case(m, n, k, Options(rank=16), "cuda")
    arguments = [v.detach().to(case.x.dtype) for v in (case.a, case.b)]
    found = []
    for rows in (0, 1024, 0, 1024):
        monkeypatch.setattr(ahead, "_HELPING_ROWS", rows)
        poison("cuda", (n, k), (m, n), (m, k), dtype=case.x.dtype)
        found.append(
            (
                *ahead.multiply_low_rank(
                    case.x.detach(), case.weight, case.bias.detach(), *arguments, SCALE
                ),
                *ahead.multiply_transposed_low_rank(case.dy, case.weight, *arguments, SCALE),
            )
        )
    for got in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(got, found[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [700, 1100, 2600])
def test_two_at_once_on_two_streams(m):
    """Each launch wants the whole chip and waits for its own strips and tiles only."""
    cases = [make_case(m + i, 8192, 2048, Options(rank=16, bias=False), "cuda") for i in (0, 1)]
    assert not torch.equal(cases[0].weight.packed, cases[1].weight.packed)
    streams = [torch.cuda.Stream() for _ in cases]

    def run(case):
        with cuda.force_strategy("ahead"), torch.no_grad():
            return nf4_linear(case.x, case.weight, lora_a=case.a, lora_b=case.b, scale=SCALE)

    wanted = [run(case) for case in cases]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for case, stream, kept in zip(cases, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(run(case))
    torch.cuda.synchronize()
    for kept, right in zip(results, wanted, strict=True):
        assert all(torch.equal(got, right) for got in kept)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "rank"), [(600, 16), (600, 48), (2600, 16)])
def test_a_graph_runs_on_new_inputs(m, rank):
    """Counters are zero again in every replay, with each way of making the small product."""
    case = make_case(m, 4096, 1024, Options(rank=rank, bias=False), "cuda")
    inputs, side = case.x.detach().clone(), torch.cuda.Stream()

    def run():
        with cuda.force_strategy("ahead"), torch.no_grad():
            return nf4_linear(inputs, case.weight, lora_a=case.a, lora_b=case.b, scale=SCALE)

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        inputs.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, run())


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ahead", "hopper", "gemv", "dense"])
def test_a_bias_at_any_address_and_no_ranks(strategy):
    case = make_case(5, 256, 512, Options(rank=0), "cuda")
    bias = torch.cat((case.bias.detach().new_zeros(1), case.bias.detach()))[1:].requires_grad_()
    none = {"lora_a": torch.zeros(0, 512).cuda(), "lora_b": torch.zeros(256, 0).cuda()}
    wanted = truth(case)
    with cuda.force_strategy(strategy):
        for lora in ({}, {name: value.requires_grad_() for name, value in none.items()}):
            case.x.grad = bias.grad = None
            y = nf4_linear(case.x, case.weight, bias, **lora)
            wanted.check("y", y.detach(), strategy)
            if strategy == "gemv":  # it has no transposed product
                continue
            y.backward(case.dy)
            wanted.check("dx", case.x.grad, strategy)
            assert all(value.grad.shape == value.shape for value in lora.values())


def test_blocks_are_wide_unless_narrow_ones_fill_the_chip():
    for m in (1, 100, 256, 512, 1000, 4096, 300_000):
        for width in (8, 1024, 4096, 28672):
            for pairs in (1, 54, 66):
                columns = ahead.columns_of(m, width, pairs)
                assert columns in (128, 256)
                if width > 128 and -(-m // 256) * -(-width // 128) > 4 * pairs:
                    assert columns == 256
    # Half a round more, by halves of wide tiles, against three rounds of narrow ones; not of few
    # columns, and not for a single round of halves.
    assert ahead.columns_of(1280, 4096, 66) == ahead.columns_of(1536, 4096, 66) == 256
    assert ahead.columns_of(5888, 1024, 66) == ahead.columns_of(2048, 1024, 66) == 128


def test_a_launch_makes_the_small_product_of_few_ranks_for_many_tiles():
    for m, width, inside in ((2048, 4096, False), (2304, 4096, True), (1024, 14336, True)):
        assert ahead.makes_small_product(m, width, 16, 66) == inside
        assert not ahead.makes_small_product(m, width, 24, 66)
    for m, n, k, options in MANY_TILES:  # of which an H100 holds 66
        assert ahead.makes_small_product(m, max(n, k), options.rank, 66)


def test_its_memory_is_what_the_kernel_lays_out():
    """Sizes are said in two languages; both blocks fit a processor of Hopper."""
    folder = jit.kernels_folder() / "nf4_linear/hopper/ahead"
    text = "".join((folder / name).read_text() for name in ("parts.cuh", "produce.cuh"))
    for name, value in {
        "DEPTH": ahead._DEPTH,
        "CELL_DEPTH": ahead._CELL_DEPTH,
        "TOKENS": ahead._TOKENS,
        "DECODERS": ahead._DECODERS,
        "MULTIPLIERS": ahead._MULTIPLIERS,
        "RANKS": ahead._RANKS,
        "NOTES": ahead._NOTES,
        "WORDS_BEFORE": ahead._WORDS_BEFORE,
    }.items():
        assert f"constexpr int {name} = {value};" in text, name
    for columns, stages in ahead._STAGES.items():
        for name, dtype in (("bfloat16", "BFloat16"), ("float16", "Float16")):
            file = folder / f"{name}_{columns}.cu"
            assert f"NF4_AHEAD({dtype}, {columns}, {stages})" in file.read_text()
        assert ahead._shared_bytes(columns) <= 227 * 1024
