"""Ops where they run: CUDA graphs, two streams at once, devices by index, other threads."""

import threading

import pytest
import torch

from qlora_kit.core.errors import BackendError
from qlora_kit.ops.backend import ENVIRONMENT_VARIABLE, force_backend
from qlora_kit.ops.column_products.op import column_products
from qlora_kit.ops.cross_entropy.op import cross_entropy
from qlora_kit.ops.gated_activation.op import gated_activation
from qlora_kit.ops.gather_rows.op import gather_rows
from qlora_kit.ops.low_rank_gradients.op import low_rank_gradients
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize
from qlora_kit.ops.nf4_linear import cuda
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.ops.nf4_quantize.op import quantize_weight
from qlora_kit.ops.nf4_scales.op import stretched_weight
from qlora_kit.ops.rms_norm.op import rms_norm
from qlora_kit.ops.rotary.op import rotary_
from tests.ops.helpers import SCALE, Options, make_case, truth

REGIMES = [1, 7, 16, 40, 130, 300, 1100, 2049]
"""Rows that meet every strategy."""


def forward(case):
    return nf4_linear(case.x, case.weight, case.bias, lora_a=case.a, lora_b=case.b, scale=SCALE)


def results(case):
    """y and all gradients, without touching `.grad`."""
    y = forward(case)
    leaves = case.leaves()
    gradients = torch.autograd.grad(y, list(leaves.values()), case.dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def check(case, got):
    wanted = truth(case)
    for name, tensor in got.items():
        # cuBLAS may sum parts in 16 bits by default: two roundings more
        error = (tensor.double() - wanted.results[name].value).norm()
        assert error < 3 * wanted.results[name].frobenius, (name, str(case))


def refill(case, seed):
    """New values in the same memory."""
    generator = torch.Generator(case.x.device).manual_seed(seed)
    with torch.no_grad():
        for tensor in (case.x, case.dy):
            tensor.normal_(generator=generator)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 1088)], ids=["1024x4096", "4096x1088"])
@pytest.mark.parametrize("m", REGIMES)
def test_a_captured_graph_computes_on_new_inputs(m, shape):
    """Forward and gradients, captured once, replayed twice on each of three inputs."""
    case = make_case(m, *shape, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case)
    for seed in range(3):
        refill(case, seed)
        for tensor in captured.values():
            tensor.fill_(float("nan"))
        graph.replay()
        first = {name: tensor.clone() for name, tensor in captured.items()}
        graph.replay()
        check(case, first)
        for name, tensor in captured.items():
            assert torch.equal(tensor, first[name]), (name, m, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("other", [3, 40, 300, 2049])
@pytest.mark.parametrize("m", [3, 40, 300, 2049])
def test_two_streams_at_once(m, other):
    """Queued behind a delay so that they overlap; a workspace shared by both would show."""
    cases = [make_case(m, 1024, 2048, device="cuda"), make_case(other, 2048, 1024, device="cuda")]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    alone = []
    torch.cuda.synchronize()  # the operands are made on the default stream
    for case, stream in zip(cases, streams, strict=True):
        with torch.cuda.stream(stream), torch.no_grad():
            alone.append(both_ways(case))
        torch.cuda.synchronize()
    for _ in range(5):
        got = [[], []]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)  # about a millisecond
        for _ in range(8):
            for index, (case, stream) in enumerate(zip(cases, streams, strict=True)):
                with torch.cuda.stream(stream), torch.no_grad():
                    got[index].append(both_ways(case))
        torch.cuda.synchronize()
        for wanted, many in zip(alone, got, strict=True):
            for pair in many:
                assert all(torch.equal(a, b) for a, b in zip(pair, wanted, strict=True))
    for case, (y, dx, *_) in zip(cases, alone, strict=True):
        check(case, {"y": y, "dx": dx})


def both_ways(case):
    """y and the op's own gradients, on the current stream."""
    w = case.weight
    fields = (w.packed, w.absmax, w.nested_absmax, w.offset, list(w.shape), w.block_size)
    ops = torch.ops.qlora_kit
    y, xa = ops.nf4_linear(case.x.detach(), *fields, case.bias, case.a, case.b, SCALE)
    flags = (True, True, True, True)
    gradients = ops.nf4_linear_backward(
        case.dy, case.x.detach(), *fields, case.a, case.b, xa, SCALE, *flags
    )
    return y, *gradients


@pytest.mark.gpu
@pytest.mark.parametrize("m", REGIMES)
def test_a_thread_that_has_not_used_the_gpu(m):
    """All is loaded, and memory is cached: nothing but our launch can give it a context."""
    case = make_case(m, 256, 512, device="cuda")
    with torch.no_grad():
        wanted = forward(case)  # and its memory goes back to the allocator
        kept = wanted.clone()
        del wanted
        torch.cuda.synchronize()
        got = []
        thread = threading.Thread(target=lambda: got.append(forward(case)))
        thread.start()
        thread.join()
    assert len(got) == 1, "it raised"
    torch.cuda.synchronize()
    assert torch.equal(got[0], kept)


@pytest.mark.gpu
@pytest.mark.parametrize("m", REGIMES)
def test_a_device_without_an_index(m):
    """`cuda` and `cuda:0` are one device."""
    case = make_case(m, 256, 512, device="cuda")
    indexed = make_case(m, 256, 512, device="cuda:0")
    first, second = results(case), results(indexed)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.multi_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("m", REGIMES)
