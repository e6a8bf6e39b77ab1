"""Flat AdamW is torch's AdamW, bit for bit, and its cost does not grow with the parameters.

Bits are compared on this machine's CPU. The plain kernel agrees at every size. The fused
one computes the last elements of a tensor, those that do not fill a vector register, by
other instructions, so there sizes are multiples of 16 elements. `test_gpu.py` has CUDA.
"""

from typing import Any

import pytest
import torch
from torch import nn

from qlora_kit.core.errors import SourceError
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.base import LONGEST_RUN, Block, Run
from qlora_kit.optim.flat import FlatParameters
from tests.optim.tensors import (
    SHAPES,
    counted,
    give_gradients,
    parameters,
    same_bits,
    train,
    zero_grad,
)

EVEN = ((4, 64), (64, 4), (16,), (48, 9), (16, 320))
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}


def never(step: int) -> tuple[int, ...]:
    return ()


def sometimes(step: int) -> tuple[int, ...]:
    """Parameters 1 and 2 miss the first update, 4 misses every second one, 0 comes last."""
    return (
        *((1, 2) if step == 0 else ()),
        *((4,) if step % 2 else ()),
        *((0,) if step < 4 else ()),
    )


@pytest.mark.parametrize("skip", [never, sometimes])
@pytest.mark.parametrize(
    ("shapes", "dtype", "fused"),
    [
        (SHAPES, torch.float32, None),
        (EVEN, torch.float32, True),
        (SHAPES, torch.bfloat16, None),
        (EVEN, torch.bfloat16, True),
    ],
)
def test_bits_are_those_of_torch(shapes: Any, dtype: torch.dtype, fused: Any, skip: Any) -> None:
    """Six updates, with and without missing gradients, decay and state included."""
    ours, theirs = parameters(shapes, dtype=dtype), parameters(shapes, dtype=dtype)
    flat = FlatAdamW(ours, **OPTIONS, fused=fused)
    plain = torch.optim.AdamW(theirs, **OPTIONS, fused=fused, foreach=False if not fused else None)
    train(ours, flat, range(6), skip)
    train(theirs, plain, range(6), skip)
    assert same_bits(ours, theirs)
    found, wanted = flat.state_dict()["state"], plain.state_dict()["state"]
    assert found.keys() == wanted.keys()
    for number, state in wanted.items():
        assert all(torch.equal(found[number][key], state[key]) for key in state)
    late = parameters(shapes, dtype=dtype)
    train(late, FlatAdamW(late, **OPTIONS, fused=fused), range(1, 7), skip)
    assert not same_bits(late, theirs)  # other gradients, other bits


