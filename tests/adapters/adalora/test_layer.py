"""AdaLoRA on one linear and on models: values, gradients, orthogonality, start, merge."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.adalora.layer import AdaLoRALinear, add_orthogonality, orthogonality
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.registry import make_adapter_config, method_name
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.export.merge import merge
from tests import tiny_models
from tests.adapters.bases import (
    BF16_EPS,
    F32_EPS,
    LINEARS,
    load_nf4,
    load_plain,
    make_linear,
    quantize,
    relative_error,
)
from tests.adapters.lora.test_layer import saved_bytes

RANK, K, N = 4, 96, 80
CONFIG = AdaLoRA(rank=RANK, alpha=12)


def adapted(kind: str, dtype: torch.dtype = torch.float32, config: AdaLoRA = CONFIG):
    """An adapted linear with λ that are not zero, and its base's weight in float64."""
    base, weight = make_linear(kind, K, N, dtype)
    layer = AdaLoRALinear(base, "proj", config, seed=0)
    with torch.no_grad():
        layer.lora_E.normal_(0, 20.0)  # beside P and Q of 0.02
    return layer, weight


def truth(layer: AdaLoRALinear, weight, x, g, scale=3.0):
    """Value and gradients by float64 autograd on s·P·Λ·Q itself."""
    names = (x, layer.lora_A, layer.lora_E, layer.lora_B)
    x64, q, values, p = (t.detach().double().requires_grad_() for t in names)
    delta = scale * p @ torch.diag(values[:, 0]) @ q
    y = x64 @ (weight + delta).T + layer.base.bias.detach().double()
    y.backward(g.double())
    return y.detach(), x64.grad, q.grad, values.grad, p.grad


@pytest.mark.parametrize("kind", LINEARS)
def test_values_and_gradients_match_float64(kind):
    layer, weight = adapted(kind)
    x = torch.randn(3, 7, K, requires_grad=True)
    g = torch.randn(3, 7, N)
    wanted = truth(layer, weight, x, g)
    out = layer(x)
    out.backward(g)
    found = (out.detach(), x.grad, layer.lora_A.grad, layer.lora_E.grad, layer.lora_B.grad)
    bound = 4 * K**0.5 * F32_EPS  # sums of K or N terms, errors adding at random
    for value, exact in zip(found, wanted, strict=True):
        assert relative_error(value, exact) < bound
    wrong = truth(layer, weight, x, g, scale=3.03)  # the bound bites
    for value, exact in zip(found, wrong, strict=True):
        assert relative_error(value, exact) > 10 * bound


def size_of_value_gradients(layer, x, g, scale=3.0):
    """What roundings of λ's gradient s·Σ (g P)(x Qᵀ) are relative to, for each λ.

    P, Q and both products are rounded: each rounding is relative to |g||P| or |x||Q|, which stays
    large where a product itself cancels.
    """
    g, p, x, q = (t.detach().double() for t in (g, layer.lora_B, x, layer.lora_A))
    left = (g.abs() @ p.abs()) * (x @ q.T).abs()
    right = (g @ p).abs() * (x.abs() @ q.abs().T)
    return scale * (left + right).sum(0)


@pytest.mark.parametrize("kind", LINEARS)
def test_bfloat16_input_with_float32_masters(kind):
    torch.manual_seed(1)
    layer, weight = adapted(kind, torch.bfloat16)
    x = torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(5, N, dtype=torch.bfloat16)
    wanted = truth(layer, weight, x, g)
    out = layer(x)
    out.backward(g)
    found = (out.detach(), x.grad, layer.lora_A.grad, layer.lora_E.grad, layer.lora_B.grad)
    assert layer.lora_E.grad.dtype == torch.float32
    for i, (value, exact) in enumerate(zip(found, wanted, strict=True)):
        if i == 3:
            size = size_of_value_gradients(layer, x, g)
            error = (value - exact).abs()[:, 0] / size
            bound = 4 * BF16_EPS / N**0.5  # errors of N and K terms, adding at random
            assert error.max() < bound
            assert ((1.1 * value - exact).abs()[:, 0] / size).max() > bound
            continue
        assert relative_error(value, exact) < 2 * BF16_EPS
        assert relative_error(value * 1.05, exact) > 2 * BF16_EPS


