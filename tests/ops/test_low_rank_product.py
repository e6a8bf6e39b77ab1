"""low_rank_product against float64, on every backend, in every shape of block and team."""

import json
import math
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks.ops import low_rank_product as benchmark
from qlora_kit.block.small_product import small_product
from qlora_kit.core.errors import ShapeError, UserError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import available_backends, force_backend
from qlora_kit.ops.low_rank_product import cuda
from qlora_kit.ops.low_rank_product.op import low_rank_product
from tests.ops.helpers import SCALE, STEP, float32_sums, poison
from tests.ops.rows import DTYPES, LAYOUTS, Buffer, Within, device_of, values

BACKENDS = available_backends("low_rank_product")
HAS_KERNEL = "cuda" in BACKENDS
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="needs a GPU")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
CASES = [  # rows, columns of x, ranks
    (1, 8, 8),
    (3, 7, 3),
    (17, 200, 16),
    (50, 64, 24),
    (257, 1032, 48),
    (129, 4104, 8),
    (333, 72, 64),
    (70, 1528, 96),
    (95, 640, 128),
    (30, 96, 136),
]
LARGE = [(8193, 4096, 16), (2048, 14_336, 48), (1021, 4104, 64), (600, 4096, 8), (8192, 512, 128)]
SHAPES = [(rank, shape) for rank, shapes in cuda.SHAPES.items() for shape in shapes]
HELD = tuple(
    tuple(blocks // team for team in range(1, 9)) for blocks in (264, 396, 528)
)  # clusters


def exact(x, factor, scale):
    """scale·x·factor in float64, and what float32 sums may be off: see tests/ops/helpers.py."""
    x, factor = x.double(), factor.double()
    sizes = x.norm(dim=1, keepdim=True) * factor.norm(dim=0, keepdim=True)
    return Within(scale * x @ factor, STEP * math.sqrt(x.shape[1]) * abs(scale) * sizes)


@dataclass
class Case:
    """Operands in a dtype, and the truth."""

    m: int
    k: int
    r: int
    dtype: torch.dtype
    turned: bool
    device: str = "cpu"
    scale: float = SCALE

    def __post_init__(self):
        generator = torch.Generator(self.device).manual_seed(self.m + self.k + self.r)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        self.x, self.stored = normal(self.m, self.k), normal(self.k, self.r)
        if not self.turned:
            self.stored = self.stored.T.contiguous()
        self.truth = exact(self.x, self.factor, self.scale)

    @property
    def factor(self):
        """(K, r)."""
        return self.stored if self.turned else self.stored.T

    def check(self, got, what=""):
        found = Within(self.truth.value.cpu(), self.truth.slack.cpu())
        found.check(got, f"{self.m} x {self.k} x {self.r}, {self.dtype}, {self.turned}, {what}")


def run(case, backend, layout):
    """The op's result on one backend, written into a poisoned buffer of a layout."""
    device = device_of(backend)
    x, stored = (
        Buffer(tuple(t.shape), case.dtype, device, layout, t, index)
        for index, t in enumerate((case.x, case.stored))
    )
    out = Buffer((case.m, case.r), case.dtype, device, layout, index=2)
    poison(device, (case.m, case.r))
    factor = stored.view if case.turned else stored.view.T
    with force_backend(backend), float32_sums():
        got = low_rank_product(x.view, factor, scale=case.scale, out=out.view)
    assert got is out.view
    for buffer in (x, stored, out):
        buffer.check_surroundings()
    return got


def run_in_place(case, **options):
    """The kernel on x with spare columns, its result written into them as a layer does."""
    m, k, r = case.m, case.k, case.r
    wide = case.x.new_full((m, k + r + 8), torch.nan)
    wide[:, :k] = case.x
    held = case.stored.new_full((case.stored.shape[0], case.stored.shape[1] + 16), torch.nan)
    held[:, : case.stored.shape[1]] = case.stored
    stored = held[:, : case.stored.shape[1]]
    out = wide[:, k : k + r]
    poison(wide.device, *[(team, m, cuda.kernel_rank(r)) for team in (3, 8)], dtype=torch.float32)
    factor = stored if case.turned else stored.T
    assert cuda.fits(wide[:, :k], factor, out)
    cuda.run(wide[:, :k], factor, case.scale, out, **options)
    assert torch.equal(wide[:, :k].view(torch.int16), case.x.view(torch.int16)), "x was written"
    assert wide[:, k + r :].isnan().all(), "values beyond the ranks were written"
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "k", "r"), CASES)
def test_the_product_matches_float64(m, k, r, backend, layout):
    for dtype in SIXTEEN_BITS if backend == "cuda" else DTYPES:
        for turned in (False, True):
            case = Case(m, k, r, dtype, turned)
            case.check(run(case, backend, layout), f"{backend}, {layout}")


