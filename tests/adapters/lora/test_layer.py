"""One adapted linear: its values, its gradients, and what it keeps for the backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_kit.adapters.linears import linear_shape
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.lora.layer import LoRALinear, initial_a
from qlora_kit.adapters.protocol import ModuleWrapper, Piece, TrainedCopy
from qlora_kit.core.errors import AdapterError, ConfigError
from tests.adapters.bases import BF16_EPS, F32_EPS, LINEARS, make_linear, relative_error

RANK, K, N = 4, 96, 80

METHODS = {
    "lora": LoRA(rank=RANK, alpha=12),
    "rslora": LoRA(rank=RANK, alpha=12, rslora=True),
    "lora_fa": LoRAFA(rank=RANK, alpha=12),
}
SCALES = {"lora": 3.0, "rslora": 6.0, "lora_fa": 3.0}


def adapted(kind: str, config: LoRA, dtype: torch.dtype = torch.float32):
    """An adapted linear with a B that is not zero, and its base's weight in float64."""
    base, weight = make_linear(kind, K, N, dtype)
    layer = LoRALinear(base, "proj", config, seed=0)
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.3)
    return layer, weight


def truth(layer: LoRALinear, weight, x, g, scale):
    """Value and gradients by float64 autograd on the formula itself."""
    x64, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    y = x64 @ weight.T + layer.base.bias.detach().double() + scale * (x64 @ a.T) @ b.T
    y.backward(g.double())
    return y.detach(), x64.grad, a.grad, b.grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LINEARS)
def test_values_and_gradients_match_float64(kind, method):
    layer, weight = adapted(kind, METHODS[method])
    x = torch.randn(3, 7, K, requires_grad=True)
    g = torch.randn(3, 7, N)
    y, dx, da, db = truth(layer, weight, x, g, SCALES[method])
    out = layer(x)
    out.backward(g)
    bound = 4 * K**0.5 * F32_EPS  # sums of K or N terms, errors adding at random
    assert relative_error(out.detach(), y) < bound
    assert relative_error(x.grad, dx) < bound
    assert relative_error(layer.lora_B.grad, db) < bound
    if method == "lora_fa":
        assert layer.lora_A.grad is None
    else:
        assert relative_error(layer.lora_A.grad, da) < bound
    # the bound bites: a scale that is 1% off is found in every quantity
    wrong_y, wrong_dx, _, wrong_db = truth(layer, weight, x, g, 1.01 * SCALES[method])
    assert relative_error(out.detach(), wrong_y) > 10 * bound
    assert relative_error(x.grad, wrong_dx) > 10 * bound
    assert relative_error(layer.lora_B.grad, wrong_db) > 10 * bound


@pytest.mark.parametrize("kind", LINEARS)
def test_bfloat16_input_with_float32_masters(kind):
    layer, weight = adapted(kind, METHODS["lora"], torch.bfloat16)
    x = torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(5, N, dtype=torch.bfloat16)
    y, dx, da, db = truth(layer, weight, x, g, SCALES["lora"])
    out = layer(x)
    out.backward(g)
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    pairs = [(out.detach(), y), (x.grad, dx), (layer.lora_A.grad, da), (layer.lora_B.grad, db)]
    for value, wanted in pairs:
        assert relative_error(value, wanted) < 2 * BF16_EPS
        assert relative_error(value * 1.05, wanted) > 2 * BF16_EPS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LINEARS)
def test_the_start_is_the_base(kind, method):
    base, _ = make_linear(kind, K, N)
    layer = LoRALinear(base, "proj", METHODS[method], seed=0)
    x = torch.randn(6, K)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.lora_B.fill_(0.1)
    assert not torch.equal(layer(x), base(x))
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", LINEARS)
def test_dropout_acts_on_the_input_of_a_while_training(kind):
    layer, weight = adapted(kind, LoRA(rank=RANK, alpha=12, dropout=0.5))
    x = torch.randn(6, K)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5).double()
    torch.manual_seed(3)
    value = layer.train()(x)
    a, b = layer.lora_A.double(), layer.lora_B.double()
    base = x.double() @ weight.T + layer.base.bias.double()
    assert relative_error(value, base + 3.0 * (dropped @ a.T) @ b.T) < 4 * K**0.5 * F32_EPS
    assert relative_error(value, base + 3.0 * (x.double() @ a.T) @ b.T) > 1e-2
    assert torch.equal(layer.eval()(x), layer(x))


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward keeps for the backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("first", [True, False], ids=["first_layer", "inner_layer"])
def test_lora_fa_keeps_only_the_narrow_product(kind, first):
    rows = 24
    x = torch.randn(2, rows // 2, K, requires_grad=not first)
    narrow = rows * RANK * 4
    lora, _ = adapted(kind, METHODS["lora"])
    lora_fa, _ = adapted(kind, METHODS["lora_fa"])
    assert saved_bytes(lora, x) == x.nbytes + narrow
    assert saved_bytes(lora_fa, x) == narrow


def test_lora_keeps_one_x_for_layers_that_share_it():
    x = torch.randn(24, K, requires_grad=True)
    layers = nn.ModuleList([adapted("nf4", METHODS["lora"])[0] for _ in range(3)])

    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer(x) for layer in self.layers])

    assert saved_bytes(Together(), x) == x.nbytes + 3 * 24 * RANK * 4


