"""Fused and compiled layers on a GPU: the same claims, with its kernels and in bfloat16."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from qlora_kit.block import tiles
from qlora_kit.block.compiled import compile_layers
from qlora_kit.block.install import fuse_blocks
from qlora_kit.block.policy import POLICIES
from qlora_kit.ops.attention.rule import Documents
from qlora_kit.ops.attention.transformers_door import packed_inputs, register
from tests import tiny_models
from tests.block.helpers import (
    FAMILIES,
    METHODS,
    Gradients,
    counted,
    gradients,
    loss_and_gradients,
    make,
    maskless,
    total_error,
    truth_of,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LENGTH = 300
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.01,  # wide layers with the tiny ones' weights would amplify
}


def build(family: str, method: str = "lora", **options: Any) -> PreTrainedModel:
    """A small NF4 model in bfloat16 whose windows of 64 tokens matter."""
    model, _ = make(family, METHODS[method], dtype=torch.bfloat16, nf4=True, **SHAPE, **options)
    return model.to(DEVICE)


def ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return tiny_models.tokens(rows, length).to(DEVICE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_gradients(family: str, method: str) -> None:
    """About as close to float64 as the model's own code with eager attention, or closer."""
    model = build(family, method)
    _, truth = loss_and_gradients(truth_of(model), ids(), use_cache=False)
    _, theirs = loss_and_gradients(model, ids(), use_cache=False)
    fused = fuse_blocks(model)
    with counted(fused) as ran:
        _, ours = loss_and_gradients(model, ids(), **maskless())
    assert ran == [0, 1]
    more = 1.3 if method == "dora" else 1.1  # whose weights' rounding comes after rows' factors
    bound = more * total_error(theirs, truth)
    assert total_error(ours, truth) < bound
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    _, wrong = loss_and_gradients(model, ids(), **maskless())
    assert total_error(wrong, truth) > 2 * bound


CASES = [
    *((family, "lora") for family in ("llama", "qwen3", "gemma2")),
    *((family, method) for family in ("llama", "gemma2") for method in ("adalora", "dora")),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_every_policy_gives_the_same_bits(family: str, method: str) -> None:
    """With deterministic attention; twice, so that pinned buffers and streams are used again."""
    model = build(family, method)
    fused = fuse_blocks(model, "save", deterministic=True)
    wanted: Gradients = {}
    for policy in (*POLICIES, "save:1,offload", *POLICIES):
        fused.set_policy(policy)
        _, found = loss_and_gradients(model, ids(8, 512), **maskless())
        wanted = wanted or found
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), policy


@pytest.mark.parametrize(("family", "method"), CASES)
def test_tiles(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to float64 as at once, an odd remainder and groups of heads included; under every
    policy the same bits, twice."""
    monkeypatch.setattr(tiles, "ATTENTION_ROWS", 1)
    model = build(family, method)
    _, truth = loss_and_gradients(truth_of(model), ids(), use_cache=False)
    fused = fuse_blocks(model, "save", deterministic=True)
    _, whole = loss_and_gradients(model, ids(), **maskless())
    fused.tile = 128
    wanted: Gradients = {}
    for policy in (*POLICIES, "save:1,offload", *POLICIES):
        fused.set_policy(policy)
        _, found = loss_and_gradients(model, ids(), **maskless())
        wanted = wanted or found
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), policy
    assert total_error(wanted, truth) < 1.1 * total_error(whole, truth)
    fused.tile = 127
    _, odd = loss_and_gradients(model, ids(), **maskless())
    assert total_error(odd, truth) < 1.1 * total_error(whole, truth)


def test_packed_rows() -> None:
    """Documents of many lengths, against each alone through the same fused layers."""
    model = build("llama")
    fuse_blocks(model)
    lengths = (5, 130, 64, 1, 100)
    tokens = ids(1)
    found: list[Gradients] = []
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = Documents.from_positions(positions).to(DEVICE)
    labels = tokens.clone()
    labels[0, documents.starts[:-1].long()] = -100  # nobody predicts a first token
    count = int((labels != -100).sum())

    def add(part: slice, **inputs: Any) -> None:
        row = tokens[:, part], labels[:, part]
        loss = model(row[0], labels=row[1], num_items_in_batch=count, **inputs).loss
        loss.backward()

    model.zero_grad()
    add(slice(0, LENGTH), position_ids=positions.to(DEVICE), use_cache=False,
        **packed_inputs(documents))  # fmt: skip
    found.append(gradients(model))
    model.zero_grad()
    start = 0
    for length in lengths:
        if length > 1:
            add(slice(start, start + length), **maskless())
        start += length
    found.append(gradients(model))
    assert total_error(found[0], found[1]) < 2.0**-6  # two roundings of bfloat16 apart


@pytest.mark.parametrize("method", METHODS)
def test_no_operation_of_a_step_waits_for_the_host(method: str) -> None:
    """Forward and backward, every policy but those that offload the first time."""
    model = build("llama", method)
    fused = fuse_blocks(model, "offload")
    tokens, mask = ids(8, 512), maskless()
    for policy, tile in [*((policy, None) for policy in POLICIES), ("offload", 1000)]:
        fused.set_policy(policy)
        fused.tile = tile
        for step in range(3):
            model.zero_grad()
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
            try:
                hidden = model.model(input_ids=tokens, **mask).last_hidden_state
                hidden.square().mean().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("policy", ["save", "recompute_elementwise", "recompute_all"])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_compiled_gradients(family: str, policy: str) -> None:
    """Generated kernels round less often than eager code does."""
    sizes: dict[str, Any] = (
        {"hidden_size": 512, "intermediate_size": 1024} if family == "phi" else {}
    )
    if family == "llama":
        sizes = SHAPE
    model, _ = make(family, dtype=torch.bfloat16, nf4=True, **sizes)
    model = model.to(DEVICE)
    _, truth = loss_and_gradients(truth_of(model), ids(), use_cache=False)
    _, theirs = loss_and_gradients(model, ids(), use_cache=False)
    model.set_attn_implementation(register())
    compile_layers(model, policy)
    _, ours = loss_and_gradients(model, ids(), use_cache=False)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert total_error(ours, truth) < 1.1 * total_error(theirs, truth)
