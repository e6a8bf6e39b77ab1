"""Fused experts in NF4 against transformers' own experts on the decoded weights."""

import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from qlora_kit.core.errors import NonFiniteError, ShapeError
from qlora_kit.nn.experts import (
    PROJECTIONS,
    NF4Experts,
    is_fused_experts,
    quantize_stack,
    unsupported_reason,
)
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.weight import NF4Weight
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat

EPS = torch.finfo(torch.float32).eps
EXPERTS = 4


def dense_experts(family="mixtral", **changes):
    """A family's experts with random weights, run one by one as transformers' reference does."""
    model = tiny_models.build(family, **changes)
    experts = copy.deepcopy(model.model.layers[0].mlp.experts)
    experts.config._experts_implementation = "eager"
    return experts


def routing(tokens=11, slots=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, tiny_models.HIDDEN, generator=generator)
    index = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:slots] for _ in range(tokens)]
    )
    weights = torch.rand(tokens, slots, generator=generator)
    return x, index, weights


def decoded(dense, experts):
    """The dense module on what the NF4 weights decode to."""
    plain = copy.deepcopy(dense)
    with torch.no_grad():
        for name in PROJECTIONS:
            plain.get_parameter(name).copy_(experts.dequantize(name))
    return plain


def relative_error(came, wanted):
    return ((came - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("family", tiny_models.MOE)
@pytest.mark.parametrize("double_quant", [True, False])
def test_output_and_gradients_are_those_of_the_decoded_experts(family, double_quant):
    dense = dense_experts(family)
    experts = NF4Experts.from_experts(dense, QuantConfig(double_quant=double_quant))
    plain = decoded(dense, experts)
    x, index, weights = routing()
    results = []
    for module in (experts, plain):
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(inputs[0], index, inputs[1])
        y.backward(torch.ones_like(y))
        results.append((y.detach(), inputs[0].grad, inputs[1].grad))
    for came, wanted in zip(*results, strict=True):
        assert relative_error(came, wanted) < 8 * EPS
    with torch.no_grad():
        wrong = experts(x, (index + 1) % EXPERTS, weights)  # the bound can fail
    assert relative_error(wrong, results[1][0]) > 0.1


def test_experts_nobody_chose_and_tokens_of_no_expert():
    dense = dense_experts()
    experts = NF4Experts.from_experts(dense, QuantConfig())
    x, index, weights = routing(slots=1)
    index = index % 2  # experts 2 and 3 get nothing
    index[3] = EXPERTS  # routed elsewhere
    y = experts(x, index, weights)
    assert torch.equal(y[3], torch.zeros_like(y[3]))
    assert relative_error(y, decoded(dense, experts)(x, index % EXPERTS, weights)) > 0.01
    kept = torch.arange(len(x)) != 3
    wanted = decoded(dense, experts)(x[kept], index[kept], weights[kept])
    assert relative_error(y[kept], wanted) < 8 * EPS
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, tiny_models.HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    dense = dense_experts()
    experts = NF4Experts.from_experts(dense.to(dtype), QuantConfig())
    x, index, weights = routing()
    y = experts(x.to(dtype), index, weights.to(dtype))
    assert y.dtype == dtype
    wanted = decoded(dense.float(), experts)(x, index, weights)
    # Two products, an activation and the weighted sum are rounded to `dtype` in turn.
    assert relative_error(y.float(), wanted) < 4 * torch.finfo(dtype).eps


def test_autocast():
    experts = NF4Experts.from_experts(dense_experts(), QuantConfig())
    x, index, weights = routing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, index, weights)
    assert y.dtype == torch.float32
    assert relative_error(y, experts(x, index, weights)) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("sizes", [(8, 64), (256, 64), (512, 64)], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantizing_one_by_one_equals_quantizing_the_stack(sizes, double_quant):
    """Also where groups of 256 scales start with an expert (256 x 64) and where not."""
    config = QuantConfig(double_quant=double_quant)
    stack = torch.randn(3, *sizes)
    wanted = NF4Weight.quantize(stack, double_quant=double_quant)
    for came in (quantize_stack(stack, config), quantize_stack(list(stack), config)):
        assert came.shape == wanted.shape
        for name, tensor in wanted.tensors().items():
            assert torch.equal(getattr(came, name), tensor), name
        for expert in range(3):
            one = came.select(expert)
            assert torch.equal(one.dequantize(), wanted.dequantize()[expert])
            assert one.packed.untyped_storage().data_ptr() == (
                came.packed.untyped_storage().data_ptr()
            )
            shares_scales = sizes[0] * sizes[1] % (64 * 256) == 0
            assert (one.absmax.dtype == torch.uint8) == (shares_scales and double_quant)


def test_stack_refuses_what_does_not_fit():
    config = QuantConfig()
    with pytest.raises(ShapeError, match="at least one"):
        quantize_stack([], config)
    with pytest.raises(ShapeError, match="one shape"):
        quantize_stack([torch.ones(2, 64), torch.ones(4, 64)], config)
    with pytest.raises(ShapeError, match="whole blocks"):
        quantize_stack([torch.ones(3, 32)], config)
    bad = torch.ones(2, 64)
    bad[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer\.down_proj.*expert 1"):
        quantize_stack([torch.ones(2, 64), bad], config, name="layer.down_proj")


def test_stored_as_bytes_and_frozen():
    experts = NF4Experts.from_experts(dense_experts(), QuantConfig())
    parameters = dict(experts.named_parameters())
    assert sorted(parameters) == sorted(
        f"{name}{suffix}"
        for name in PROJECTIONS
        for suffix in ("", "_absmax", "_nested_absmax", "_offset")
    )
    assert {p.dtype for p in parameters.values()} == {torch.uint8}
    assert not any(p.requires_grad for p in parameters.values())
    assert sum(p.numel() for p in parameters.values()) < 0.6 * EXPERTS * 3 * 64 * 128


def test_state_and_copies_keep_every_bit():
    experts = NF4Experts.from_experts(dense_experts(), QuantConfig())
    other = NF4Experts(dense_experts(seed=1), QuantConfig())
    other.load_state_dict(experts.state_dict())
    x, index, weights = routing()
    wanted = experts(x, index, weights)
    assert torch.equal(other(x, index, weights), wanted)
    assert torch.equal(copy.deepcopy(experts)(x, index, weights), wanted)
    assert torch.equal(copy.deepcopy(experts).half().float()(x, index, weights), wanted)


def test_back_to_dense_experts():
    dense = dense_experts("qwen3_moe")
    experts = NF4Experts.from_experts(dense, QuantConfig())
    again = experts.to_experts()
    assert type(again) is type(dense)
    x, index, weights = routing()
    assert torch.equal(again(x, index, weights), decoded(dense, experts)(x, index, weights))
    assert is_fused_experts(dense)  # the source was not touched
    assert torch.equal(dense.gate_up_proj, dense_experts("qwen3_moe").gate_up_proj)


def test_the_familys_own_gate_is_used():
    """A class may define `_apply_gate`; DeepSeek V4 and others clamp there."""

    class Clamped(type(dense_experts())):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate).clamp(max=0.1) * up

    dense = dense_experts()
    x, index, weights = routing()
    usual = NF4Experts.from_experts(dense, QuantConfig())(x, index, weights)
    dense.__class__ = Clamped
    clamped = NF4Experts.from_experts(dense, QuantConfig())(x, index, weights)
    assert relative_error(clamped, usual) > 0.1


def test_layouts_that_are_not_covered_say_why():
    config = QuantConfig()
    oss = GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2))
    assert is_fused_experts(oss)
    assert unsupported_reason(oss, config) == "they have biases"
    with pytest.raises(ShapeError, match="biases"):
        NF4Experts(oss, config)
    odd = dense_experts(intermediate_size=24)
    assert "whole blocks of 2048" in unsupported_reason(odd, QuantConfig(block_size=2048))
    assert not is_fused_experts(nn.Linear(4, 4))
    stacked = nn.Module()
    stacked.gate_up_proj = nn.Parameter(torch.ones(2, 64, 64))
    stacked.down_proj = nn.Parameter(torch.ones(2, 64, 32))
    assert is_fused_experts(stacked)
    assert unsupported_reason(stacked, config) == "they have no gate"


def test_set_weight_refuses_another_shape():
    experts = NF4Experts.from_experts(dense_experts(), QuantConfig())
    with pytest.raises(ShapeError, match="gate_up_proj needs"):
        experts.set_weight("gate_up_proj", NF4Weight.quantize(torch.ones(4, 64, 64)))
