"""Layers under torch.compile: one graph for all that are alike, and the gradients of eager code.

Most tests use the backend `aot_eager`, which traces forward and backward and generates no code.
The bound is that of test_gradients.py: 64 units of rounding. Measured: none at all with
`aot_eager`, 10 with `inductor`, whose fused kernels add in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.block.compiled import (
    GRAPHS,
    POLICIES,
    CompiledLayer,
    CompiledLayers,
    compile_layers,
    why_not_compiled,
)
from qlora_kit.block.install import decoder_layers, fuse_blocks
from qlora_kit.core.errors import ConfigError
from qlora_kit.nn.experts import NF4Experts, is_fused_experts
from qlora_kit.ops.attention.rule import Documents
from qlora_kit.ops.attention.transformers_door import packed_inputs, register
from qlora_kit.ops.nf4_linear import reference
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.block.helpers import METHODS, errors, gradients, loss_and_gradients, make
from tests.block.test_rows import LENGTHS, packed

UNIT = 64 * torch.finfo(torch.float32).eps
HOST_FREE_EXPERTS = Version(transformers.__version__) >= Version("5.23")
"""Whether transformers' experts can be traced on a CPU; in 5.17 their sizes are asked for."""
CAUSAL = [name for name in tiny_models.FAMILIES if name not in tiny_models.ENCODERS]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graph of another test, and torch's own limit of them."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def build(family: str = "llama", **options: Any) -> PreTrainedModel:
    """An adapted NF4 model in float32 with sdpa attention, where the family has it."""
    model, _ = make(family, **{"dtype": torch.float32, "nf4": True, **options})
    if family != "gemma2":
        model.set_attn_implementation("sdpa")
    return model


def compiled(model: nn.Module, activations: str = "save", **options: Any) -> CompiledLayers:
    """Traced, without generated code."""
    return compile_layers(model, activations, **{"backend": "aot_eager", **options})


def graphs() -> int:
    """How many were compiled; none of them was broken."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


FAST = ("llama", "gpt2", "mixtral")
FAMILIES = [
    family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in CAUSAL
]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_models_own(family: str) -> None:
    """Every causal family; an adapter that changes after compiling is read anew."""
    model = build(family)
    loss, wanted = loss_and_gradients(model, use_cache=False)
    layers = compiled(model)
    if family in tiny_models.MOE and not HOST_FREE_EXPERTS:
        with pytest.raises(ConfigError, match=r"as one graph.*data-dependent"):
            loss_and_gradients(model, use_cache=False)
        layers.remove()
        assert max(errors(loss_and_gradients(model, use_cache=False)[1], wanted)) == 0.0
        return
    found_loss, found = loss_and_gradients(model, use_cache=False)
    kinds = 2 if family == "gemma3" else 1  # of layers: with a mask for the window and without
    assert graphs() == kinds
    assert abs(found_loss - loss) < UNIT * loss
    assert max(errors(found, wanted)) < UNIT
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(1.001)
    _, wrong = loss_and_gradients(model, use_cache=False)
    assert graphs() == kinds
    assert max(errors(wrong, wanted)) > 10 * UNIT


# x, h, attention's input and output: 4 x 64; k, v: 2 x 32; gate, up: 2 x 128; X·Aᵀ: 7 x 4;
# one logsumexp for each of 4 heads
ELEMENTWISE = tiny_models.LAYERS * (4 * 64 + 2 * 32 + 2 * 128 + 7 * 4 + 4)
OUTSIDE = 4 * 64
"""What the last norm keeps, outside the layers, and the rotary tables."""
KEPT = {
    "save": (1.2 * ELEMENTWISE, 1.6 * ELEMENTWISE),
    "recompute_elementwise": (ELEMENTWISE, ELEMENTWISE + OUTSIDE),
    "recompute_all": (tiny_models.LAYERS * 64, tiny_models.LAYERS * 64 + OUTSIDE),
}
"""Numbers that a model of two layers keeps per token, from and below. `save` is torch's choice."""


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collect what is saved for a backward pass, parameters aside, by address of the storage."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in own:
            saved[at] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", METHODS)