@pytest.mark.parametrize("kind", LINEARS)
def test_autocast_decides_the_compute_dtype(kind):
    layer, weight = adapted(kind, METHODS["lora"])
    x = torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    wanted, *_ = truth(layer, weight, x, torch.ones(5, N), 3.0)
    assert relative_error(y.detach(), wanted) < 4 * BF16_EPS
    assert layer.lora_A.grad.dtype == torch.float32


def test_the_start_depends_on_seed_and_name_alone():
    config = LoRA()
    first = initial_a(config, "layers.0.q_proj", 8, 64, seed=0)
    torch.manual_seed(99)  # the global state plays no part, and is left alone
    expected = torch.rand(3)
    torch.manual_seed(99)
    assert torch.equal(first, initial_a(config, "layers.0.q_proj", 8, 64, seed=0))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(first, initial_a(config, "layers.1.q_proj", 8, 64, seed=0))
    assert not torch.equal(first, initial_a(config, "layers.0.q_proj", 8, 64, seed=1))
    # pinned: an adapter that starts elsewhere after an upgrade cannot repeat old runs
    wanted = torch.tensor(PINNED_START)
    torch.testing.assert_close(first[0, :4], wanted, rtol=1e-5, atol=1e-7)


PINNED_START = [-0.1230105, -0.0249284, 0.0816213, -0.122837]


@pytest.mark.parametrize(
    ("init", "deviation"), [("kaiming", (3 * 512) ** -0.5), ("gaussian", 1 / 8)]
)
def test_the_start_has_the_published_spread(init, deviation):
    a = initial_a(LoRA(init=init), "proj", 8, 512, seed=0)
    assert abs(a.std().item() / deviation - 1) < 0.05
    assert abs(a.mean().item()) < 4 * deviation / a.numel() ** 0.5
    if init == "kaiming":  # torch's own, from which the reference code draws
        own = nn.init.kaiming_uniform_(torch.empty(8, 512), a=5**0.5)
        assert abs(a.abs().max() - own.abs().max()) < 1e-3


def test_merge_delta_is_the_effective_change():
    for kind in LINEARS:
        layer, weight = adapted(kind, METHODS["rslora"])
        x = torch.randn(5, K)
        delta = layer.merge_delta()
        assert delta.shape == (N, K)
        assert delta.dtype == torch.float32
        merged = x.double() @ (weight + delta.double()).T + layer.base.bias.double()
        assert relative_error(layer(x), merged) < 4 * K**0.5 * F32_EPS


def test_patterns_decide_rank_and_scale():
    config = LoRA(rank=8, alpha=16, rank_pattern={"proj": 2}, alpha_pattern={"re:p.*": 10})
    layer = LoRALinear(nn.Linear(K, N), "proj", config, seed=0)
    assert (layer.rank, layer.scale, layer.lora_A.shape[0]) == (2, 5.0, 2)
    with pytest.raises(ConfigError, match="rank_pattern"):
        LoRA(rank_pattern={"proj": 0})


def test_model_code_can_look_at_weight_and_bias():
    layer, _ = adapted("nf4", METHODS["lora"])
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert "rank=4" in repr(layer)


def test_it_works_without_data():
    base = nn.Linear(K, N, device="meta")
    layer = LoRALinear(base, "proj", METHODS["lora"], seed=0)
    assert layer.lora_A.is_meta
    assert layer(torch.empty(2, K, device="meta")).shape == (2, N)


@pytest.mark.parametrize("kind", ["nf4", "linear", "conv1d"])
@pytest.mark.parametrize("method", ["lora", "lora_fa"])
def test_torch_compile_takes_it_as_one_graph(kind, method):
    torch._dynamo.reset()
    layer, _ = adapted(kind, METHODS[method])
    x = torch.randn(6, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        layer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), *(p.grad.clone() for p in layer.trainable().values())))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


def test_other_modules_are_refused():
    with pytest.raises(AdapterError, match="not LayerNorm"):
        linear_shape(nn.LayerNorm(4))


def test_the_pieces_satisfy_the_protocol():
    layer, _ = adapted("nf4", METHODS["lora"])
    assert isinstance(layer, Piece)
    assert isinstance(TrainedCopy(nn.Linear(4, 4), "head", torch.float32), Piece)
    assert not isinstance(nn.Linear(4, 4), Piece)
    plain = ModuleWrapper(nn.Linear(4, 4), "layers.0.mlp")
    with pytest.raises(AdapterError, match="cannot be merged"):
        plain.merge_delta()


def test_a_trained_copy_leaves_the_original_alone():
    original = nn.Linear(8, 3).to(torch.bfloat16)
    head = TrainedCopy(original, "classifier", torch.float32)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert head(x).dtype == torch.bfloat16
    before = original(x)
    with torch.no_grad():
        head.trainable()["weight"].add_(1.0)
    assert not torch.equal(head(x), before)
    head.enabled = False
    assert torch.equal(head(x), before)
    assert head.merge_delta() is None


def test_a_trained_copy_of_an_embedding_takes_token_ids():
    table = nn.Embedding(10, 4).to(torch.bfloat16)
    copy = TrainedCopy(table, "embed_tokens", torch.float32)
    ids = torch.tensor([[1, 2]])
    assert torch.equal(copy(ids), table(ids))


def test_a_trained_copy_needs_floating_point_values():
    with pytest.raises(AdapterError, match="quantized parameters"):
        TrainedCopy(make_linear("nf4", K, N)[0], "classifier", torch.float32)
    with pytest.raises(AdapterError, match="no parameters"):
        TrainedCopy(nn.Identity(), "classifier", torch.float32)
