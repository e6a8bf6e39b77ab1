"""The attention pair on a GPU: every kernel against float64, layouts, repetition, graphs, waits."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qlora_kit.ops.attention.choose import BACKENDS, choose, force_attention
from qlora_kit.ops.attention.op import attention
from qlora_kit.ops.attention.pair import attention_forward
from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents
from tests.ops.attention_cases import RESULTS, SHAPES, Truth, make_case, run
from tests.ops.helpers import poison

pytestmark = pytest.mark.gpu

KERNELS = ["cudnn", "flash", "chunked"]
LONGER = [(3, 515, 32, 8, 128), (1, 1000, 8, 2, 128), (2, 640, 4, 1, 64), (1, 1537, 4, 4, 112)]
LENGTHS = (3, 211, 64, 1, 129, 9)
RULES = [
    {},
    {"window": 7},
    {"window": 200},
    {"documents": LENGTHS},
    {"documents": LENGTHS, "window": 50},
    {"softcap": 5.0},
    {"documents": LENGTHS, "window": 50, "softcap": 5.0},
]


def make(shape, **options):
    return make_case(shape, device="cuda", **{"dtype": torch.bfloat16} | options)


def served(name, case):
    """Skip what a kernel says it does not do."""
    rule = case.rule
    idle = rule.window is not None and rule.window >= case.q.shape[1]
    rule = replace(rule, window=None) if idle else rule
    reason = BACKENDS[name].refuses(Call.of(case.q, rule, documents=case.documents is not None))
    if reason is not None:
        pytest.skip(f"{name} {reason}")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule) or "plain")
@pytest.mark.parametrize("shape", SHAPES + LONGER, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", KERNELS)
def test_forward_and_gradients_match_float64(name, shape, rule):
    case = make(shape, **rule)
    served(name, case)
    truth = Truth(case)
    poison("cuda", tuple(case.q.shape), tuple(case.k.shape))
    with force_attention(name):
        got = run(case)
    truth.check(got, name)
    assert all(tensor.is_contiguous() for tensor in got.values())


@pytest.mark.parametrize("rule", [{}, {"documents": LENGTHS}], ids=["plain", "documents"])
@pytest.mark.parametrize("name", KERNELS)
def test_float16(name, rule):
    case = make((2, 515, 8, 2, 128), dtype=torch.float16, **rule)
    served(name, case)
    with force_attention(name):
        Truth(case).check(run(case), name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule) or "plain")
def test_float32(rule):
    case = make((2, 300, 8, 2, 80), dtype=torch.float32, **rule)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        Truth(case).check(run(case), "chunked")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_few_tokens(tokens):
    case = make((2, tokens, 4, 2, 64))
    Truth(case).check(run(case), f"{tokens} tokens")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_write_what_the_caller_gets(name):
    """Of strided views, before the pair makes anything contiguous: no copy is hidden there.

    Enough blocks to fill the GPU: below that flash splits the keys and adds up in float32.
    """
    case = make((4, 1024, 16, 4, 128))
    served(name, case)
    kernel = BACKENDS[name]
    for each in (case, make((1, 256, 8, 2, 128))):
        out, lse = kernel.forward(each.q, each.k, each.v, each.rule, None)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert lse.shape == (each.q.shape[0], each.q.shape[2], each.q.shape[1])
        arguments = each.dout, each.q, each.k, each.v, out, lse, each.rule, None
        assert all(gradient.is_contiguous() for gradient in kernel.backward(*arguments))
    with force_attention(name):  # a second call finds its memory where the first one left it
        run(case)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        out, saved = attention_forward(case.q, case.k, case.v, case.rule)
        grown = torch.cuda.max_memory_allocated() - held
    if name != "chunked":
        assert grown <= out.nbytes + saved[0].nbytes + (1 << 20), grown


@pytest.mark.parametrize("rule", [{}, {"documents": LENGTHS}], ids=["plain", "documents"])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_odd_memory(name, rule):
    """Rows that start anywhere: kernels that read 16 bytes at a time get copies."""
    case = make((2, 300, 4, 2, 64), **rule)
    served(name, case)
    shape = case.q.shape
    wide = torch.zeros(2 * 300, 4 * 64 + 3, device="cuda", dtype=torch.bfloat16)
    wide[:, 3:] = case.q.reshape(600, -1)
    case.q = wide[:, 3:].view(shape)
    case.dout = torch.cat([case.dout.new_zeros(1), case.dout.flatten()])[1:].view(shape)
    with force_attention(name):
        Truth(case).check(run(case), name)


@pytest.mark.parametrize("rule", RULES[:5], ids=lambda rule: "-".join(rule) or "plain")
@pytest.mark.parametrize("shape", [(1, 4096, 32, 8, 128), (2, 2000, 8, 8, 64)])
def test_deterministic_results_repeat(shape, rule):
    case = make(shape, deterministic=True, **rule)
    assert not torch.are_deterministic_algorithms_enabled()
    first = run(case)
    for _ in range(5):
        again = run(case)
        assert all(torch.equal(first[name], again[name]) for name in RESULTS)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_switch_is_what_makes_flash_repeat():
    """Without it the bits do change, so the test above tests something."""
    case = make((1, 4096, 32, 8, 128))
    with force_attention("flash"):
        first = run(case)["dq"]
        changed = any(not torch.equal(first, run(case)["dq"]) for _ in range(20))
    assert changed


def test_the_choice_on_this_card():
    q = torch.zeros(1, 8, 2, 128, device="cuda", dtype=torch.bfloat16)
    plain = Call.of(q, AttentionRule(scale=1.0), documents=False)
    if torch.cuda.get_device_capability()[0] == 9:
        assert choose(plain) == "cudnn"
    assert choose(replace(plain, documents=True)) == "flash"
    assert choose(replace(plain, deterministic=True)) == "flash"
    assert choose(replace(plain, window=True)) == "flash"
    for change in ({"softcap": True}, {"dtype": torch.float32}, {"head_dim": 20}):
        assert choose(replace(plain, **change)) == "chunked"


@pytest.mark.parametrize("name", KERNELS)
def test_one_document_changes_no_bit_of_another(name):
    case = make((1, 600, 8, 2, 128), documents=(200, 130, 270), deterministic=True)
    served(name, case)
    other = replace(case, **{n: getattr(case, n).clone() for n in ("q", "k", "v", "dout")})
    for tensor in (other.q, other.k, other.v, other.dout):
        tensor[:, 200:330] *= -3.0
    with force_attention(name):
        before, after = run(case), run(other)
    for result in RESULTS:
        assert torch.equal(before[result][:, :200], after[result][:, :200]), result
        assert torch.equal(before[result][:, 330:], after[result][:, 330:]), result
        assert not torch.equal(before[result][:, 200:330], after[result][:, 200:330]), result


def test_documents_without_tokens_may_follow():
    case = make((2, 300, 8, 2, 64), documents=LENGTHS, deterministic=True)
    starts, longest = case.documents.starts, case.documents.longest
    padded = Documents(torch.cat([starts, starts[-1:].expand(5)]), longest)
    wanted, got = run(case), run(replace(case, documents=padded))
    assert all(torch.equal(wanted[name], got[name]) for name in RESULTS)


def test_a_gradient_in_another_layout():
    """cuDNN compiles for the layouts of the first call and does not look at dout's again."""
    case = make((2, 384, 8, 2, 128))
    served("cudnn", case)
    truth = Truth(case)
    case.dout = case.dout.transpose(1, 2).contiguous().transpose(1, 2)
    with force_attention("cudnn"):
        truth.check(run(case), "dout by head, first")
        case.dout = case.dout.contiguous()
        truth.check(run(case), "dout by token")


