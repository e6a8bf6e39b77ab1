"""GLoRA merged by rows: weight and bias, old biases and new ones, into either base."""

import json

import pytest
import torch

from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.core.errors import AdapterError
from qlora_kit.export.merge import merge
from qlora_kit.export.rows import CHUNK_WEIGHTS
from tests import tiny_models
from tests.adapters.bases import load_nf4, load_plain

MIXED = {"re:.*1.*": "vector scalar none scalar scalar"}


def trained(folder, config, *, bits: int, classifier: bool = False):
    load = load_nf4 if bits == 4 else load_plain
    model = load(folder, classifier=classifier)
    adapter = attach(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for value in adapter.parameters():
            value.normal_(0, 0.15)
    return model, adapter


@pytest.mark.transformers_compat
@pytest.mark.parametrize("into", ["quantized", "original"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2-weights"])
def test_merged_equals_unmerged(family, into, tmp_path, monkeypatch):
    family, _, weights_only = family.partition("-")
    monkeypatch.setattr("qlora_kit.export.rows.CHUNK_WEIGHTS", CHUNK_WEIGHTS >> 11)  # many chunks
    folder = tiny_models.saved(family)
    structure = "lora lora none none none" if weights_only else GLoRA().structure
    config = GLoRA(rank=2, structure=structure, structures={} if weights_only else MIXED)
    model, adapter = trained(folder, config, bits=4 if into == "quantized" else 16)
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    merge(folder, tmp_path / "adapter", tmp_path / "out", into=into, dtype="float32")
    ids = tiny_models.tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        found = load_plain(tmp_path / "out")(ids).logits
        with adapter.disabled():
            base = model(ids).logits
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max() / 4
    assert (base - wanted).abs().max() > 0.05
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for flag in ("attention_bias", "mlp_bias"):
        assert bool(written.get(flag)) == (family == "llama")


def test_a_classifier_and_its_head(tmp_path):
    folder = tiny_models.save("roberta", tmp_path / "base", num_labels=3)
    model, adapter = trained(folder, GLoRA(rank=2), bits=16, classifier=True)
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    merge(folder, tmp_path / "adapter", tmp_path / "out", into="original", dtype="float32")
    ids = tiny_models.tokens()
    with torch.no_grad():
        found = load_plain(tmp_path / "out", classifier=True)(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_linears_that_are_not_adapted_get_zero_biases(tmp_path):
    folder = tiny_models.saved("llama")
    _, adapter = trained(folder, GLoRA(rank=2, targets=("q_proj",)), bits=16)
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    merge(folder, tmp_path / "adapter", tmp_path / "out", into="original", dtype="float32")
    biases = {n: p for n, p in load_plain(tmp_path / "out").named_parameters() if "bias" in n}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, value in biases.items():
        assert bool(value.any()) == ("q_proj" in name)


def test_a_class_without_a_place_for_the_bias_is_refused(tmp_path):
    folder = tiny_models.saved("mistral")
    _, adapter = trained(folder, GLoRA(rank=2), bits=16)
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    with pytest.raises(AdapterError, match="has no place"):
        merge(folder, tmp_path / "adapter", tmp_path / "out", into="original")
    assert not (tmp_path / "out").exists()


def test_a_super_net_is_refused(tmp_path):
    folder = tiny_models.saved("gpt2")
    _, adapter = trained(folder, GLoRA(rank=2, super_net=True), bits=16)
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    with pytest.raises(AdapterError, match="Search the best one first"):
        merge(folder, tmp_path / "adapter", tmp_path / "out")
