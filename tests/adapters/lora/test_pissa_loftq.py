"""PiSSA and LoftQ: their starts, PiSSA's function and gradients, files, PEFT, merging, resume."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.linears import seeded
from qlora_kit.adapters.lora.config import DoRA, LoRA, LoRAFA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.adapters.lora.pissa import EXACT, PiSSALinear, leading_factors
from qlora_kit.core.errors import AdapterError, ConfigError, FormatError
from qlora_kit.export.merge import merge
from qlora_kit.export.originals import original_weights
from qlora_kit.export.quantized import save_quantized
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train.checkpoints import restore_adapter
from tests import tiny_models
from tests.adapters.bases import (
    F32_EPS,
    LINEARS,
    load_bitsandbytes,
    load_nf4,
    load_plain,
    make_linear,
    relative_error,
)
from tests.export.models import error, plain_logits, unmerged_logits, weights, wrong_scale

RANK, K, N = 4, 96, 80
PISSA = LoRA(rank=RANK, alpha=12, init="pissa")
LOFTQ = LoRA(rank=RANK, alpha=12, init="loftq")


def moved(kind: str, config: LoRA = PISSA):
    base, weight = make_linear(kind, K, N)
    layer = PiSSALinear(base, "proj", config, seed=0)
    with torch.no_grad():
        layer.lora_A.add_(0.1 * torch.randn(RANK, K))
        layer.lora_B.add_(0.1 * torch.randn(N, RANK))
    return layer, weight


@pytest.mark.parametrize("kind", LINEARS)
def test_the_start_is_the_base_and_its_leading_directions(kind):
    base, weight = make_linear(kind, K, N)
    layer = PiSSALinear(base, "proj", PISSA, seed=0)
    x = torch.randn(6, K)
    assert relative_error(layer(x), base(x).double()) < 4 * K**0.5 * F32_EPS
    s = torch.linalg.svdvals(weight)
    rest = weight - layer.scale * (layer.lora_B.double() @ layer.lora_A.double())
    assert (torch.linalg.svdvals(rest)[0] - s[RANK]).abs() < 1e-5 * s[0]
    assert torch.linalg.svdvals(0.99 * rest)[0] < s[RANK] - 1e-5 * s[0]
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", LINEARS)
def test_values_and_gradients_match_float64(kind):
    layer, weight = moved(kind)
    x, g = torch.randn(3, 7, K, requires_grad=True), torch.randn(3, 7, N)
    x64, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    rest = weight - layer.scale * layer.start_b.double() @ layer.start_a.double()
    y = x64 @ rest.T + layer.base.bias.double() + 3.0 * (x64 @ a.T) @ b.T
    y.backward(g.double())
    out = layer(x)
    out.backward(g)
    bound = 8 * K**0.5 * F32_EPS  # the start is added and taken away
    for value, wanted in (
        (out, y.detach()),
        (x.grad, x64.grad),
        (layer.lora_A.grad, a.grad),
        (layer.lora_B.grad, b.grad),
    ):
        assert relative_error(value, wanted) < bound
        assert relative_error(1.01 * value, wanted) > 10 * bound
    merged = weight + layer.merge_delta().double()
    assert relative_error(x.detach().double() @ merged.T + layer.base.bias.double(), y) < bound


def test_dropout_is_for_what_is_trained():
    base, _ = make_linear("nf4", K, N)
    layer = PiSSALinear(base, "proj", LoRA(rank=RANK, init="pissa", dropout=0.5), seed=0)
    x = torch.randn(3000, K)
    mean = (layer(x) - base(x)).mean(0)
    assert not torch.allclose(layer(x), base(x), atol=1e-3)  # A sees another input
    assert mean.abs().max() < 0.2 * base(x).abs().max()  # right on average
    layer.eval()
    assert torch.allclose(layer(x), base(x), atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 90), (EXACT + 40, EXACT + 8)])
def test_leading_factors_are_the_best_of_their_rank(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(0.98 ** torch.arange(shape[1]))
    left, right = leading_factors(matrix, 8, seeded("a", 0))
    s = torch.linalg.svdvals(matrix.double())
    rest = (matrix - left @ right).double().norm()
    best = s[8:].norm()
    assert best * (1 - 1e-6) < rest < best * 1.001
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4)
    again = leading_factors(matrix, 8, seeded("a", 0))
    assert torch.equal(again[0], left)
    worse = (matrix - matrix[:, :8] @ torch.linalg.pinv(matrix[:, :8]) @ matrix).double().norm()
    assert worse > best * 1.001
    with pytest.raises(AdapterError, match="fewer than the rank"):
        leading_factors(torch.ones(3, 5), 4, seeded("a", 0))


def shake(adapter) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_files_hold_one_lora_of_twice_the_rank(family, tmp_path):
    config = LoRA(rank=RANK, alpha=12, init="pissa", rank_pattern={"re:.*1.*": 2}, rslora=True)
    model = tiny_models.build(family)
    adapter = attach(model, config)
    shake(adapter)
    adapter.save(tmp_path / "a")
    text = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert text["init_lora_weights"] is True
    again = load_adapter(tiny_models.build(family), tmp_path / "a")
    assert again.config.init == "pissa"
    assert again.config.rank == RANK
    state = adapter.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    assert again.num_trainable == adapter.num_trainable
    ids = tiny_models.tokens()
    assert torch.equal(again.model(ids).logits, model(ids).logits)
    (tmp_path / "a" / "qlora_kit.json").unlink()
    plain = load_adapter(tiny_models.build(family), tmp_path / "a")
    assert plain.num_trainable == 2 * adapter.num_trainable
    assert torch.allclose(plain.model(ids).logits, model(ids).logits, atol=1e-5)
    fresh = attach(tiny_models.build(family), config, seed=9)
    with pytest.raises(AdapterError):  # that file is a LoRA now
        fresh.load_state_dict(plain.state_dict())


def test_a_checkpoint_is_restored(tmp_path):
    first = attach(tiny_models.build("llama"), PISSA)
    shake(first)
    first.save(tmp_path / "a")
    second = attach(tiny_models.build("llama"), PISSA, seed=3)
    restore_adapter(second, tmp_path / "a")
    state = first.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in second.state_dict().items())


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_peft_answers_alike(family, init, tmp_path):
    folder = tiny_models.saved(family)
    model, ids = load_nf4(folder), tiny_models.tokens()
    base = model(ids).logits
    originals = original_weights(folder)
    adapter = attach(model, LoRA(rank=RANK, alpha=6, init=init), originals=originals)
    shake(adapter)
    adapter.save(tmp_path / "a", base_model=str(folder))
    peft = PeftModel.from_pretrained(load_bitsandbytes(folder), tmp_path / "a").train()
    with torch.no_grad():
        assert (model(ids).logits - peft(ids).logits).abs().max() < 3e-5
        assert (base - peft(ids).logits).abs().max() > 0.01


@pytest.mark.transformers_compat
def test_training_is_pefts_pissa_on_an_unquantized_base(tmp_path):
    """PEFT puts the rest in the base's place; the function and its updates are the same."""
    folder = tiny_models.saved("llama")
    ids = tiny_models.tokens()
    model = load_plain(folder).train()
    adapter = attach(model, LoRA(rank=RANK, alpha=6, init="pissa"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted = LoraConfig(r=RANK, lora_alpha=6, init_lora_weights="pissa", target_modules=targets)
    peft = get_peft_model(load_plain(folder).train(), wanted)
    losses = []
    for net, parameters in (
        (model, list(adapter.parameters())),
        (peft, [p for p in peft.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        losses.append([])
        for _ in range(8):
            loss = net(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert worst < 1e-4, losses
    assert losses[0][-1] < losses[0][0] - 0.05  # it learned, so the agreement means something
    peft.save_pretrained(tmp_path / "theirs")
    with pytest.raises(FormatError, match="a start that changes the base"):
        load_adapter(load_plain(folder), tmp_path / "theirs")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_merges_into_either_base(family, tmp_path):
    base, folder = tiny_models.saved(family), tmp_path / "adapter"
    model, _ = load(base, quant=QuantConfig(), dtype="float32")
    adapter = attach(model, PISSA)
    shake(adapter)
    adapter.save(folder, base_model=str(base))
    for into, quant in (("quantized", QuantConfig()), ("original", None)):
        expected = unmerged_logits(base, folder, quant=quant)
        merge(base, folder, tmp_path / into, into=into, dtype="float32")
        assert error(plain_logits(tmp_path / into, family), expected) < 2e-5
        merge(base, folder, tmp_path / f"{into}16", into=into, dtype="bfloat16")
        exact, rounded = weights(tmp_path / into), weights(tmp_path / f"{into}16")
        assert all(torch.equal(t.bfloat16(), rounded[n]) for n, t in exact.items())
    wrong_scale(folder)
    merge(base, folder, tmp_path / "wrong", into="original", dtype="float32")
    assert error(plain_logits(tmp_path / "wrong", family), expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_starts_at_the_best_approximation_of_the_error(family, tmp_path):
    base: Path = tiny_models.saved(family)
    model, _ = load(base, quant=QuantConfig(), dtype="float32")
    originals = original_weights(base)
    adapter = attach(model, LOFTQ, originals=originals)
    for piece in adapter.pieces:
        assert type(piece) is LoRALinear
        lost = (originals(piece.place) - piece.base.dequantize()).double()
        rest = lost - piece.merge_delta().double()
        best = torch.linalg.svdvals(lost)[RANK:].norm()
        assert best * (1 - 1e-5) < rest.norm() < best * (1 + 1e-5)
        assert rest.norm() < 0.95 * lost.norm()
    adapter.save(tmp_path / "a", base_model=str(base))
    again, _ = load(base, quant=QuantConfig(), dtype="float32")
    loaded = load_adapter(again, tmp_path / "a")  # needs no originals
    assert loaded.config.init == "loftq"
    merge(base, tmp_path / "a", tmp_path / "merged", dtype="float32")
    expected = unmerged_logits(base, tmp_path / "a", quant=QuantConfig())
    assert error(plain_logits(tmp_path / "merged", family), expected) < 1e-5
    with pytest.raises(AdapterError, match="Merge into the quantized base"):
        merge(base, tmp_path / "a", tmp_path / "other", into="original")


def test_what_cannot_start_so_is_refused(tmp_path):
    for kind in (DoRA, LoRAFA):
        with pytest.raises(ConfigError, match="for the methods lora and rslora alone"):
            kind(init="pissa")
    with pytest.raises(ConfigError, match="slices start at random"):
        LoRA(init="loftq", slices={"c_attn": ("q",)})
    base = tiny_models.saved("llama")
    with pytest.raises(AdapterError, match="needs the original weights"):
        attach(load_nf4(base), LOFTQ)
    with pytest.raises(AdapterError, match="is not quantized"):
        attach(load_plain(base), LOFTQ, originals=original_weights(base))
    with pytest.raises(AdapterError, match="of different models"):
        attach(load_nf4(base), LOFTQ, originals=lambda name: torch.ones(2, 2))
    model = load_nf4(base)
    with pytest.raises(AdapterError, match="no tensor that is the weight"):
        original_weights(base)("model.layers.0.nothing")
    save_quantized(base, tmp_path / "nf4")
    with pytest.raises(FormatError, match="has no original weights"):
        original_weights(tmp_path / "nf4")
    assert attach(model, PISSA).num_trainable  # and nothing was left behind