@needs_kernel
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "turned"])
@pytest.mark.parametrize(("rank", "shape"), SHAPES, ids=str)
def test_every_shape_of_block_matches_float64(rank, shape, turned):
    """Alone, in clusters, and in teams that meet in memory; tails of rows, columns and ranks."""
    sizes = [(1, 8), (17, 200), (shape.tokens, 64), (257, 1032), (shape.tokens + 1, 4104)]
    for m, k in sizes:
        for r, dtype in ((rank, torch.bfloat16), (rank - 8, torch.float16)):
            case = Case(m, k, r, dtype, turned, device_of("cuda"), scale=0.3)
            for team in (1, 2, 3, 8):
                if team > -(-k // shape.columns):
                    continue
                for clustered in (True, False):
                    got = run_in_place(case, chosen=cuda.Plan(shape, team), clustered=clustered)
                    case.check(got, f"{shape}, teams of {team}, clusters: {clustered}")


@needs_kernel
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "turned"])
@pytest.mark.parametrize(("m", "k", "r"), LARGE)
def test_the_chosen_plan_matches_float64(m, k, r, turned):
    for dtype in SIXTEEN_BITS:
        case = Case(m, k, r, dtype, turned, device_of("cuda"), scale=-1.7)
        case.check(run_in_place(case), "as planned")


@needs_kernel
def test_repeats_have_the_same_bits():
    """And a cluster's sums those of a team that meets in memory: the order is the same."""
    for rank, shape in SHAPES:
        for turned in (False, True):
            case = Case(333, 4104, rank, torch.bfloat16, turned, device_of("cuda"))
            for team in (1, 3, 8):
                chosen = cuda.Plan(shape, team)
                first = run_in_place(case, chosen=chosen).clone()
                for clustered in (None, None, False):
                    again = run_in_place(case, chosen=chosen, clustered=clustered)
                    assert torch.equal(first, again), (rank, shape, turned, team, clustered)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(("m", "k", "r"), [(129, 1032, 16), (40, 200, 48)])
def test_wrong_answers_do_not_pass(m, k, r, dtype):
    case = Case(m, k, r, dtype, turned=False)
    x, factor = case.x.double(), case.factor.double()
    columns = torch.arange(k)
    wrong = {
        "the last column left out": x * (columns < k - 1),
        "pieces exchanged": torch.cat((x[:, 8:16], x[:, :8], x[:, 16:]), dim=1),
        "a member's columns twice": torch.cat((x[:, :64], x[:, :64], x[:, 128:]), dim=1),
        "rows exchanged": x.roll(1, 0),
        "one value off": x + (torch.arange(x.numel()).view(x.shape) == 5 * k + 3),
    }
    for name, tensor in wrong.items():
        got = exact(tensor, factor, case.scale).value
        case.truth.check_refuses(got.to(dtype), name)
    value = case.truth.value
    case.truth.check_refuses(value.roll(1, 1).to(dtype), "another rank's")
    case.truth.check_refuses((2 * value).to(dtype), "scaled twice")
    halves = [(case.scale * x[:, i::2] @ factor[i::2]).to(dtype).double() for i in (0, 1)]
    case.truth.check_refuses(sum(halves).to(dtype), "rounded twice")
    case.check(value.to(dtype))


