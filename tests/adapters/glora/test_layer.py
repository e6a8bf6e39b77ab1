"""GLoRA on one linear: every structure against float64, the start, what is kept, the merge."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_kit.adapters.glora.config import FORMS, GLoRA, Structure, support_shapes
from qlora_kit.adapters.glora.layer import GLoRALinear
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.registry import make_adapter_config, method_name
from qlora_kit.core.errors import AdapterError, ConfigError
from tests import tiny_models
from tests.adapters.bases import BF16_EPS, F32_EPS, LINEARS, make_linear, quantize, relative_error
from tests.adapters.lora.test_layer import saved_bytes

RANK, K, N = 3, 96, 80
ALL = [Structure(*forms) for forms in itertools.product(*FORMS.values())]
SOME = [
    "lora lora lora vector vector",
    "vector none none none none",
    "scalar vector vector scalar scalar",
    "none lora none none none",
    "lora scalar lora none vector",
    "none none vector vector none",
]


def adapted(kind: str, text: str, dtype: torch.dtype = torch.float32, super_net: bool = False):
    """An adapted linear with supports that are not zero, and its base's weight in float64."""
    base, weight = make_linear(kind, K, N, dtype)
    config = GLoRA(rank=RANK, structure=text, super_net=super_net)
    layer = GLoRALinear(base, "proj", config, seed=0)
    with torch.no_grad():
        for value in layer.supports.values():
            value.normal_(0, 0.3)
    return layer, weight


def plain(structure: Structure, s: dict[str, torch.Tensor], x, weight, bias):
    """The formula as it stands, W⊙A formed; X_d may be larger than the structure needs."""

    def matrix(letter: str, form: str):
        if form == "none":
            return torch.zeros((), dtype=x.dtype)
        d = s[f"{letter}_d"]
        if form == "lora":
            return d @ s[f"{letter}_u"]
        return d[:, :1] if form == "vector" else d[0, 0]

    a, b, c = (matrix(n, getattr(structure, n.lower())) for n in "ABC")
    full = weight + weight * a + b
    shift = torch.zeros(weight.shape[0], dtype=x.dtype) if bias is None else bias
    if structure.d != "none" and bias is not None:
        shift = shift + bias * (s["D"] if structure.d == "vector" else s["D"][0])
    if structure.e != "none":
        shift = shift + (s["E"] if structure.e == "vector" else s["E"][0])
    if structure.c != "none":
        shift = shift + (weight @ c)[:, 0]
    return x @ full.T + shift


def truth(layer: GLoRALinear, weight, x, g, size=lambda t: t):
    """Value and gradients by float64 autograd; of their terms' sizes with `torch.abs`."""
    weight, g = size(weight), size(g)
    x64 = size(x.detach().double()).requires_grad_()
    held = layer.supports.items()
    copies = {k: size(v.detach().double()).requires_grad_() for k, v in held}
    bias = None if layer.bias is None else size(layer.bias.detach().double())
    y = plain(layer.choice, copies, x64, weight, bias)
    y.backward(g.double())
    return y.detach(), x64.grad, {k: v.grad for k, v in copies.items()}


def error(layer: GLoRALinear, weight, x, g, name: str, exact) -> float:
    """Relative error of a gradient; of one that is a single sum, relative to the sum's terms."""
    value = layer.supports[name].grad
    if int((exact != 0).sum()) > 1:
        return relative_error(value, exact)
    terms = truth(layer, weight, x, g, torch.abs)[2][name]
    return float((value.double() - exact).norm() / terms.norm())


def test_there_are_432_structures():
    assert len(ALL) == len(set(ALL)) == 432
    assert all(Structure.parse(str(s)) == s for s in ALL)