def test_policies(policy: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients; products are computed again only where all is, and less is kept."""
    model = build(config=METHODS[method])
    ids = tiny_models.tokens(2, 70)
    _, wanted = loss_and_gradients(model, ids, use_cache=False)
    calls = []
    own = reference.forward

    def counting(*inputs: Any) -> Any:
        if len(inputs[0]) == ids.numel():  # not A's rows, for DoRA's lengths
            calls.append(inputs[0].shape)
        return own(*inputs)

    monkeypatch.setattr(reference, "forward", counting)
    compiled(model, policy)
    with saved_storages(model) as saved:
        states = model.model(input_ids=ids, use_cache=False)
    kept = sum(t.untyped_storage().nbytes() for t in saved.values()) / 4 / ids.numel()
    least, most = KEPT[policy]
    if method == "lora" or (policy != "save" and method != "dora"):  # which has row lengths too
        assert least <= kept < most
    del states, calls[:]

    _, found = loss_and_gradients(model, ids, use_cache=False)
    assert graphs() == 1
    assert max(errors(found, wanted)) < UNIT
    linears = 7 * tiny_models.LAYERS
    if policy == "recompute_all":
        assert len(calls) > 1.5 * linears
    else:
        assert len(calls) == linears


def test_a_mixture_and_a_change_of_policy() -> None:
    """Each policy is a graph of its own, and stays compiled."""
    model = build()
    _, wanted = loss_and_gradients(model, use_cache=False)
    layers = compiled(model, "save:1,recompute_all")
    assert layers.policies == ("save", "recompute_all")
    for policy in ("save:1,recompute_all", "recompute_all", "save"):
        layers.set_policy(policy)
        _, found = loss_and_gradients(model, use_cache=False)
        assert max(errors(found, wanted)) < UNIT
    assert graphs() == 2


def test_identical_layers_compile_once_and_sizes_become_variables() -> None:
    """However many layers there are: one graph, then one for any length."""
    model = build(num_hidden_layers=4)
    compiled(model)
    found = []
    for length in (20, 20, 30, 25):
        loss_and_gradients(model, tiny_models.tokens(2, length), use_cache=False)
        found.append(graphs())
    assert found == [1, 1, 2, 2]


@pytest.mark.slow
def test_sizes_that_are_variables_from_the_start() -> None:
    """One graph for all; a single row is another to torch."""
    model = build()
    compiled(model, dynamic=True)
    found = []
    for rows, length in ((2, 20), (3, 30), (5, 11), (1, 11)):
        loss_and_gradients(model, tiny_models.tokens(rows, length), use_cache=False)
        found.append(graphs())
    assert found == [1, 1, 1, 2]


@pytest.mark.slow
def test_many_sizes_and_kinds_stay_within_the_limit() -> None:
    """After 8 graphs torch would give up, as an error; a model may need more."""
    model = build("gemma3")
    compiled(model, dynamic=False)
    assert torch._dynamo.config.recompile_limit >= GRAPHS
    for length in range(65, 70):
        loss_and_gradients(model, tiny_models.tokens(2, length), use_cache=False)
    assert graphs() == 10


def test_packed_rows() -> None:
    """Documents through our attention; other lengths of theirs are variables."""
    model = build()
    model.set_attn_implementation(register())
    layers = compiled(model)

    def run(lengths: Any) -> dict[str, Tensor]:
        model.zero_grad()
        rows = packed(lengths)
        places = rows["position_ids"]
        documents = packed_inputs(Documents.from_positions(places))
        inputs = {"input_ids": rows["ids"], "labels": rows["ids"], "position_ids": places}
        model(**inputs, **documents, use_cache=False).loss.backward()
        return gradients(model)

    batches = [LENGTHS, ((50, 50), (40, 60)), ((10, 20, 70), (100,)), ((99, 1), (7, 93))]
    found = [run(lengths) for lengths in batches]
    assert graphs() == 2
    layers.remove()
    for lengths, ours in zip(batches, found, strict=True):
        assert max(errors(ours, run(lengths))) < UNIT


@pytest.mark.slow
def test_dropout_is_drawn_once() -> None:
    """What is computed again drops the same values."""
    model = build(config=LoRA(rank=4, alpha=5.0, dropout=0.5))
    found = []
    for policy in POLICIES:
        layers = compiled(model, policy)
        torch.manual_seed(0)
        found.append(loss_and_gradients(model, use_cache=False)[1])
        layers.remove()
    assert graphs() == 3
    assert max(errors(found[1], found[0])) < UNIT
    assert max(errors(found[2], found[0])) < UNIT


def test_the_models_checkpointing_around_compiled_layers() -> None:
    """Non-reentrant checkpointing of transformers, outside the graph."""
    model = build()
    _, wanted = loss_and_gradients(model, use_cache=False)
    compiled(model)
    own = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    own({"use_reentrant": False})
    _, found = loss_and_gradients(model, use_cache=False)
    assert graphs() == 1
    assert max(errors(found, wanted)) < UNIT


def test_removal_restores_everything() -> None:
    """Names, objects and classes; while compiled only the class differs."""
    model = build()
    layers = decoder_layers(model)
    kind, modules, state = type(layers[0]), dict(model.named_modules()), set(model.state_dict())
    handle = compiled(model)
    assert all(isinstance(layer, CompiledLayer) and isinstance(layer, kind) for layer in layers)
    assert why_not_compiled(model) == "they already are"
    loss_and_gradients(model, use_cache=False)
    assert dict(model.named_modules()) == modules
    assert set(model.state_dict()) == state
    handle.remove()
    handle.remove()
    assert all(type(layer) is kind for layer in layers)
    assert not any("_compiled_step" in vars(layer) for layer in layers)
    before = graphs()
    loss_and_gradients(model, tiny_models.tokens(2, 9), use_cache=False)
    assert graphs() == before


def test_generation_and_evaluation_compile_nothing() -> None:
    """The same tokens and hidden states by the layers' own code; training with a cache too."""
    model = build()
    ids = tiny_models.tokens(2, 9)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        wanted = model.generate(ids, **options)
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    compiled(model)
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **options), wanted)
        found = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(found, states, strict=True))
    loss_and_gradients(model, use_cache=True)
    assert graphs() == 0


