"""What is quantized, from which numbers, in which dtype, and what other libraries see of it."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import qlora_kit as qk
from qlora_kit.core.errors import AdapterError, ConfigError, FormatError
from qlora_kit.load.hf_quantizer import NF4Config
from qlora_kit.load.model import load
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.swap import nf4_modules
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.weight import NF4Weight
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat


def names(model):
    return {name for name, _ in nf4_modules(model)}


def endings(model):
    return {name.rpartition(".")[2] for name in names(model)}


def test_target_selects_and_skip_takes_away():
    folder = tiny_models.saved("llama")
    model, _ = load(
        folder, quant=QuantConfig(target=("mlp", "q_proj"), skip=(r"re:.*layers\.0\..*",))
    )
    assert names(model) == {
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")),
    }


def test_output_head_stays_unless_targeted_and_untied():
    head = QuantConfig(skip=(), target=("lm_head", "down_proj"))
    assert "lm_head" not in names(load(tiny_models.saved("llama"), quant=QuantConfig(skip=()))[0])
    assert "lm_head" in names(load(tiny_models.saved("llama"), quant=head)[0])
    tied, _ = load(tiny_models.saved("llama_tied"), quant=head, dtype="float32")
    assert "lm_head" not in names(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.dtype == torch.float32


def test_tied_weights_are_one_after_saving_and_loading(tmp_path):
    model, _ = load(tiny_models.saved("llama_tied"))
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"'q_porj' matches no linear layer.*q_proj"):
        load(tiny_models.saved("llama"), quant=QuantConfig(target=("q_porj",)))
    with pytest.raises(ConfigError, match="nothing to quantize"):
        load(tiny_models.saved("llama"), quant=QuantConfig(skip=("re:.*",)))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 128])
def test_block_size_and_double_quantization_travel(block_size, double_quant, tmp_path):
    config = QuantConfig(block_size=block_size, double_quant=double_quant)
    model, _ = load(tiny_models.saved("qwen3_moe"), quant=config)
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path)  # the checkpoint's settings win over the default ones
    state, wanted = again.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    for _, module in nf4_modules(again):
        assert module.config.block_size == block_size
        assert module.config.double_quant == double_quant
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["block_size"] == block_size
    assert stored["format_version"] == 1


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_depends_on_the_checkpoint_not_on_the_compute_dtype(family, stored, compute):
    """Weights are quantized from the numbers in the file, not from their rounding to bf16."""
    folder = tiny_models.saved(family, dtype=stored)
    model, _ = load(folder, dtype=compute, device="cpu")
    dense = tiny_models.build(family, dtype=stored)
    rounded_differs = False
    for name, layer in nf4_modules(model):
        weight = dense.get_submodule(name).weight.detach()
        weight = weight.T.contiguous() if layer.transposed else weight
        wanted = NF4Weight.quantize(weight)
        rounded = NF4Weight.quantize(weight.bfloat16())
        assert layer.nf4_weight.dtype == stored
        assert torch.equal(layer.weight, wanted.packed), name
        assert torch.equal(layer.dequantize(torch.float32), wanted.dequantize(torch.float32)), name
        rounded_differs |= not torch.equal(layer.weight, rounded.packed)
    assert rounded_differs == (stored != torch.bfloat16)  # the check above can fail
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {getattr(torch, compute)}


def test_sixteen_bit_base():
    model, _ = load(tiny_models.saved("llama"), quant=None, dtype="bfloat16")
    assert not names(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not getattr(model, "is_loaded_in_4bit", False)


def test_modules_kept_in_float32_are_not_quantized(monkeypatch):
    """Models name such modules (`_keep_in_fp32_modules`); T5's `wo` is the classic."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj"})
    model, _ = load(tiny_models.saved("llama"), dtype="bfloat16")
    assert "o_proj" not in endings(model)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_a_classifier_on_a_language_model_gets_a_new_head(family, caplog, tmp_path):
    tiny_models.save(family, tmp_path)
    tiny_models.tokenizer(tmp_path)
    with caplog.at_level(logging.INFO, logger="qlora_kit"):
        model, _ = load(tmp_path, task="sequence_classification", num_labels=3)
    assert "new, untrained weights" in caplog.text
    head = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert head  # neither `classifier`, `score` nor a pooler is quantized
    assert all(n.split(".")[0] in ("classifier", "score") or "pooler" in n for n in head)
    assert all(p.requires_grad for n in head for p in model.get_submodule(n).parameters())
    ids, labels = tiny_models.tokens().to(model.device), torch.tensor([0, 2]).to(model.device)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert all(model.get_submodule(n).weight.grad is not None for n in head)


def test_labels_of_a_trained_classifier_come_from_the_checkpoint(tmp_path):
    tiny_models.build("bert", num_labels=5).save_pretrained(tmp_path)
    model, _ = load(tmp_path, task="sequence_classification")
    assert model.classifier.out_features == 5
    with pytest.raises(ConfigError, match="num_labels"):
        load(tmp_path, num_labels=2)


def test_another_number_of_labels_starts_a_new_head(tmp_path):
    """transformers 5.17 would take over the old head, whatever its shape."""
    dense = tiny_models.build("bert", num_labels=5)
    dense.save_pretrained(tmp_path)
    model, _ = load(tmp_path, task="sequence_classification", num_labels=3, device="cpu")
    assert model.classifier.weight.shape == (3, tiny_models.HIDDEN)
    assert model.classifier.bias.shape == (3,)
    assert model.classifier.weight.isfinite().all()
    assert 0 < model.classifier.weight.std() < 0.1  # initialised, not left as it was in memory
    assert torch.equal(model.bert.pooler.dense.weight, dense.bert.pooler.dense.weight)