def test_a_gradient_in_another_layout_of_somebody_else():
    """The same shapes and strides through torch's own function first, with dout by head."""
    case = make((2, 448, 8, 2, 128))
    served("cudnn", case)
    q, k, v = (t.detach().requires_grad_() for t in (case.q, case.k, case.v))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        options = {"is_causal": True, "scale": case.rule.scale, "enable_gqa": True}
        out = scaled_dot_product_attention(*heads, **options)
    out.backward(case.dout.transpose(1, 2).contiguous())
    with force_attention("cudnn"):
        Truth(case).check(run(case), "after somebody else")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule) or "plain")
def test_nothing_waits_for_the_gpu(rule):
    case = make((2, 700, 8, 2, 128), **rule)
    run(case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case)
        q, k, v = (t.detach().requires_grad_() for t in (case.q, case.k, case.v))
        attention(q, k, v, case.rule, case.documents).backward(case.dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule) or "plain")
@pytest.mark.parametrize("name", KERNELS)
def test_a_cuda_graph_replays(name, rule):
    case = make((2, 700, 8, 2, 128), **rule)
    served(name, case)
    other = make((2, 701, 8, 2, 128))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with force_attention(name), torch.cuda.stream(side):
        run(case)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            got = run(case)
    for name_of in ("q", "k", "v", "dout"):  # the graph computes: it does not repeat results
        getattr(case, name_of).copy_(getattr(other, name_of)[:, :700])
    graph.replay()
    torch.cuda.synchronize()
    Truth(case).check(got, f"{name} in a graph")


def test_chunks_need_little_memory():
    """A softcap over 8,192 tokens: all scores of 8 heads would be 2 GiB in float32."""
    case = make((1, 8192, 8, 2, 128), softcap=30.0)
    run(case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    got = run(case)
    grown = torch.cuda.max_memory_allocated() - held
    assert grown < 1 << 30, f"{grown / 2**20:.0f} MiB"
    part = replace(case, **{n: getattr(case, n)[:, :900] for n in ("q", "k", "v", "dout")})
    Truth(part).results["out"].check(got["out"][:, :900], "the first tokens")