@pytest.mark.parametrize("text", SOME)
@pytest.mark.parametrize("kind", LINEARS)
def test_values_and_gradients_match_float64(kind, text):
    layer, weight = adapted(kind, text)
    x = torch.randn(3, 7, K, requires_grad=True)
    g = torch.randn(3, 7, N)
    y, dx, grads = truth(layer, weight, x, g)
    out = layer(x)
    out.backward(g)
    bound = 8 * K**0.5 * F32_EPS  # sums of K or N terms, errors adding at random
    assert relative_error(out, y) < bound
    assert relative_error(x.grad, dx) < bound
    assert set(grads) == set(layer.supports.keys())
    for name, exact in grads.items():
        assert error(layer, weight, x, g, name, exact) < bound, name
    with torch.no_grad():  # the bound bites: supports that are 1% off are found
        for value in layer.supports.values():
            value.mul_(1.01)
    assert relative_error(out, truth(layer, weight, x, g)[0]) > 10 * bound


@pytest.mark.parametrize("kind", ["nf4", "conv1d"])
def test_every_structure_of_a_super_net(kind):
    """All 432 from one set of values: a vector is the first column, a scalar the first value."""
    layer, weight = adapted(kind, SOME[0], super_net=True)
    x = torch.randn(5, K)
    values = {k: v.detach().double() for k, v in layer.supports.items()}
    bias = layer.bias.double()
    for structure in ALL:
        layer.choice = structure
        exact = plain(structure, values, x.double(), weight, bias)
        with torch.no_grad():
            assert relative_error(layer(x), exact) < 8 * K**0.5 * F32_EPS, structure
    assert relative_error(layer(x), x.double() @ weight.T + bias) < K**0.5 * F32_EPS  # the last


def test_gradients_of_a_super_net_reach_what_is_used():
    layer, weight = adapted("nf4", SOME[0], super_net=True)
    x, g = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    layer.choice = Structure.parse("vector scalar vector scalar none")
    _, dx, grads = truth(layer, weight, x, g)
    layer(x).backward(g)
    assert relative_error(x.grad, dx) < 8 * K**0.5 * F32_EPS
    used = {name for name, value in grads.items() if value is not None}
    assert used == {"A_d", "B_d", "C_d", "D"}
    for name, value in layer.supports.items():
        if name not in used:
            assert value.grad is None
            continue
        assert error(layer, weight, x, g, name, grads[name]) < 8 * K**0.5 * F32_EPS
        assert torch.equal(value.grad == 0, grads[name] == 0)


@pytest.mark.parametrize("text", SOME)
@pytest.mark.parametrize("kind", LINEARS)
def test_bfloat16_input_with_float32_masters(kind, text):
    layer, weight = adapted(kind, text, torch.bfloat16)
    with torch.no_grad():
        for value in layer.supports.values():
            value.mul_(0.3)  # as small as trained ones: a change, not another layer
    x = torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(5, N, dtype=torch.bfloat16)
    y, dx, grads = truth(layer, weight, x, g)
    out = layer(x)
    out.backward(g)
    assert out.dtype == x.grad.dtype == torch.bfloat16
    for value, exact in [(out, y), (x.grad, dx)]:
        assert relative_error(value, exact) < 4 * BF16_EPS
        assert relative_error(value * 1.1, exact) > 4 * BF16_EPS
    for name, exact in grads.items():
        steps = 16 if name.startswith("C") else 4  # W·C is one row: its errors are not averaged
        assert error(layer, weight, x, g, name, exact) < steps * BF16_EPS, name


