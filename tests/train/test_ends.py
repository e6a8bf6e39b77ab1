"""Embeddings in host memory and a head in NF4: asked for in the configuration, kept in merging."""

from pathlib import Path

import pytest
import torch

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import ConfigError
from qlora_kit.export.merge import merge
from qlora_kit.load.model import load
from qlora_kit.nn.host_embedding import HostEmbedding
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig
from qlora_kit.step.loss import causal_lm_loss
from qlora_kit.train.config import DataConfig, ModelConfig, RunConfig
from qlora_kit.train.ends import settle_ends
from tests import tiny_models


def folder_of(tmp_path: Path, *, tied: bool = False) -> Path:
    """A tiny checkpoint."""
    model = tiny_models.build("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def config_of(folder: Path, **model: object) -> RunConfig:
    """A run on it."""
    options = {"quantize_head": True, "embeddings_on_host": True, **model}
    return RunConfig(
        model=ModelConfig(path=str(folder), **options),  # type: ignore[arg-type]
        data=DataConfig(train="t.jsonl"),
    )


def test_training_and_merging(tmp_path: Path) -> None:
    """The loss has a gradient; the merged head is the decoded one that training had."""
    config = config_of(folder_of(tmp_path))
    model, _ = load(config.model.path, quant=config.base_quant, dtype="float32", device="cpu")
    adapter = attach(model, LoRA(rank=4), seed=0)
    settle_ends(model, config.model)
    head = model.get_output_embeddings()
    assert isinstance(head, NF4Linear)
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert not any("lm_head" in name or "embed" in name for name in adapter.module_names)
    ids = tiny_models.tokens(2, 9)
    loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
    loss.backward()
    assert all(p.grad is not None for _, p in adapter.named_parameters())
    adapter.save(tmp_path / "adapter", base_model=config.model.path)
    merge(config.model.path, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged, _ = load(tmp_path / "merged", quant=None, dtype="float32", device="cpu")
    assert torch.equal(merged.get_output_embeddings().weight, head.dequantize(torch.float32))
    logits = model(ids).logits  # B is zero: the adapter changes nothing yet
    assert torch.allclose(merged(ids).logits, logits, atol=1e-5)


def test_the_head_is_quantized_only_where_asked_for(tmp_path: Path) -> None:
    """By default it stays in 16 bits, and `base_quant` is `quant`."""
    config = config_of(folder_of(tmp_path), quantize_head=False)
    assert config.base_quant == config.quant
    model, _ = load(config.model.path, quant=config.base_quant, device="cpu")
    settle_ends(model.requires_grad_(False), config.model)
    assert not isinstance(model.get_output_embeddings(), NF4Linear)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    """Neither option would save anything."""
    config = config_of(folder_of(tmp_path, tied=True))
    model, _ = load(config.model.path, quant=config.base_quant, device="cpu")
    with pytest.raises(ConfigError, match="also that of the embeddings"):
        settle_ends(model, config.model)
    config = config_of(folder_of(tmp_path, tied=True), quantize_head=False)
    with pytest.raises(ConfigError, match="also the weight of the head"):
        settle_ends(model.requires_grad_(False), config.model)


def test_sixteen_bits_have_no_quantized_head(tmp_path: Path) -> None:
    config = config_of(folder_of(tmp_path), bits=16)
    assert config.base_quant is None
    model, _ = load(config.model.path, quant=None, device="cpu")
    with pytest.raises(ConfigError, match=r"model\.bits is 16"):
        settle_ends(model, config.model)


def test_with_head_keeps_other_patterns() -> None:
    """What else is skipped or targeted stays so."""
    quant = QuantConfig(skip=("lm_head", "down_proj"), target=("mlp",)).with_head()
    assert quant.skip == ("down_proj",)
    assert quant.target == ("mlp", "lm_head")
    assert QuantConfig(block_size=128).with_head().block_size == 128