class _Breaks(nn.Module):
    """Asks the host about values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_a_graph_break_is_an_error_that_names_the_layer() -> None:
    """Not a silent detour through Python; after removal the model trains again."""
    model = build()
    for layer in model.model.layers:
        layer.mlp.act_fn = _Breaks()
    handle = compiled(model)
    with pytest.raises(ConfigError, match="cannot run LlamaDecoderLayer as one graph") as error:
        loss_and_gradients(model, use_cache=False)
    assert "train.step=eager" in str(error.value)
    assert error.value.__cause__ is not None
    handle.remove()
    loss_and_gradients(model, use_cache=False)


def test_what_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_compiled(nn.Linear(2, 2)) == "it has no list of layers"
    with pytest.raises(ConfigError, match=r"cannot be compiled: it has no list.*step=eager"):
        compiled(nn.Linear(2, 2))
    model = build()
    for policy, message in (
        ("offload", r"no activation policy 'offload'; they know save, "),
        ("save:3", r"for 3 layers, and the model has 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            compiled(model, policy)
    fused = fuse_blocks(model)
    assert why_not_compiled(model) == "they are fused"
    fused.remove()

    experts = build("mixtral")
    for name, module in list(experts.named_modules()):
        if is_fused_experts(module):
            experts.set_submodule(name, NF4Experts.from_experts(module, QuantConfig()))
    assert "read by the host" in str(why_not_compiled(experts, "aot_eager"))

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler (g++, or what CXX names)" in str(why_not_compiled(model))
    assert why_not_compiled(model, "aot_eager") is None
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "needs a C++ compiler" in str(why_not_compiled(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generated_code(family: str) -> None:
    """The default backend, under the policy that keeps products."""
    model = build(family)
    reason = why_not_compiled(model)
    if reason is not None:
        pytest.skip(reason)
    loss, wanted = loss_and_gradients(model, use_cache=False)
    compile_layers(model, "recompute_elementwise")
    found_loss, found = loss_and_gradients(model, use_cache=False)
    assert graphs() == 1
    assert abs(found_loss - loss) < UNIT * loss
    assert max(errors(found, wanted)) < UNIT