def test_the_reference_is_exact_in_float64():
    x, factor = values(6, 10), values(10, 3)
    for scale in (1.0, 0.3):
        got = low_rank_product(x, factor, scale=scale)
        torch.testing.assert_close(got, scale * x @ factor, rtol=0, atol=1e-14)


def _with_misfortunes(x):
    x[3, 7], x[20, -1] = torch.nan, torch.inf
    return [i for i in range(x.shape[0]) if i not in (3, 20)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_rows(backend):
    case = Case(40, 200, 8, torch.bfloat16, turned=True)
    others = _with_misfortunes(case.x)
    got = run(case, backend, "spare columns").cpu()
    assert got[3].isnan().all()
    assert not got[20].isfinite().any()
    assert got[others].isfinite().all()


@needs_kernel
@pytest.mark.parametrize("clustered", [True, False])
def test_nan_and_infinity_stay_in_their_rows_of_the_kernel(clustered):
    for rank, shape in SHAPES:
        case = Case(40, 1032, rank - 8, torch.bfloat16, rank % 32 == 0, device_of("cuda"))
        others = _with_misfortunes(case.x)
        got = run_in_place(case, chosen=cuda.Plan(shape, 3), clustered=clustered)
        assert got[3].isnan().all()
        assert not got[20].isfinite().any()
        assert got[others].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_columns(backend):
    device = device_of(backend)
    with force_backend(backend):
        empty = torch.ones(0, 64, device=device).bfloat16()
        assert low_rank_product(empty, empty.new_ones(64, 8)).shape == (0, 8)
        zeros = low_rank_product(empty.new_ones(5, 0), empty.new_ones(0, 8))
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_misfits_are_refused():
    x, factor = torch.ones(4, 6), torch.ones(6, 2)
    with pytest.raises(ShapeError, match=r"x with 2 dimensions, got shape \(4,\)"):
        low_rank_product(torch.ones(4), factor)
    with pytest.raises(ShapeError, match=r"factor of shape \(6, r\).*got \(5, 2\)"):
        low_rank_product(x, torch.ones(5, 2))
    with pytest.raises(ShapeError, match=r"factor or its transpose.*bfloat16"):
        low_rank_product(x, factor.bfloat16())
    with pytest.raises(ShapeError, match="transpose with its last dimension contiguous"):
        low_rank_product(x, torch.ones(6, 8)[:, ::4])
    with pytest.raises(ShapeError, match="needs out of shape"):
        low_rank_product(x, factor, out=torch.ones(4, 3))
    with pytest.raises(ShapeError, match="needs out with its last dimension contiguous"):
        low_rank_product(x, factor, out=torch.ones(2, 4).T)


def test_a_lost_gradient_is_refused():
    x, factor = torch.ones(4, 6), torch.ones(6, 2, requires_grad=True)
    with pytest.raises(UserError, match="no gradient of its own"):
        low_rank_product(x, factor)
    with torch.no_grad():
        low_rank_product(x, factor)


def test_opcheck():
    op = torch.ops.qlora_kit.low_rank_product
    x, factor = torch.randn(4, 6), torch.randn(3, 6)
    torch.library.opcheck(op, (x, factor.T, 0.5, torch.empty(4, 3)))
    torch.library.opcheck(op, (x, factor.T.contiguous(), 1.0, torch.empty(4, 3)))


def test_compiled_code_calls_the_op():
    factor = torch.randn(6, 2)

    def beside(x):
        wide = torch.cat((x, x[:, :2]), dim=1)
        wide[:, 6:] = low_rank_product(x, factor)
        return wide

    x = torch.randn(4, 6)
    compiled = torch.compile(beside, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), beside(x))


