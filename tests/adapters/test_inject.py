"""Adapters on whole models: where they go, what they change, and that they leave no trace."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.adapters.targets import compact_names, linear_targets, whole_modules
from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.linear import NF4Linear
from tests import tiny_models
from tests.adapters.bases import quantize

BLOCK_LINEARS = {  # last name parts, and linears per layer
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "bert": {"query", "key", "value", "dense"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
}
BLOCK_LINEARS |= dict.fromkeys(
    ("llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), BLOCK_LINEARS["llama"]
)
BLOCK_LINEARS |= {"roberta": BLOCK_LINEARS["bert"], "qwen3_moe": BLOCK_LINEARS["mixtral"]}


def filled(model: nn.Module, config: LoRA | None = None, seed: int = 0):
    """An adapter whose B is not zero."""
    adapter = attach(model, config or LoRA(rank=4), seed=seed)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, tensor in adapter.state_dict().items():
            if name.endswith("lora_B"):
                tensor.normal_(0, 0.2)
    return adapter


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens()).logits


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_from_start_to_removal(family):
    model = quantize(tiny_models.build(family))
    before, modules = answer(model), dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    adapter = filled(model)
    last_parts = {name.rpartition(".")[2] for name in adapter.module_names}
    assert last_parts == BLOCK_LINEARS[family]
    assert not any(name.endswith(("lm_head", "pooler.dense")) for name in adapter.module_names)
    trained = {id(p) for _, p in adapter.named_parameters()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(".lora_" in name for name, _ in adapter.named_parameters())

    after = answer(model)
    assert not torch.allclose(after, before, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(answer(model), before)
    assert torch.equal(answer(model), after)

    model(tiny_models.tokens()).logits.square().mean().backward()
    assert adapter.without_gradient() == ()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())

    adapter.detach_from_model()
    assert torch.equal(answer(model), before)
    now = dict(model.named_modules())
    assert now.keys() == modules.keys()
    assert all(now[name] is module for name, module in modules.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(AdapterError, match="not on the model"):
        adapter.detach_from_model()


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("config", [LoRA(rank=4), LoRAFA(rank=4)], ids=["lora", "lora_fa"])
def test_gradients_pass_through_checkpointing(family, bits, config):
    model = tiny_models.build(family)
    model = quantize(model) if bits == 4 else model
    adapter = filled(model, config)
    ids = tiny_models.tokens()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert adapter.without_gradient() == ()
        return {name: p.grad.clone() for name, p in adapter.named_parameters()}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients()
    for name, wanted in plain.items():
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(recomputed[name], wanted)


def test_the_start_does_not_depend_on_what_else_is_adapted():
    all_of_them = attach(tiny_models.build("llama"), LoRA(rank=4), seed=5).state_dict()
    few = attach(tiny_models.build("llama"), LoRA(rank=4, targets=("v_proj",)), seed=5).state_dict()
    other = attach(tiny_models.build("llama"), LoRA(rank=4, targets=("v_proj",)), seed=6)
    for name, tensor in few.items():
        assert torch.equal(tensor, all_of_them[name])
        assert torch.equal(tensor, other.state_dict()[name]) == name.endswith("lora_B")


def test_the_run_seed_repeats_a_run():
    first = attach(tiny_models.build("llama"), LoRA(rank=4), seed=1).state_dict()
    torch.manual_seed(1234)
    second = attach(tiny_models.build("llama"), LoRA(rank=4), seed=1).state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_targets_by_name_by_ending_and_by_regular_expression():
    model = tiny_models.build("llama")
    names = {
        ("q_proj",): 2,
        "q_proj": 2,
        ("self_attn.q_proj", "v_proj"): 4,
        ("model.layers.1.mlp.up_proj",): 1,
        (r"re:.*layers\.0\..*_proj",): 7,
        ("lm_head",): 1,
    }
    for targets, count in names.items():
        assert len(linear_targets(model, targets)) == count, targets


def test_a_target_that_matches_nothing_names_what_exists():
    model = quantize(tiny_models.build("llama"))
    with pytest.raises(AdapterError, match=r"'q_prj'.*down_proj, embed_tokens, gate_proj.*q_proj"):
        attach(model, LoRA(targets=("v_proj", "q_prj")))
    with pytest.raises(AdapterError, match="no linear layer"):
        attach(nn.Embedding(4, 4), LoRA())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_failed_attach_changes_nothing():
    model = tiny_models.build("llama")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError):
        attach(model, LoRA(targets=("nothing",)))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_tied_head_is_refused_and_an_untied_one_is_not():
    with pytest.raises(AdapterError, match="lm_head shares its weight"):
        attach(tiny_models.build("llama_tied"), LoRA(targets=("lm_head",)))
    assert attach(tiny_models.build("llama"), LoRA(targets=("lm_head",))).num_trainable > 0


def test_a_second_adapter_is_refused():
    model = tiny_models.build("llama")
    attach(model, LoRA(rank=2))
    with pytest.raises(AdapterError, match="already carries an adapter"):
        attach(model, LoRA(rank=2))
    with pytest.raises(AdapterError, match="already carries an adapter"):
        load_adapter(model, "anywhere")


def test_a_model_without_blocks_is_adapted_but_for_its_head():
    model = nn.ModuleDict({"hidden": nn.Linear(8, 8), "classifier": nn.Linear(8, 2)})
    assert list(linear_targets(model, "all-linear")) == ["hidden"]
    with pytest.raises(AdapterError, match="only outside its blocks"):
        linear_targets(
            nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU()]), "out": nn.Linear(4, 4)}),
            "all-linear",
        )


def test_torchs_own_attention_is_left_out():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
    assert list(linear_targets(model, "all-linear")) == ["1"]


@pytest.mark.transformers_compat
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_classifiers_head_is_trained(family):
    model = tiny_models.build(family, num_labels=3)
    head_name = "score" if family == "llama" else "classifier"
    head, before = model.get_submodule(head_name), answer(model)
    adapter = filled(model, LoRA(rank=4, targets=("re:.*(query|q_proj)",)))
    trained = dict(adapter.named_parameters())
    heads = [name for name in trained if name.startswith(head_name)]
    assert len(heads) == len(list(head.parameters()))

    ids, labels = tiny_models.tokens(), torch.tensor([0, 2])
    model(ids, labels=labels).loss.backward()
    assert adapter.without_gradient() == ()
    with torch.no_grad():
        for name in heads:
            trained[name].add_(0.3)
    with adapter.disabled():
        assert torch.equal(answer(model), before)
    assert not torch.allclose(answer(model), before)
    adapter.detach_from_model()
    assert model.get_submodule(head_name) is head
    assert torch.equal(answer(model), before)


def test_a_quantized_head_cannot_be_trained():
    model = tiny_models.build("bert", num_labels=3)
    model.classifier = NF4Linear.from_linear(model.classifier, quantized_config())
    with pytest.raises(AdapterError, match=r"QuantConfig\(skip="):
        attach(model, LoRA(rank=4))


def quantized_config():
    from qlora_kit.quant.config import QuantConfig

    return QuantConfig()


def test_modules_named_to_be_trained_whole():
    model = tiny_models.build("llama")
    adapter = attach(model, LoRA(rank=2, train_modules=("norm",), targets=("q_proj",)))
    names = [name for name, _ in adapter.named_parameters()]
    assert "model.norm.weight" in names
    assert adapter.merge_delta("model.norm") is None
    with pytest.raises(AdapterError, match="train_modules: 'nrm'"):
        attach(tiny_models.build("llama"), LoRA(train_modules=("nrm",)))
    # one inside another is trained once
    bert = tiny_models.build("bert", num_labels=2)
    nested = whole_modules(bert, ("bert.pooler", "pooler.dense"))
    assert nested == ("bert.pooler", "classifier")


def test_state_goes_round_and_misfits_are_named():
    source = filled(quantize(tiny_models.build("llama")), LoRAFA(rank=4), seed=1)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert sum(name.endswith("lora_A") for name in state) == 14  # the frozen A is saved too
    target = attach(quantize(tiny_models.build("llama")), LoRAFA(rank=4), seed=2)
    assert not torch.equal(answer(target.model), answer(source.model))
    target.load_state_dict(state)
    assert torch.equal(answer(target.model), answer(source.model))

    name, tensor = next(iter(state.items()))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    for broken, message in [
        ({k: v for k, v in state.items() if k != name}, "missing: " + name),
        (state | {"model.extra.lora_A": tensor}, "not in this adapter: model.extra.lora_A"),
        (state | {name: tensor[:, :5]}, "other shapes: " + name),
    ]:
        with pytest.raises(AdapterError, match=message):
            target.load_state_dict({k: v + 1 for k, v in broken.items()})
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_merge_delta_of_a_model():
    model = quantize(tiny_models.build("gpt2"))
    adapter = filled(model)
    wanted = answer(model)
    deltas = {name: adapter.merge_delta(name) for name in adapter.module_names}
    assert adapter.merge_delta("transformer.wte") is None
    adapter.detach_from_model()
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        dense = Conv1D(layer.out_features, layer.in_features)
        with torch.no_grad():
            dense.weight.copy_((layer.dequantize() + delta).T)
            dense.bias.copy_(layer.bias)
        model.set_submodule(name, dense)
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-5)


def test_fused_experts_are_mentioned(caplog, monkeypatch):
    monkeypatch.setattr("qlora_kit.core.log._said", set())
    with caplog.at_level(logging.INFO, logger="qlora_kit"):
        attach(tiny_models.build("mixtral"), LoRA(rank=2))
    assert "experts" in caplog.text


def test_the_adapter_follows_the_models_training_mode_and_copies():
    model = quantize(tiny_models.build("llama"))
    filled(model, LoRA(rank=4, dropout=0.5))
    twin = copy.deepcopy(model)
    assert torch.equal(answer(model), answer(twin))
    model.train()
    assert not torch.equal(answer(model), answer(model))
    with pytest.raises(AdapterError, match="already carries"):
        attach(twin, LoRA(rank=4))


def test_adapter_dtype_is_as_configured():
    model = quantize(tiny_models.build("llama", dtype=torch.bfloat16))
    adapter = attach(model, LoRA(rank=4, dtype="bfloat16"))
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    ids = tiny_models.tokens()
    model(ids, labels=ids).loss.backward()
    assert adapter.without_gradient() == ()


@pytest.mark.parametrize(
    ("chosen", "others", "short"),
    [
        (["a.0.q", "a.1.q"], ["a.0.k"], ("q",)),
        (["a.0.q"], ["a.1.q"], ("0.q",)),
        (["e.0.out.dense", "e.0.dense"], ["p.dense"], ("0.dense", "out.dense")),
        (["q"], ["x.q"], ("q",)),  # not expressible: PEFT would take both
    ],
)
def test_compact_names(chosen, others, short):
    assert compact_names(chosen, [*chosen, *others]) == short


def test_repr_says_what_is_attached():
    adapter = attach(tiny_models.build("llama"), LoRA(rank=2, targets=("q_proj",)), name="demo")
    assert repr(adapter) == "AttachedAdapter('demo', LoRA, 2 modules, 512 trained values)"
