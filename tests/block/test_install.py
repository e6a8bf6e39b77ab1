"""Fusing a model's layers changes nothing but how they compute, and can be undone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.block.install import (
    FusedBlocks,
    FusedLayer,
    decoder_layers,
    fuse_blocks,
    why_not_fused,
)
from qlora_kit.core.errors import ConfigError
from tests import tiny_models
from tests.block.helpers import (
    FAMILIES,
    METHODS,
    Float64,
    counted,
    errors,
    loss_and_gradients,
    make,
    maskless,
    randomize,
)

UNIT = 64 * torch.finfo(torch.float64).eps


def steps(model: PreTrainedModel, fused: FusedBlocks, **inputs: Any) -> list[int]:
    """Which layers run as one step in a training step."""
    with counted(fused) as ran:
        loss_and_gradients(model, **{**maskless(), **inputs})
    return ran


@pytest.mark.parametrize("family", FAMILIES)
def test_names_parameters_and_classes_stay(family: str) -> None:
    """While fused and after: the same objects under the same names."""
    model, _ = make(family)
    layers = decoder_layers(model)
    kind = type(layers[0])
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def unchanged() -> bool:
        now = model.state_dict()
        return (
            now.keys() == state.keys()
            and all(torch.equal(now[name], state[name]) for name in state)
            and dict(model.named_modules()) == modules
            and all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
        )

    fused = fuse_blocks(model)
    assert all(isinstance(layer, FusedLayer) and isinstance(layer, kind) for layer in layers)
    assert len({type(layer) for layer in layers}) == 1
    assert unchanged()
    loss_and_gradients(model, **maskless())
    assert unchanged()
    fused.remove()
    assert all(type(layer) is kind for layer in layers)
    assert not any("_runner" in vars(layer) for layer in layers)
    assert unchanged()
    fused.remove()  # doing it again changes nothing


def test_a_fused_model_can_be_fused_again_after_removal() -> None:
    model, _ = make()
    fused = fuse_blocks(model)
    with pytest.raises(ConfigError, match="they already do"):
        fuse_blocks(model)
    fused.remove()
    assert steps(model, fuse_blocks(model)) == [0, 1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_generation_gives_the_same_tokens(family: str) -> None:
    """With a cache the layers' own code runs; without one the fused code gives the same."""
    model, _ = make(family, dtype=torch.float32)
    model.eval()
    ids = tiny_models.tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        wanted = model.generate(ids, **options)
        fused = fuse_blocks(model)
        with counted(fused) as ran:
            assert torch.equal(model.generate(ids, **options), wanted)
        assert ran == []
        with counted(fused) as ran:
            for length in range(9, 21):
                logits = model(wanted[:, :length], **maskless()).logits[:, -1]
                assert torch.equal(logits.argmax(-1), wanted[:, length])
        assert ran == [0, 1] * 12


def test_evaluation_without_gradients() -> None:
    """The same logits, with nothing kept; and in evaluation mode with gradients."""
    model, _ = make()
    ids = tiny_models.tokens(2, 70)
    with torch.no_grad(), Float64():
        wanted = model(ids, use_cache=False).logits
        fused = fuse_blocks(model)
        with counted(fused) as ran:
            found = model.eval()(ids, **maskless()).logits
    assert ran == [0, 1]
    assert (found - wanted).norm() < UNIT * wanted.norm()
    assert steps(model, fused) == [0, 1]


def test_hidden_states_and_attention_weights() -> None:
    """Hooks of the model still see its layers; weights come from the layer's own code."""
    model, _ = make()
    ids = tiny_models.tokens(2, 9)
    with Float64():
        wanted = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        fused = fuse_blocks(model)
        with counted(fused) as ran:
            found = model(ids, **maskless(), output_hidden_states=True)
            assert ran == [0, 1]
            both = model(ids, use_cache=False, output_attentions=True)
            assert ran == [0, 1]
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert (ours - theirs).norm() < UNIT * theirs.norm()
    assert torch.equal(both.attentions[1], wanted.attentions[1])


def test_an_adapter_that_comes_and_goes() -> None:
    """A model may be fused before it is adapted, and adapted anew."""
    plain, _ = make()
    _, wanted = loss_and_gradients(plain, use_cache=False)
    model, adapter = make()
    adapter.detach_from_model()
    model.requires_grad_(False)
    fused = fuse_blocks(model)
    with counted(fused) as ran, torch.no_grad():
        model(tiny_models.tokens(), **maskless())
    assert ran == [0, 1]
    adapter = attach(model, METHODS["lora"])
    randomize(adapter)
    model.double()
    _, found = loss_and_gradients(model, **maskless())
    assert max(errors(found, wanted)) < UNIT
    adapter.detach_from_model()
    model.requires_grad_(False)
    attach(model, LoRA(rank=2, targets=("down_proj",)))
    model.double()
    _, found = loss_and_gradients(model, **maskless())
    assert len(found) == 4
    assert steps(model, fused) == [0, 1]


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_disabled_adapter_is_off(method: str) -> None:
    """Layers run as one step without it, to the base's loss; and with it again afterwards."""
    model, adapter = make("llama", METHODS[method])
    fused = fuse_blocks(model)
    ids = tiny_models.tokens(2, 70)
    on, wanted = loss_and_gradients(model, **maskless())
    with adapter.disabled(), counted(fused) as ran, Float64(), torch.no_grad():
        off = model(ids, labels=ids, **maskless()).loss
        assert ran == [0, 1]
    again, found = loss_and_gradients(model, **maskless())
    assert again == on
    assert max(errors(found, wanted)) == 0.0
    fused.remove()
    adapter.detach_from_model()
    with Float64(), torch.no_grad():
        base = model(ids, labels=ids, use_cache=False).loss
    assert abs(off - base) < UNIT * base
    assert abs(on - base) > 1e-3


