"""A merged model computes what the unmerged one computes, in plain transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.errors import (
    AdapterError,
    ConfigError,
    FormatError,
    NonFiniteError,
    SourceError,
)
from qlora_kit.export.merge import merge
from qlora_kit.export.quantized import save_quantized
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.weight import NF4Weight
from tests import tiny_models
from tests.export.models import (
    BF16_EPS,
    error,
    plain_logits,
    train_adapter,
    unmerged_logits,
    wrong_scale,
)

FP32_BOUND = 1e-5
"""Float32 sums in another order; four layers of 64 to 128 terms."""
FAMILIES = sorted(tiny_models.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(tmp_path, family):
    """Into the quantized base: as trained. Into the original: as on a 16-bit base."""
    base, adapter = tiny_models.saved(family), tmp_path / "adapter"
    trained = train_adapter(base, adapter)
    original = unmerged_logits(base, adapter, quant=None)
    assert error(trained, original) > 0.01  # the two bases differ visibly
    for into, expected in (("quantized", trained), ("original", original)):
        summary = merge(base, adapter, tmp_path / into, into=into, dtype="float32")
        assert error(plain_logits(tmp_path / into, family), expected) < FP32_BOUND
        assert summary.merged == len(read_adapter(adapter).deltas)
        assert (summary.decoded > 0) == (into == "quantized")
    wrong_scale(adapter)
    merge(base, adapter, tmp_path / "wrong", dtype="float32")
    assert error(plain_logits(tmp_path / "wrong", family), trained) > 100 * FP32_BOUND


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize("into", ["quantized", "original"])
def test_bfloat16_output_is_one_rounding_away(tmp_path, family, into):
    """Of every weight; of the logits too, where no router turns a rounding into a jump."""
    base, adapter = tiny_models.saved(family), tmp_path / "adapter"
    trained = train_adapter(base, adapter)
    quant = QuantConfig() if into == "quantized" else None
    expected = trained if quant else unmerged_logits(base, adapter, quant=None)
    merge(base, adapter, tmp_path / "exact", into=into, dtype="float32")
    merge(base, adapter, tmp_path / "out", into=into)
    exact, rounded = open_source(tmp_path / "exact"), open_source(tmp_path / "out")
    for name in exact.tensors:
        assert torch.equal(rounded.read(name), exact.read(name).bfloat16()), name
    if family in tiny_models.MOE:
        return
    assert error(plain_logits(tmp_path / "out", family), expected) < 2 * BF16_EPS
    wrong_scale(adapter)
    merge(base, adapter, tmp_path / "wrong", into=into)
    assert error(plain_logits(tmp_path / "wrong", family), expected) > 20 * BF16_EPS


def test_every_weight_is_the_formula(tmp_path):
    """Adapted: W_q + s·B·A; quantized without adapter: W_q; the rest: untouched."""
    base, adapter = tiny_models.saved("llama"), tmp_path / "adapter"
    train_adapter(base, adapter, config=LoRA(rank=4, alpha=8.0, targets=("q_proj",)))
    merge(base, adapter, tmp_path / "out", dtype="float32", device="cpu")
    files, source, got = read_adapter(adapter), open_source(base), open_source(tmp_path / "out")
    assert got.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        weight = expected = source.read(name)
        if name.endswith("proj.weight"):
            expected = NF4Weight.quantize(weight).dequantize()
        if pair := files.deltas.get(name.removesuffix(".weight")):
            expected = expected + pair.scale * (pair.b @ pair.a)
            assert (got.read(name) - expected).abs().max() < 1e-6
        else:
            assert torch.equal(got.read(name), expected), name
        assert torch.equal(expected, weight) == (not name.endswith("proj.weight"))


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(block_size=128, double_quant=False),
        QuantConfig(skip=("lm_head", "mlp")),
        QuantConfig(target=("mlp.up_proj",)),
    ],
    ids=["block 128", "skip", "target"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_settings_of_the_training_are_followed(tmp_path, family, quant):
    if quant.target and family != "llama":
        quant = QuantConfig(target=("c_fc",) if family == "gpt2" else ("experts",))
    base, adapter = tiny_models.saved(family), tmp_path / "adapter"
    trained = train_adapter(base, adapter, quant=quant)
    merge(base, adapter, tmp_path / "out", dtype="float32")
    assert error(plain_logits(tmp_path / "out", family), trained) < FP32_BOUND


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_trained_in_bfloat16(tmp_path, stored):
    """Decoded values are rounded to the compute dtype before the change is added."""
    base, adapter = tiny_models.saved("llama", dtype=stored), tmp_path / "adapter"
    train_adapter(base, adapter, dtype="bfloat16")
    merge(base, adapter, tmp_path / "out", dtype="float32")
    model, _ = load(base, dtype="bfloat16", adapter=adapter)
    name = "model.layers.1.mlp.down_proj"
    wrapper = model.get_submodule(name)
    pair = read_adapter(adapter).deltas[name]
    expected = wrapper.base.dequantize(torch.bfloat16).float().cpu() + pair.delta()
    got = open_source(tmp_path / "out").read(f"{name}.weight")
    assert (got - expected).abs().max() < 1e-6
    unrounded = wrapper.base.dequantize(torch.float32).cpu() + pair.delta()
    assert (got - unrounded).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "llama_tied"])
def test_a_base_that_is_nf4_already(tmp_path, family):
    model, _ = load(tiny_models.saved(family), dtype="float32")
    model.save_pretrained(tmp_path / "base")
    trained = train_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert error(plain_logits(tmp_path / "out", family), trained) < FP32_BOUND
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    with pytest.raises(FormatError, match=r"4-bit model.*Name the 16-bit model"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "o", into="original")


def test_an_unquantized_base_stays_as_it_is(tmp_path):
    base, adapter = tiny_models.saved("llama"), tmp_path / "adapter"
    trained = train_adapter(base, adapter, quant=None)
    summary = merge(base, adapter, tmp_path / "out", dtype="float32")
    assert error(plain_logits(tmp_path / "out"), trained) < FP32_BOUND
    assert summary.decoded == 0
    assert "unquantized base" in summary.notes[0]


def test_an_adapter_from_elsewhere_assumes_the_defaults_and_says_so(tmp_path):
    base, adapter = tiny_models.saved("llama"), tmp_path / "adapter"
    trained = train_adapter(base, adapter)
    (adapter / "qlora_kit.json").unlink()
    summary = merge(base, adapter, tmp_path / "out", dtype="float32")
    assert error(plain_logits(tmp_path / "out"), trained) < FP32_BOUND
    assert "is assumed" in str(summary)


def test_gpt2_names_without_the_prefix(tmp_path):
    """The published GPT-2 has no `transformer.` in its names; the output keeps it so."""
    base = tmp_path / "base"
    model = tiny_models.build("gpt2")
    model.save_pretrained(base)
    tensors = {
        name.removeprefix("transformer."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    tensors["h.0.attn.bias"] = torch.ones(4)  # an old buffer nobody reads
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    trained = train_adapter(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert open_source(tmp_path / "out").tensors.keys() == tensors.keys()
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        got = out(input_ids=tiny_models.tokens(rows=3, length=9)).logits
    assert error(got, trained) < FP32_BOUND


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2", "plain bert"])
def test_classifiers_keep_their_trained_head(tmp_path, family):
    base = tmp_path / "base"
    if family == "plain bert":  # as sentence encoders are published: no head, no prefix
        torch.manual_seed(0)
        config = tiny_models.FAMILIES["bert"]()
        assert isinstance(config, BertConfig)
        BertModel(config).save_pretrained(base)
    else:
        shutil.copytree(tiny_models.saved(family), base)
    trained = train_adapter(base, tmp_path / "adapter", task="sequence_classification")
    assert read_adapter(tmp_path / "adapter").modules
    summary = merge(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert summary.replaced > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert len(config["id2label"]) == 3
    assert error(plain_logits(tmp_path / "out", "classifier"), trained) < FP32_BOUND


def test_output_is_complete(tmp_path):
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    tiny_models.save("llama_tied", base)
    tiny_models.tokenizer(base)
    (base / "generation_config.json").write_text('{"max_new_tokens": 5}')
    train_adapter(base, adapter)
    summary = merge(base, adapter, out, max_shard="100KB")
    assert summary.files > 1
    assert summary.nbytes == sum(info.nbytes for info in open_source(out).tensors.values())
    assert (out / "model.safetensors.index.json").is_file()
    assert (out / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    assert (out / "generation_config.json").read_text() == '{"max_new_tokens": 5}'
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in open_source(out).tensors
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {info.dtype for info in open_source(out).tensors.values()} == {torch.bfloat16}


def test_a_tokenizer_saved_with_the_adapter_wins(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_models.save("llama", base)
    tiny_models.tokenizer(base)
    train_adapter(base, adapter)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "trained with this"
    tokenizer.save_pretrained(adapter)
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "trained with this"
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_an_existing_output_is_kept_unless_allowed(tmp_path):
    base, adapter, out = tiny_models.saved("llama"), tmp_path / "adapter", tmp_path / "out"
    train_adapter(base, adapter)
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(SourceError, match="already exists"):
        merge(base, adapter, out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    merge(base, adapter, out, overwrite=True)
    assert not (out / "precious").exists()


def test_a_failed_merge_leaves_nothing(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_models.save("llama", base, max_shard_size="1GB")
    train_adapter(base, adapter)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        merge(base, adapter, tmp_path / "out")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="float16 cannot hold"):
        merge(base, adapter, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    train_adapter(tiny_models.saved("llama"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="GPT2LMHeadModel has no module"):
        merge(tiny_models.saved("gpt2"), tmp_path / "adapter", tmp_path / "out")
    tiny_models.save("llama", tmp_path / "wide", intermediate_size=192)
    with pytest.raises(AdapterError, match=r"was trained on \(64, 128\).*another base"):
        merge(tmp_path / "wide", tmp_path / "adapter", tmp_path / "out")


def test_a_change_of_a_tied_weight_is_refused(tmp_path):
    base, adapter = tiny_models.saved("llama"), tmp_path / "adapter"
    train_adapter(base, adapter, config=LoRA(rank=2, alpha=2.0, targets=("lm_head",)))
    merge(base, adapter, tmp_path / "untied")
    with pytest.raises(AdapterError, match="tied to the embeddings"):
        merge(tiny_models.saved("llama_tied"), adapter, tmp_path / "out")


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="quantized or original, got 'both'"):
        merge("base", "adapter", tmp_path / "out", into="both")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        merge("base", "adapter", tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="device must be"):
        merge("base", "adapter", tmp_path / "out", device="gpu0")
    with pytest.raises(ConfigError, match="is not a size"):
        merge("base", "adapter", tmp_path / "out", max_shard="large")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_gpu_merges_to_the_same_weights(tmp_path, family):
    """Into stored NF4: quantized anew, a scale near two codes may fall to either side."""
    base, adapter = tmp_path / "nf4", tmp_path / "adapter"
    save_quantized(
        tiny_models.saved(family), base, style="qlora_kit", dtype="float32", device="cpu"
    )
    train_adapter(base, adapter, quant=None)
    merge(base, adapter, tmp_path / "cpu", dtype="float32", device="cpu")
    merge(base, adapter, tmp_path / "gpu", dtype="float32", device="cuda")
    one, two = open_source(tmp_path / "cpu"), open_source(tmp_path / "gpu")
    for name in one.tensors:
        assert error(two.read(name), one.read(name)) < 1e-6, name
