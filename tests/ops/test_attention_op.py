"""`attention` as a torch op: gradients through autograd, what is kept, compiling, flops."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qlora_kit.ops.attention.choose import force_attention
from qlora_kit.ops.attention.op import attention
from qlora_kit.ops.attention.rule import AttentionRule, Documents
from tests.ops.attention_cases import RESULTS, Truth, make_case, pack

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SHAPE = (2, 37, 4, 2, 16)
RULES = [{}, {"documents": (3, 11, 9), "window": 5, "softcap": 4.0}]


def leaves(case):
    """q, k and v as leaves that want gradients."""
    for name in ("q", "k", "v"):
        setattr(case, name, getattr(case, name).detach().requires_grad_())
    return case.q, case.k, case.v


def arguments(case):
    rule, documents = case.rule, case.documents
    placed = (None, 0) if documents is None else (documents.starts, documents.longest)
    return rule.scale, rule.window, rule.softcap, rule.deterministic, *placed


@pytest.mark.parametrize("rule", RULES, ids=["plain", "all"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_gradients_through_autograd_match_float64(rule, device):
    case = make_case(SHAPE, device=device, **rule)
    truth = Truth(case)
    q, k, v = leaves(case)
    out = attention(q, k, v, case.rule, case.documents)
    out.backward(case.dout)
    truth.check(dict(zip(RESULTS, (out, q.grad, k.grad, v.grad), strict=True)), "attention")


def test_gradcheck():
    q, k, v = (torch.randn(1, 7, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    for rule in (AttentionRule(scale=0.4), AttentionRule(scale=0.4, window=3, softcap=2.0)):
        for documents in (None, pack(1, 7, (2, 5))):
            call = partial(attention, rule=rule, documents=documents)
            assert torch.autograd.gradcheck(call, (q, k, v))


def test_nothing_else_is_kept():
    """q, k, v and the output, and one float32 number per query."""
    case = make_case(SHAPE)
    q, k, v = leaves(case)
    kept = {}

    def pack_hook(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        out = attention(q, k, v, case.rule)
    for storage in {tensor.untyped_storage().data_ptr() for tensor in (q, k, v, out)}:
        del kept[storage]
    assert sorted(kept.values()) == [2 * 37 * 4 * 4]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("rule", RULES, ids=["plain", "all"])
def test_opcheck(rule, device):
    case = make_case(SHAPE, device=device, **rule)
    inputs = (*leaves(case), *arguments(case))
    torch.library.opcheck(torch.ops.qlora_kit.attention, inputs)
    results = torch.ops.qlora_kit.attention(*inputs)
    tensors = [t.detach() for t in (case.dout, *inputs[:3], *results)]
    inputs = (*tensors, *arguments(case))
    torch.library.opcheck(torch.ops.qlora_kit.attention_backward, inputs)


@pytest.mark.parametrize("rule", RULES, ids=["plain", "all"])
def test_compiled_equals_eager(rule):
    """Once, and again with other lengths: one graph for all of them."""
    case = make_case(SHAPE, **rule)

    def layer(q, k, v, documents):
        return attention(q * 2, k, v, case.rule, documents).relu()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (37, 29):
        results = []
        for call in (layer, compiled):
            case = make_case((2, length, *SHAPE[2:]), **rule)
            q, k, v = leaves(case)
            out = call(q, k, v, case.documents)
            out.backward(case.dout)
            results.append((out, q.grad, k.grad, v.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_flops_are_counted():
    case = make_case(SHAPE)
    square = 2 * 2 * 4 * 37 * 37 * 16  # B, multiply and add, heads
    with FlopCounterMode(display=False) as counter:
        out = attention(*leaves(case), case.rule)
    assert counter.get_total_flops() == 2 * square
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * square
    case = make_case(SHAPE, window=5)
    with FlopCounterMode(display=False) as counter:
        attention(case.q, case.k, case.v, case.rule)
    assert counter.get_total_flops() == 2 * square * 5 / 37
    case = make_case(SHAPE, documents=(3, 11, 9))
    with FlopCounterMode(display=False) as counter:
        attention(case.q, case.k, case.v, case.rule, case.documents)
    assert counter.get_total_flops() == 2 * square * 11 / 37


def test_the_forced_backend_is_that_of_the_backward_too():
    """Autograd's threads do not see the block, which has ended besides."""
    case = make_case((1, 50, 4, 2, 16), dtype=torch.bfloat16)
    found = {}
    for name in ("cpu", "chunked"):
        q, k, v = leaves(case)
        with force_attention(name):
            out = attention(q, k, v, case.rule)
        out.backward(case.dout)
        found[name] = k.grad
    assert not torch.equal(found["cpu"], found["chunked"])  # else this proves nothing
    q, k, v = leaves(case)
    attention(q, k, v, case.rule).backward(case.dout)
    assert torch.equal(k.grad, found["cpu"])


def test_any_strides_are_taken():
    case = make_case((2, 9, 4, 2, 8))
    wanted = attention(case.q, case.k, case.v, case.rule)
    odd = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (case.q, case.k, case.v)]
    assert odd[0].stride(-1) != 1
    torch.testing.assert_close(attention(*odd, case.rule), wanted)


def test_no_gradient_for_documents():
    case = make_case((1, 9, 2, 1, 8), documents=(4, 5))
    out = attention(*leaves(case), case.rule, Documents(case.documents.starts, 5))
    assert out.requires_grad
    out.sum().backward()
    assert case.documents.starts.grad is None
