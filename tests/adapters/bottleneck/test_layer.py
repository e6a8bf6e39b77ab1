"""Bottlenecks: the formula in float64, where they go, their start, and AdapterDrop."""

import math

import pytest
import torch
from torch import nn

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.bottleneck.layer import SIGMA, BottleneckLinear, RandomDrop
from qlora_kit.adapters.inject import attach
from qlora_kit.core.errors import AdapterError, ConfigError
from tests import tiny_models
from tests.adapters.bases import F32_EPS, LINEARS, make_linear, quantize, relative_error

ERROR = 40 * F32_EPS  # sums of up to 96 products and their roundings
FUNCTIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}


def filled(base: nn.Module, config: Bottleneck) -> BottleneckLinear:
    piece = BottleneckLinear(base, "proj", config, seed=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in piece.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return piece


@pytest.mark.parametrize("base", LINEARS)
@pytest.mark.parametrize(
    ("kind", "activation"), [("houlsby", "gelu"), ("pfeiffer", "relu"), ("lin", "tanh")]
)
def test_formula_and_gradients(base, kind, activation):
    layer, weight = make_linear(base)
    piece = filled(layer, Bottleneck(kind=kind, width=5, activation=activation))
    x = torch.randn(7, 96, requires_grad=True)
    g = torch.randn(7, 80)
    y = piece(x)
    y.backward(g)

    values = {k: p.detach().double().requires_grad_() for k, p in piece.trainable().items()}
    x64 = x.detach().double().requires_grad_()
    h = x64 @ weight.T + layer.bias.double()
    z = h
    if kind == "lin":
        z = nn.functional.layer_norm(h, (80,), values["norm.weight"], values["norm.bias"])
    inner = FUNCTIONS[activation](z @ values["down.weight"].T + values["down.bias"])
    change = inner @ values["up.weight"].T + values["up.bias"]
    (h + change).backward(g.double())

    assert relative_error(y, h + change) < ERROR
    assert relative_error(y, change) > ERROR  # without the residual the check fails
    assert relative_error(x.grad, x64.grad) < ERROR
    for key, parameter in piece.trainable().items():
        assert relative_error(parameter.grad, values[key].grad) < ERROR, key
        assert relative_error(1.001 * parameter.grad, values[key].grad) > ERROR
    assert all(p.grad is None for p in layer.parameters())


PLACES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
}


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "lin"])
def test_where_they_go(family, kind):
    model = quantize(tiny_models.build(family))
    adapter = attach(model, Bottleneck(kind=kind, width=4, norms="freeze"))
    attention, feedforward = PLACES[family]
    endings = (attention, feedforward) if kind == "houlsby" else (feedforward,)
    assert len(adapter.module_names) == 2 * len(endings)
    for place in adapter.module_names:
        assert place.endswith(endings)
        assert kind == "houlsby" or not place.endswith("attention.output.dense")


def test_houlsby_trains_the_norms_of_the_blocks():
    model = tiny_models.build("gpt2")
    adapter = attach(model, Bottleneck(width=4))
    norms = [n for n, _ in adapter.named_parameters() if ".ln_" in n]
    assert len(norms) == 2 * 2 * 2  # layers, norms, γ and β
    assert attach(
        tiny_models.build("qwen3"), Bottleneck(kind="pfeiffer", width=4, norms="train")
    ).num_trainable == 2 * (2 * 64 * 4 + 4 + 64 + 2 * 64)


def test_the_start_is_a_cut_normal_and_repeats():
    def start(seed: int) -> BottleneckLinear:
        return BottleneckLinear(nn.Linear(8, 512), "proj", Bottleneck(width=64), seed=seed)

    weights = torch.cat([start(0).down.weight.flatten(), start(0).up.weight.flatten()]).detach()
    cut = math.exp(-2.0) * 2 / math.sqrt(2 * math.pi) / math.erf(2 / math.sqrt(2))
    sigma = SIGMA * math.sqrt(1 - 2 * cut)  # of a normal cut at two sigma
    assert weights.abs().max() <= 2 * SIGMA
    assert abs(float(weights.std()) / sigma - 1) < 4 / math.sqrt(2 * weights.numel())
    assert abs(float(weights.std()) / SIGMA - 1) > 4 / math.sqrt(2 * weights.numel())
    assert start(0).down.bias.abs().max() == start(0).up.bias.abs().max() == 0
    assert torch.equal(start(1).up.weight, start(1).up.weight)
    assert not torch.equal(start(1).up.weight, start(2).up.weight)


def test_nearly_the_base_at_the_start():
    model = tiny_models.build("llama")
    with torch.no_grad():
        before = model(tiny_models.tokens()).logits
        attach(model, Bottleneck(width=4))
        after = model(tiny_models.tokens()).logits
    assert 0 < relative_error(after, before) < 1e-2


def test_adapter_drop_of_the_first_layers():
    model = tiny_models.build("llama")
    adapter = attach(model, Bottleneck(width=4, drop_layers=1))
    assert {place.split(".")[2] for place in adapter.module_names} == {"1"}
    with pytest.raises(AdapterError, match="Leave at least one"):
        attach(tiny_models.build("llama"), Bottleneck(drop_layers=2))
    with pytest.raises(AdapterError, match="Leave at least one"):
        attach(tiny_models.build("llama"), Bottleneck(drop_random=2))


def test_adapter_drop_drawn_for_every_batch(tmp_path):
    model = tiny_models.build("llama")
    ids = tiny_models.tokens()
    adapter = attach(model, Bottleneck(kind="pfeiffer", width=4, drop_random=1), seed=5)
    drawing = next(piece for piece in adapter.pieces if isinstance(piece, RandomDrop))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        whole = model(ids).logits
        model.train()
        answers = [(model(ids).logits, drawing.dropping.now) for _ in range(12)]
        assert answers[0][1] == 0  # every adapter is seen once
        assert {n for _, n in answers} == {0, 1}
        found = {n: y for y, n in answers}
        assert torch.equal(found[0], whole)
        model.eval()
        for count in (0, 1):  # cut afterwards
            drawing.dropping.at_inference = count
            assert torch.equal(model(ids).logits, found[count])
        drawing.dropping.at_inference = 0
    with adapter.disabled():
        assert not torch.equal(model(ids).logits, whole)
    adapter.save(tmp_path / "a")
    adapter.detach_from_model()
    assert not model.model._forward_pre_hooks


def test_recomputed_layers_drop_what_they_dropped():
    model = tiny_models.build("llama").train()
    ids = tiny_models.tokens()
    config = Bottleneck(kind="pfeiffer", width=4, drop_random=1)
    found = []
    for checkpointing in (False, True):
        adapter = attach(model, config, seed=1)
        if checkpointing:
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        for _ in range(5):
            model(ids, labels=ids).loss.backward()
        found.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
        adapter.detach_from_model()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_refusals():
    with pytest.raises(AdapterError, match="after_attention"):
        attach(tiny_models.build("mixtral"), Bottleneck())
    places = {"after_attention": ("v_proj",), "after_feedforward": ("o_proj",)}
    named = Bottleneck(kind="pfeiffer", width=4, **places)
    assert attach(tiny_models.build("mixtral"), named).num_trainable > 0
    adapter = attach(tiny_models.build("llama"), Bottleneck(width=4))
    with pytest.raises(AdapterError, match="cannot be merged"):
        adapter.merge_delta("model.layers.0.mlp.down_proj")
    for wrong in ({"kind": "serial"}, {"width": 0}, {"reduction": 0}, {"drop_layers": -1}):
        with pytest.raises(ConfigError):
            Bottleneck(**wrong)