def test_chunks_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU updates what fits its cache at a time: the same bits, across parameters."""
    from qlora_kit.optim import adamw

    ours, theirs = parameters(), parameters()
    train(theirs, FlatAdamW(theirs, **OPTIONS), range(3), sometimes)
    monkeypatch.setattr(adamw, "CPU_CHUNK", 1024)
    train(ours, FlatAdamW(ours, **OPTIONS), range(3), sometimes)
    assert same_bits(ours, theirs)


def test_groups_schedules_and_accumulation() -> None:
    """Two groups with rates of their own under a schedule, batches accumulated in `.grad`."""
    results = []
    for make in (FlatAdamW, torch.optim.AdamW):
        params = parameters()
        groups = [
            {"params": params[::2], "weight_decay": 0.1},
            {"params": params[1::2], "weight_decay": 0.0, "lr": 1e-3},
            {"params": []},
        ]
        optimizer = make(groups, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
        for _ in range(4):
            for batch in range(3):
                x = torch.tensor(0.4 * batch)
                sum(((p + x).sin() * p).sum() for p in params).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert [group["lr"] for group in optimizer.param_groups[:2]] == [1e-2 / 5, 1e-3 / 5]
        results.append(params)
    assert same_bits(*results)


def test_two_dtypes_in_one_group() -> None:
    """Float32 and bfloat16 masters side by side: a block each."""
    results = []
    for make in (FlatAdamW, torch.optim.AdamW):
        params = [
            p
            for pair in zip(parameters(), parameters(dtype=torch.bfloat16), strict=True)
            for p in pair
        ]
        optimizer = make(params, **OPTIONS)
        train(params, optimizer)
        results.append(params)
        if isinstance(optimizer, FlatAdamW):
            assert [b.flat.data.dtype for b in optimizer.blocks] == [torch.float32, torch.bfloat16]
    assert same_bits(*results)


@pytest.mark.parametrize("source", [FlatAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("target", [FlatAdamW, torch.optim.AdamW])
def test_resume_gives_the_same_bits(source: Any, target: Any, tmp_path: Any) -> None:
    """Saved after three updates and resumed, also across the two; skipped parameters too."""
    whole = parameters()
    train(whole, FlatAdamW(whole, **OPTIONS), range(6), sometimes)
    first = parameters()
    optimizer = source(first, **OPTIONS)
    train(first, optimizer, range(3), sometimes)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = target(second, **OPTIONS | {"lr": 7.0})
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(second, resumed, range(3, 6), sometimes)
    assert same_bits(second, whole)
    forgetful = [nn.Parameter(p.detach().clone()) for p in first]
    train(forgetful, target(forgetful, **OPTIONS), range(3, 6), sometimes)
    assert not same_bits(forgetful, whole)


def test_loading_ones_own_state_changes_nothing() -> None:
    """As accelerate does when it wraps an optimizer, before and after the first update."""
    ours, theirs = parameters(), parameters()
    flat, plain = FlatAdamW(ours, **OPTIONS), FlatAdamW(theirs, **OPTIONS)
    for steps in (range(2), range(2, 4)):
        flat.load_state_dict(flat.state_dict())
        train(ours, flat, steps)
        train(theirs, plain, steps)
    assert same_bits(ours, theirs)
    empty = FlatAdamW(parameters(), **OPTIONS).state_dict()
    flat.load_state_dict(empty)  # and an empty state forgets
    assert flat.state_dict()["state"] == {}
    assert not any(block.state["exp_avg"].any() for block in flat.blocks)


def test_foreign_state_is_refused() -> None:
    """Another optimizer's checkpoint, or another adapter's."""
    params = parameters()
    other = torch.optim.SGD(params, momentum=0.9)
    train(params, other, range(1))
    with pytest.raises(SourceError, match="Resume with the optimizer"):
        FlatAdamW(parameters(), **OPTIONS).load_state_dict(other.state_dict())
    shorter = parameters(tuple((2, *shape) for shape in SHAPES))
    adam = FlatAdamW(shorter, **OPTIONS)
    train(shorter, adam, range(1))
    with pytest.raises(SourceError, match="does not fit FlatAdamW"):
        FlatAdamW(parameters(), **OPTIONS).load_state_dict(adam.state_dict())


def calls_per_update(count: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """Ops of one update of `count` parameters, after a first one that allocates."""
    params = parameters(((16, 48),) * count, dtype=dtype)
    optimizer = FlatAdamW(params, **OPTIONS, fused=True)
    for step in range(2):
        give_gradients(params, step)
        with counted() as names:
            optimizer.clip_grad_norm(0.5)
            optimizer.step()
            zero_grad(params)
    return list(names)


def test_calls_do_not_grow_with_the_parameters() -> None:
    """Three or three hundred tensors: the same ops. Per-tensor clipping alone is more."""
    few = calls_per_update(3)
    assert calls_per_update(300) == few
    assert len(few) < 16, few
    assert {"_foreach_copy_", "linalg_vector_norm", "_fused_adamw_"} <= set(few)
    params = parameters(((16, 48),) * 300)
    give_gradients(params, 0)
    with counted() as names:
        torch.optim.AdamW(params, foreach=False).step()
    assert len(names) > 300


def test_changes_are_seen_by_autograd() -> None:
    """A backward pass after an update that changed what it saved is refused, as with torch."""
    params = parameters()
    optimizer = FlatAdamW(params, **OPTIONS)
    loss = sum((p * p).sum() for p in params)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_is_called_with_gradients() -> None:
    """`step(closure)` as torch has it."""
    params = parameters()
    optimizer = FlatAdamW(params, **OPTIONS)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        loss.backward()
        return loss

    first = float(optimizer.step(closure))
    assert float(optimizer.step(closure)) < first


def test_float16_loss_scaling() -> None:
    """torch's scaler around it: the update of unscaled gradients, and none on overflow.

    Nothing of the overflow is left between the parameters for the norms that follow.
    """
    ours, theirs = parameters(), parameters()
    flat, plain = FlatAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        factor = float("inf") if step == 2 else 1.0 + step
        scaler.scale(sum((p * factor).sin().sum() for p in ours)).backward()
        scaler.unscale_(flat)
        flat.clip_grad_norm(0.5)
        before = [p.detach().clone() for p in ours]
        scaler.step(flat)
        scaler.update()
        if step == 2:
            assert same_bits(before, ours)
        else:  # a power of two scales without rounding
            sum((p * factor).sin().sum() for p in theirs).backward()
            nn.utils.clip_grad_norm_(theirs, 0.5)
            plain.step()
        zero_grad(ours + theirs)
    assert scaler.get_scale() == 512.0
    largest = max(float((p - q).abs().max()) for p, q in zip(ours, theirs, strict=True))
    assert largest < 3 * OPTIONS["lr"] * 1e-4  # the two norms differ in the last bits
    assert all(steps == 3 for block in flat.blocks for steps in block.steps)


def test_runs_never_exceed_what_bitsandbytes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long buffers are updated in parts that end between parameters."""
    from qlora_kit.optim import base

    assert LONGEST_RUN < 2**31
    monkeypatch.setattr(base, "LONGEST_RUN", 600)
    block = Block(FlatParameters(parameters(((256,), (256,), (256,), (900,), (256,)))), 0, 32)
    assert block.advance(()) == [
        Run(0, 512, 1),
        Run(512, 768, 1),
        Run(768, 1792, 1),  # one parameter is never cut
        Run(1792, 2048, 1),
    ]
    assert [r.start for r in block.advance((1,))] == [0, 512, 768, 1792]
