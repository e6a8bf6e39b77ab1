"""Full fine-tuning: the same loss by both heads, 16 bytes per parameter, policies that agree."""

import pytest
import torch

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.bench import full, ours
from qlora_kit.bench.components import RESIDENT, components, resident_bytes
from qlora_kit.bench.shapes import TINY
from qlora_kit.bench.sizes import count
from qlora_kit.bench.steps import make_batches
from qlora_kit.bench.subject import Build, NotPossible, Point, Stage
from qlora_kit.quant.config import QuantConfig

EPS = torch.finfo(torch.float32).eps


def build_of(impl="full", method="full", **changes):
    values = {"impl": impl, "model": "tiny", "checkpoint": "", "method": method, "rank": 4}
    return Build(**values | {"device": "cpu", "dtype": "float32", "bits": 16} | changes)


def subject_of(**changes):
    torch.manual_seed(0)
    build = build_of(**changes)
    return (full if build.impl == "full" else ours).build(build, Stage())


def point(policy="save", head="chunked", *, graph=False):
    return Point(batch=2, seq=16, policy=policy, head=head, graph=graph)


def batch():
    return make_batches(TINY.vocab_size, 2, 16, 0, "cpu")[1]


def gradients(subject, where):
    with subject.prepare(where) as step:
        assert step == "eager"
        loss = subject.backward(batch())
    found = {n: p.grad.clone() for n, p in subject.model.named_parameters()}
    subject.optimizer.zero_grad()
    return float(loss), found


def test_heads_and_policies_give_the_same_gradients():
    subject = subject_of(optimizer="adamw_torch_fused")
    loss, wanted = gradients(subject, point(head="stock"))
    without = subject.model.config._attn_implementation
    others = [point(), point("recompute_all"), point("recompute_all", "stock")]
    others += [point(graph=True), point("recompute_all", "stock", graph=True)]
    for where in others:
        other, found = gradients(subject, where)
        assert other == pytest.approx(loss, rel=100 * EPS)
        for name, gradient in found.items():
            scale = wanted[name].abs().max()
            assert (gradient - wanted[name]).abs().max() < 1000 * EPS * scale, name
            assert (2 * gradient - wanted[name]).abs().max() > 1000 * EPS * scale  # it bites
        assert subject.facts() == {"graph": False}  # on a GPU only
        assert subject.model.config._attn_implementation == without


@pytest.mark.parametrize(("masters", "each"), [("float32", 16), ("library", 8)])
def test_bytes_per_parameter(masters, each):
    """Weights, gradients and two moments: 16 bytes per parameter, or 8 in pure bf16."""
    subject = subject_of(masters=masters, dtype="bfloat16", optimizer="adamw_torch_fused")
    with subject.prepare(point()):
        subject.step(batch())
    found = resident_bytes(subject, "cpu")
    numbers = sum(p.numel() for p in subject.parameters)
    steps = 4 * len(subject.parameters)  # the update's number, once per tensor
    stays = found["trained"] + found["gradients"] + found["optimizer"]
    assert stays == each * numbers + steps
    assert found["scales"] == found["embeddings"] == 0


def test_a_quantized_base_is_what_the_arithmetic_says():
    """Components of a real QLoRA add up to what is counted on the meta device."""
    subject = subject_of(impl="qlora_kit", method="lora", bits=4, dtype="bfloat16")
    with subject.prepare(point()):
        subject.step(batch())
    found = resident_bytes(subject, "cpu")
    counted = count(TINY, LoRA(rank=4), QuantConfig())
    rotary = sum(b.nbytes for b in subject.model.buffers())
    frozen = found["weights"] + found["scales"] + found["embeddings"]
    assert frozen - rotary == pytest.approx(counted.base_bytes, abs=rotary)
    assert found["trained"] == found["gradients"] == 4 * counted.adapter_parameters
    dense = count(TINY, LoRA(rank=4), None)
    assert frozen < 0.8 * dense.base_bytes
    assert found["scales"] > 0


def test_the_rest_of_the_peak_is_the_steps():
    resident = dict.fromkeys(RESIDENT, 1)
    assert components(resident, 10)["step"] == 10 - len(RESIDENT)
    assert "step" not in components(resident, None)


@pytest.mark.gpu
@pytest.mark.parametrize("head", full.HEADS)
@pytest.mark.parametrize("policy", ["save", "recompute_all"])
def test_small_batches_run_as_a_cuda_graph(policy, head):
    """The loss of every step is that of steps without one, to bf16's rounding of a sum."""
    losses = {}
    for graph in (False, True):
        subject = subject_of(
            device="cuda", dtype="bfloat16", masters="float32", optimizer="adamw_torch_fused"
        )
        batches = make_batches(TINY.vocab_size, 2, 16, 0, "cuda")[1:]
        with subject.prepare(point(policy, head, graph=graph)):
            losses[graph] = [float(subject.step(batches[at % 4])) for at in range(8)]
        assert subject.facts() == {"graph": graph}
    pairs = list(zip(losses[True], losses[False], strict=True))
    assert max(abs(one / other - 1) for one, other in pairs) < 2 * torch.finfo(torch.bfloat16).eps
    assert len({round(loss, 3) for loss in losses[True]}) > 1  # it learns: losses are not stale


def test_what_it_cannot_do_is_said():
    with pytest.raises(NotPossible, match="lora"):
        full.build(build_of(method="lora"), Stage())
    subject = subject_of(optimizer="adamw_torch_fused")
    for where in (point("offload"), point(head="nonsense")):
        with pytest.raises(NotPossible), subject.prepare(where):
            pass
