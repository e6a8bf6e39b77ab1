"""LoRA on embeddings, and adapters on some of the layers: values, selection, merging, PEFT."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import DoRA, LoRA, LoRAFA
from qlora_kit.adapters.lora.embedding import LoRAEmbedding
from qlora_kit.adapters.targets import linear_targets
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.export.merge import merge
from qlora_kit.load.model import load
from qlora_kit.nn.host_embedding import keep_embeddings_on_host
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.adapters.bases import F32_EPS, load_bitsandbytes, load_nf4, relative_error
from tests.export.models import error, plain_logits, unmerged_logits, weights, wrong_scale

V, H, RANK = 40, 24, 4
CONFIG = LoRA(rank=RANK, alpha=12)
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}


def shake(adapter) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for tensor in adapter.state_dict().values():
            tensor.normal_(0, 0.2)


@pytest.mark.parametrize("padding", [None, 3])
def test_values_and_gradients_match_float64(padding):
    base = nn.Embedding(V, H, padding_idx=padding).requires_grad_(False)
    layer = LoRAEmbedding(base, "embed", CONFIG, seed=0)
    with torch.no_grad():
        layer.lora_embedding_A.normal_()
    ids, g = torch.randint(V, (5, 7)), torch.randn(5, 7, H)
    ids[0, :3] = 3
    a, b = (t.detach().double().requires_grad_() for t in layer.state().values())
    wanted = base.weight.double()[ids] + 3.0 * F.embedding(ids, a.T, padding_idx=padding) @ b.T
    wanted.backward(g.double())
    out = layer(ids)
    out.backward(g)
    bound = 4 * H**0.5 * F32_EPS
    assert relative_error(out, wanted.detach()) < bound
    assert relative_error(layer.lora_embedding_A.grad, a.grad) < bound
    assert relative_error(layer.lora_embedding_B.grad, b.grad) < bound
    assert relative_error(1.01 * layer.lora_embedding_B.grad, b.grad) > 10 * bound
    absent = torch.ones(V, dtype=torch.bool)
    absent[ids.unique()] = False
    if padding is not None:
        absent[padding] = True
    assert not layer.lora_embedding_A.grad[:, absent].any()
    merged = base.weight + layer.merge_delta().T
    assert relative_error(out, merged.double()[ids].detach()) < bound


def test_the_start_is_the_base_and_depends_on_seed_and_name():
    base = nn.Embedding(V, H)
    first, again, other = (
        LoRAEmbedding(base, name, CONFIG, seed=seed)
        for name, seed in (("a", 0), ("a", 0), ("b", 0))
    )
    ids = torch.arange(V)
    assert torch.equal(first(ids), base(ids))
    assert torch.equal(first.lora_embedding_B, again.lora_embedding_B)
    assert not torch.equal(first.lora_embedding_B, other.lora_embedding_B)
    with torch.no_grad():
        first.lora_embedding_A.fill_(0.1)
    assert not torch.equal(first(ids), base(ids))
    first.enabled = False
    assert torch.equal(first(ids), base(ids))


@pytest.mark.parametrize("family", [*EMBEDDINGS, "gemma3"])
def test_what_is_trained_saved_and_loaded(family, tmp_path):
    name = EMBEDDINGS.get(family, "embed_tokens")
    model = tiny_models.build(family)
    count = attach(tiny_models.build(family), CONFIG).num_trainable
    adapter = attach(model, LoRA(rank=RANK, alpha=12, targets=("all-linear", name)))
    assert adapter.num_trainable == count + RANK * (tiny_models.VOCAB + tiny_models.HIDDEN)
    ends = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert ends == {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    model(tiny_models.tokens()).logits.sum().backward()
    assert not adapter.without_gradient()
    shake(adapter)
    adapter.save(tmp_path / "a")
    again = load_adapter(tiny_models.build(family), tmp_path / "a")
    state = adapter.state_dict()
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in adapter.named_parameters()]
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    before = model(tiny_models.tokens()).logits
    adapter.detach_from_model()
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert not torch.equal(model(tiny_models.tokens()).logits, before)


@pytest.mark.parametrize("family", ["llama", "gpt2_untied", "gemma3_untied"])
def test_merged_equals_unmerged(family, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = tiny_models.build(family.removesuffix("_untied"))
    if family.endswith("_untied"):
        model.config.tie_word_embeddings = False
        head = nn.Linear(tiny_models.HIDDEN, tiny_models.VOCAB, bias=False)
        model.set_output_embeddings(head)
    model.save_pretrained(base)
    name = "wte" if "gpt2" in family else "embed_tokens"
    model, _ = load(base, quant=QuantConfig(), dtype="float32")
    adapter = attach(model, LoRA(rank=RANK, alpha=12, targets=("all-linear", name)))
    shake(adapter)
    adapter.save(folder, base_model=str(base))
    for into, quant in (("quantized", QuantConfig()), ("original", None)):
        expected = unmerged_logits(base, folder, quant=quant)
        merge(base, folder, tmp_path / into, into=into, dtype="float32")
        assert error(plain_logits(tmp_path / into, "llama"), expected) < 1e-5
        merge(base, folder, tmp_path / f"{into}16", into=into, dtype="bfloat16")
        exact, rounded = weights(tmp_path / into), weights(tmp_path / f"{into}16")
        assert all(torch.equal(t.bfloat16(), rounded[n]) for n, t in exact.items())
    wrong_scale(folder)
    merge(base, folder, tmp_path / "wrong", into="original", dtype="float32")
    assert error(plain_logits(tmp_path / "wrong", "llama"), expected) > 1e-3


def test_counts_on_meta_and_what_models_read():
    with torch.device("meta"):
        model = tiny_models.build("llama")
        layer = LoRAEmbedding(nn.Embedding(V, H, padding_idx=3), "embed", CONFIG, seed=0)
    adapter = attach(model, LoRA(rank=8, targets=("embed_tokens",)))
    assert adapter.num_trainable == 8 * (tiny_models.VOCAB + tiny_models.HIDDEN)
    assert (layer.weight.shape, layer.padding_idx) == ((V, H), 3)


def test_a_tied_table_is_not_merged(tmp_path):
    base = tiny_models.saved("gpt2")
    model, _ = load(base, quant=QuantConfig(), dtype="float32")
    attach(model, LoRA(rank=2, targets=("wte",))).save(tmp_path / "a", base_model=str(base))
    with pytest.raises(AdapterError, match="tied to the embeddings"):
        merge(base, tmp_path / "a", tmp_path / "merged")


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "gemma3"])
@pytest.mark.parametrize("direction", ["ours", "theirs"])
def test_peft_answers_alike(family, direction, tmp_path):
    folder: Path = tiny_models.saved(family)
    name = {"llama": "embed_tokens", "gpt2": "wte", "gemma3": "embed_tokens"}.get(
        family, "word_embeddings"
    )
    linear = {"gpt2": "c_attn", "roberta": "query"}.get(family, "q_proj")
    model, ids = load_nf4(folder), tiny_models.tokens()
    base = model(ids).logits
    if direction == "ours":
        adapter = attach(model, LoRA(rank=RANK, alpha=6, targets=(name, linear)))
        shake(adapter)
        adapter.save(tmp_path / "a", base_model=str(folder))
        peft = PeftModel.from_pretrained(load_bitsandbytes(folder), tmp_path / "a").train()
    else:
        wanted = LoraConfig(r=RANK, lora_alpha=6, target_modules=[name, linear])
        peft = get_peft_model(load_bitsandbytes(folder), wanted).train()
        torch.manual_seed(7)
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p.normal_(0, 0.2)
        peft.save_pretrained(tmp_path / "a")
        load_adapter(model, tmp_path / "a")
    with torch.no_grad():
        ours, theirs = model(ids).logits, peft(ids).logits
    scale = theirs.abs().max().clamp(min=1)
    assert (ours - theirs).abs().max() < 1e-5 * scale
    assert (base - theirs).abs().max() > 1e-3 * scale


def test_what_cannot_be_adapted_is_refused():
    model = tiny_models.build("llama")
    for config in (DoRA(targets=("embed_tokens",)), LoRAFA(targets=("embed_tokens",))):
        with pytest.raises(AdapterError, match="only lora and rslora with a random start"):
            attach(model, config)
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(AdapterError, match="more than look rows up"):
        attach(model, LoRA(targets=("embed_tokens",)))
    model.model.embed_tokens.max_norm = None
    attach(model, LoRA(targets=("embed_tokens",)))
    with pytest.raises(ConfigError, match="they are a LoRAEmbedding"):
        keep_embeddings_on_host(model)


def test_layers_are_numbered_by_the_outermost_lists():
    model = tiny_models.build("mixtral")
    names = set(linear_targets(model, "all-linear"))
    second = {name for name in names if ".layers.1." in name}
    assert len(second) == len(names) / 2
    assert set(linear_targets(model, "all-linear", layers=(1,))) == second
    assert set(linear_targets(model, "all-linear", layers=(1, 0))) == names
    queries = linear_targets(model, ("q_proj", "k_proj"), layers=(0,))
    assert [name.rpartition("layers.")[2][0] for name in queries] == ["0", "0"]


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_some_layers_are_adapted_saved_and_read_by_peft(family, tmp_path):
    folder = tiny_models.saved(family)
    model = load_nf4(folder)
    adapter = attach(model, LoRA(rank=RANK, alpha=6, layers_to_transform=(1,)))
    assert all(".1." in name for name in adapter.module_names)
    both = attach(load_nf4(folder), LoRA(rank=RANK, alpha=6))
    assert 2 * adapter.num_trainable == both.num_trainable
    shake(adapter)
    adapter.save(tmp_path / "a", base_model=str(folder))
    ids = tiny_models.tokens()
    peft = PeftModel.from_pretrained(load_bitsandbytes(folder), tmp_path / "a").train()
    again = load_adapter(load_nf4(folder), tmp_path / "a")
    with torch.no_grad():
        assert (model(ids).logits - peft(ids).logits).abs().max() < 2e-5
        assert torch.equal(again.model(ids).logits, model(ids).logits)


def test_layers_that_do_not_exist_are_refused():
    model = tiny_models.build("llama")
    with pytest.raises(AdapterError, match=r"has 2 layers, numbered from 0; there is no layer 7"):
        attach(model, LoRA(layers_to_transform=(0, 7)))
    with pytest.raises(AdapterError, match="has 0 layers"):
        linear_targets(nn.Sequential(nn.Linear(2, 2)), "all-linear", layers=(0,))
    with pytest.raises(AdapterError, match="'lm_head' matches no linear"):
        attach(model, LoRA(targets=("q_proj", "lm_head"), layers_to_transform=(0,)))
    with pytest.raises(ConfigError, match="counts from 0"):
        LoRA(layers_to_transform=(-1,))
