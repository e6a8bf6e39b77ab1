"""Positions of targets that come with the batch: the same loss, and nothing waits for the GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.block.install import fuse_blocks
from qlora_kit.nn.loss_head import IGNORE
from qlora_kit.step import head_input as heads
from qlora_kit.step.head_input import (
    POSITIONS_MULTIPLE,
    TARGET_POSITIONS,
    head_input,
    label_mask,
    target_positions,
)
from qlora_kit.step.loss import causal_lm_loss, count_targets
from qlora_kit.step.prepare import FusedCollator, fused_inputs
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.held_out import language_model_losses, loss_totals
from tests import tiny_models

WAITING = ("nonzero", "item", "_local_scalar_dense", "masked_select", "is_nonzero", "equal")
"""What cannot end before the GPU has: its result is the host's, or decides a shape."""


def make_batch(rows: int = 3, length: int = 11, seed: int = 0) -> dict[str, Any]:
    """Rows of different length with labels on scattered positions, collated for fused layers."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(rows):
        ids = torch.randint(3, tiny_models.VOCAB, (length - 2 * row,), generator=generator)
        labels = ids.clone()
        labels[torch.rand(len(ids), generator=generator) < 0.4] = IGNORE
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return FusedCollator(PadCollator(0))(made)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("multiple", [1, 4, 256])
def test_positions_are_those_of_the_mask(multiple: int) -> None:
    """Each once and in order; padding predicts nothing; there is always some."""
    batch = make_batch()
    labels = batch["labels"]
    positions, count = target_positions(labels, multiple), int(count_targets(labels))
    assert len(positions) == -(-count // multiple) * multiple
    assert positions[:count].tolist() == sorted(set(positions[:count].tolist()))
    mask = torch.zeros(labels.numel(), dtype=torch.bool)
    mask[positions[:count]] = True
    assert torch.equal(mask.view(labels.shape), label_mask(labels))
    assert (positions[count:] == labels.shape[1] - 1).all()
    assert not label_mask(labels)[0, -1]
    assert len(target_positions(torch.full((2, 5), IGNORE), multiple)) == multiple


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.transformers_compat
def test_loss_and_gradients_are_the_same_with_positions(family: str) -> None:
    """Padding adds nothing: not to the loss, not to the mean, not to the first row's gradient."""
    model = tiny_models.build(family)
    batch = {k: v for k, v in make_batch().items() if isinstance(v, Tensor)}
    without = {k: v for k, v in batch.items() if k != TARGET_POSITIONS}
    count = count_targets(batch["labels"])
    assert len(batch[TARGET_POSITIONS]) == POSITIONS_MULTIPLE > count
    eps = torch.finfo(torch.float32).eps
    for items in (None, torch.tensor(7)):
        wanted, found = (causal_lm_loss(model, b, items) for b in (without, batch))
        assert abs(found - wanted).item() < 16 * eps * wanted.item()
        expected = gradients(model, wanted)
        for name, gradient in gradients(model, found).items():
            scale = expected[name].abs().max().clamp_min(1e-6)
            assert (gradient - expected[name]).abs().max() < 256 * eps * scale, name
    every_one = batch | {TARGET_POSITIONS: torch.arange(batch["labels"].numel())}
    assert torch.allclose(causal_lm_loss(model, every_one), causal_lm_loss(model, without))
    fewer = batch | {TARGET_POSITIONS: target_positions(batch["labels"])[1:]}
    assert abs(causal_lm_loss(model, fewer) - wanted).item() > 1e-3  # one less is noticed


def test_nothing_to_learn_is_zero() -> None:
    """A batch whose labels are all ignored keeps the shape of its steps."""
    model = tiny_models.build("llama")
    batch = make_batch()
    batch["labels"][:] = IGNORE
    batch[TARGET_POSITIONS] = target_positions(batch["labels"])
    inputs = fused_inputs(batch)
    inputs.pop("attention_mask")
    loss = causal_lm_loss(model, inputs)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.transformers_compat
def test_models_and_evaluation_never_see_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the head is reached nor where it is not; and held-out tokens are counted."""
    model = tiny_models.build("llama")
    batch = {k: v for k, v in make_batch().items() if isinstance(v, Tensor)}
    without = {k: v for k, v in batch.items() if k != TARGET_POSITIONS}
    count = int(count_targets(batch["labels"]))
    run, seen = model.forward, []

    def forward(**inputs: Any) -> Any:
        seen.append(set(inputs))
        return run(**inputs)

    monkeypatch.setattr(model, "forward", forward)
    for reached in (True, False):
        if not reached:
            monkeypatch.setattr(heads, "selectable_head", lambda _model: None)
        totals = loss_totals(model, [batch])
        assert totals.count == count
        with torch.no_grad():
            losses, selected = language_model_losses(model, batch)
            assert len(losses) == len(selected.rows) == count
            assert torch.allclose(causal_lm_loss(model, batch), causal_lm_loss(model, without))
    assert not any(TARGET_POSITIONS in names for names in seen)


class Dispatched(TorchDispatchMode):
    """Names of all operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def fused_model(device: str = "cpu") -> Any:
    """A tiny Llama with fused layers, in training, and its fused layers."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = tiny_models.build("llama", dtype=dtype).to(device)
    attach(model, LoRA(rank=4))
    fused = fuse_blocks(model.train(), "recompute_all")
    return model, fused


def step(model: PreTrainedModel, batch: dict[str, Any], items: Tensor) -> Tensor:
    loss = causal_lm_loss(model, fused_inputs(batch), items)
    loss.backward()
    return loss.detach()


@pytest.mark.transformers_compat
def test_no_operation_of_a_step_reads_back() -> None:
    """Loss and backward of fused layers; the first batch of a model may, as its rule is asked."""
    model, fused = fused_model()
    batch, items = make_batch(), torch.tensor(9)
    step(model, batch, items)
    with Dispatched() as found:
        step(model, batch, items)
    fused.remove()
    assert "cross_entropy_" in found.names
    assert "index_select" in found.names
    assert not found.names & set(WAITING)
    without = {k: v for k, v in batch.items() if k != TARGET_POSITIONS}
    with Dispatched() as found:
        step(model, without, items)
    assert "nonzero" in found.names  # which the check would see


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    """torch raises where the host would wait; the loss is the one of a step that does."""
    model, fused = fused_model("cuda")
    batch, items = on_gpu(make_batch()), torch.tensor(9, device="cuda")
    wanted = step(model, batch, items)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(model, batch, items)
        with pytest.raises(RuntimeError, match="synchroniz"):
            head_input(model, fused_inputs({k: v for k, v in batch.items() if k in ("labels",)}))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        fused.remove()
    assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_a_step_in_a_graph() -> None:
    """One recording serves batches with another number of targets: shapes do not show it."""
    model, fused = fused_model("cuda")
    items = torch.tensor(9, device="cuda")
    batches = [on_gpu(make_batch(seed=seed)) for seed in (0, 2)]
    assert count_targets(batches[0]["labels"]) != count_targets(batches[1]["labels"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = [step(model, batch, items) for batch in batches]
    torch.cuda.current_stream().wait_stream(stream)
    own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batches[0].items()}
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, own, items)
    for batch, expected in zip(batches, wanted, strict=True):
        for name, value in own.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.allclose(captured, expected, rtol=1e-3)
    assert not torch.allclose(wanted[0], wanted[1], rtol=1e-2)
    fused.remove()


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on the GPU."""
    return {k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in batch.items()}
