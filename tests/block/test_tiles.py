"""Layers that work on tiles give what they give at once.

Bounds. Rows are the same arithmetic with or without tiles; gradients of the adapters are sums
over tokens, those of tiles added in float32 (float64 here): T tiles are off by at most T units
of rounding of the sum of magnitudes, and there are at most 20. The 64 units that tests of this
folder allow for a whole chain of products allow for that as well.
"""

import pytest
import torch
from torch import Tensor

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.block import tiles
from qlora_kit.block.install import fuse_blocks
from qlora_kit.block.policy import POLICIES
from qlora_kit.block.tiles import Tiles, auto_tokens, tile_tokens
from qlora_kit.core.errors import ConfigError
from qlora_kit.ops.attention.rule import Documents
from tests import tiny_models
from tests.block.helpers import (
    FAMILIES,
    METHODS,
    Gradients,
    counted,
    errors,
    exactly,
    gradients,
    loss_and_gradients,
    make,
    maskless,
    total_error,
    truth_of,
)
from tests.block.test_rows import packed, together

UNIT = 64 * torch.finfo(torch.float64).eps

TILE = 32
"""Of 140 tokens: four and an odd remainder, and none ends where a row does."""


@pytest.fixture(autouse=True)
def _groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in as many groups as there are key heads, at any length."""
    monkeypatch.setattr(tiles, "ATTENTION_ROWS", 1)


@pytest.mark.parametrize("policy", [*POLICIES, "save:1,offload"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_change_nothing(family: str, method: str, policy: str) -> None:
    """Loss and every gradient, for every family and policy, in float64."""
    model, _ = make(family, METHODS[method])
    fused = fuse_blocks(model, policy)
    loss, wanted = loss_and_gradients(model, **maskless())
    fused.tile = TILE
    with counted(fused) as ran:
        tiled, found = loss_and_gradients(model, **maskless())
    assert ran == [0, 1]
    assert abs(tiled - loss) < UNIT * loss
    assert max(errors(found, wanted)) < UNIT


@pytest.mark.parametrize("tile", [1, 3, 69, 70, 71, 139, 140, 1000])
def test_tiles_of_any_size(tile: int) -> None:
    """Of one token, of a row, of all but one token, of more than there are."""
    model, _ = make()
    fused = fuse_blocks(model, "offload")
    loss, wanted = loss_and_gradients(model, **maskless())
    fused.tile = tile
    tiled, found = loss_and_gradients(model, **maskless())
    assert abs(tiled - loss) < UNIT * loss
    assert max(errors(found, wanted)) < UNIT
    if tile >= 140:
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("third", [slice(65, 96), slice(63, 96)])
def test_a_wrong_tile_is_found(monkeypatch: pytest.MonkeyPatch, third: slice) -> None:
    """One that leaves a token out, and one that takes a token twice."""
    model, _ = make()
    fused = fuse_blocks(model, "offload")
    _, wanted = loss_and_gradients(model, **maskless())
    fused.tile = TILE
    right = Tiles(140, TILE).parts
    monkeypatch.setattr(Tiles, "parts", property(lambda _: [*right[:2], third, *right[3:]]))
    _, found = loss_and_gradients(model, **maskless())
    assert not max(errors(found, wanted)) < 1e6 * UNIT  # or NaN


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_packed_documents(family: str) -> None:
    """Tiles begin and end anywhere in documents."""
    model, _ = make(family)
    rows = packed()
    documents = Documents.from_positions(rows["position_ids"])
    fused = fuse_blocks(model, "recompute_all")
    wanted = together(model, rows, documents)
    fused.tile = 48
    found = together(model, rows, documents)
    assert max(errors(found, wanted)) < UNIT
    documents.starts[4] += 1
    assert max(errors(together(model, rows, documents), wanted)) > 1e-3


@pytest.mark.parametrize("policy", ["recompute_elementwise", "recompute_mlp", "recompute_all"])
def test_bfloat16_on_an_nf4_base(policy: str) -> None:
    """As close to float64 as without tiles, within a tenth; ranks of all kinds."""
    config = LoRA(rank=4, alpha=5.0, rank_pattern={"k_proj": 1, "gate_proj": 17, "o_proj": 9})
    model, _ = make("llama", config, dtype=torch.bfloat16, nf4=True)
    _, truth = loss_and_gradients(truth_of(model), use_cache=False)
    fused = fuse_blocks(model, policy)
    _, whole = loss_and_gradients(model, **maskless())
    fused.tile = TILE
    _, tiled = loss_and_gradients(model, **maskless())
    assert total_error(tiled, truth) < 1.1 * total_error(whole, truth)


def test_some_linears() -> None:
    """Groups without adapters have no ranks, and buffers no room beside them."""
    for targets in (("q_proj", "down_proj"), ("o_proj",), (r"re:.*layers\.1\..*(v|up)_proj",)):
        model, _ = make("qwen2", LoRA(rank=3, alpha=5.0, targets=targets))
        fused = fuse_blocks(model, "offload")
        _, wanted = loss_and_gradients(model, **maskless())
        fused.tile = TILE
        _, found = loss_and_gradients(model, **maskless())
        assert max(errors(found, wanted)) < UNIT


def test_evaluation_in_tiles() -> None:
    """Without gradients, too."""
    model, _ = make()
    fused = fuse_blocks(model.eval())
    ids = tiny_models.tokens(2, 70)
    with torch.no_grad(), exactly(model):
        wanted = model(ids, **maskless()).logits
        fused.tile = TILE
        found = model(ids, **maskless()).logits
    assert (found - wanted).norm() < UNIT * wanted.norm()


def test_the_tile_may_change_between_forward_and_backward() -> None:
    """A backward pass goes by what its forward pass left."""
    model, _ = make()
    for policy in ("recompute_elementwise", "offload"):
        fused = fuse_blocks(model, policy)
        _, wanted = loss_and_gradients(model, **maskless())
        for first, then in ((TILE, None), (None, TILE)):
            model.zero_grad()
            ids = tiny_models.tokens(2, 70)
            fused.tile = first
            with exactly(model):
                loss = model(input_ids=ids, labels=ids, **maskless()).loss
                fused.tile = then
                loss.backward()
            assert max(errors(gradients(model), wanted)) < UNIT
        fused.remove()


def test_other_readers_of_hidden_states() -> None:
    """A loss on what lies between two layers: no gradient is written over that others add to."""
    model, _ = make(num_hidden_layers=3)
    ids = tiny_models.tokens(2, 70)
    fused = fuse_blocks(model, "offload")
    found: list[Gradients] = []
    for tile in (None, TILE):
        fused.tile = tile
        model.zero_grad()
        with exactly(model):
            output = model(ids, labels=ids, output_hidden_states=True, **maskless())
            (output.loss + sum(h.square().mean() for h in output.hidden_states)).backward()
        found.append(gradients(model))
    assert max(errors(found[1], found[0])) < UNIT


def test_gradients_are_written_over_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles that of hidden states has one place in all layers but the last, else not."""
    model, _ = make(num_hidden_layers=4)
    fused = fuse_blocks(model, "offload", tile=TILE)
    places: list[int] = []
    own = fused.handed_out

    def handed_out(dy: Tensor) -> bool:
        places.append(dy.untyped_storage().data_ptr())
        return own(dy)

    monkeypatch.setattr(fused, "handed_out", handed_out)
    loss_and_gradients(model, **maskless())
    assert len(places) == 4
    assert len(set(places[1:])) == 1


@pytest.mark.parametrize("tile", ["", "off", "4096", 0, -1, 1.5])
def test_other_words_are_refused(tile: object) -> None:
    """With those that are known."""
    with pytest.raises(ConfigError, match="4096, or auto, or null"):
        tile_tokens(tile)  # type: ignore[arg-type]


def test_auto_leaves_usual_batches_whole() -> None:
    """8,192 tokens of an 8B model are one tile, 300,000 are tiles of 4,096."""
    model, _ = make()
    description = fuse_blocks(model).layers[0]._runner.description
    width = description.gate_up.n
    tokens = auto_tokens(width)
    assert not tiles.tiles_of(description, 4 * tokens, 0).several
    assert tiles.tiles_of(description, 4 * tokens + 1, 0).tokens == tokens
    assert auto_tokens(2 * 14336) == 4096


def test_head_groups_divide_key_heads() -> None:
    """As many as leave a kernel enough rows, and a divisor."""
    assert Tiles(300, 400).head_groups(32, 8) == 1
    for rows in (100, 1000):
        assert Tiles(rows, 10).head_groups(12, 6) == 6
