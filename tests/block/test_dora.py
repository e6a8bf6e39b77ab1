"""DoRA in fused layers: outputs that its lengths need, factors of rows, biases, what is refused.

Families, policies, tiles, packed rows and wrong formulas are in the other files of this folder.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import DoRA
from qlora_kit.block import attention_half, mlp_half
from qlora_kit.block.description import Norm
from qlora_kit.block.install import fuse_blocks, why_not_fused
from qlora_kit.block.policy import POLICIES
from tests import tiny_models
from tests.block.helpers import METHODS, counted, errors, loss_and_gradients, make, maskless
from tests.block.test_policies import SHAPE, TINY, saved_bytes

UNIT = 64 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("policy", ["recompute_elementwise", "recompute_all"])
@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_an_output_with_the_residual_in_it_is_found(
    half: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lengths of rows of `o` and `down` need is their own output."""
    model, _ = make("llama", METHODS["dora"])
    _, wanted = loss_and_gradients(model, use_cache=False)
    fuse_blocks(model, policy)

    def added(how: Norm | None, y: Tensor, residual: Tensor, *, out: Tensor) -> None:
        y.add_(residual)
        out.copy_(y)

    monkeypatch.setattr({"attention": attention_half, "mlp": mlp_half}[half], "join", added)
    _, found = loss_and_gradients(model, **maskless())
    off = dict(zip(wanted, errors(found, wanted), strict=True))
    place = {"attention": "o_proj", "mlp": "down_proj"}[half]
    wrong = [e for name, e in off.items() if f"{place}.lora_magnitude" in name]
    again = half == "mlp" and policy == "recompute_all"  # there y is computed without a sum
    assert (min(wrong) > 0.05) != again
    assert max(e for name, e in off.items() if f"{place}.lora_magnitude" not in name) < UNIT


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_magnitude"])
def test_a_part_of_dora_may_be_frozen(frozen: str) -> None:
    """With frozen lengths no output is kept, and rows are stretched all the same."""
    model, adapter = make("gemma3", METHODS["dora"])
    _, wanted = loss_and_gradients(model, use_cache=False)
    for piece in adapter.pieces:
        getattr(piece, frozen).requires_grad_(False)
    fused = fuse_blocks(model)
    left = {name: g for name, g in wanted.items() if not name.endswith(frozen)}
    for policy in POLICIES:
        fused.set_policy(policy)
        _, found = loss_and_gradients(model, **maskless())
        assert max(errors(found, left)) < UNIT


