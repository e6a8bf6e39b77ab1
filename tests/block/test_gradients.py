"""Fused layers give the loss and the gradients of the model's own code, for every family.

Bounds. A gradient is the end of a chain of some 50 products, norms and activations, forward
and backward, each off by a few units of rounding that go either way: about √50 ≈ 7 units
together, and 64 leave room. Measured: 13 in float64 and in float32. bfloat16 is compared with
Hugging Face's own distance from float64: theirs rounds more often.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.block.install import FusedLayer, fuse_blocks
from tests import tiny_models
from tests.block.helpers import (
    FAMILIES,
    LENGTH,
    METHODS,
    WINDOWED,
    Float64,
    counted,
    errors,
    gradients,
    loss_and_gradients,
    make,
    maskless,
    total_error,
    truth_of,
)

BOTH_LAYERS = list(range(tiny_models.LAYERS))


def units(dtype: torch.dtype) -> float:
    """64 units of rounding."""
    return 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_equals_the_models_own_code(family: str, method: str) -> None:
    """Loss and every gradient; a B off by a billionth is found."""
    model, adapter = make(family, METHODS[method])
    loss, wanted = loss_and_gradients(model, use_cache=False)
    assert len(wanted) == len(list(adapter.parameters()))
    fused = fuse_blocks(model)
    with counted(fused) as ran:
        fused_loss, found = loss_and_gradients(model, **maskless())
    assert ran == BOTH_LAYERS
    assert abs(fused_loss - loss) < units(torch.float64) * loss
    assert max(errors(found, wanted)) < units(torch.float64)

    with torch.no_grad():
        model.get_submodule(adapter.module_names[-1]).lora_B.mul_(1 + 1e-9)
    _, wrong = loss_and_gradients(model, **maskless())
    assert max(errors(wrong, wanted)) > 100 * units(torch.float64)


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_is_seen(family: str) -> None:
    """A window of one token more or less is another gradient."""
    model, _ = make(family)
    _, wanted = loss_and_gradients(model, use_cache=False)
    for window in (63, 65):
        other, _ = make(family, sliding_window=window)
        fuse_blocks(other)
        _, wrong = loss_and_gradients(other, **maskless())
        assert max(errors(wrong, wanted)) > 1e-6


SUBSETS = {
    "some": LoRA(rank=4, alpha=5.0, targets=("q_proj", "down_proj")),
    "one": LoRA(rank=4, alpha=5.0, targets=("o_proj",)),
    "ranks": LoRA(
        rank=4, alpha=5.0, rank_pattern={"k_proj": 1, "v_proj": 3, "gate_proj": 17, "o_proj": 8}
    ),
    "rank 1": LoRA(rank=1, alpha=0.7),
    "rank 3": LoRAFA(rank=3, alpha=0.7),
    "one layer": LoRA(rank=4, alpha=5.0, targets=(r"re:.*layers\.1\..*(v_proj|up_proj)",)),
}


@pytest.mark.parametrize("policy", ["recompute_elementwise", "recompute_all"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_some_linears_and_different_ranks(subset: str, policy: str) -> None:
    """Ranks are padded, and parts without an adapter have none: with Qwen 2's biases."""
    model, _ = make("qwen2", SUBSETS[subset])
    loss, wanted = loss_and_gradients(model, use_cache=False)
    fused = fuse_blocks(model, policy)
    with counted(fused) as ran:
        fused_loss, found = loss_and_gradients(model, **maskless())
    assert ran == BOTH_LAYERS
    assert abs(fused_loss - loss) < units(torch.float64) * loss
    assert max(errors(found, wanted)) < units(torch.float64)


