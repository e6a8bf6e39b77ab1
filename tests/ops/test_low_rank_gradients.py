"""low_rank_gradients against float64, on every backend and in every shape of block."""

import json
import math
import sys
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from benchmarks.ops import low_rank_gradients as benchmark
from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.low_rank_gradients import cuda, reference
from qlora_kit.ops.low_rank_gradients.op import low_rank_gradients
from tests.ops.helpers import STEP, float32_sums, poison
from tests.ops.rows import DTYPES, LAYOUTS, Buffer, Within, device_of, values

BACKENDS = available_backends("low_rank_gradients")
HAS_KERNEL = "cuda" in BACKENDS
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
CASES = [  # rows, and where columns and ranks of the parts end
    (1, [(8, 8)]),
    (3, [(7, 3)]),
    (16, [(64, 16)]),
    (17, [(200, 16)]),
    (50, [(64, 8), (72, 8), (136, 24)]),
    (129, [(40, 16), (1032, 24), (1112, 40)]),
    (333, [(1032, 16)]),
    (77, [(264, 32), (528, 64)]),
    (70, [(1528, 24)]),
    (95, [(640, 64)]),
    (40, [(72, 40), (200, 40), (264, 48), (1400, 104)]),
    (30, [(96, 72)]),
    (18, [(8, 8), (16, 16), (24, 24), (32, 32), (40, 40)]),
]
SHAPES = [(rank, shape) for rank, shapes in cuda.SHAPES.items() for shape in shapes]
TRAINING = [  # tokens, and the linears of an 8B model that share their input
    (8192, [(14_336, 16), (28_672, 32)]),
    (8193, [(4096, 16), (5120, 32), (6144, 48)]),
    (8191, [(4096, 16)]),
    (2048, [(4096, 32)]),
    (4100, [(4096, 64)]),
]


def bounds(parts):
    """Columns and ranks of each part, as slices."""
    columns, ranks = ([0, *ends] for ends in zip(*parts, strict=True))
    return [(slice(*c), slice(*r)) for c, r in zip(pairwise(columns), pairwise(ranks), strict=True)]


def product(left, right):
    """left·right in float64, and what float32 sums may be off: see tests/ops/helpers.py."""
    sizes = left.norm(dim=1, keepdim=True) * right.norm(dim=0, keepdim=True)
    return Within(left @ right, STEP * math.sqrt(left.shape[1]) * sizes)


@dataclass
class Case:
    """Operands in a dtype, and the truth."""

    m: int
    parts: list
    dtype: torch.dtype
    device: str = "cpu"

    def __post_init__(self):
        (self.n, self.r), m = self.parts[-1], self.m
        self.columns, self.ranks = (list(ends) for ends in zip(*self.parts, strict=True))
        self.widest = reference.widest(self.ranks)
        generator = torch.Generator(self.device).manual_seed(m + self.n)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        self.dy, self.xa, self.b = normal(m, self.n), normal(m, self.r), normal(self.n, self.r)
        outside = torch.ones_like(self.b, dtype=torch.bool)
        for columns, ranks in bounds(self.parts):
            outside[columns, ranks] = False
        self.b[outside] = 0
        self.result = self.product(self.dy.double())
        self.gradient = self.sums(self.dy.double())

    def product(self, dy):
        """dY·B."""
        return product(dy, self.b.double())

    def sums(self, dy):
        """dB as the op returns it."""
        found = [dy.new_zeros(self.n, self.widest) for _ in range(2)]
        for columns, ranks in bounds(self.parts):
            part = product(dy[:, columns].T, self.xa[:, ranks].double())
            for tensor, of_part in zip(found, (part.value, part.slack), strict=True):
                tensor[columns, : ranks.stop - ranks.start] = of_part
        return Within(*found)

    def check(self, dyb, d_b, what=""):
        assert d_b.dtype == torch.float32
        assert d_b.shape == (self.n, self.widest)
        for name, expected, got in (("dYB", self.result, dyb), ("dB", self.gradient, d_b)):
            Within(expected.value.cpu(), expected.slack.cpu()).check(got, f"{name}, {what}")


def run(case, backend, layout):
    """Both results of a backend, dYB written into a poisoned buffer of a layout."""
    device = device_of(backend)
    dy, xa = (
        Buffer(tuple(t.shape), case.dtype, device, layout, t, index)
        for index, t in enumerate((case.dy, case.xa))
    )
    out = Buffer((case.m, case.r), case.dtype, device, layout, index=2)
    poison(device, (case.m, case.r), (case.n, case.widest))
    with force_backend(backend), float32_sums():
        dyb, d_b = low_rank_gradients(
            dy.view, case.b.to(device), xa.view, parts=case.parts, out=out.view
        )
    assert dyb is out.view
    for buffer in (dy, xa, out):
        buffer.check_surroundings()
    return dyb, d_b