@pytest.mark.parametrize("kind", LINEARS)
def test_the_start_is_the_base(kind):
    base, _ = make_linear(kind, K, N)
    layer = AdaLoRALinear(base, "proj", CONFIG, seed=0)
    x = torch.randn(6, K)
    assert torch.equal(layer(x), base(x))
    for matrix in (layer.lora_A, layer.lora_B):
        assert abs(matrix.std().item() / 0.02 - 1) < 0.15
    again = AdaLoRALinear(base, "proj", CONFIG, seed=0)
    assert torch.equal(again.lora_B, layer.lora_B)
    assert not torch.equal(AdaLoRALinear(base, "proj", CONFIG, seed=1).lora_A, layer.lora_A)
    with torch.no_grad():
        layer.lora_E.fill_(100.0)
    assert not torch.equal(layer(x), base(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", LINEARS)
def test_it_keeps_no_more_than_lora(kind):
    """x and x·Aᵀ, and the narrow A = ΛQ, whatever the base."""
    layer, _ = adapted(kind)
    x = torch.randn(2, 12, K, requires_grad=True)
    assert saved_bytes(layer, x) == x.nbytes + 24 * RANK * 4 + RANK * K * 4


def test_dropout_acts_on_the_branch_while_training():
    layer, _ = adapted("nf4", config=AdaLoRA(rank=RANK, alpha=12, dropout=0.5))
    x = torch.randn(6, K)
    torch.manual_seed(3)
    first = layer.train()(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_layer_without_any_triplet_is_its_base():
    base, _ = make_linear("nf4", K, N)
    layer = AdaLoRALinear(base, "proj", CONFIG, seed=0, rank=0)
    x = torch.randn(2, K)
    assert torch.equal(layer(x), base(x))
    assert layer.merge_delta().abs().max() == 0


def test_orthogonality_in_both_forms():
    """Against a plain float64 formula, gradients too; a form is not the other."""
    kinds = ("linear", "nf4", "conv1d")
    layers = [adapted(kind)[0] for kind in kinds] + [
        AdaLoRALinear(nn.Linear(12, 40), "small", CONFIG, seed=0)
    ]
    parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    copies = [p.detach().double().requires_grad_() for p in parameters]
    grams = [p @ p.T if i % 2 == 0 else p.T @ p for i, p in enumerate(copies)]
    distances = [torch.linalg.norm(m - torch.eye(RANK, dtype=torch.float64)) for m in grams]
    exact = {
        "paper": torch.stack([d**2 for d in distances]).sum(),
        "code": torch.stack(distances).mean(),
    }
    for form, wanted in exact.items():
        value = orthogonality(layers, form)
        assert value.dtype == torch.float32
        assert abs(value.item() / wanted.item() - 1) < 16 * F32_EPS
        assert abs(value.item() / exact["code" if form == "paper" else "paper"].item() - 1) > 0.1
        found = torch.autograd.grad(value, parameters)
        right = torch.autograd.grad(wanted, copies, retain_graph=True)
        for a, b in zip(found, right, strict=True):
            assert relative_error(a, b) < 64 * F32_EPS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_its_gradient_in_closed_form(form, dtype):
    """As autograd has it, added to what is there; frozen parts, half a factor and scales."""
    config = replace(CONFIG, dtype=dtype)
    layers = [AdaLoRALinear(nn.Linear(12, 40), f"small{i}", config, seed=0) for i in range(3)]
    layers += [AdaLoRALinear(nn.Linear(24, 12), "other", config, seed=0)]
    parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    wanted = torch.autograd.grad(0.3 * orthogonality(layers, form), parameters)
    layers[1].lora_B.requires_grad_(False)
    layers[0].lora_A.grad = torch.full_like(layers[0].lora_A, 2.0)
    value = add_orthogonality(layers, 0.3, form, loss_scale=torch.tensor(4.0))
    assert torch.equal(value, 0.3 * orthogonality(layers, form).detach())
    assert layers[1].lora_B.grad is None
    assert all(layer.lora_E.grad is None for layer in layers)
    eps = 64 * (F32_EPS if dtype == "float32" else torch.finfo(torch.bfloat16).eps / 16)
    for i, (parameter, right) in enumerate(zip(parameters, wanted, strict=True)):
        if parameter is layers[1].lora_B:
            continue
        right = 4.0 * right.float() + (2.0 if i == 0 else 0.0)
        assert relative_error(parameter.grad, right) < eps
        assert relative_error(0.5 * parameter.grad, right) > 0.4


def test_its_gradient_is_zero_where_it_is():
    layer, _ = adapted("linear")
    with torch.no_grad():
        layer.lora_A.zero_()[:, :RANK] = torch.eye(RANK)
        layer.lora_B.zero_()[:RANK] = torch.eye(RANK)
    for form in ("code", "paper"):
        layer.lora_A.grad = layer.lora_B.grad = None
        assert add_orthogonality([layer], 1.0, form) == 0.0
        assert not layer.lora_A.grad.any()
        assert not layer.lora_B.grad.any()


def test_orthogonality_is_float32_under_autocast_and_flat_at_the_minimum():
    layer, _ = adapted("linear")
    exact = orthogonality([layer])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality([layer]), exact)
    with torch.no_grad():
        layer.lora_A.zero_()[:, :RANK] = torch.eye(RANK)
        layer.lora_B.zero_()[:RANK] = torch.eye(RANK)
    for form in ("code", "paper"):
        gradients = torch.autograd.grad(orthogonality([layer], form), [layer.lora_A, layer.lora_B])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("bits", [4, 16])
def test_models_from_start_to_removal(family, bits):
    model = tiny_models.build(family)
    model = quantize(model) if bits == 4 else model
    ids = tiny_models.tokens()
    before = model(ids).logits
    adapter = attach(model, CONFIG)
    assert torch.equal(model(ids).logits, before)
    names = {name.rpartition(".")[2] for name, _ in adapter.named_parameters()}
    assert names == {"lora_A", "lora_E", "lora_B"}
    trained = {id(p) for p in adapter.parameters()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for piece in adapter.pieces:
            piece.lora_E.fill_(30.0)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    model(ids).logits.square().mean().backward()
    assert adapter.without_gradient() == ()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    adapter.detach_from_model()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("into", ["quantized", "original"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_equals_unmerged(family, into, tmp_path):
    folder = tiny_models.saved(family)
    model = load_nf4(folder) if into == "quantized" else load_plain(folder)
    adapter = attach(model, CONFIG)
    torch.manual_seed(5)
    with torch.no_grad():
        for piece in adapter.pieces:
            piece.lora_E.normal_(0, 30.0)[1] = 0.0
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    merge(folder, tmp_path / "adapter", tmp_path / "out", into=into, dtype="float32")
    ids = tiny_models.tokens()
    with torch.no_grad(), adapter.disabled():
        base = model(ids).logits
    found, wanted = load_plain(tmp_path / "out")(ids).logits, model(ids).logits
    assert (found - wanted).abs().max() < 5e-5  # float32, logits of size 1 to 10
    assert (base - wanted).abs().max() > 0.01


def test_the_merge_leaves_out_what_is_zero():
    layer, _ = adapted("linear")
    with torch.no_grad():
        layer.lora_E[2] = 0.0
        layer.lora_A[2] = float("nan")  # would show
    delta = layer.merge_delta()
    keep = [0, 1, 3]
    values = layer.lora_E[keep] * layer.lora_A[keep]
    torch.testing.assert_close(delta, 3.0 * layer.lora_B[:, keep] @ values)


def test_settings():
    budget = RankBudget(target_rank=3)
    made = make_adapter_config("adalora", LoRA(rank=6, alpha=5), budget)
    assert (made.rank, made.alpha, made.target_rank, method_name(made)) == (6, 5, 3, "adalora")
    assert make_adapter_config("adalora", LoRA(rank=6)).target_rank == 4
    assert AdaLoRA(rank=1).target_rank == 1
    with pytest.raises(ConfigError, match="fall from rank to target_rank"):
        AdaLoRA(rank=2, budget=RankBudget(target_rank=3))
    with pytest.raises(ConfigError, match="rank_pattern is not"):
        AdaLoRA(rank_pattern={"q": 2})
    for wrong in (
        {"every": 0},
        {"target_rank": 0},
        {"start_updates": -1},
        {"beta1": 1.0},
        {"orthogonality": -0.1},
        {"orthogonality_form": "both"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RankBudget(**wrong)


def test_an_embedding_is_not_for_it():
    with pytest.raises(AdapterError, match="matches no linear"):
        attach(tiny_models.build("llama"), AdaLoRA(targets=("embed_tokens",)))


def test_parameter_count_from_the_configuration_alone():
    """RoBERTa-base, all six linears of a layer at rank 3: P, Q and λ of each."""
    from transformers import AutoModel, RobertaConfig

    with torch.device("meta"):
        model = AutoModel.from_config(RobertaConfig(hidden_size=768, num_hidden_layers=12))
    adapter = attach(model, AdaLoRA(rank=3))
    per_layer = 4 * (2 * 768) + 2 * (768 + 3072)
    assert adapter.num_trainable == 12 * (3 * per_layer + 6 * 3)