def test_biases_count() -> None:
    """The biases of the test above are there, and matter."""
    model, _ = make("qwen2")
    _, wanted = loss_and_gradients(model, use_cache=False)
    fuse_blocks(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.base.bias[0] += 1e-6
    _, wrong = loss_and_gradients(model, **maskless())
    assert max(errors(wrong, wanted)) > 100 * units(torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_on_an_nf4_base(family: str) -> None:
    """Against float64 on the decoded weights; another weight's codes are found."""
    model, _ = make(family, LoRA(rank=3, alpha=5.0), dtype=torch.float32, nf4=True)
    loss, truth = loss_and_gradients(truth_of(model), use_cache=False)
    fused = fuse_blocks(model)
    with counted(fused) as ran:
        fused_loss, found = loss_and_gradients(model, **maskless())
    assert ran == BOTH_LAYERS
    assert abs(fused_loss - loss) < units(torch.float32) * loss
    assert max(errors(found, truth)) < units(torch.float32)

    down = model.model.layers[1].mlp.down_proj.base
    down.weight.data[0, 0] ^= 0x10
    _, wrong = loss_and_gradients(model, **maskless())
    assert max(errors(wrong, truth)) > 10 * units(torch.float32)


@pytest.mark.parametrize("policy", ["recompute_elementwise", "recompute_all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_at_least_as_close_as_the_models_own_code(family: str, policy: str) -> None:
    """All gradients together, and no single one more than 1.6 times as far off."""
    model, adapter = make(family, dtype=torch.bfloat16, nf4=family in ("llama", "qwen2"))
    _, truth = loss_and_gradients(truth_of(model), use_cache=False)
    _, theirs = loss_and_gradients(model, use_cache=False)
    fused = fuse_blocks(model, policy)
    with counted(fused) as ran:
        _, ours = loss_and_gradients(model, **maskless())
    assert ran == BOTH_LAYERS
    assert total_error(ours, truth) < total_error(theirs, truth)
    pairs = zip(errors(ours, truth), errors(theirs, truth), strict=True)
    assert max(our / their for our, their in pairs) < 1.6

    with torch.no_grad():  # adapters 4% off: the bound bites
        for parameter in adapter.parameters():
            parameter.mul_(1.04)
    _, wrong = loss_and_gradients(model, **maskless())
    assert total_error(wrong, truth) > 2 * total_error(theirs, truth)


def layer_gradients(model: nn.Module, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of the second layer alone, its input's among them."""
    model.zero_grad()
    layer = model.model.layers[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, tiny_models.HIDDEN, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    with Float64():
        positions = model.model.rotary_emb(x, torch.arange(9)[None])
        reduce(layer(x, attention_mask=None, position_embeddings=positions)).backward()
    assert x.grad is not None
    return gradients(layer) | {"x": x.grad}


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda y: y.sum(),
    "transposed": lambda y: (y.mT.contiguous().mT * y.detach()).sum(),
    "one token": lambda y: y[1, 3].square().sum(),
}


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_any_layout_of_the_gradient(kind: str) -> None:
    """What comes back need not be contiguous, and the layer may stand alone."""
    model, _ = make()
    model.set_attn_implementation("sdpa")
    wanted = layer_gradients(model, REDUCTIONS[kind])
    fused = fuse_blocks(model)
    with counted(fused) as ran:
        found = layer_gradients(model, REDUCTIONS[kind])
    assert ran == [1]
    assert max(errors(found, wanted)) < units(torch.float64)


def test_the_embeddings_gradient() -> None:
    """The first layer gives the gradient of its input where someone wants it, else not."""
    model, _ = make()
    ids = tiny_models.tokens(2, LENGTH)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    found = []
    for fused in (False, True):
        if fused:
            fuse_blocks(model)
        embedded.grad = None
        with Float64():
            model(inputs_embeds=embedded, labels=ids, **maskless() if fused else {}).loss.backward()
        found.append({"embedded": embedded.grad})
    assert max(errors(found[1], found[0])) < units(torch.float64)


def test_graphs_side_by_side() -> None:
    """Two forward passes, then two backward passes, as accumulated losses make them."""
    model, _ = make()
    rows = [tiny_models.tokens(1, LENGTH, seed=seed) for seed in (1, 2)]
    _, wanted = loss_and_gradients(model, torch.cat(rows), use_cache=False)
    fuse_blocks(model)
    model.zero_grad()
    with Float64():
        losses = [model(input_ids=ids, labels=ids, **maskless()).loss for ids in rows]
        for loss in losses:
            (loss / 2).backward()
    assert max(errors(gradients(model), wanted)) < units(torch.float64)


def test_other_readers_of_hidden_states() -> None:
    """A loss on what lies between two layers adds to the gradient that one hands the other."""
    model, _ = make(num_hidden_layers=3)
    ids = tiny_models.tokens(2, LENGTH)
    found = []
    for inputs in ({"use_cache": False}, maskless()):
        model.zero_grad()
        with Float64():
            output = model(ids, labels=ids, output_hidden_states=True, **inputs)
            (output.loss + sum(h.square().mean() for h in output.hidden_states)).backward()
        found.append(gradients(model))
        fuse_blocks(model) if len(found) == 1 else None
    assert max(errors(found[1], found[0])) < units(torch.float64)
    _, without = loss_and_gradients(model, **maskless())
    assert max(errors(without, found[0])) > 1e-3


def test_masters_are_read_at_each_forward_pass() -> None:
    """What the optimizer wrote between two steps is what the second step computes with."""
    model, adapter = make()
    fuse_blocks(model)
    loss_and_gradients(model, **maskless())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.9)
    _, found = loss_and_gradients(model, **maskless())
    for layer in model.model.layers:
        assert isinstance(layer, FusedLayer)
    _, wanted = loss_and_gradients(model, use_cache=False)  # an eager mask: its own code
    assert max(errors(found, wanted)) < units(torch.float64)


def test_the_models_checkpointing_around_fused_layers() -> None:
    """Wasteful, but right."""
    model, _ = make()
    _, wanted = loss_and_gradients(model, use_cache=False)
    fuse_blocks(model)
    own = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    own({"use_reentrant": False})
    _, found = loss_and_gradients(model, **maskless())
    assert max(errors(found, wanted)) < units(torch.float64)