def run_in_place(case, **options):
    """The kernel on dY with spare columns, dYB written into them as the training step does."""
    r, n, rest = case.r, case.n, 8
    wide = case.dy.new_full((case.m, n + r + rest), torch.nan)
    wide[:, :n] = case.dy
    small = case.dy.new_full((case.m, 24 + r), torch.nan)
    small[:, 24:] = case.xa
    out = wide[:, n : n + r]
    poison(wide.device, (case.m, r), (n, case.widest), (64, case.m, 64), (600, 512, 64))
    operands = wide[:, :n], case.b, small[:, 24:]
    d_b = cuda.one_pass(*operands, case.columns, case.ranks, out, **options)
    assert torch.equal(wide[:, :n], case.dy)
    assert wide[:, n + r :].isnan().all(), "values beyond the ranks were written"
    assert small[:, :24].isnan().all()
    return out, d_b


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "parts"), CASES, ids=str)
def test_both_products_match_float64(m, parts, backend, layout):
    """Where the kernel does not take a layout or a shape, two products do."""
    for dtype in SIXTEEN_BITS if backend == "cuda" else DTYPES:
        case = Case(m, parts, dtype)
        case.check(*run(case, backend, layout), f"{dtype}")


@pytest.mark.skipif(not HAS_KERNEL, reason="needs a GPU")
@pytest.mark.parametrize(("rank", "shape"), SHAPES, ids=str)
def test_every_shape_of_block_matches_float64(rank, shape):
    """One block, fewer than there are strips, and as many as there is work for."""
    for m, parts in CASES:
        columns, ranks = zip(*parts, strict=True)
        if cuda.kernel_rank(columns, ranks) != rank:
            continue
        for dtype, blocks in zip((*SIXTEEN_BITS, torch.bfloat16), (1, 3, 1000), strict=True):
            case = Case(m, parts, dtype, device_of("cuda"))
            found = run_in_place(case, shape=shape, blocks=blocks, keep=blocks == 3)
            case.check(*found, f"{m}, {parts}, {dtype}, {blocks} blocks")


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(
    ("m", "parts"), [(129, [(40, 16), (1032, 24)]), (17, [(200, 16)])], ids=str
)
def test_wrong_answers_do_not_pass(m, parts, dtype):
    case = Case(m, parts, dtype)
    dy, b = case.dy.double(), case.b.double()
    wrong = {
        "the last row left out": dy * (torch.arange(m)[:, None] < m - 1),
        "the last column left out": dy * (torch.arange(case.n) < case.n - 1),
        "rows of a tile twice": torch.cat((dy[:16], dy[:16], dy[32:])) if m > 32 else 2 * dy,
        "columns of a tile exchanged": torch.cat((dy[:, 8:16], dy[:, :8], dy[:, 16:]), dim=1),
        "one value off": dy + (torch.arange(dy.numel()).view(dy.shape) == 5 * case.n + 3),
    }
    for name, tensor in wrong.items():
        case.result.check_refuses(case.product(tensor).value.to(dtype), name)
        case.gradient.check_refuses(case.sums(tensor).value.float(), name)
    case.result.check_refuses((dy @ b.roll(1, 1)).to(dtype), "another rank's")
    case.gradient.check_refuses(case.gradient.value.roll(1, 1).float(), "another rank's")
    halves = [(dy[:, i::2] @ b[i::2]).to(dtype).double() for i in (0, 1)]
    case.result.check_refuses(sum(halves).to(dtype), "rounded twice")
    case.gradient.check_refuses(case.gradient.value.to(dtype).float(), "rounded to 16 bits")
    case.check(case.result.value.to(dtype), case.gradient.value.float())


def test_the_reference_is_exact_in_float64():
    dy, b, xa = values(6, 10), values(10, 3), values(6, 3)
    dyb, d_b = low_rank_gradients(dy, b, xa)
    torch.testing.assert_close(dyb, dy @ b, rtol=0, atol=1e-14)
    torch.testing.assert_close(d_b, dy.T @ xa, rtol=0, atol=1e-14)


def test_float32_sums_of_the_reference_are_not_rounded():
    case = Case(50, [(64, 8)], torch.bfloat16)
    assert not torch.equal(reference.token_sum(case.dy, case.xa).bfloat16().float(), case.dy)
    case.gradient.check(reference.token_sum(case.dy, case.xa))


