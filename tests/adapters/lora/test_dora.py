"""DoRA: values and gradients by float64, the start, merging, PEFT's files both ways."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.dora import DoRALinear
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.block.install import why_not_fused
from qlora_kit.core.errors import FormatError
from qlora_kit.export.merge import merge
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.adapters.bases import (
    BF16_EPS,
    F32_EPS,
    LINEARS,
    load_bitsandbytes,
    load_nf4,
    make_linear,
    relative_error,
)
from tests.export.models import error, plain_logits, unmerged_logits, weights, wrong_scale

RANK, K, N = 4, 96, 80
SCALE = 3.0
CONFIG = DoRA(rank=RANK, alpha=12)


def adapted(kind: str, dtype: torch.dtype = torch.float32, config: LoRA = CONFIG):
    """An adapted linear far from its start, and its base's weight in float64."""
    base, weight = make_linear(kind, K, N, dtype)
    layer = DoRALinear(base, "proj", config, seed=0)
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.3)
        layer.lora_magnitude.mul_(1 + 0.3 * torch.rand(N))
    return layer, weight


def truth(layer, weight, x, g, scale=SCALE, *, detached=True):
    """Value and gradients by float64 autograd on the formula itself."""
    parts = (x, layer.lora_A, layer.lora_B, layer.lora_magnitude)
    x64, a, b, m = (t.detach().double().requires_grad_() for t in parts)
    v = weight + scale * b @ a
    length = v.norm(dim=1, keepdim=True)
    turned = m[:, None] * v / (length.detach() if detached else length)
    y = x64 @ turned.T + layer.base.bias.detach().double()
    y.backward(g.double())
    return y.detach(), x64.grad, a.grad, b.grad, m.grad


def found(layer, x, g):
    out = layer(x)
    out.backward(g)
    grads = (layer.lora_A.grad, layer.lora_B.grad, layer.lora_magnitude.grad)
    return out.detach(), x.grad, *grads


@pytest.mark.parametrize("kind", LINEARS)
def test_values_and_gradients_match_float64(kind):
    layer, weight = adapted(kind)
    x, g = torch.randn(3, 7, K, requires_grad=True), torch.randn(3, 7, N)
    got = found(layer, x, g)
    bound = 4 * K**0.5 * F32_EPS  # sums of K or N terms, errors adding at random
    for value, wanted in zip(got, truth(layer, weight, x, g), strict=True):
        assert relative_error(value, wanted) < bound
    for value, wrong in zip(got, truth(layer, weight, x, g, 1.01 * SCALE), strict=True):
        assert relative_error(value, wrong) > 10 * bound
    # the length counts as a constant: with its gradient, A and B learn something else
    full = truth(layer, weight, x, g, detached=False)
    assert all(relative_error(got[i], full[i]) > 0.01 for i in (2, 3))


@pytest.mark.parametrize("kind", ["nf4", "linear", "conv1d"])
def test_bfloat16_input_with_float32_masters(kind):
    layer, weight = adapted(kind, torch.bfloat16)
    x = torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(5, N, dtype=torch.bfloat16)
    got = found(layer, x, g)
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in got[2:])
    for value, wanted in zip(got, truth(layer, weight, x, g), strict=True):
        assert relative_error(value, wanted) < 3 * BF16_EPS  # u, its stretch, and the bias
        assert relative_error(value * 1.05, wanted) > 3 * BF16_EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LINEARS)
def test_the_start_is_the_base(kind, dtype):
    base, _ = make_linear(kind, K, N, dtype)
    if kind != "linear":
        base.bias.data.zero_()  # where it is not, adding it last rounds once more
    layer = DoRALinear(base, "proj", CONFIG, seed=0)
    x = torch.randn(6, K, dtype=dtype)
    wanted = base(x)
    eps = torch.finfo(dtype).eps
    assert (layer(x) - wanted).abs().max() <= 2 * eps * wanted.abs().max()
    with torch.no_grad():
        layer.lora_magnitude.mul_(1.5)
    assert (layer(x) - wanted).abs().max() > 8 * eps * wanted.abs().max()
    layer.enabled = False
    assert torch.equal(layer(x), wanted)


def test_a_change_of_length_is_right_on_average_in_bfloat16():
    """1.012 is no bfloat16: a rounded factor would be 1.0156, for the whole row."""
    base, _ = make_linear("nf4", K, N, torch.bfloat16)
    layer = DoRALinear(base, "proj", CONFIG, seed=0)
    x = torch.randn(4000, K, dtype=torch.bfloat16)
    before = layer(x).double()
    bias = base.bias.detach().double()
    with torch.no_grad():
        layer.lora_magnitude.mul_(1.012)
    u = before - bias
    gain = ((layer(x).double() - before) * u).sum() / u.square().sum()
    assert abs(gain - 0.012) < 1e-3
    assert abs(float(torch.tensor(1.012).bfloat16()) - 1 - 0.012) > 3e-3


