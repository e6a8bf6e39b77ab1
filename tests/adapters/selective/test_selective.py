"""The model's own weights: BitFit's biases, the last blocks, all of them; merging and saving."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.adapters.selective.full import computing_dtype
from qlora_kit.core.errors import AdapterError, ConfigError, SourceError
from qlora_kit.export.merge import merge
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.adapters.bases import F32_EPS, quantize
from tests.adapters.test_other_methods import answer, shake


def test_bitfit_trains_what_is_there(caplog, monkeypatch):
    adapter = attach(tiny_models.build("qwen2"), BitFit())
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in adapter.state_dict()} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    model = tiny_models.build("bert")
    names = {n for n, p in model.named_parameters() if n.endswith("bias") and n.startswith("bert.")}
    assert set(attach(model, BitFit()).state_dict()) == names  # and not the head's

    monkeypatch.setattr("qlora_kit.core.log._said", set())
    with caplog.at_level(logging.INFO, logger="qlora_kit"):
        added = attach(tiny_models.build("llama"), BitFit())
    assert "zero ones" in caplog.text
    assert len(added.state_dict()) == 14
    assert all(not t.any() for t in added.state_dict().values())
    with pytest.raises(AdapterError, match="has none"):
        attach(tiny_models.build("llama"), BitFit(add_biases="never"))
    both = attach(tiny_models.build("qwen2"), BitFit(add_biases="always"))
    assert len(both.state_dict()) == 14


def test_top_k_trains_the_last_blocks_and_the_final_norm():
    model = quantize(tiny_models.build("gpt2"))
    adapter = attach(model, TopK(blocks=1))
    names = [n for n, _ in adapter.named_parameters()]
    assert {n.rpartition(".")[0] for n in names if not n.startswith("transformer.h.1.")} == {
        "transformer.ln_f"
    }
    plain = tiny_models.build("gpt2")
    block = sum(p.numel() for p in plain.transformer.h[1].parameters())
    assert adapter.num_trainable == block + 2 * 64
    shapes = {n: p.shape for n, p in plain.named_parameters()}
    assert all(p.shape == shapes[n] for n, p in adapter.named_parameters())  # Conv1D's (in, out)

    alone = attach(tiny_models.build("gpt2"), TopK(blocks=1, final_norm=False))
    assert alone.num_trainable == block
    model.train()
    ids = tiny_models.tokens()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".h.0." in n)


def test_top_k_refusals():
    with pytest.raises(AdapterError, match="2 blocks"):
        attach(tiny_models.build("llama"), TopK(blocks=3))
    with pytest.raises(AdapterError, match=r"mlp\.\w+ \("):
        attach(tiny_models.build("qwen3_moe"), TopK(blocks=1))
    with pytest.raises(ConfigError, match="at least 1"):
        TopK(blocks=0)


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "bert"])
def test_full_trains_everything_once(family):
    model = tiny_models.build(family)
    adapter = attach(model, Full())
    assert adapter.num_trainable == sum(p.numel() for p in model.parameters())
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in model.parameters()}


def test_full_refuses_a_4_bit_base():
    model = quantize(tiny_models.build("llama"))
    before = answer(model)
    with pytest.raises(AdapterError, match="code of 4 bits"):
        attach(model, Full())
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
def test_full_has_masters_by_choice(masters):
    model = tiny_models.build("llama", dtype=torch.bfloat16)
    before = answer(model)
    adapter = attach(model, Full(dtype=masters))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, masters)}
    wide = masters == "float32"
    assert computing_dtype(adapter.pieces) == (torch.bfloat16 if wide else None)
    adapter.detach_from_model()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(answer(model), before)


def test_full_says_that_the_base_is_gone():
    model = tiny_models.build("llama")
    adapter = attach(model, Full())
    with adapter.disabled():
        pass
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"lm_head\.weight.*Load the base again"):
        adapter.detach_from_model()
    with pytest.raises(AdapterError, match="no copy"), adapter.disabled():
        pass


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_full_saves_a_model_that_transformers_loads(family, tmp_path):
    model = tiny_models.build(family, dtype=torch.bfloat16)
    adapter = attach(model, Full())
    shake(adapter, 0.01)
    adapter.save(tmp_path / "model")
    assert model.config.dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    wanted = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
    assert {n for n, _ in loaded.named_parameters()} == set(wanted)
    assert all(torch.equal(p, wanted[n]) for n, p in loaded.named_parameters())
    with pytest.raises((SourceError, FileExistsError)):
        adapter.save(tmp_path / "model")


@pytest.mark.parametrize("config", [BitFit(), TopK(blocks=1)], ids=["bitfit", "top_k"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
@pytest.mark.parametrize("bits", [4, 16])
def test_merged_equals_unmerged(family, config, bits, tmp_path):
    folder = tiny_models.saved(family)
    quant = QuantConfig() if bits == 4 else None
    model, _ = load(folder, quant=quant, dtype="float32", device="cpu")
    adapter = attach(model, config)
    shake(adapter)
    adapter.save(tmp_path / "a", base_model=str(folder))
    summary = merge(folder, tmp_path / "a", tmp_path / "m", dtype="float32", device="cpu")
    assert summary.replaced == len(adapter.state_dict())
    assert f": {summary.replaced} trained tensors put into the quantized base, " in str(summary)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    wanted = answer(model)
    error = (answer(merged) - wanted).abs().max() / wanted.abs().max()
    assert error < 500 * F32_EPS
    with adapter.disabled():  # the base is another model
        assert (answer(merged) - answer(model)).abs().max() / wanted.abs().max() > 500 * F32_EPS


def test_merges_that_cannot_be(tmp_path):
    for name, config, reason in [
        ("added", BitFit(add_biases="always"), "BitFit has added one"),
        ("sequence", Bottleneck(width=4), "nonlinearity"),
    ]:
        folder = tiny_models.saved("qwen2" if name == "added" else "llama")
        model, _ = load(folder, quant=None, dtype="float32", device="cpu")
        attach(model, config).save(tmp_path / name, base_model=str(folder))
        with pytest.raises(AdapterError, match=reason):
            merge(folder, tmp_path / name, tmp_path / "m", device="cpu")
        assert not (tmp_path / "m").exists()


def test_a_checkpoint_of_full_has_the_masters(tmp_path):
    model = tiny_models.build("llama", dtype=torch.bfloat16)
    adapter = attach(model, Full())
    shake(adapter, 0.01)
    wanted = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.save(tmp_path / "checkpoint", resumable=True)
    fresh = tiny_models.build("llama", dtype=torch.bfloat16)
    loaded = load_adapter(fresh, tmp_path / "checkpoint")
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in loaded.state_dict().items())
    rounded = {n for n, t in wanted.items() if torch.equal(t, t.bfloat16().float())}
    assert not rounded  # it would be seen if they had been saved in 16 bits