def test_dequantize_gives_an_ordinary_model(tmp_path):
    for family in ("llama", "gpt2", "mixtral"):
        model, _ = load(tiny_models.saved(family), device="cpu")
        with torch.no_grad():
            wanted = model(input_ids=tiny_models.tokens()).logits
        plain = model.dequantize()
        assert not names(plain)
        assert not plain.is_loaded_in_4bit
        with torch.no_grad():
            came = plain(input_ids=tiny_models.tokens()).logits
        assert (came - wanted).norm() / wanted.norm() < 16 * torch.finfo(torch.float32).eps
        plain.save_pretrained(tmp_path / family)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        with torch.no_grad():
            assert torch.equal(again(input_ids=tiny_models.tokens()).logits, came)


def test_the_ecosystems_door(tmp_path):
    """`from_pretrained(quantization_config=NF4Config())` gives what `load` gives."""
    folder = tiny_models.saved("qwen2")
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=qk.NF4Config())
    ours, _ = load(folder, dtype="float32")  # as saved, which is what `from_pretrained` takes
    state = theirs.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
    assert theirs.is_loaded_in_4bit
    assert theirs.quantization_method == "qlora_kit_nf4"
    assert theirs.hf_quantizer.is_trainable
    assert theirs.hf_quantizer.is_serializable()


def test_errors_reach_the_user_of_from_pretrained(tmp_path):
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(qk.QloraKitError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NF4Config())
    skip = QuantConfig(skip=("lm_head", "up_proj", "q_proj"))
    assert names(load(tmp_path, quant=skip)[0])  # what the message advises works


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"'blocksize'.*Did you mean 'block_size'"):
        NF4Config.from_dict({"quant_method": "qlora_kit_nf4", "blocksize": 64})
    with pytest.raises(FormatError, match="Upgrade"):
        NF4Config.from_dict({"format_version": 99})
    with pytest.raises(ConfigError, match="block_size"):
        NF4Config(block_size=48)
    config = replace(QuantConfig(), block_size=128, target=("mlp",))
    again = NF4Config.from_dict(json.loads(NF4Config.from_quant(config).to_json_string()))
    assert again.quant == config


def test_trainer_accepts_the_model(tmp_path):
    """transformers.Trainer refuses quantized models without an adapter unless told otherwise."""
    model, _ = load(tiny_models.saved("llama"), device="cpu")
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in tiny_models.tokens(4)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=rows,
    )
    before = model.model.norm.weight.detach().clone()
    packed = model.model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()
    assert not torch.equal(model.model.norm.weight, before)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, packed)


def test_casting_the_model_leaves_the_scales_alone():
    model, _ = load(tiny_models.saved("llama"))
    layer = model.model.layers[0].mlp.up_proj
    wanted = layer.nf4_weight.scales()
    model.to(torch.float16)
    assert model.model.norm.weight.dtype == torch.float16
    assert torch.equal(layer.nf4_weight.scales(), wanted)


def test_saving_with_an_adapter_attached_says_what_to_do(tmp_path):
    model, _ = load(tiny_models.saved("llama"))
    adapter = qk.attach(model, qk.LoRA(rank=2))
    with pytest.raises(AdapterError, match=r"adapter\.save"):
        model.save_pretrained(tmp_path / "model")
    adapter.save(tmp_path / "adapter")
    adapter.detach_from_model()
    model.save_pretrained(tmp_path / "model")
    assert names(load(tmp_path / "model")[0])


def test_load_attaches_an_adapter(tmp_path):
    model, _ = load(tiny_models.saved("llama"))
    adapter = qk.attach(model, qk.LoRA(rank=2))
    ids = tiny_models.tokens().to(model.device)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(0.1)
        wanted = model(input_ids=ids).logits
    adapter.save(tmp_path)
    again, _ = load(tiny_models.saved("llama"), adapter=tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, wanted)


def test_saved_names_are_bitsandbytes(tmp_path):
    model, _ = load(tiny_models.saved("mixtral"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert not [key for key in keys if "_absmax" in key.replace("nested_absmax", "")]
    stem = next(key for key in keys if key.endswith("experts.gate_up_proj"))
    assert {key.removeprefix(stem) for key in keys if key.startswith(stem)} == {
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
    }


def test_a_fused_and_a_per_expert_checkpoint_give_the_same_base(tmp_path):
    """transformers writes experts one by one (hub layout) or, asked to, as it holds them."""
    dense = tiny_models.build("qwen3_moe")
    dense.save_pretrained(tmp_path / "hub")
    dense.save_pretrained(tmp_path / "fused", save_original_format=False)
    with safe_open(tmp_path / "hub" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in file.keys()  # noqa: SIM118
    one, two = (load(tmp_path / name)[0].state_dict() for name in ("hub", "fused"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_experts_can_be_skipped(tmp_path):
    config = QuantConfig(skip=("lm_head", r"re:.*layers\.0\.mlp\.experts"))
    model, _ = load(tiny_models.saved("mixtral"), quant=config, device="cpu")
    dense = tiny_models.build("mixtral")
    kept = model.model.layers[0].mlp.experts
    assert torch.equal(kept.gate_up_proj, dense.model.layers[0].mlp.experts.gate_up_proj)
    assert "model.layers.1.mlp.experts" in names(model)
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path, device="cpu")
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_peft_makes_of_the_model():
    """PEFT's own LoRA does not know NF4Linear: it must refuse, not train something else."""
    peft = pytest.importorskip("peft")
    model, _ = load(tiny_models.saved("llama"))
    with pytest.raises(ValueError, match="NF4Linear"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def test_classifier_round_trip_through_the_auto_class(tmp_path):
    model, _ = load(tiny_models.saved("bert"), task="sequence_classification", num_labels=4)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert isinstance(again.bert.encoder.layer[0].attention.self.query, NF4Linear)