def test_lengths_are_kept_between_passes_without_gradient_only():
    layer, _ = adapted("nf4")
    x = torch.randn(2, K)
    layer.eval()
    with torch.no_grad():
        first = layer(x)
        kept = layer.row_lengths(torch.float32)
        assert layer.row_lengths(torch.float32) is kept
        layer.lora_B.mul_(2)
        assert layer.row_lengths(torch.float32) is not kept
        assert not torch.allclose(layer(x), first)
        layer.lora_B.data.view(-1)[:] = 0.0  # through another view: no version tells
    layer(x)  # a pass with gradients
    with torch.no_grad():
        assert torch.equal(layer.row_lengths(torch.float32), layer.base_squares.sqrt())


def test_dropout_acts_on_the_input_of_a():
    layer, _ = adapted("nf4", config=DoRA(rank=RANK, alpha=12, dropout=0.5))
    x = torch.randn(4000, K)
    torch.manual_seed(0)
    mean = layer(x).mean(0)
    layer.eval()
    wanted = layer(x)
    assert (mean - wanted.mean(0)).abs().max() < 0.2 * wanted.abs().max()  # right on average
    assert not torch.allclose(layer.train()(x), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_what_is_trained_and_saved(family, tmp_path):
    model = tiny_models.build(family)
    adapter = attach(model, DoRA(rank=RANK))
    ends = {name.rpartition(".")[2] for name, _ in adapter.named_parameters()}
    assert ends == {"lora_A", "lora_B", "lora_magnitude"}
    assert ends == {name.rpartition(".")[2] for name in adapter.state_dict()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in adapter.named_parameters()
    }
    assert (why_not_fused(model) is None) == (family == "llama")
    adapter.save(tmp_path / "a")
    again = load_adapter(tiny_models.build(family), tmp_path / "a")
    assert isinstance(again.config, DoRA)
    state = adapter.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())


def test_parameters_of_llama_8b_from_its_configuration():
    from tests.adapters.test_counts import llama_8b, on_meta

    lora = attach(on_meta(llama_8b()), LoRA(rank=16)).num_trainable
    outputs = 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096)
    assert attach(on_meta(llama_8b()), DoRA(rank=16)).num_trainable == lora + outputs


def shaken(model, config, folder: Path, base: Path):
    adapter = attach(model, config)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, tensor in adapter.state_dict().items():
            if name.endswith("lora_magnitude"):
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor))
            else:
                tensor.normal_(0, 0.2)
    adapter.save(folder, base_model=str(base))
    return adapter


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merged_equals_unmerged(family, tmp_path):
    base, folder = tiny_models.saved(family), tmp_path / "adapter"
    model, _ = load(base, quant=QuantConfig(), dtype="float32")
    shaken(model, CONFIG, folder, base)
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


@pytest.mark.parametrize("kind", LINEARS)
def test_the_delta_is_what_the_layer_adds(kind):
    layer, weight = adapted(kind)
    x = torch.randn(5, K)
    merged = weight + layer.merge_delta().double()
    y = x.double() @ merged.T + layer.base.bias.double()
    assert relative_error(layer(x), y) < 4 * K**0.5 * F32_EPS


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("direction", ["ours", "theirs"])
def test_peft_answers_alike(family, direction, tmp_path):
    folder = tiny_models.saved(family)
    config = DoRA(rank=4, alpha=6, rslora=family == "llama")
    model = load_nf4(folder)
    ids = tiny_models.tokens()
    base = model(ids).logits
    if direction == "ours":
        shaken(model, config, tmp_path / "a", folder)
        peft = PeftModel.from_pretrained(load_bitsandbytes(folder), tmp_path / "a").train()
    else:
        wanted = LoraConfig(
            r=4, lora_alpha=6, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        peft = get_peft_model(load_bitsandbytes(folder), wanted).train()
        torch.manual_seed(7)
        with torch.no_grad():
            for name, p in peft.named_parameters():
                if p.requires_grad:
                    factor = 1 + 0.3 * torch.rand_like(p)
                    p.copy_(p * factor if "magnitude" in name else 0.2 * torch.randn_like(p))
        peft.save_pretrained(tmp_path / "a")
        load_adapter(model, tmp_path / "a")
    with torch.no_grad():
        ours, theirs = model(ids).logits, peft(ids).logits
    assert (ours - theirs).abs().max() < 3e-5  # logits of size 1 to 10 in float32
    assert (base - theirs).abs().max() > 0.01


def test_files_that_contradict_themselves_are_refused(tmp_path):
    adapter = attach(tiny_models.build("llama"), DoRA(rank=2))
    adapter.save(tmp_path / "a")
    weights_file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights_file)
    name = next(name for name in tensors if "magnitude" in name)
    save_file(tensors | {name: torch.ones(3)}, weights_file)
    with pytest.raises(FormatError, match=r"lora_magnitude_vector \(3,\) beside"):
        load_adapter(tiny_models.build("llama"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    (tmp_path / "a" / "qlora_kit.json").unlink()
    with pytest.raises(FormatError, match="lora_magnitude"):
        load_adapter(tiny_models.build("llama"), tmp_path / "a")


def test_the_run_names_it():
    assert isinstance(make_adapter_config("dora", LoRA(rank=3)), DoRA)