@pytest.mark.parametrize("text", SOME)
@pytest.mark.parametrize("kind", LINEARS)
def test_the_start_is_the_base(kind, text):
    base, _ = make_linear(kind, K, N)
    layer = GLoRALinear(base, "proj", GLoRA(rank=RANK, structure=text), seed=0)
    x = torch.randn(6, K)
    assert torch.equal(layer(x), base(x))
    for name, value in layer.supports.items():
        assert bool(value.any()) == name.endswith("_u")
    with torch.no_grad():
        for value in layer.supports.values():
            value.fill_(0.1)
    assert not torch.equal(layer(x), base(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", LINEARS)
def test_the_product_keeps_x_alone(kind):
    """r passes of the base, none of whose inputs or outputs is kept."""
    layer, _ = adapted(kind, "lora none none none none")
    x = torch.randn(2, 12, K, requires_grad=True)
    assert saved_bytes(layer, x) == x.nbytes


def test_autocast_decides_the_compute_dtype():
    layer, weight = adapted("nf4", SOME[0])
    x = torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert relative_error(y, truth(layer, weight, x, torch.ones(5, N))[0]) < 8 * BF16_EPS


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("text", SOME)
def test_merged_equals_unmerged(text, bias):
    base = nn.Linear(K, N, bias=bias).requires_grad_(False)
    layer = GLoRALinear(base, "proj", GLoRA(rank=RANK, structure=text), seed=0)
    with torch.no_grad():
        for value in layer.supports.values():
            value.normal_(0, 0.3)
    x = torch.randn(5, K)
    with torch.no_grad():
        weight, shift = base.weight + layer.merge_delta(), layer.merged_bias()
        torch.testing.assert_close(F.linear(x, weight, shift), layer(x), rtol=1e-4, atol=1e-4)
    wanted = bias or layer.structure.c != "none" or layer.structure.e != "none"
    assert (shift is not None) == wanted


def test_a_linear_without_bias_has_no_d():
    layer = GLoRALinear(nn.Linear(8, 4, bias=False), "proj", GLoRA(), seed=0)
    assert "D" not in layer.supports
    assert "E" in layer.supports


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("bits", [4, 16])
def test_models_from_start_to_removal(family, bits, tmp_path):
    model = tiny_models.build(family)
    model = quantize(model) if bits == 4 else model
    ids = tiny_models.tokens()
    before = model(ids).logits
    config = GLoRA(rank=2, structures={"re:.*1.*": "vector lora none scalar vector"})
    adapter = attach(model, config)
    assert torch.equal(model(ids).logits, before)
    trained = {id(p) for p in adapter.parameters()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for value in adapter.parameters():
            value.normal_(0, 0.1)
    after = model(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    after.square().mean().backward()
    assert adapter.without_gradient() == ()
    count = sum(
        p.choice.count(p.out_features, p.in_features, rank=2, bias=p.has_bias)
        for p in adapter.pieces
    )
    assert adapter.num_trainable == count
    adapter.save(tmp_path / "adapter")
    adapter.detach_from_model()
    assert torch.equal(model(ids).logits, before)
    again = load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(ids).logits, after)
    assert again.config == config


def test_counts_from_the_configuration_alone():
    """LoRA is the special case B = LoRA, the rest none."""
    from tests.adapters.test_counts import llama_8b, on_meta

    adapter = attach(on_meta(llama_8b()), GLoRA(rank=16, structure="none lora none none none"))
    assert adapter.num_trainable == 41_943_040
    full = attach(on_meta(llama_8b()), GLoRA(rank=4))
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    assert full.num_trainable == 32 * sum(4 * (2 * (n + k) + k + 1) + n for n, k in shapes)


def test_settings():
    made = make_adapter_config("glora", GLoRA(rank=2))
    assert (made.rank, method_name(made)) == (2, "glora")
    for wrong in ("lora", "lora lora scalar none none", "full none none none none"):
        with pytest.raises(ConfigError, match=r"glora's|five words"):
            GLoRA(structure=wrong)
    with pytest.raises(ConfigError, match="five words"):
        GLoRA(structures={"q_proj": ""})
    with pytest.raises(ConfigError, match="rank"):
        GLoRA(rank=0)
    with pytest.raises(ConfigError, match="dtype"):
        GLoRA(dtype="int8")
    for s in ALL[::7]:
        for bias in (True, False):
            shapes = support_shapes(s.on(bias=bias), 12, 20, 3)
            total = sum(torch.Size(shape).numel() for shape in shapes.values())
            assert total == s.count(12, 20, rank=3, bias=bias)
    with pytest.raises(AdapterError, match="LayerNorm"):
        GLoRALinear(nn.LayerNorm(4), "norm", GLoRA(), seed=0)
