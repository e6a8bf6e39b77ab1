"""nf4_linear on a GPU against float64: every strategy, real shapes, every number of rows.

Each case runs the public op with its gradients, then each strategy that serves it,
over memory filled with NaN. The bounds are derived in tests/ops/helpers.py; what
runs on a CPU too, with the reference backend, tests the bounds themselves.
"""

import itertools
import random

import pytest
import torch

from qlora_kit.ops.nf4_linear import cuda, reference
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.quant.weight import NF4Weight
from tests.ops.helpers import SCALE, Options, float32_sums, make_case, poison, truth

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]

FEW = (1, 2, 3, 5, 8, 9, 15, 16)
SOME = (17, 31, 33, 63, 64, 65, 100, 127, 129, 200, 255, 257, 500)
MANY = (513, 1000, 1025, 2047, 2049, 4097, 8193)
RANKS = (0, 1, 4, 16, 17, 64, 128)
MODELS = {  # (hidden, query, key and value, intermediate)
    "Llama-3 8B": (4096, 4096, 1024, 14336),
    "Llama-3 70B": (8192, 8192, 1024, 28672),
    "Qwen3 8B": (4096, 4096, 1024, 12288),
    "Qwen3 14B": (5120, 5120, 1024, 17408),
    "Qwen3 32B": (5120, 8192, 1024, 25600),
    "Gemma 2 9B": (3584, 4096, 2048, 14336),
    "Gemma 2 27B": (4608, 4096, 2048, 36864),
    "Gemma 3 12B": (3840, 4096, 2048, 15360),
    "Gemma 3 27B": (5376, 4096, 2048, 21504),
}
AWKWARD = [  # the last four have a K that is no multiple of 64
    (64, 64),
    (128, 192),
    (64 * 33, 64 * 9),
    (64 * 17, 64 * 65),
    (1000, 576),
    (1000, 4096),
    (24, 8256),
    (8256, 64),
    (17, 4160),
    (96, 1056),
    (4096, 4128),
    (31, 77),
    (130, 100),
]


def model_shapes():
    """(N, K) of every linear of the models, each once."""
    shapes = set()
    for hidden, query, key, intermediate in MODELS.values():
        shapes |= {(query, hidden), (key, hidden), (hidden, query)}
        shapes |= {(intermediate, hidden), (hidden, intermediate)}
    return sorted(shapes)


SHAPES = model_shapes() + AWKWARD


def cases():
    """Every shape with four M, every M with several shapes, options drawn at random."""
    draw = random.Random(3)
    ranks = itertools.cycle(RANKS)
    for index, (n, k) in enumerate(SHAPES):
        rows = FEW[index % 8], SOME[index % 13], SOME[(index + 6) % 13], MANY[index % 7]
        for m in rows:
            options = Options(
                rank=next(ranks),
                dtype=draw.choice([torch.bfloat16, torch.float16]),
                bias=draw.random() < 0.5,
                nested=draw.random() < 0.7,
                block_size=64 if (n, k) not in AWKWARD else draw.choice([64, 64, 32, 128]),
            )
            yield m, n, k, options


CASES = list(cases())
CPU_CASES = [  # small enough for a CPU, one of each kind
    (3, 128, 192, Options(rank=0, dtype=torch.float16, bias=False)),
    (17, 96, 320, Options(rank=17, nested=False)),
    (33, 130, 100, Options(rank=4, block_size=32)),
    (9, 64, 64, Options(rank=1, dtype=torch.float32)),
    (200, 72, 1152, Options(rank=128, dtype=torch.float16)),
]
IDS = [f"{n}x{k}-m{m}-{options}" for m, n, k, options in CASES]


@pytest.fixture(autouse=True)
def _sums():
    with float32_sums():
        yield


def run(case, device):
    """The op and its gradients over poisoned memory, by the names of the truth."""
    shapes = ((case.m, case.n), (case.m, case.k), (case.m, max(1, case.options.rank)))
    for leaf in case.leaves().values():
        leaf.grad = None
    poison(device, *shapes, dtype=case.options.dtype)
    y = nf4_linear(case.x, case.weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE)
    poison(device, *shapes, dtype=case.options.dtype)
    y.backward(case.dy)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in case.leaves().items()}