def test_devices_by_index(m):
    """Tensors say where a call runs, whichever device is current, and it stays current."""
    for index in (1, 0):
        for current in (0, 1):
            with torch.cuda.device(current):
                case = make_case(m, 256, 512, device=f"cuda:{index}")
                y = forward(case)  # the backward runs in a thread of its device
                assert (y.device.index, torch.cuda.current_device()) == (index, current)
                got = results(case)
                assert {tensor.device.index for tensor in got.values()} == {index}
                check(case, got)
                decoded = nf4_dequantize(case.weight, torch.bfloat16)
                assert torch.equal(decoded, case.weight.dequantize(torch.bfloat16))
                assert torch.cuda.current_device() == current


def other_ops(device):
    """The ops beside `nf4_linear`, by name, on operands of that device."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    generator = torch.Generator(device).manual_seed(0)
    x, dy, heads, gate_up = normal(64, 256), normal(64, 256), normal(64, 4, 32), normal(64, 512)
    b, xa = normal(256, 16), normal(64, 16)
    angle = normal(64, 16).float().repeat(1, 2)
    weight, factors = quantize_weight(x), normal(64).float()
    targets = torch.arange(64, device=device)
    return {
        "rms_norm": lambda: rms_norm(x, factors.repeat(4), 1e-5),
        "rotary": lambda: rotary_(heads.clone(), angle.cos(), angle.sin()),
        "gated_activation": lambda: gated_activation(gate_up, "silu"),
        "column_products": lambda: column_products(x, dy),
        "cross_entropy": lambda: cross_entropy(x, targets),
        "gather_rows": lambda: gather_rows(x, targets),
        "low_rank_gradients": lambda: torch.cat(low_rank_gradients(dy, b, xa)),
        "nf4_quantize": lambda: quantize_weight(x).packed,
        "nf4_scales": lambda: stretched_weight(weight, factors).absmax,
        "nf4_dequantize": lambda: nf4_dequantize(weight, torch.bfloat16),
    }


@pytest.mark.multi_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", other_ops("cpu"))
def test_other_ops_by_index(name):
    """First uses among them: each compiles and loads while another device is current."""
    for index in (1, 0):
        with force_backend("cuda"), torch.cuda.device(1 - index):
            run = other_ops(f"cuda:{index}")[name]
            got = run()
            assert (got.device.index, torch.cuda.current_device()) == (index, 1 - index)
            with torch.cuda.device(index):
                assert torch.equal(got, run())


@pytest.mark.multi_gpu
@pytest.mark.gpu
def test_two_devices_at_once():
    cases = [make_case(300, 1024, 2048, device=f"cuda:{index}") for index in range(2)]
    alone = [results(case) for case in cases]
    together = [[results(case) for case in cases] for _ in range(10)]
    for got in together:
        for one, wanted in zip(got, alone, strict=True):
            assert all(torch.equal(one[name], wanted[name]) for name in wanted)


def in_a_thread(run):
    """Run it in another thread, as autograd runs the backward of CUDA tensors; what it raised."""
    raised = []

    def body():
        try:
            run()
        except BackendError as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return raised


def test_a_forced_backend_holds_in_the_backward(monkeypatch):
    """The choice is the forward's, in whatever thread the backward runs."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")  # what a backward that forgot would take
    case = make_case(3, 64, 128)
    with force_backend("reference"):
        y = forward(case)
    assert not in_a_thread(lambda: y.backward(case.dy))
    check(case, {name: leaf.grad for name, leaf in case.leaves().items()})


@pytest.mark.gpu
def test_a_forced_strategy_holds_in_the_backward(monkeypatch):
    """Were it forgotten, the unknown name would be read and refused."""
    case = make_case(3, 64, 128, device="cuda")
    with cuda.force_strategy("dense"):
        y = forward(case)
        monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, "no such strategy")
        y.backward(case.dy)
    check(case, {name: leaf.grad for name, leaf in case.leaves().items()})


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", cuda.STRATEGIES)
def test_a_forced_strategy_serves_the_public_op(strategy):
    """Where it serves the case, the bits are those of the strategy itself."""
    served = []
    for m in REGIMES:
        case = make_case(m, 256, 512, Options(rank=0, bias=False), device="cuda")
        x = case.x.detach()
        module = cuda.STRATEGIES[strategy]
        with cuda.force_strategy(strategy):
            if not module.serves(x, case.weight):
                with pytest.raises(BackendError, match=strategy):
                    nf4_linear(x, case.weight)
                continue
            got = nf4_linear(x, case.weight)
        assert torch.equal(got, module.multiply(x, case.weight, None, None, None))
        check(case, {"y": got})
        served.append(m)
    if not served:
        pytest.skip(f"{strategy} is for another architecture")


@pytest.mark.gpu
def test_a_forced_backend_that_cannot_serve_raises():
    """Asked for CUDA with tensors on the CPU: no other backend steps in."""
    case = make_case(3, 64, 128)
    with force_backend("cuda"), pytest.raises(BackendError, match="forced backend 'cuda'"):
        forward(case)