def test_a_group_calls_the_op_for_many_rows(monkeypatch):
    """And torch for few; both give the same."""
    x, factor = torch.randn(40, 64), torch.randn(16, 64).T
    results = []
    for fewest in (1, 1 << 30):
        monkeypatch.setattr(cuda, "FEWEST_ROWS", fewest)
        monkeypatch.setattr(cuda, "FEWEST_VALUES", {16: 1})
        out = torch.full((40, 16), torch.nan)
        with torch.profiler.profile() as profile:
            small_product(x, factor, out)
        ops = {event.key for event in profile.key_averages()}
        assert ("qlora_kit::low_rank_product" in ops) == (fewest == 1)
        results.append(out)
    assert torch.equal(*results)


def test_the_kernel_is_used_where_it_fits():
    for r, rank in ((0, 0), (7, 0), (8, 16), (40, 48), (128, 128), (129, 0), (136, 0)):
        assert cuda.kernel_rank(r) == rank
    x, out = torch.empty(4, 72).bfloat16(), torch.empty(4, 24).bfloat16()
    factor = torch.empty(64, 16).bfloat16()
    assert cuda.fits(x[:, :64], factor, out[:, 8:])
    assert cuda.fits(x[:, :64], torch.empty(16, 64).bfloat16().T, out[:, :16])
    assert not cuda.fits(x[:, 1:65], factor, out[:, :16])
    assert not cuda.fits(x[:, :60], factor[:60], out[:, :16]), "k is no multiple of 8"
    assert not cuda.fits(x[:, :64], factor[:, :12], out[:, :12])
    assert not cuda.fits(x[:0, :64], factor, out[:0, :16])
    assert not cuda.fits(x[:, :64], factor, out[:, 1:17])
    rows = cuda.FEWEST_ROWS
    assert cuda.is_large(rows, 1 << 20, 16)
    assert not cuda.is_large(rows - 1, 1 << 20, 16)
    assert not cuda.is_large(rows, 8, 16)


def test_every_kernel_named_is_in_its_source():
    for (dtype, rank), kernels in cuda._KERNELS.items():
        text = jit.source_text(kernels.file)
        name = str(dtype).removeprefix("torch.")
        struct = {"bfloat16": "BFloat16", "float16": "Float16"}[name]
        assert f"LOW_RANK_PRODUCT_ADD({name}, {struct}, {rank})" in text
        for shape in cuda.SHAPES[rank]:
            numbers = ", ".join(map(str, (rank, *shape)))
            assert f"LOW_RANK_PRODUCT({name}, {struct}, {numbers})" in text


def test_every_gpu_has_the_memory_for_each_shape():
    sizes = [shape.shared_bytes(rank, turned) for rank, shape in SHAPES for turned in (False, True)]
    assert max(sizes) <= 99 * 1024
    assert cuda.SHAPES[48][0].shared_bytes(48, True) == 4 * (16_384 + 64 * 7 * 16)


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("rank", cuda.SHAPES)
def test_a_plan_gives_every_block_work(rank, clustered):
    """And, from 512 rows on, most processors a block."""
    for m in (1, 17, 257, 512, 1000, 2048, 4096, 8193, 65_536):
        for k in (8, 200, 4096, 14_336, 28_672):
            held = HELD[: len(cuda.SHAPES[rank])]
            shape, team = cuda.plan(m, k, rank, False, held, 132, clustered)
            assert shape in cuda.SHAPES[rank]
            assert 1 <= team <= min(8, -(-k // shape.columns))
            blocks = -(-m // shape.tokens) * team
            if m >= 512 and k >= 4096:
                assert blocks >= 64 if rank > 64 else blocks >= 110, (m, k, shape, team)


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")
def test_the_benchmark_measures_and_records(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--seconds", "0.01", "--out", str(tmp_path)])
    benchmark.main()
    (file,) = tmp_path.rglob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert {row["impl"] for row in rows} == {"cublas", "kernel"}
    assert all(row["us"] > 0 for row in rows)
    case = benchmark.Case.parse("forward:17x64:16")
    with pytest.raises(AssertionError, match="wrong: off by"):
        benchmark.check(case, {"wrong": lambda operands: 1.05 * benchmark.cublas(operands)})
