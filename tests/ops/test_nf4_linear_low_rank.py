"""LoRA's small product of many rows against float64, in every shape of block and team."""

import json
import math
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks.ops import nf4_linear_low_rank as benchmark
from qlora_kit.ops import jit
from qlora_kit.ops.nf4_linear import low_rank
from tests.ops.helpers import SCALE, STEP, poison
from tests.ops.rows import Within

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
LARGE = [(8193, 4096, 16), (2048, 14_336, 16), (1021, 4104, 16), (600, 4096, 8), (8192, 512, 16)]
SHAPES = [(rank, shape) for rank, shapes in low_rank.SHAPES.items() for shape in shapes]


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


def run_in_place(case, **options):
    """The kernel on x with spare columns, its result written into them as a layer does."""
    m, k, r = case.m, case.k, case.r
    wide = case.x.new_full((m, k + r + 8), torch.nan)
    wide[:, :k] = case.x
    held = case.stored.new_full((case.stored.shape[0], case.stored.shape[1] + 16), torch.nan)
    held[:, : case.stored.shape[1]] = case.stored
    stored = held[:, : case.stored.shape[1]]
    out = wide[:, k : k + r]
    poison(
        wide.device, *[(team, m, low_rank.kernel_rank(r)) for team in (3, 8)], dtype=torch.float32
    )
    factor = stored if case.turned else stored.T
    assert low_rank.fits(wide[:, :k], factor)
    low_rank.run(wide[:, :k], factor, case.scale, out, **options)
    assert torch.equal(wide[:, :k].view(torch.int16), case.x.view(torch.int16)), "x was written"
    assert wide[:, k + r :].isnan().all(), "values beyond the ranks were written"
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "turned"])
@pytest.mark.parametrize(("rank", "shape"), SHAPES, ids=str)
def test_every_shape_of_block_matches_float64(rank, shape, turned):
    """Alone, in clusters, and in teams that meet in memory; tails of rows, columns and ranks."""
    sizes = [(1, 8), (17, 200), (shape.tokens, 64), (257, 1032), (shape.tokens + 1, 4104)]
    for m, k in sizes:
        for r, dtype in ((rank, torch.bfloat16), (rank - 8, torch.float16)):
            case = Case(m, k, r, dtype, turned, "cuda", scale=0.3)
            for team in (1, 2, 3, 8):
                if team > -(-k // shape.columns):
                    continue
                for clustered in (True, False):
                    got = run_in_place(case, chosen=low_rank.Plan(shape, team), clustered=clustered)
                    case.check(got, f"{shape}, teams of {team}, clusters: {clustered}")


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "turned"])
@pytest.mark.parametrize(("m", "k", "r"), LARGE)
def test_the_chosen_plan_matches_float64(m, k, r, turned):
    for dtype in SIXTEEN_BITS:
        case = Case(m, k, r, dtype, turned, "cuda", scale=-1.7)
        case.check(run_in_place(case), "as planned")


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "turned"])
@pytest.mark.parametrize(("rank", "shape"), SHAPES, ids=str)
def test_x_is_put_beside_the_product(rank, shape, turned):
    """Bit for bit, once and completely, by teams too; what is behind it stays."""
    for m, k in [(1, 8), (17, 200), (257, 1032), (shape.tokens + 1, 4104)]:
        case = Case(m, k, rank, torch.bfloat16, turned, "cuda", scale=0.3)
        alone = run_in_place(case, chosen=low_rank.Plan(shape, 1)).clone()
        for team in (1, 3):
            if team > -(-k // shape.columns):
                continue
            for clustered in (True, False):
                wide = case.x.new_full((m, k + rank + 8), torch.nan)
                both, out = wide[:, : k + rank], case.x.new_full((m, rank), torch.nan)
                chosen = low_rank.Plan(shape, team)
                low_rank.run(
                    *(case.x, case.factor, case.scale, out),
                    both=both,
                    chosen=chosen,
                    clustered=clustered,
                )
                case.check(out, f"beside, teams of {team}")
                assert team > 1 or torch.equal(out, alone)
                assert torch.equal(both[:, :k].view(torch.int16), case.x.view(torch.int16))
                assert torch.equal(both[:, k:], out)
                assert wide[:, k + rank :].isnan().all(), "values beyond were written"


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k", "r"), [*LARGE[:3], (8192, 28_672, 16)])
def test_beside_the_product_of_many_rows(m, k, r):
    case = Case(m, k, r, torch.bfloat16, True, "cuda")
    small, both = low_rank.product_beside(case.x, case.factor, case.scale)
    case.check(small, "beside")
    assert torch.equal(both, torch.cat((case.x, small), dim=1))


@pytest.mark.parametrize("r", [8, 12])
def test_side_by_side_without_a_gpu(r):
    """Ranks are filled up with zeros."""
    case = Case(40, 64, r, torch.float32, turned=False)
    small, both = low_rank.product_beside(case.x, case.factor, case.scale)
    case.check(small, "on a CPU")
    filled = low_rank.to_eight(small)
    assert filled.shape[1] % 8 == 0
    assert not filled[:, r:].any()
    assert torch.equal(both, torch.cat((case.x, filled), dim=1))


@pytest.mark.gpu
def test_repeats_have_the_same_bits():
    """And a cluster's sums those of a team that meets in memory: the order is the same."""
    for rank, shape in SHAPES:
        for turned in (False, True):
            case = Case(333, 4104, rank, torch.bfloat16, turned, "cuda")
            for team in (1, 3, 8):
                chosen = low_rank.Plan(shape, team)
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


def _with_misfortunes(x):
    x[3, 7], x[20, -1] = torch.nan, torch.inf
    return [i for i in range(x.shape[0]) if i not in (3, 20)]


@pytest.mark.gpu
@pytest.mark.parametrize("clustered", [True, False])
def test_nan_and_infinity_stay_in_their_rows_of_the_kernel(clustered):
    for rank, shape in SHAPES:
        case = Case(40, 1032, rank - 8, torch.bfloat16, clustered, "cuda")
        others = _with_misfortunes(case.x)
        got = run_in_place(case, chosen=low_rank.Plan(shape, 3), clustered=clustered)
        assert got[3].isnan().all()
        assert not got[20].isfinite().any()
        assert got[others].isfinite().all()


def test_the_kernel_is_used_where_it_fits(monkeypatch):
    for r, rank in ((0, 0), (7, 0), (8, 16), (12, 0), (16, 16), (24, 0)):
        assert low_rank.kernel_rank(r) == rank
    x = torch.empty(4, 72).bfloat16()
    factor = torch.empty(64, 16).bfloat16()
    assert low_rank.fits(x[:, :64], factor)
    assert low_rank.fits(x[:, :64], torch.empty(16, 64).bfloat16().T)
    assert not low_rank.fits(x[:, 1:65], factor)
    assert not low_rank.fits(x[:, :60], factor[:60]), "k is no multiple of 8"
    assert not low_rank.fits(x[:, :64], factor[:, :12])
    assert not low_rank.fits(x[:0, :64], factor)
    monkeypatch.setattr(low_rank, "MOST_VALUES", 1024 * 64)
    many = torch.empty(1025, 64).bfloat16()
    for device, fitting in (("sm_90a", True), ("sm_80", False)):
        monkeypatch.setattr(low_rank, "architecture_of", lambda _, name=device: name)
        assert low_rank.is_faster(many[:1024], factor) == fitting
    monkeypatch.setattr(low_rank, "architecture_of", lambda _: "sm_90a")
    assert not low_rank.is_faster(many, factor)
    assert not low_rank.is_faster(many[: low_rank.FEWEST_ROWS - 1], factor)
    assert not low_rank.is_faster(many[:1024].float(), factor.float())
    assert not low_rank.is_faster(many[:1024], torch.empty(64, 24).bfloat16())


def test_elsewhere_torch_multiplies():
    case = Case(40, 200, 24, torch.bfloat16, turned=False)
    case.check(low_rank.product(case.x, case.factor, case.scale))


def test_every_kernel_named_is_in_its_source():
    for (dtype, rank), kernels in low_rank._KERNELS.items():
        text = jit.source_text(kernels.file)
        name = str(dtype).removeprefix("torch.")
        struct = {"bfloat16": "BFloat16", "float16": "Float16"}[name]
        assert f"LOW_RANK_PRODUCT_ADD({name}, {struct}, {rank})" in text
        for shape in low_rank.SHAPES[rank]:
            numbers = ", ".join(map(str, (rank, *shape)))
            assert f"LOW_RANK_PRODUCT({name}, {struct}, {numbers})" in text


def test_every_gpu_has_the_memory_for_each_shape():
    sizes = [shape.shared_bytes(rank, turned) for rank, shape in SHAPES for turned in (False, True)]
    assert max(sizes) <= 99 * 1024
    assert low_rank.SHAPES[16][0].shared_bytes(16, True) == 4 * (32 * 256 + 128 * 2 * 16)


@pytest.mark.parametrize("rank", low_rank.SHAPES)
def test_a_plan_gives_every_block_work(rank):
    """And, from 512 rows on, asks memory for enough or shares as much as it can."""
    for m in (1, 17, 257, 512, 1000, 2048, 4096, 8193, 65_536):
        for k in (8, 200, 4096, 14_336, 28_672):
            shape, team = low_rank.plan(m, k, rank, 132)
            assert shape in low_rank.SHAPES[rank]
            assert 1 <= team <= min(8, -(-k // shape.columns))
            blocks = -(-m // shape.tokens) * team
            ahead = blocks * (shape.stages - 1) * shape.bytes_of_x()
            if m >= 512 and k >= 4096:
                assert ahead >= 132 * low_rank.IN_FLIGHT or (team, shape) == (
                    8,
                    low_rank.SHAPES[rank][-1],
                )
            assert team == 1 or ahead * (team - 1) < 132 * low_rank.IN_FLIGHT * team


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
