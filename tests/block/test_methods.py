"""Methods beside LoRA in fused layers: what `helpers.METHODS` does not reach by itself.

Families, policies and tiles run every method in `test_gradients`, `test_policies` and `test_tiles`.
Here: packed and padded rows, bytes kept, 16 bits on NF4, frozen and missing parts, and that
a wrong formula would be found.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_kit.adapters.adalora import AdaLoRALinear
from qlora_kit.adapters.adalora_config import RankBudget
from qlora_kit.adapters.config import AdaLoRA, DoRA
from qlora_kit.adapters.dora import DoRALinear
from qlora_kit.adapters.inject import attach
from qlora_kit.block import attention_half, mlp_half, operands
from qlora_kit.block.description import Norm
from qlora_kit.block.install import fuse_blocks, why_not_fused
from qlora_kit.block.policy import POLICIES
from qlora_kit.block.projection import Group
from qlora_kit.block.row_factors import stretch
from qlora_kit.ops.attention.rule import Documents
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.block.helpers import (
    METHODS,
    counted,
    errors,
    gradients,
    loss_and_gradients,
    make,
    maskless,
    randomize,
    total_error,
    truth_of,
)
from tests.block.test_policies import SHAPE, TINY, saved_bytes
from tests.block.test_rows import add_gradients, one_by_one, packed, padded, together
from tests.train.helpers import arguments, rows, state

UNIT = 64 * torch.finfo(torch.float64).eps

OTHERS = [name for name in METHODS if not name.startswith("lora")]


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_packed_rows_and_padding(family: str, method: str) -> None:
    """Documents as each would be alone, and a row's padding as its mask would have it."""
    model, _ = make(family, METHODS[method])
    documents = packed()
    alone = one_by_one(model, documents)
    ids, labels, mask = padded("right")
    model.zero_grad()
    add_gradients(model, ids, labels, attention_mask=mask, use_cache=False)
    masked = gradients(model)
    for policy in ("recompute_elementwise", "recompute_all"):
        fused = fuse_blocks(model, policy)
        with counted(fused) as ran:
            found = together(model, documents, Documents.from_positions(documents["position_ids"]))
            assert max(errors(found, alone)) < UNIT
            model.zero_grad()
            add_gradients(model, ids, labels, **maskless())
        assert max(errors(gradients(model), masked)) < UNIT
        assert ran == [0, 1, 0, 1]
        fused.remove()


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_on_an_nf4_base(family: str, method: str) -> None:
    """As close to float64 as the model's own code; masters 4% off are found.

    DoRA a little less: the truth's weights are rounded before rows are stretched, ours after.
    """
    model, adapter = make(family, METHODS[method], dtype=torch.bfloat16, nf4=True)
    _, truth = loss_and_gradients(truth_of(model), use_cache=False)
    _, theirs = loss_and_gradients(model, use_cache=False)
    for policy in ("recompute_elementwise", "recompute_all"):
        fused = fuse_blocks(model, policy)
        _, ours = loss_and_gradients(model, **maskless())
        most = 1.2 if method == "dora" else 1.05
        assert total_error(ours, truth) < most * total_error(theirs, truth)
        fused.remove()
    fuse_blocks(model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.04)
    _, wrong = loss_and_gradients(model, **maskless())
    assert total_error(wrong, truth) > 2 * total_error(theirs, truth)


def _without_values(piece: Any, d_a: Tensor, d_b: Tensor, _: None) -> list[Tensor]:
    """AdaLoRA's gradients with λ left out of Q's."""
    of_values = (d_a * piece.lora_A).sum(1, keepdim=True) * piece.scale
    return [d_a * piece.scale, of_values, d_b]


def _without_scale(piece: Any, d_a: Tensor, d_b: Tensor, d_lengths: Tensor) -> list[Tensor]:
    """DoRA's with s left out of A's."""
    return [d_a, d_b, d_lengths]


