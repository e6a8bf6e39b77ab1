"""4-bit exports load in plain transformers with bitsandbytes, and in this package."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.export.merge import merge
from qlora_kit.export.quantized import save_quantized
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.weight import NF4Weight
from tests import tiny_models
from tests.export.models import error, logits, train_adapter, wrong_scale

FP32_BOUND = 1e-5
FAMILIES = ["llama", "llama_tied", "gpt2", "gemma2", "phi3", "mixtral", "qwen3_moe"]


def in_bitsandbytes(folder):
    """Logits in plain transformers and bitsandbytes.

    In training mode: in evaluation mode on some CPUs bitsandbytes repacks its weights and
    multiplies in bfloat16. The tiny models have no dropout.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    return logits(model.train())


def in_qlora_kit(folder):
    model, _ = load(folder, dtype="float32")
    return logits(model)


READERS = {"bitsandbytes": in_bitsandbytes, "qlora_kit": in_qlora_kit}


def without_experts(family):
    """bitsandbytes leaves fused experts in 16 bits."""
    skip = ("lm_head", "experts") if family in tiny_models.MOE else ("lm_head",)
    return QuantConfig(skip=skip)


@pytest.mark.parametrize("style", READERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_folder_computes_like_the_loaded_model(tmp_path, family, style):
    base = tiny_models.saved(family)
    quant = without_experts(family) if style == "bitsandbytes" else QuantConfig()
    model, _ = load(base, quant=quant, dtype="float32")
    save_quantized(base, tmp_path / "out", style=style, dtype="float32", max_shard="100KB")
    expected = logits(model)
    assert error(READERS[style](tmp_path / "out"), expected) < FP32_BOUND
    assert error(in_qlora_kit(tmp_path / "out"), expected) < FP32_BOUND
    assert error(logits(tiny_models.build(family)), expected) > 100 * FP32_BOUND


@pytest.mark.parametrize("style", READERS)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_a_loaded_model_is_written_as_it_is(tmp_path, family, style):
    model, _ = load(tiny_models.saved(family), dtype="float32")
    save_quantized(model, tmp_path / "out", style=style, dtype="float32", max_shard="100KB")
    assert error(READERS[style](tmp_path / "out"), logits(model)) < FP32_BOUND
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize("quant", [QuantConfig(block_size=128), QuantConfig(double_quant=False)])
def test_the_same_codes_as_the_loader(tmp_path, quant):
    model, _ = load(tiny_models.saved("llama"), quant=quant, dtype="float32")
    save_quantized(tiny_models.saved("llama"), tmp_path / "a", quant=quant, dtype="float32")
    save_quantized(model, tmp_path / "b", dtype="float32")
    one, two = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    assert one.tensors.keys() == two.tensors.keys()
    for name in one.tensors:
        got, expected = one.read(name), two.read(name)
        if name.endswith("nf4"):  # padded with spaces
            got = got[: expected.numel()]
        assert torch.equal(got, expected), name
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] == quant.double_quant


@pytest.mark.parametrize("style", READERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("into", ["quantized", "original"])
def test_merged_weights_are_quantized_again(tmp_path, family, style, into):
    """The same weights as quantizing the merged model."""
    base, adapter = tiny_models.saved(family), tmp_path / "adapter"
    quant = without_experts(family)
    train_adapter(base, adapter, quant=quant)
    merge(base, adapter, tmp_path / "merged", into=into, dtype="float32")
    model, _ = load(tmp_path / "merged", quant=quant, dtype="float32")
    out = tmp_path / "out"
    save_quantized(base, out, style=style, adapter=adapter, into=into, dtype="float32")
    assert error(READERS[style](out), logits(model)) < FP32_BOUND
    wrong_scale(adapter)
    save_quantized(base, tmp_path / "wrong", style=style, adapter=adapter, dtype="float32")
    assert error(READERS[style](tmp_path / "wrong"), logits(model)) > 100 * FP32_BOUND


def test_weights_no_adapter_touches_keep_their_codes(tmp_path):
    base, adapter = tiny_models.saved("llama"), tmp_path / "adapter"
    train_adapter(base, adapter, config=LoRA(rank=4, targets=("q_proj",)))
    save_quantized(base, tmp_path / "out", adapter=adapter, device="cpu")
    source, got = open_source(base), open_source(tmp_path / "out")
    for name in got.quantized_names():
        expected = NF4Weight.quantize(source.read(name))
        weight = got.read_weight(name)
        assert isinstance(weight, NF4Weight)
        same = torch.equal(weight.dequantize(torch.float32), expected.dequantize(torch.float32))
        assert same == ("q_proj" not in name), name


@pytest.mark.parametrize("style", READERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_folder_that_is_nf4_changes_its_style(tmp_path, family, style):
    model, _ = load(tiny_models.saved(family), dtype="float32")
    model.save_pretrained(tmp_path / "own")
    save_quantized(tmp_path / "own", tmp_path / "out", style=style, dtype="float32")
    assert error(READERS[style](tmp_path / "out"), logits(model)) < FP32_BOUND
    train_adapter(tmp_path / "own", tmp_path / "adapter")
    save_quantized(
        tmp_path / "own",
        tmp_path / "new",
        style=style,
        dtype="float32",
        adapter=tmp_path / "adapter",
    )
    merge(tmp_path / "own", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    quant = without_experts(family) if style == "bitsandbytes" else QuantConfig()
    merged, _ = load(tmp_path / "merged", quant=quant, dtype="float32")
    if family not in tiny_models.MOE:  # decoded experts are not quantized a second time
        assert error(READERS[style](tmp_path / "new"), logits(merged)) < FP32_BOUND


def test_tokenizer_and_settings_travel(tmp_path):
    tiny_models.save("llama", tmp_path / "base")
    tiny_models.tokenizer(tmp_path / "base")
    quant = QuantConfig(skip=("lm_head", "down_proj"), block_size=128)
    save_quantized(tmp_path / "base", tmp_path / "out", style="qlora_kit", quant=quant)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["skip"] == ["lm_head", "down_proj"]
    assert config["quantization_config"]["block_size"] == 128
    assert config["dtype"] == "bfloat16"
    assert not any("down_proj" in name for name in open_source(tmp_path / "out").quantized_names())


def test_what_cannot_be_written_is_refused(tmp_path):
    base = tiny_models.saved("llama")
    model, _ = load(base)
    with pytest.raises(ConfigError, match="a loaded model is written as it is"):
        save_quantized(model, tmp_path / "out", adapter="adapter")
    attach(model, LoRA(rank=2))
    with pytest.raises(AdapterError, match="has an adapter attached"):
        save_quantized(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="has no NF4 weight"):
        save_quantized(tiny_models.build("llama"), tmp_path / "out")
    with pytest.raises(ConfigError, match="style must be"):
        save_quantized(base, tmp_path / "out", style="gptq")
    with pytest.raises(ConfigError, match="into must be"):
        save_quantized(base, tmp_path / "out", into="both")
    with pytest.raises(ConfigError, match="dtype must be"):
        save_quantized(base, tmp_path / "out", dtype="int8")
    assert not list(tmp_path.iterdir())