TARGETS: dict[str, tuple[str, ...]] = {
    "some": ("k_proj", "up_proj"),
    "one": ("down_proj",),
    "one layer": (r"re:.*layers\.1\..*(v_proj|o_proj|gate_proj)",),
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tile", [None, 32])
def test_dora_on_some_linears(targets: str, tile: int | None) -> None:
    """Bare rows keep their length; ranks of any size, padded."""
    pattern = {"k_proj": 3, "down_proj": 9, "o_proj": 1}
    config = DoRA(rank=4, alpha=5.0, targets=TARGETS[targets], rank_pattern=pattern)
    model, _ = make("qwen3", config)
    _, wanted = loss_and_gradients(model, use_cache=False)
    fused = fuse_blocks(model, tile=tile)
    for policy in POLICIES:
        fused.set_policy(policy)
        with counted(fused) as ran:
            _, found = loss_and_gradients(model, **maskless())
        assert ran == [0, 1]
        assert max(errors(found, wanted)) < UNIT


def test_biases_of_dora() -> None:
    """Those of q, k and v stand beside the lengths; others send layers to their own code."""
    model, _ = make("qwen2", METHODS["dora"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.base.bias.mul_(100.0)
    _, wanted = loss_and_gradients(model, use_cache=False)
    fuse_blocks(model)
    _, found = loss_and_gradients(model, **maskless())
    assert max(errors(found, wanted)) < 100 * UNIT  # attention is sharper
    for changes in ({"attention_bias": True}, {"mlp_bias": True}):
        for method, reason in (("lora", None), ("dora", "biases")):
            other, _ = make("llama", METHODS[method], **changes)
            found_reason = why_not_fused(other)
            assert (found_reason is None) if reason is None else reason in str(found_reason)


def test_a_row_without_length_stays_without() -> None:
    """m = 0 and a row of zeros: no NaN, and no gradient."""
    model, adapter = make("llama", METHODS["dora"], dtype=torch.float32)
    with torch.no_grad():
        for piece in adapter.pieces:
            piece.lora_magnitude[3] = 0.0
            piece.base.weight[5] = 0.0
            piece.lora_B[5] = 0.0
            piece.base_squares[5] = piece.lora_magnitude[5] = 0.0
    for policy in ("recompute_elementwise", "recompute_all"):
        fused = fuse_blocks(model, policy)
        _, found = loss_and_gradients(model, **maskless())
        for name, gradient in found.items():
            assert gradient.isfinite().all(), name
            if name.endswith(("magnitude", "lora_B")):
                assert not gradient[[3, 5]].any(), name
        fused.remove()


def test_the_start_of_dora_is_the_base() -> None:
    """B = 0 and m = ‖Ŵ‖: every factor is 1 exactly, in 16 bits as well."""
    for dtype in (torch.bfloat16, torch.float32):
        model, adapter = make("llama", METHODS["dora"], dtype=dtype, nf4=True)
        adapter.detach_from_model()
        model.requires_grad_(False)
        ids = tiny_models.tokens(2, 33)
        with torch.no_grad():
            base = model(ids, use_cache=False).logits
            adapter = attach(model, METHODS["dora"])
            fused = fuse_blocks(model.train())
            with counted(fused) as ran:
                found = model(ids, **maskless()).logits
            assert ran == [0, 1]
            groups = [g for r in model.model.layers for g in r._runner.description.groups]
            assert not any(group.rows.change.any() for group in groups)
            bound = 64 * torch.finfo(dtype).eps * base.float().norm()
            assert (found - base).float().norm() < bound
            for piece in adapter.pieces:
                piece.lora_magnitude.mul_(1.0 + 200 * torch.finfo(dtype).eps)
            found = model(ids, **maskless()).logits
            assert all(group.rows.change.all() for group in groups)
            assert (found - base).float().norm() > bound


@pytest.mark.parametrize("family", TINY)
def test_dora_keeps_outputs_beside(family: str) -> None:
    """q, k and v as projected, the outputs of o and down; no room beside gate and up."""
    changes = {"head_dim": 32, "intermediate_size": 192}
    model, _ = make(family, DoRA(rank=8), dtype=torch.bfloat16, nf4=True, **changes)
    fused = fuse_blocks(model)
    ranks = (8, 8, 8, 8) if family == "phi3" else (24, 8, 16, 8)  # whose linears are fused
    sizes = replace(TINY[family], ranks=ranks, norms_behind=True, normed_heads=True)
    for policy in POLICIES:
        fused.set_policy(policy)
        wanted = SHAPE[0] * SHAPE[1] * sizes.per_token(policy, frozen_a=False)
        if policy in ("save", "recompute_elementwise"):
            wanted -= SHAPE[0] * SHAPE[1] * 2 * ranks[2]
        assert saved_bytes(model) == wanted, policy


def test_weights_with_factors_do_not_stay_decoded() -> None:
    """Factors change with every step."""
    model, adapter = make("llama", METHODS["dora"], dtype=torch.float32, nf4=True)
    fused = fuse_blocks(model)
    fused.keep_decoded(2, torch.float32)
    assert fused.kept_decoded() == []
    _, before = loss_and_gradients(model, **maskless())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.1)
    _, wanted = loss_and_gradients(model, use_cache=False)
    _, found = loss_and_gradients(model, **maskless())
    assert max(errors(found, wanted)) < 64 * torch.finfo(torch.float32).eps
    assert max(errors(before, wanted)) > 1e-3


def test_blocks_across_rows_cannot_be_stretched() -> None:
    """Rows of 96 in blocks of 64: such a layer runs its own code, and says why."""
    changes = {"intermediate_size": 96}
    for method, reason in (("lora", None), ("dora", "run across the rows")):
        model, _ = make("llama", METHODS[method], dtype=torch.float32, nf4=True, **changes)
        found = why_not_fused(model)
        assert (found is None) if reason is None else reason in str(found)