def _dropout(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if name.endswith("layers.0.self_attn.q_proj"):
            module.dropout = 0.1


def _model_dropout(model: PreTrainedModel) -> None:
    model.config.attention_dropout = 0.1


def _trained_norm(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm.weight.requires_grad_()


def _trained_base(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.up_proj.base.weight.requires_grad_()


def _odd_activation(model: PreTrainedModel) -> None:
    model.config.hidden_act = "relu"


def _other_module(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj)


def _both_ways(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.is_causal = False


def _switched_off(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.v_proj.enabled = False


REASONS: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "adapter dropout": (_dropout, r"dropout or is no linear \(LoRALinear\)"),
    "model dropout": (_model_dropout, "the model drops out activations"),
    "trained norm": (_trained_norm, "a norm is trained"),
    "trained base": (_trained_base, "a projection is trained"),
    "activation": (_odd_activation, "its activation is relu"),
    "other module": (_other_module, r"is no linear \(Sequential\)"),
    "both ways": (_both_ways, "its attention looks ahead"),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_layer_that_cannot_be_fused_says_why(case: str) -> None:
    """And the model is left as it was."""
    model, _ = make()
    change, reason = REASONS[case]
    change(model)
    with pytest.raises(ConfigError, match=reason) as error:
        fuse_blocks(model)
    assert "train.step=compiled or eager" in str(error.value)
    assert type(model.model.layers[0]) is LlamaDecoderLayer


@pytest.mark.parametrize("family", ["gpt2", "phi", "mixtral"])
def test_other_architectures_are_refused(family: str) -> None:
    model = tiny_models.build(family)
    assert str(why_not_fused(model)).endswith("is not of the Llama-like family")
    with pytest.raises(ConfigError, match="not of the Llama-like family"):
        fuse_blocks(model)


def test_a_policy_that_does_not_fit_leaves_the_model_alone() -> None:
    model, _ = make()
    with pytest.raises(ConfigError, match="and the model has 2"):
        fuse_blocks(model, "save:3")
    assert type(model.model.layers[0]) is LlamaDecoderLayer


LATER: dict[str, tuple[Callable[[PreTrainedModel], None], list[int]]] = {
    "adapter dropout": (_dropout, [1, 2]),
    "trained norm": (_trained_norm, [0, 2]),
    "trained base": (_trained_base, [1, 2]),
    "switched off": (_switched_off, [0, 1, 2]),
    "other module": (_other_module, [1, 2]),
}
"""Changes to a fused model of three layers, and those that still run as one step."""


@pytest.mark.parametrize("case", LATER)
def test_changes_to_a_fused_model_are_noticed(case: str) -> None:
    """The layer concerned runs its own code; others go on, with adapters as they are now."""
    model, adapter = make(num_hidden_layers=3)
    model.set_attn_implementation("sdpa")
    fused = fuse_blocks(model)
    change, running = LATER[case]
    change(model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.9)
    assert steps(model, fused, attention_mask=None) == running
    torch.manual_seed(0)
    _, found = loss_and_gradients(model, use_cache=False)
    fused.remove()
    torch.manual_seed(0)
    _, wanted = loss_and_gradients(model, use_cache=False)
    assert found["model.layers.1.mlp.up_proj.lora_A"].any()
    assert max(errors(found, wanted)) < UNIT


def test_dropout_of_a_model_that_was_fused_in_evaluation_mode() -> None:
    model, _ = make(attention_dropout=0.5)
    fused = fuse_blocks(model.eval())
    assert steps(model, fused) == [0, 1]
    assert steps(model.train(), fused, attention_mask=None) == []


def test_autocast_runs_the_layers_own_code() -> None:
    """Its casts are not ours to imitate."""
    model, _ = make(dtype=torch.float32)
    fused = fuse_blocks(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert steps(model, fused, attention_mask=None) == []


def test_a_cache_in_training_runs_the_layers_own_code() -> None:
    """transformers fills one unless told not to."""
    model, _ = make()
    model.set_attn_implementation("sdpa")
    fused = fuse_blocks(model)
    assert steps(model, fused, use_cache=True, attention_mask=None) == []
    assert steps(model, fused, use_cache=False, attention_mask=None) == [0, 1]


def test_the_dtype_may_change() -> None:
    """Adapters are rounded anew for another dtype."""
    model, _ = make(dtype=torch.float32)
    fuse_blocks(model)
    loss_and_gradients(model, **maskless())
    model.double()
    _, found = loss_and_gradients(model, **maskless())
    _, wanted = loss_and_gradients(model, use_cache=False)
    assert max(errors(found, wanted)) < UNIT


def test_decoder_layers_are_the_longest_list() -> None:
    """A model's smaller lists, of experts for example, are not its layers."""
    model = tiny_models.build("llama")
    assert decoder_layers(model) == list(model.model.layers)
    assert why_not_fused(nn.Linear(2, 2)) == "it has no list of layers"
