"""Flat optimizers on a GPU: the same bits, real paging, and a host that never waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.base import FlatOptimizer
from qlora_kit.optim.bnb_adamw import FlatBnbAdamW
from qlora_kit.optim.corrected import CorrectedGradient
from qlora_kit.optim.create import flat_optimizer
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.optim.tensors import (
    SHAPES,
    give_gradients,
    parameters,
    same_bits,
    train,
    values,
    zero_grad,
)
from tests.train.helpers import arguments, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}
BLOCKS = (*SHAPES, (5000,), (33, 129))
"""With parameters in 8 bits whose last block of 256 is not full."""
LONG_CYCLES = 1_000_000_000
"""A kernel of about half a second, behind which the host can run ahead."""

KINDS: dict[str, Callable[[list[nn.Parameter]], FlatOptimizer]] = {
    "adamw": lambda params: FlatAdamW(params, **OPTIONS),
    "adamw 8 bit": lambda params: FlatBnbAdamW(params, **OPTIONS),
    "paged 32 bit": lambda params: FlatBnbAdamW(params, **OPTIONS, bits=32, paged=True),
    "paged 8 bit": lambda params: FlatBnbAdamW(params, **OPTIONS, paged=True),
}


def sometimes(step: int) -> tuple[int, ...]:
    return (1, 5) if step % 2 else ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["torch", "32", "8"])
def test_bits_are_those_of_the_library(kind: str, dtype: torch.dtype) -> None:
    """torch's fused kernel and bitsandbytes' per tensor, gradients missing now and then."""
    import bitsandbytes as bnb

    ours, theirs = (parameters(BLOCKS, dtype=dtype, device="cuda") for _ in range(2))
    if kind == "torch":
        flat: Any = FlatAdamW(ours, **OPTIONS)
        plain: Any = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    else:
        flat = FlatBnbAdamW(ours, **OPTIONS, bits=int(kind))
        plain = bnb.optim.AdamW(theirs, **OPTIONS, optim_bits=int(kind))
    train(ours, flat, range(6), sometimes)
    train(theirs, plain, range(6), sometimes)
    assert same_bits(ours, theirs)
    other = parameters(BLOCKS, dtype=dtype, device="cuda")
    train(other, flat.__class__(other, **OPTIONS | {"lr": 2e-2}), range(6), sometimes)
    assert not same_bits(other, theirs)


@pytest.mark.parametrize("bits", [8, 32])
def test_paged_state_is_one_buffer(bits: int, tmp_path: Path) -> None:
    """However small the adapter: managed memory, each parameter a part of it, also after resume."""
    params = parameters(((16, 256), (256, 16)) * 20, device="cuda")
    total = sum(p.numel() for p in params)
    flat = FlatBnbAdamW(params, **OPTIONS, bits=bits, paged=True)
    train(params, flat, range(2))
    torch.save(flat.state_dict(), tmp_path / "optimizer.pt")
    resumed = FlatBnbAdamW(params, **OPTIONS, bits=bits, paged=True)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for optimizer in (flat, resumed):
        (block,) = optimizer.blocks
        for name in ("state1", "state2"):
            buffer = block.state[name]
            assert getattr(buffer, "is_paged", False)
            assert buffer.numel() == total
            assert buffer.element_size() == bits // 8
            ends = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
            parts = [block.part(name, i) for i in range(len(params))]
            assert all(ends[0] <= part.data_ptr() < ends[1] for part in parts)
            assert any(bool(part.any()) for part in parts)


@pytest.mark.parametrize("bits", [8, 32])
def test_paging_changes_no_bits(bits: int, tmp_path: Path) -> None:
    """Paged, unpaged, and paged with a resume in the middle."""
    groups = [parameters(BLOCKS, device="cuda") for _ in range(3)]
    for params, paged in zip(groups, (False, True, True), strict=True):
        optimizer = FlatBnbAdamW(params, **OPTIONS, bits=bits, paged=paged)
        train(params, optimizer, range(3))
        if params is groups[2]:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            optimizer = FlatBnbAdamW(params, **OPTIONS, bits=bits, paged=True)
            saved = torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(saved)
        train(params, optimizer, range(3, 6))
    assert same_bits(groups[0], groups[1])
    assert same_bits(groups[0], groups[2])


def adapted_layers() -> list[LoRALinear]:
    config = LoRAFA(rank=16, corrected_gradient=True)
    with torch.device("cuda"):
        linears = [nn.Linear(256, n).requires_grad_(False) for n in (512, 512, 320)]
    return [LoRALinear(linear, f"m{i}", config, seed=i) for i, linear in enumerate(linears)]


def update(layers: list[LoRALinear], correction: CorrectedGradient, flat: FlatOptimizer) -> Tensor:
    """What an update does after the backward pass."""
    correction.apply()
    norm = flat.clip_grad_norm(0.5)
    flat.step()
    zero_grad([layer.lora_B for layer in layers])
    return norm


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_waits_for_nothing(kind: str) -> None:
    """Torch's own check finds no synchronisation, and the host runs ahead of a long kernel."""
    layers = adapted_layers()
    params = [layer.lora_B for layer in layers]
    correction, flat = CorrectedGradient(layers), KINDS[kind](params)
    for step in range(3):
        give_gradients(params, step)
        update(layers, correction, flat)
    give_gradients(params, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            params[0].sum().item()  # the check bites
        update(layers, correction, flat)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    give_gradients(params, 4)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    norm = update(layers, correction, flat)
    behind = torch.cuda.Event()
    behind.record()
    assert not behind.query(), "the host waited for the GPU"
    assert float(norm) > 0  # reading it waits
    assert behind.query()


def test_bitsandbytes_itself_waits() -> None:
    """What the test above would catch, as long as its per-tensor optimizer does it."""
    import bitsandbytes as bnb

    params = parameters(device="cuda")
    plain = bnb.optim.AdamW8bit(params)
    train(params, plain, range(2))
    give_gradients(params, 2)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_CYCLES)
    plain.step()
    behind = torch.cuda.Event()
    behind.record()
    if not behind.query():
        pytest.skip("this bitsandbytes does not wait any more")


