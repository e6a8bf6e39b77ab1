"""Checkpoints travel both ways between this package and transformers with bitsandbytes.

Both are on the CPU wherever numbers are compared.
"""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from qlora_kit.core.errors import FormatError
from qlora_kit.load.model import load
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import nf4_modules
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.format import to_bnb_tensors
from tests import tiny_models

FAMILIES = ["llama", "llama_tied", "gemma2", "phi3", "gpt2", "qwen3_moe", "bert"]


def quantized_by_bitsandbytes(folder, family, *, double_quant=True, dtype=torch.float32, **options):
    """A model quantized by transformers and bitsandbytes while it loads, and its saved folder."""
    kind = AutoModelForCausalLM
    if family in tiny_models.ENCODERS:
        kind = AutoModelForSequenceClassification
        tiny_models.build(family, num_labels=3).save_pretrained(folder / "plain")
    else:
        tiny_models.save(family, folder / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )
    model = kind.from_pretrained(
        folder / "plain", quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(folder / "bnb")  # before a forward repacks weights for this CPU
    return model, folder / "bnb"


def options_of(family):
    return {"task": "sequence_classification"} if family in tiny_models.ENCODERS else {}


def logits(model):
    """Logits in training mode (no dropout here).

    In evaluation mode on a CPU with AVX512-BF16, bitsandbytes repacks its weights in place and
    multiplies in bfloat16, 0.7% off; while training it decodes, as everybody does.
    """
    with torch.no_grad():
        return model.train()(input_ids=tiny_models.tokens()).logits


def decoded(layer):
    """What bitsandbytes decodes a layer's weight to."""
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.transformers_compat
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bitsandbytes_checkpoint_is_taken_over_bit_for_bit(family, double_quant, tmp_path):
    theirs, folder = quantized_by_bitsandbytes(tmp_path, family, double_quant=double_quant)
    ours, _ = load(folder, device="cpu", **options_of(family))
    names = [n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert names == [n for n, _ in nf4_modules(ours)]
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for name in names:
        layer = ours.get_submodule(name)
        for suffix, tensor in to_bnb_tensors(layer.nf4_weight).items():
            assert torch.equal(tensor, stored[f"{name}.weight{suffix}"]), name + suffix
        assert torch.equal(layer.dequantize(), decoded(theirs.get_submodule(name)))
    # float32 products of equal numbers: only their order of summation can differ.
    error = (logits(ours) - logits(theirs)).norm() / logits(theirs).norm()
    assert error < 16 * torch.finfo(torch.float32).eps
    ours.save_pretrained(tmp_path / "again")
    again = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        again |= load_file(file)
    for name in names:  # the linears' bytes survive a round through this package
        for key in (k for k in stored if k.startswith(f"{name}.weight")):
            assert torch.equal(again[key], stored[key]), key


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_our_own_quantization_equals_theirs(family, tmp_path):
    theirs, _ = quantized_by_bitsandbytes(tmp_path, family)
    ours, _ = load(tmp_path / "plain", device="cpu", **options_of(family))
    compared = 0
    for name, layer in nf4_modules(ours):
        other = theirs.get_submodule(name)
        if isinstance(other, bnb.nn.Linear4bit):
            assert torch.equal(layer.weight, other.weight.data), name
            assert torch.equal(layer.dequantize(), decoded(other)), name
            compared += 1
    assert compared >= 8


@pytest.mark.transformers_compat
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_what_we_save_loads_in_bitsandbytes(family, double_quant, tmp_path):
    """The tensors are bitsandbytes'; only the name of the method in config.json is ours."""
    tiny_models.save(family, tmp_path / "plain")
    quant = QuantConfig(double_quant=double_quant)
    ours, _ = load(tmp_path / "plain", quant=quant, device="cpu")
    ours.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["quant_method"] == "qlora_kit_nf4"
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    ).to_dict()
    path.write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map={"": "cpu"})
    for name, layer in nf4_modules(ours):
        other = theirs.get_submodule(name)
        assert isinstance(other, bnb.nn.Linear4bit)
        assert torch.equal(other.weight.data, layer.weight), name
        assert torch.equal(decoded(other), layer.dequantize()), name
    error = (logits(ours) - logits(theirs)).norm() / logits(theirs).norm()
    assert error < 16 * torch.finfo(torch.float32).eps


@pytest.mark.transformers_compat
def test_bytes_stored_as_another_dtype(tmp_path):
    """bnb_4bit_quant_storage, which FSDP users set, stores the same bytes as bfloat16."""
    theirs, folder = quantized_by_bitsandbytes(
        tmp_path, "llama", bnb_4bit_quant_storage=torch.bfloat16
    )
    ours, _ = load(folder, device="cpu")
    name = "model.layers.1.mlp.up_proj"
    assert theirs.get_submodule(name).weight.dtype == torch.bfloat16
    assert ours.get_submodule(name).weight.dtype == torch.uint8
    for name, layer in nf4_modules(ours):
        other = theirs.get_submodule(name).weight.data
        assert torch.equal(layer.weight.flatten(), other.view(torch.uint8).flatten()), name


@pytest.mark.transformers_compat
def test_norms_of_an_nf4_checkpoint_follow_the_compute_dtype(tmp_path):
    _, folder = quantized_by_bitsandbytes(tmp_path, "llama", dtype=torch.bfloat16)
    ours, _ = load(folder, dtype="float32")
    floats = {p.dtype for p in ours.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}
    ours, _ = load(folder, dtype="bfloat16")
    floats = {p.dtype for p in ours.parameters() if p.is_floating_point()}
    assert floats == {torch.bfloat16}
    assert ours.model.layers[0].mlp.up_proj.nf4_weight.dtype == torch.bfloat16


def rewrite(folder, change):
    """Apply a change to the tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.transformers_compat
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.absmax"), "absmax"),
        (lambda t: t.pop(f"{UP}.nested_quant_map"), "nested_quant_map"),
        (lambda t: t.pop(UP), "missing"),
        (lambda t: t[f"{UP}.quant_map"].mul_(2), "quant_map"),
        (lambda t: t[f"{UP}.quant_state.bitsandbytes__nf4"].fill_(7), "damaged"),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), "packed weight has"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)],
            "lacks",
        ),
    ],
    ids=["absmax", "nested_map", "packed", "map", "json", "short", "whole weight"],
)
def test_a_damaged_checkpoint_is_refused(change, message, tmp_path):
    _, folder = quantized_by_bitsandbytes(tmp_path, "llama")
    rewrite(folder, change)
    with pytest.raises(FormatError, match=message):
        load(folder)


@pytest.mark.transformers_compat
def test_fp4_is_refused_by_name(tmp_path):
    tiny_models.save("llama", tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "fp4")
    with pytest.raises(FormatError, match="fp4"):
        load(tmp_path / "fp4")


@pytest.mark.transformers_compat
def test_an_nf4_checkpoint_can_be_decoded(tmp_path):
    theirs, folder = quantized_by_bitsandbytes(tmp_path, "llama")
    model, _ = load(folder, quant=None, device="cpu")
    assert not list(nf4_modules(model))
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, decoded(theirs.model.layers[0].mlp.up_proj))
    model.save_pretrained(tmp_path / "plain16")
    assert (
        getattr(AutoConfig.from_pretrained(tmp_path / "plain16"), "quantization_config", None)
        is None
    )
    again, _ = load(tmp_path / "plain16", quant=None, device="cpu")
    assert torch.equal(logits(again), logits(model))