def _without_factors(piece: Any, d_a: Tensor, d_b: Tensor, d_lengths: Tensor) -> list[Tensor]:
    """DoRA's with f left out of B's."""
    factors = piece.lora_magnitude / piece.row_lengths(d_b.dtype)
    return [d_a * piece.scale, d_b / factors[:, None], d_lengths]


def _as_if_lengths_were_one(groups: Sequence[Group]) -> None:
    """`stretch`, with 1/m left out of that of m."""
    stretch(groups)
    for group in groups:
        assert group.rows is not None
        group.rows = replace(group.rows, per_length=torch.ones_like(group.rows.per_length))


WRONG = {
    "no λ": ("adalora", AdaLoRALinear, "pull_back", _without_values, "lora_A"),
    "no s": ("dora", DoRALinear, "pull_back", _without_scale, "lora_A"),
    "no f": ("dora", DoRALinear, "pull_back", _without_factors, "lora_B"),
    "no m": ("dora", operands, "stretch", _as_if_lengths_were_one, "lora_magnitude"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_formula_is_found(fault: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the gradients that it touches, and in no other."""
    method, owner, name, wrong, touched = WRONG[fault]
    model, _ = make("llama", METHODS[method])
    _, wanted = loss_and_gradients(model, use_cache=False)
    fuse_blocks(model, policy)
    monkeypatch.setattr(owner, name, wrong)
    _, found = loss_and_gradients(model, **maskless())
    off = dict(zip(wanted, errors(found, wanted), strict=True))
    assert min(e for name, e in off.items() if name.endswith(touched)) > 0.05
    assert max(e for name, e in off.items() if not name.endswith(touched)) < UNIT


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


@pytest.mark.parametrize("policy", ["recompute_elementwise", "recompute_all"])
def test_triplets_without_weight_and_linears_without_triplets(policy: str) -> None:
    """λ = 0 gets a gradient, its P and Q a zero one; rank 0 is no adapter at all."""
    model, adapter = make("llama", METHODS["adalora"])
    adapter.detach_from_model()
    config = AdaLoRA(rank=4, alpha=5.0, targets=("q_proj", "k_proj", "up_proj", "down_proj"))
    adapter = attach(model, config)
    model.double()
    randomize(adapter)
    with torch.no_grad():
        for piece in adapter.pieces:
            piece.lora_E[1] = 0.0
        empty = model.model.layers[1].self_attn.k_proj
        empty.rank = 0
        for name in ("lora_A", "lora_E"):
            setattr(empty, name, torch.nn.Parameter(getattr(empty, name)[:0]))
        empty.lora_B = torch.nn.Parameter(empty.lora_B[:, :0])
    _, wanted = loss_and_gradients(model, use_cache=False)
    fused = fuse_blocks(model, policy)
    with counted(fused) as ran:
        _, found = loss_and_gradients(model, **maskless())
    assert ran == [0, 1]
    assert not any("layers.1.self_attn.k_proj" in name for name in found)
    assert max(errors(found, wanted)) < UNIT
    assert found["model.layers.0.mlp.down_proj.lora_E"][1].abs() > 0
    assert not found["model.layers.0.mlp.down_proj.lora_A"][1].any()
    assert not found["model.layers.0.mlp.down_proj.lora_B"][:, 1].any()


@pytest.mark.parametrize("frozen", ["lora_A", "lora_E", "lora_B"])
def test_a_part_of_it_may_be_frozen(frozen: str) -> None:
    """What is frozen gets nothing, what is not gets what it got."""
    model, adapter = make("llama", METHODS["adalora"])
    _, wanted = loss_and_gradients(model, use_cache=False)
    for piece in adapter.pieces:
        getattr(piece, frozen).requires_grad_(False)
    fuse_blocks(model)
    _, found = loss_and_gradients(model, **maskless())
    left = {name: g for name, g in wanted.items() if not name.endswith(frozen)}
    assert max(errors(found, left)) < UNIT


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
    own = TINY[family]
    sizes = replace(own, ranks=(24, 8, 16, 8), norms_behind=True, normed_heads=True)
    for policy in POLICIES:
        fused.set_policy(policy)
        wanted = SHAPE[0] * SHAPE[1] * sizes.per_token(policy, frozen_a=False)
        if policy in ("save", "recompute_elementwise"):
            wanted -= SHAPE[0] * SHAPE[1] * 2 * 16
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


@pytest.mark.parametrize("family", TINY)
def test_adalora_keeps_what_lora_keeps(family: str) -> None:
    """To the byte, by policy."""
    config = AdaLoRA(rank=8, alpha=5.0)
    changes = {"head_dim": 32, "intermediate_size": 192}
    model, _ = make(family, config, dtype=torch.bfloat16, nf4=True, **changes)
    fused = fuse_blocks(model)
    sizes = replace(TINY[family], ranks=(24, 8, 16, 8))
    for policy in POLICIES:
        fused.set_policy(policy)
        wanted = SHAPE[0] * SHAPE[1] * sizes.per_token(policy, frozen_a=False)
        assert saved_bytes(model) == wanted, policy


def test_budget_and_ranks_follow_the_fused_step(tmp_path: Path) -> None:
    """Importance, regularizer and the choice of ranks, as with the model's own code."""
    budget = RankBudget(target_rank=2, start_updates=1, final_updates=3, every=2)
    found = []
    for step in ("eager", "fused"):
        model = tiny_models.build("llama")
        adapter = attach(model, AdaLoRA(rank=4, alpha=8, budget=budget), seed=3)
        trainer = Trainer(
            model,
            adapter,
            arguments(tmp_path / step, max_steps=9),
            train_dataset=rows(20),
            data_collator=PadCollator(0),
            step=step,
        )
        assert (trainer.fused is not None) == (step == "fused")
        if trainer.fused is not None:
            with counted(trainer.fused.blocks) as ran:
                trainer.train()
            assert ran == [0, 1] * 9
        else:
            trainer.train()
        history = trainer.ranks.allocator.history
        found.append((state(trainer), history.ranks, history.budget))
    (wanted, ranks, budgets), (values, fused_ranks, fused_budgets) = found
    assert fused_ranks == ranks
    assert fused_budgets == budgets
    assert sum(ranks[-1]) == 2 * 14
    assert len(set(ranks[-1])) > 1
    for name, tensor in wanted.items():  # Adam magnifies rounding where gradients are small
        assert (values[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_blocks_across_rows_cannot_be_stretched() -> None:
    """Rows of 96 in blocks of 64: such a layer runs its own code, and says why."""
    changes = {"intermediate_size": 96}
    for method, reason in (("lora", None), ("dora", "run across the rows")):
        model, _ = make("llama", METHODS[method], dtype=torch.float32, nf4=True, **changes)
        found = why_not_fused(model)
        assert (found is None) if reason is None else reason in str(found)


class _Calls(TorchDispatchMode):
    """Counts calls and the values that go into them, by op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.values: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            given = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.calls[func.name()] += 1
            self.values[func.name()] += sum(t.numel() for t in given)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lora_fa_does_nothing_that_lora_does_not(family: str, policy: str) -> None:
    """It leaves the gradient of A out, so it is not slower: a part of LoRA's calls, and no other."""
    found = {}
    for method in ("lora", "lora_fa"):
        model, _ = make(family, METHODS[method], dtype=torch.bfloat16, nf4=True)
        fuse_blocks(model, policy)
        loss_and_gradients(model, **maskless())
        with _Calls() as calls:
            loss_and_gradients(model, **maskless())
        found[method] = calls
    lora, lora_fa = found["lora"], found["lora_fa"]
    assert not lora_fa.calls - lora.calls
    assert not lora_fa.values - lora.values
    products = "aten::mm"
    assert lora.calls[products] - lora_fa.calls[products] == 4 * tiny_models.LAYERS  # one per group