def strategy_arguments(case):
    """What `multiply` and `multiply_transposed` are given, prepared as the op does."""
    dtype = case.options.dtype
    x, bias = case.x.detach(), None if case.bias is None else case.bias.detach()
    xa = dyb = a = b = None
    if case.a is not None:
        a, b = case.a.detach().to(dtype), case.b.detach().to(dtype)
        xa = reference.scaled_product(x, a.T, SCALE)
        dyb = reference.scaled_product(case.dy, b, SCALE)
    return {
        "multiply": ("y", (x, case.weight, bias, xa, b)),
        "multiply_transposed": ("dx", (case.dy, case.weight, dyb, a)),
    }


def check_strategies(case, wanted, device):
    """Each strategy that serves the case, both products; which ones did."""
    ran = []
    for product, (name, arguments) in strategy_arguments(case).items():
        for strategy, module in cuda.STRATEGIES.items():
            if not hasattr(module, product) or not module.serves(*arguments[:2]):
                continue
            what = f"{strategy}.{product}, {case}"
            results = []
            for _ in "ab":
                poison(device, wanted.results[name].value.shape, dtype=case.options.dtype)
                results.append(getattr(module, product)(*arguments))
            wanted.check(name, results[0], what)
            assert torch.equal(*results), f"two runs differ: {what}"
            ran.append((strategy, product))
    return ran


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "options"), CASES, ids=IDS)
def test_results_match_float64(m, n, k, options):
    case = make_case(m, n, k, options, "cuda")
    wanted = truth(case)
    for name, got in run(case, "cuda").items():
        wanted.check(name, got, str(case))
    check_strategies(case, wanted, "cuda")


@pytest.mark.parametrize(("m", "n", "k", "options"), CPU_CASES, ids=str)
def test_results_match_float64_on_a_cpu(m, n, k, options):
    case = make_case(m, n, k, options)
    wanted = truth(case)
    for name, got in run(case, "cpu").items():
        wanted.check(name, got, str(case))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), SHAPES, ids=[f"{n}x{k}" for n, k in SHAPES])
def test_every_number_of_rows(n, k):
    ranks = itertools.cycle(RANKS)
    for m in FEW + SOME + MANY:
        case = make_case(m, n, k, Options(rank=next(ranks), bias=m % 2 == 0), "cuda")
        wanted = truth(case)
        for name, got in run(case, "cuda").items():
            wanted.check(name, got, str(case))
        check_strategies(case, wanted, "cuda")


def test_the_cases_cover_what_they_should():
    """Every M meets several shapes, both dtypes and every rank; every shape several M."""
    for m in FEW + SOME + MANY:
        found = [case for case in CASES if case[0] == m]
        assert len({case[1:3] for case in found}) >= 3, m
        assert len({case[3].dtype for case in found}) == 2, m
    for n, k in SHAPES:
        assert len({case[0] for case in CASES if case[1:3] == (n, k)}) == 4
    for low, high in ((1, 16), (17, 512), (513, 8193)):
        options = [case[3] for case in CASES if low <= case[0] <= high]
        assert {option.rank for option in options} == set(RANKS)
        assert {(option.bias, option.nested) for option in options} == {
            (bias, nested) for bias in (False, True) for nested in (False, True)
        }
        assert {option.block_size for option in options} == {32, 64, 128}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("m", [1, 16, 33, 300])
