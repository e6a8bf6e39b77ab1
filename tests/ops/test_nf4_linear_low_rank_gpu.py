"""LoRA's small product where it runs: in CUDA graphs, on two streams, inside nf4_linear."""

import pytest
import torch

from qlora_kit.ops.nf4_linear import cuda as nf4_cuda
from qlora_kit.ops.nf4_linear import hopper, low_rank
from qlora_kit.ops.nf4_linear.cuda import force_strategy
from qlora_kit.ops.nf4_linear.op import nf4_linear
from tests.ops.helpers import SCALE, Options, float32_sums, make_case, poison, truth
from tests.ops.test_nf4_linear_low_rank import Case, exact

pytestmark = pytest.mark.gpu


@pytest.fixture
def everywhere(monkeypatch):
    """The kernel is used whatever the size, and its calls are counted."""
    calls = []
    run = low_rank.run
    monkeypatch.setattr(low_rank, "FEWEST_ROWS", 1)
    monkeypatch.setattr(low_rank, "MOST_VALUES", 1 << 40)
    monkeypatch.setattr(low_rank, "architecture_of", lambda device: "sm_90a")
    monkeypatch.setattr(
        low_rank, "run", lambda *args, **more: (calls.append(args), run(*args, **more))
    )
    return calls


def check_linear(case, x, strategy):
    """Output and every gradient of nf4_linear with one strategy."""
    poison("cuda", (case.m, case.n), (case.m, case.k), (case.m, case.options.rank))
    leaves = case.leaves() | {"dx": x}
    with force_strategy(strategy), float32_sums():
        y = nf4_linear(x, case.weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE)
        gradients = torch.autograd.grad(y, list(leaves.values()), case.dy)
    wanted = truth(case)
    for name, got in {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}.items():
        wanted.check(name, got, f"{strategy}, {case}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["dense", "hopper"])
def test_nf4_linear_with_it_matches_float64(everywhere, monkeypatch, strategy, dtype):
    """Contiguous, strided and unaligned rows; both of its products come from the kernel."""
    tiling = hopper.tiling  # for a launch that leaves the small product to another kernel
    monkeypatch.setattr(hopper, "tiling", lambda *product: tiling(*product[:4], 0))
    for m, n, k, rank in ((1, 1024, 512, 16), (17, 520, 768, 8), (300, 1088, 1024, 16)):
        case = make_case(m, n, k, Options(rank=rank, dtype=dtype), "cuda")
        if not nf4_cuda.STRATEGIES[strategy].serves(case.x, case.weight):
            pytest.skip("not on this GPU")
        spare = torch.full((m, k + 24), torch.nan, dtype=dtype, device="cuda")
        odd = torch.full((m * k + 1,), torch.nan, dtype=dtype, device="cuda")
        for x in (case.x.detach(), spare[:, 8 : 8 + k], odd[1:].view(m, k)):
            x.copy_(case.x.detach())
            before = len(everywhere)
            check_linear(case, x.detach().requires_grad_(), strategy)
            assert len(everywhere) == before + 2


def test_a_small_product_wrong_in_one_rank_is_found(everywhere, monkeypatch):
    case = make_case(64, 512, 512, Options(rank=16), "cuda")
    run = low_rank.run

    def wrong(x, factor, scale, out, *, both):
        run(x, factor, scale, out, both=both)
        both[:, x.shape[1] + 3] *= 2

    monkeypatch.setattr(low_rank, "run", wrong)
    with pytest.raises(AssertionError, match="times the bound"):
        check_linear(case, case.x, "dense")


@pytest.mark.parametrize("m", [512, 700])
@pytest.mark.parametrize("rank", [16, 64])
def test_hopper_s_kernel_of_few_rows_is_not_used_for_many(monkeypatch, m, rank):
    case = make_case(m, 1024, 512, Options(rank=rank), "cuda")
    if not hopper.serves(case.x, case.weight):
        pytest.skip("not on this GPU")
    few = []
    monkeypatch.setattr(hopper, "product_of_few_rows", lambda *args: few.append(args))
    check_linear(case, case.x, "hopper")
    assert not few


def test_the_kernel_in_a_cuda_graph_computes_on_new_inputs():
    for turned, clustered in ((False, True), (True, True), (False, False)):
        case = Case(700, 4096, 16, torch.bfloat16, turned, "cuda")
        out = case.x.new_empty((case.m, case.r))
        call = (case.x, case.factor, case.scale, out)
        low_rank.run(*call, clustered=clustered)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            low_rank.run(*call, clustered=clustered)
        for seed in range(3):
            case.x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
            out.fill_(torch.nan)
            graph.replay()
            case.truth = exact(case.x, case.factor, case.scale)
            case.check(out, f"replay {seed}")


@pytest.mark.parametrize("clustered", [True, False])
def test_two_streams_at_once(clustered):
    cases = [Case(m, 4096, r, torch.bfloat16, False, "cuda") for m, r in ((777, 16), (2048, 8))]
    outs = [case.x.new_empty((case.m, case.r)) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
    for _ in range(20):
        for case, out, stream in zip(cases, outs, streams, strict=True):
            with torch.cuda.stream(stream):
                low_rank.run(case.x, case.factor, case.scale, out, clustered=clustered)
    torch.cuda.synchronize()
    for case, out in zip(cases, outs, strict=True):
        case.check(out, "beside another")