@pytest.mark.parametrize("kind", KINDS)
def test_another_stream_gives_the_same_bits(kind: str) -> None:
    """bitsandbytes' kernels run on the default stream: both wait for each other."""
    results = []
    for side in (False, True):
        params = parameters(((16, 1024),) * 4, device="cuda")
        flat = KINDS[kind](params)
        train(params, flat, range(2))
        give_gradients(params, 2)
        gradients = [p.grad for p in params]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            for factor in range(1, 4):
                torch.cuda._sleep(20_000_000)  # gradients come late
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = gradient * factor
                flat.clip_grad_norm(0.5)
                flat.step()
                zero_grad(params)
        torch.cuda.synchronize()
        results.append(params)
    assert same_bits(*results)


def test_gradients_of_a_captured_graph() -> None:
    """Forward, backward and gathering replayed; the update outside reads the fixed buffer."""
    eager, captured = (parameters(device="cuda") for _ in range(2))
    x = torch.zeros((), device="cuda")

    def backward(params: list[nn.Parameter]) -> None:
        sum(((p + x).sin() * p).sum() for p in params).backward()

    plain, flat = FlatAdamW(eager, **OPTIONS), FlatAdamW(captured, **OPTIONS)
    buffer = flat.blocks[0].flat
    buffer.keep_grad = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            backward(captured)
            buffer.gather()
            zero_grad(captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(captured)
        buffer.gather()
    zero_grad(captured)
    for step in range(4):
        x.fill_(0.3 * step)
        graph.replay()
        buffer.open_grad(zero=False)
        backward(eager)
        for params, optimizer in ((captured, flat), (eager, plain)):
            optimizer.clip_grad_norm(0.5)
            optimizer.step()
            zero_grad(params)
    assert same_bits(eager, captured)


def test_gradients_leave_no_memory_behind() -> None:
    """After `zero_grad` only values and state are held."""
    params = parameters(((512, 512),) * 8, device="cuda")
    flat = FlatAdamW(params, **OPTIONS)
    train(params, flat, range(1))
    held = torch.cuda.memory_allocated()
    for step in range(3):
        give_gradients(params, step)
        flat.clip_grad_norm(0.5)
        flat.step()
        assert torch.cuda.memory_allocated() > held
        zero_grad(params)
        assert torch.cuda.memory_allocated() == held


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_float16_with_a_loss_scale(optimizer: str, tmp_path: Path) -> None:
    """The Trainer with fp16: unscaled norms, overflows skipped, everything stays finite."""
    model = tiny_models.build("llama", dtype=torch.float16).to("cuda")
    adapter = attach(model, LoRA(rank=64, targets=("q_proj", "v_proj")), seed=3)
    settings: dict[str, Any] = {"use_cpu": False, "fp16": True, "optim": optimizer, "max_steps": 12}
    trainer = Trainer(
        model,
        adapter,
        arguments(tmp_path, **settings),
        train_dataset=rows(20),
        data_collator=PadCollator(0, 8),
    )
    before = values(list(adapter.parameters()))
    trainer.train()
    assert flat_optimizer(trainer.optimizer) is not None
    after = list(adapter.parameters())
    assert all(bool(p.isfinite().all()) for p in after)
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert trainer.accelerator.scaler is not None
    norms = [r["grad_norm"] for r in trainer.state.log_history if "loss" in r]
    assert 0 < min(norms) < 1e3  # the scale, 65,536 at first, is divided out before the norm


def test_shapes_cover_both_kinds_of_state() -> None:
    """The tests above mean 8-bit and 32-bit blocks at once."""
    sizes = [torch.Size(shape).numel() for shape in BLOCKS]
    assert min(sizes) < 4096 <= max(sizes)