def test_a_wrong_result_is_out_of_bounds(device, dtype, m):
    """One code, one scale, one row of A, one element, all of it off by three roundings."""
    case = make_case(m, 256, 512, Options(rank=4, dtype=dtype), device)
    wanted = truth(case)
    results = run(case, device)
    for name, got in results.items():
        wanted.check(name, got, str(case))
    for field, change in (("packed", 128), ("absmax", 8)):
        tensors = {"packed": case.weight.packed.clone(), "absmax": case.weight.absmax.clone()}
        tensors[field].view(-1)[777] ^= change
        broken = replace(case.weight, **tensors)
        got = run(make_case(m, 256, 512, case.options, device, broken), device)
        assert wanted.results["y"].worst(got["y"]) > 1, field
        assert wanted.results["dx"].worst(got["dx"]) > 1, field
    with torch.no_grad():
        case.a[2] *= 1.25
    got = run(case, device)
    for name in ("y", "dx", "db"):
        assert wanted.results[name].worst(got[name]) > 1, name
    for name, got in results.items():
        worst = wanted.results[name].worst
        one = got.clone()
        one.view(-1)[-1] += wanted.results[name].value.abs().mean()
        assert worst(one) > 1, name
        one.view(-1)[-1] = float("nan")
        assert not worst(one) <= 1, name
        unit = torch.finfo(dtype).eps / 2
        assert worst(got.double() * (1 + 3 * unit)) > 1, name
        assert worst(torch.zeros_like(got)) > 1, name


def replace(weight, packed, absmax):
    return NF4Weight(
        packed=packed,
        absmax=absmax,
        nested_absmax=weight.nested_absmax,
        offset=weight.offset,
        shape=weight.shape,
        block_size=weight.block_size,
        dtype=weight.dtype,
    )


def test_the_report_says_where():
    case = make_case(5, 64, 128, Options(rank=0, bias=False))
    wanted = truth(case).results["y"]
    got = wanted.value.clone()
    got[3, 7:9] = 9.0
    got[4, 8] = float("nan")
    text = (
        r"y: nan times the bound\n3 of 320 elements \(1 NaN\), rows 2: 3 4, columns 2: 7 8: \[3,7\]"
    )
    with pytest.raises(AssertionError, match=text):
        wanted.check(got, "y")
    with pytest.raises(AssertionError, match=r"y: \(4, 64\)"):
        wanted.check(got[:4], "y")


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (1000, 576), (192, 64 * 33), (128, 192)])
def test_strategies_decode_bit_for_bit(n, k, dtype, nested):
    """Rows with a single 1 read columns of W out of the product, unrounded."""
    options = Options(rank=0, dtype=dtype, nested=nested)
    weight = make_case(1, n, k, options, "cuda").weight
    check_decoding(weight, dtype, "cuda")


def check_decoding(weight, dtype, device):
    """Every weight through both products of each strategy; which ones ran."""
    wanted = weight.dequantize(dtype)
    ran = set()
    for strategy, module in cuda.STRATEGIES.items():
        for product, tail, matrix in (
            ("multiply", (None,) * 3, wanted.T),
            ("multiply_transposed", (None,) * 2, wanted),
        ):
            for start, stop in itertools.pairwise([0, 1, 9, 25, 90, *range(219, 600, 200), 10**9]):
                rows = torch.eye(matrix.shape[0], device=device, dtype=dtype)[start:stop]
                serves = hasattr(module, product) and module.serves(rows, weight)
                if not serves or not len(rows):
                    continue
                poison(device, (len(rows), matrix.shape[1]), dtype=dtype)
                got = getattr(module, product)(rows, weight, *tail)
                what = f"{strategy}.{product}, rows {start} to {stop}"
                differing = (got != matrix[start:stop]).nonzero()[:5].tolist()
                assert not differing, f"{what}: {differing}"
                ran.add((strategy, product))
    return ran


@pytest.mark.gpu
def test_with_the_default_reductions():
    """As users run it: cuBLAS may keep parts of a sum in 16 bits, two roundings more."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    for m, n, k in ((1, 4096, 4096), (16, 4096, 14336), (100, 1024, 8192), (2049, 1024, 4096)):
        for dtype in (torch.bfloat16, torch.float16):
            case = make_case(m, n, k, Options(dtype=dtype), "cuda")
            wanted = truth(case)
            for name, got in run(case, "cuda").items():
                result = wanted.results[name]
                assert (got.double() - result.value).norm() < 3 * result.frobenius, (name, case)
