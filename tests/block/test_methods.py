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

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.adalora.layer import AdaLoRALinear
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.dora import DoRALinear
from qlora_kit.adapters.lora.pissa import PiSSALinear
from qlora_kit.block import operands
from qlora_kit.block.install import fuse_blocks
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


def _of_the_start(piece: Any, d_a: Tensor, d_b: Tensor, _: None) -> list[Tensor]:
    """PiSSA's with the start's in the place of A's."""
    return [d_a[piece.rank :] * piece.scale, d_b[:, : piece.rank]]


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
    "other half": ("pissa", PiSSALinear, "pull_back", _of_the_start, "lora_A"),
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


@pytest.mark.parametrize("family", TINY)
def test_adalora_keeps_what_lora_keeps(family: str) -> None:
    """To the byte, by policy."""
    config = AdaLoRA(rank=8, alpha=5.0)
    changes = {"head_dim": 32, "intermediate_size": 192}
    model, _ = make(family, config, dtype=torch.bfloat16, nf4=True, **changes)
    fused = fuse_blocks(model)
    fused_linears = family == "phi3"
    sizes = replace(TINY[family], ranks=(8, 8, 8, 8) if fused_linears else (24, 8, 16, 8))
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
    """It leaves A's gradient out and is not slower: a part of LoRA's calls, and no other."""
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