@pytest.mark.skipif(not HAS_KERNEL, reason="needs a GPU")
def test_repeats_have_the_same_bits():
    """And so have results that other blocks' numbers lead to in dYB: a tile has one block."""
    for rank, parts in ((16, [(1032, 16), (1112, 32)]), (32, [(1112, 32)]), (64, [(640, 64)])):
        case = Case(333, parts, torch.bfloat16, device_of("cuda"))
        for shape in cuda.SHAPES[rank]:
            first = run_in_place(case, shape=shape, blocks=5)
            again = run_in_place(case, shape=shape, blocks=5, overlap=False)
            other = run_in_place(case, shape=shape, blocks=2)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            assert torch.equal(first[0], other[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_reach_their_rows_and_columns(backend):
    """Of dYB the row, of dB the column, within the part; no others."""
    parts = [(64, 8), (200, 24)]
    case = Case(40, parts, torch.bfloat16)
    case.dy[3, 70], case.dy[20, 5] = torch.nan, torch.inf
    dyb, d_b = (tensor.cpu() for tensor in run(case, backend, "spare columns"))
    assert dyb[3, 8:].isnan().all()
    assert not dyb[20, :8].isfinite().any()
    assert dyb[[i for i in range(40) if i not in (3, 20)]].isfinite().all()
    assert d_b[70].isnan().all()
    assert not d_b[5, :8].isfinite().any()
    assert (d_b[5, 8:] == 0).all()
    assert d_b[[i for i in range(200) if i not in (5, 70)]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_zeros(backend):
    device = device_of(backend)
    dy, b, xa = (torch.ones(s, device=device).bfloat16() for s in ((0, 64), (64, 8), (0, 8)))
    with force_backend(backend):
        dyb, d_b = low_rank_gradients(dy, b, xa)
    assert dyb.shape == (0, 8)
    assert torch.equal(d_b, torch.zeros(64, 8, device=device))


def test_misfits_are_refused():
    dy, b, xa = torch.ones(4, 6), torch.ones(6, 2), torch.ones(4, 2)
    with pytest.raises(ShapeError, match=r"dy with 2 dimensions, got shape \(4,\)"):
        low_rank_gradients(torch.ones(4), b, xa)
    with pytest.raises(ShapeError, match=r"needs b of shape \(6, 2\).*got \(5, 2\)"):
        low_rank_gradients(dy, torch.ones(5, 2), xa)
    with pytest.raises(ShapeError, match="needs b contiguous"):
        low_rank_gradients(dy, torch.ones(6, 4)[:, :2], xa)
    with pytest.raises(ShapeError, match="needs xa of shape"):
        low_rank_gradients(dy, b, torch.ones(3, 2))
    with pytest.raises(ShapeError, match=r"needs out of shape .*torch.float32.*bfloat16"):
        low_rank_gradients(dy, b, xa, out=torch.ones(4, 2).bfloat16())
    with pytest.raises(ShapeError, match="needs out with its last dimension contiguous"):
        low_rank_gradients(dy, b, xa, out=torch.ones(2, 4).T)
    for parts in ([], [(6, 1)], [(5, 2)], [(3, 2), (3, 2), (6, 2)], [(3, 2), (6, 1)]):
        with pytest.raises(ShapeError, match="needs parts that end one after the other"):
            low_rank_gradients(dy, b, xa, parts=parts)


def test_a_lost_gradient_is_refused():
    dy, b, xa = torch.ones(4, 6), torch.ones(6, 2, requires_grad=True), torch.ones(4, 2)
    with pytest.raises(UserError, match="no gradient of its own"):
        low_rank_gradients(dy, b, xa)
    with torch.no_grad():
        low_rank_gradients(dy, b, xa)


def test_opcheck():
    op = torch.ops.qlora_kit.low_rank_gradients
    dy, b, xa = torch.randn(4, 6), torch.randn(6, 3), torch.randn(4, 3)
    torch.library.opcheck(op, (dy, b, xa, [6], [3], torch.empty(4, 3)))
    b[:2, 1:], b[2:, :1] = 0, 0
    torch.library.opcheck(op, (dy, b, xa, [2, 6], [1, 3], torch.empty(4, 3)))


def test_compiled_code_calls_the_op():
    b, xa = torch.randn(6, 2), torch.randn(4, 2)

    def both(dy):
        wide = torch.cat((dy, dy[:, :2]), dim=1)
        dyb, d_b = low_rank_gradients(dy, b, xa)
        wide[:, 6:] = dyb
        return wide, d_b

    dy = torch.randn(4, 6)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(compiled(dy), both(dy), strict=True):
        assert torch.equal(got, wanted)


def test_every_kernel_named_is_in_its_source():
    for (dtype, rank), kernels in cuda._KERNELS.items():
        text = jit.source_text(kernels.file)
        name = str(dtype).removeprefix("torch.")
        for shape in cuda.SHAPES[rank]:
            numbers = ", ".join(map(str, (rank, *shape)))
            struct = {"bfloat16": "BFloat16", "float16": "Float16"}[name]
            assert f"LOW_RANK_GRADIENTS({name}, {struct}, {numbers})" in text


def test_every_gpu_has_the_memory_for_a_shape():
    for rank, shapes in cuda.SHAPES.items():
        sizes = [shape.shared_bytes(rank) for shape in shapes]
        assert min(sizes) <= cuda._LEAST_SHARED_KIB * 1024
        assert max(sizes) <= max(cuda._SHARED_KIB.values()) * 1024
    assert cuda.SHAPES[16][0].shared_bytes(16) == 4 * 33_280 + 32_768 + 16_384


@pytest.mark.parametrize("wide", [256, 512, 1024])
def test_a_plan_gives_every_block_work_and_little_memory(wide):
    """A block starts at least one tile: sums of blocks that saw nothing are never added."""
    for m, parts in [*CASES, *TRAINING]:
        columns, ranks = zip(*parts, strict=True)
        tiles = -(-m // 16)
        for blocks in (1, 7, 132, 264):
            plan = cuda.plan(m, columns, ranks, wide, blocks)
            widths = []
            for of_columns, of_ranks in bounds(parts):
                count = of_columns.stop - of_columns.start
                if of_ranks.start < of_ranks.stop:
                    strips = math.ceil(count / wide)
                    widths += [64 * math.ceil(math.ceil(count / strips) / 64)] * strips
                    assert widths[-1] * (strips - 1) < count <= widths[-1] * strips
                    assert widths[-1] <= wide
            costs = [width // 64 + 2 for width in widths]
            total = tiles * sum(costs)
            assert plan.strips == len(widths)
            assert plan.grains * 64 == sum(widths)
            assert plan.share >= 2 * max(costs)
            assert (plan.blocks - 1) * plan.share < total <= plan.blocks * plan.share
            assert plan.blocks <= blocks


def test_the_kernel_is_used_where_it_fits():
    assert cuda.kernel_rank([64], [8]) == 16
    assert cuda.kernel_rank([64, 128], [24, 24]) == 32
    assert cuda.kernel_rank([64], [64]) == 64
    for columns, ranks in (([64], [72]), ([60], [8]), ([64], [4]), ([8], [0]), ([8] * 5, [8] * 5)):
        assert cuda.kernel_rank(columns, ranks) == 0
    wide = torch.empty(5, 96, dtype=torch.bfloat16)
    dy, b, xa, out = wide[:, :64], torch.empty(64, 8).bfloat16(), wide[:, 72:80], wide[:, 64:72]
    assert cuda.fits(dy, b, xa, out)
    assert not cuda.fits(wide[:, 1:65], b, xa, out)
    assert not cuda.fits(dy, b, wide[:, 73:81], out)
    assert not cuda.fits(torch.empty(5, 65, dtype=torch.bfloat16)[:, :64], b, xa, out)
    assert not cuda.fits(dy[:0], b, xa[:0], out[:0])
    assert not cuda.serves(dy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")
def test_the_benchmark_measures_and_records(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--seconds", "0.01", "--out", str(tmp_path)])
    benchmark.main()
    (file,) = tmp_path.rglob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["impl"] for row in rows} == {"one pass", "two products", "dY B alone", "dB alone"}
    assert all(row["us"] > 0 for row in rows)
    case = benchmark.Case.parse("33:64:16")
    found = benchmark.two_products(case, case.operands())
    for wrong in ((1.05 * found[0], found[1]), (found[0], [1.01 * d_b for d_b in found[1]])):
        with pytest.raises(AssertionError, match="ours: off by"):
            benchmark.check(case, wrong, found, "ours")


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "parts"), TRAINING, ids=str)
def test_at_the_sizes_of_training(m, parts):
    """As many blocks as a GPU runs, each shape of them, and an odd number of rows."""
    case = Case(m, parts, torch.bfloat16, "cuda")
    for shape in cuda.SHAPES[cuda.kernel_rank(case.columns, case.ranks)]:
        case.check(*run_in_place(case, shape=shape), f"{shape}")
    case.check(*run(case, "cuda", "spare columns"), "as called")


@pytest.mark.gpu
def test_in_a_graph():
    case = Case(1100, [(1032, 16), (1112, 32)], torch.bfloat16, "cuda")
    operands = case.dy, case.b, case.xa

    def call():
        return low_rank_gradients(*operands, parts=case.parts)

    wanted = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
