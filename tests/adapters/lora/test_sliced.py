"""LoRA on slices of fused linears: separate adapters in one, counts, files, PEFT, merging."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.sliced import SlicedLoRALinear, layout
from qlora_kit.core.errors import AdapterError, ConfigError, FormatError
from qlora_kit.export.merge import merge
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train.checkpoints import restore_adapter
from tests import tiny_models
from tests.adapters.bases import (
    F32_EPS,
    LINEARS,
    load_bitsandbytes,
    load_nf4,
    make_linear,
    relative_error,
)
from tests.adapters.test_counts import gpt2, on_meta
from tests.export.models import error, plain_logits, unmerged_logits, weights, wrong_scale

RANK, K, N = 4, 96, 80
SPANS = {"q": (0, 48), "v": (64, 80)}
CONFIG = LoRA(rank=RANK, alpha=12)
SLICES = {
    "gpt2": LoRA(rank=RANK, alpha=6, slices={"c_attn": ("q", "v")}),
    "phi3": LoRA(
        rank=RANK,
        alpha=6,
        rslora=True,
        slices={"qkv_proj": ("q", "v"), "gate_up_proj": ("up",)},
        rank_pattern={"gate_up_proj": 2},
    ),
}


def shake(adapter) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.2)


@pytest.mark.parametrize("kind", LINEARS)
def test_values_and_gradients_are_those_of_separate_adapters(kind):
    base, weight = make_linear(kind, K, N)
    layer = SlicedLoRALinear(base, "proj", CONFIG, SPANS, seed=0)
    x, g = torch.randn(3, 7, K, requires_grad=True), torch.randn(3, 7, N)
    assert torch.equal(layer(x), base(x))
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.3)
    x64, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    parts = [(a[:RANK], b[:48]), (a[RANK:], b[48:])]
    added = [3.0 * (x64 @ a_j.T) @ b_j.T for a_j, b_j in parts]
    between = x64.new_zeros(3, 7, 16)
    y = x64 @ weight.T + base.bias.double() + torch.cat([added[0], between, added[1]], -1)
    y.backward(g.double())
    out = layer(x)
    out.backward(g)
    bound = 4 * K**0.5 * F32_EPS
    for value, wanted in (
        (out, y.detach()),
        (x.grad, x64.grad),
        (layer.lora_A.grad, a.grad),
        (layer.lora_B.grad, b.grad),
    ):
        assert relative_error(value, wanted) < bound
        assert relative_error(1.01 * value, wanted) > 10 * bound
    merged = weight + layer.merge_delta().double()
    assert relative_error(x.detach().double() @ merged.T + base.bias.double(), y) < bound
    assert not layer.merge_delta()[48:64].any()
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


def test_dropout_and_bfloat16():
    base, _ = make_linear("nf4", K, N, torch.bfloat16)
    layer = SlicedLoRALinear(base, "p", LoRA(rank=RANK, dropout=0.5), SPANS, seed=0)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(4, K, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("config", "count"), [(gpt2(1024, 24, 16), 393_216), (gpt2(1280, 36, 20), 737_280)]
)
def test_published_counts(config, count):
    """GPT-2 M and L with rank 4 on q and v, as the paper has them."""
    settings = LoRA(rank=4, targets=("c_attn",), slices={"c_attn": ("q", "v")})
    assert attach(on_meta(config), settings).num_trainable == count


def test_layouts_follow_the_model():
    model = tiny_models.build("phi3")
    fused = model.model.layers[0].self_attn.qkv_proj
    assert layout(model, "x.qkv_proj", fused) == {"q": (0, 64), "k": (64, 96), "v": (96, 128)}
    x = torch.randn(1, 64)
    q = model.model.layers[0].self_attn.qkv_proj(x)[:, :64]
    assert torch.equal(q, x @ fused.weight[:64].T)


@pytest.mark.parametrize("family", SLICES)
def test_files_go_round(family, tmp_path):
    model, ids = tiny_models.build(family), tiny_models.tokens()
    adapter = attach(model, SLICES[family])
    shake(adapter)
    adapter.save(tmp_path / "a")
    again = load_adapter(tiny_models.build(family), tmp_path / "a")
    state = adapter.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    assert (again.config.rank, again.config.slices) == (RANK, SLICES[family].slices)
    assert torch.equal(again.model(ids).logits, model(ids).logits)
    third = attach(tiny_models.build(family), SLICES[family], seed=8)
    restore_adapter(third, tmp_path / "a")
    assert torch.equal(third.model(ids).logits, model(ids).logits)
    (tmp_path / "a" / "qlora_kit.json").unlink()
    plain = load_adapter(tiny_models.build(family), tmp_path / "a")
    assert plain.num_trainable > adapter.num_trainable
    assert torch.allclose(plain.model(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("own", [[1], {"rank": 0}, {"slices": 3}, {"init": "other"}])
def test_a_side_file_that_is_malformed_is_refused(own, tmp_path):
    attach(tiny_models.build("gpt2"), SLICES["gpt2"]).save(tmp_path / "a")
    path = tmp_path / "a" / "qlora_kit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"own": own}))
    with pytest.raises((FormatError, ConfigError)):
        load_adapter(tiny_models.build("gpt2"), tmp_path / "a")


def test_what_is_not_in_the_slices_is_refused(tmp_path):
    adapter = attach(tiny_models.build("gpt2"), SLICES["gpt2"])
    adapter.save(tmp_path / "a")
    pair = next(p.low_rank() for p in adapter.pieces if isinstance(p, SlicedLoRALinear))
    pair.b[70, 0] = 1.0  # a row of k
    piece = next(p for p in adapter.pieces if isinstance(p, SlicedLoRALinear))
    with pytest.raises(AdapterError, match="not zero outside the slices q, v"):
        piece.own_state(pair)


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", SLICES)
def test_peft_answers_alike(family, tmp_path):
    folder: Path = tiny_models.saved(family)
    model, ids = load_nf4(folder), tiny_models.tokens()
    base = model(ids).logits
    adapter = attach(model, SLICES[family])
    shake(adapter)
    adapter.save(tmp_path / "a", base_model=str(folder))
    peft = PeftModel.from_pretrained(load_bitsandbytes(folder), tmp_path / "a").train()
    with torch.no_grad():
        assert (model(ids).logits - peft(ids).logits).abs().max() < 3e-5
        assert (base - peft(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("family", SLICES)
def test_merged_equals_unmerged(family, tmp_path):
    base, folder = tiny_models.saved(family), tmp_path / "adapter"
    model, _ = load(base, quant=QuantConfig(), dtype="float32")
    adapter = attach(model, SLICES[family])
    shake(adapter)
    adapter.save(folder, base_model=str(base))
    for into, quant in (("quantized", QuantConfig()), ("original", None)):
        expected = unmerged_logits(base, folder, quant=quant)
        merge(base, folder, tmp_path / into, into=into, dtype="float32")
        assert error(plain_logits(tmp_path / into, family), expected) < 1e-5
        merge(base, folder, tmp_path / f"{into}16", into=into, dtype="bfloat16")
        exact, rounded = weights(tmp_path / into), weights(tmp_path / f"{into}16")
        assert all(torch.equal(t.bfloat16(), rounded[n]) for n, t in exact.items())
    wrong_scale(folder)
    merge(base, folder, tmp_path / "wrong", into="original", dtype="float32")
    assert error(plain_logits(tmp_path / "wrong", family), expected) > 1e-3


def test_what_cannot_be_sliced_is_refused():
    model = tiny_models.build("gpt2")
    for slices, message in (
        ({"c_attn": ("q", "w")}, "none called 'w'"),
        ({"c_proj": ("q",)}, "no fused linear whose layout is known"),
        ({"qkv": ("q",)}, "matches none of the adapted modules"),
    ):
        with pytest.raises(AdapterError, match=message):
            attach(model, LoRA(slices=slices))
    with pytest.raises(AdapterError, match="79 outputs"):
        layout(model, "c_attn", torch.nn.Linear(4, 79))
    with pytest.raises(ConfigError, match="slices is for the methods lora and rslora"):
        DoRA(slices={"c_attn": ("q",)})
