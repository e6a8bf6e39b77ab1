"""Flat 8-bit and 32-bit AdamW by bitsandbytes: its own bits, its own checkpoints."""

from typing import Any

import pytest
import torch
from torch import nn

from qlora_kit.core.errors import SourceError
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.bnb_adamw import FlatBnbAdamW
from tests.optim.tensors import counted, give_gradients, parameters, same_bits, train, zero_grad

bnb = pytest.importorskip("bitsandbytes")

SHAPES = ((16, 320), (320, 16), (4, 64), (33, 129), (300,), (5000,), (7,))
"""Above and below 4,096 elements, whole blocks of 256 and not."""
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}


def sometimes(step: int) -> tuple[int, ...]:
    return (1, 5) if step % 2 else ()


def never(step: int) -> tuple[int, ...]:
    return ()


@pytest.mark.parametrize("skip", [never, sometimes])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_bitsandbytes(dtype: torch.dtype, bits: int, skip: Any) -> None:
    """Values and state after six updates, missing gradients included."""
    ours, theirs = parameters(SHAPES, dtype=dtype), parameters(SHAPES, dtype=dtype)
    flat = FlatBnbAdamW(ours, **OPTIONS, bits=bits)
    plain = bnb.optim.AdamW(theirs, **OPTIONS, optim_bits=bits)
    train(ours, flat, range(6), skip)
    train(theirs, plain, range(6), skip)
    assert same_bits(ours, theirs)
    for number, p in enumerate(theirs):
        found = flat._unpack(flat.state_dict()["state"][number])
        assert found.keys() == plain.state[p].keys()
        assert found["step"] == plain.state[p]["step"]
        for name, tensor in plain.state[p].items():
            assert name == "step" or torch.equal(found[name].flatten(), tensor.flatten()), name
    other = parameters(SHAPES, dtype=dtype)
    train(other, FlatBnbAdamW(other, **OPTIONS, bits=40 - bits), range(6), skip)
    assert not same_bits(other, theirs)  # 8 and 32 bits differ


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("source", ["flat", "plain"])
@pytest.mark.parametrize("target", ["flat", "plain"])
def test_resume_gives_the_same_bits(source: str, target: str, bits: int, tmp_path: Any) -> None:
    """Saved after three updates and resumed, also across ours and bitsandbytes' own."""

    def make(kind: str, params: list[nn.Parameter]) -> Any:
        if kind == "flat":
            return FlatBnbAdamW(params, **OPTIONS, bits=bits)
        return bnb.optim.AdamW(params, **OPTIONS, optim_bits=bits)

    whole = parameters(SHAPES)
    train(whole, make("flat", whole), range(6), sometimes)
    first = parameters(SHAPES)
    optimizer = make(source, first)
    train(first, optimizer, range(3), sometimes)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = make(target, second)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(second, resumed, range(3, 6), sometimes)
    assert same_bits(second, whole)


def test_small_ones_and_embeddings_stay_in_32_bits() -> None:
    """Two blocks per group: parameters below 4,096 elements, and those named, in 32 bits."""
    params = parameters(SHAPES)
    flat = FlatBnbAdamW(params, **OPTIONS, bits=8, keep_32bit=[params[0]])
    sizes = {b.bits: [p.numel() for p in b.flat.parameters] for b in flat.blocks}
    assert sizes == {32: [5120, 256, 300, 7], 8: [5120, 4257, 5000]}
    train(params, flat, range(1))
    dtypes = {b.bits: b.state["state1"].dtype for b in flat.blocks}
    assert dtypes == {32: torch.float32, 8: torch.uint8}


def test_states_of_other_bits_are_refused() -> None:
    """A checkpoint of torch's AdamW, and one in 32 bits, do not fit 8 bits."""
    params = parameters(SHAPES)
    for other in (FlatAdamW(params), FlatBnbAdamW(params, bits=32)):
        train(params, other, range(1))
        with pytest.raises(SourceError, match="Resume with the optimizer"):
            FlatBnbAdamW(parameters(SHAPES)).load_state_dict(other.state_dict())


def test_calls_do_not_grow_with_the_parameters() -> None:
    """One call of bitsandbytes per block, for three parameters or thirty."""
    found = []
    for count in (3, 30):
        params = parameters(((16, 320),) * count + ((64,),) * count)
        optimizer = FlatBnbAdamW(params, **OPTIONS)
        for step in range(2):
            give_gradients(params, step)
            with counted() as names:
                optimizer.clip_grad_norm(0.5)
                optimizer.step()
                zero_grad(params)
        found.append(list(names))
    assert found[0] == found[1]
    updates = [name for name in found[0] if name.startswith("optimizer_update")]
    assert updates == ["optimizer_update_8bit_blockwise", "optimizer_update_32bit"]


def test_changes_are_seen_by_autograd() -> None:
    """bitsandbytes' kernels count no version; the optimizer does."""
    params = parameters(SHAPES)
    optimizer = FlatBnbAdamW(params, **OPTIONS)
    loss = sum((p * p).sum() for p in params)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_paging_on_a_cpu_is_ordinary_memory() -> None:
    """There is nothing to page: the same bits as unpaged."""
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    train(ours, FlatBnbAdamW(ours, **OPTIONS, paged=True))
    train(theirs, FlatBnbAdamW(theirs, **OPTIONS))
    assert same_bits(ours, theirs)


def test_what_lies_between_parameters_is_zero_after_a_resume() -> None:
    """The last block of a parameter is restored whole: its scale is not taken from padding."""

    def push(params: list[nn.Parameter], optimizer: Any, size: float) -> None:
        params[0].grad = torch.zeros(5000)
        params[0].grad[-1] = size
        optimizer.step()

    results = []
    for kind in (FlatBnbAdamW, bnb.optim.AdamW8bit):
        first = parameters(((5000,),))
        optimizer = kind(first, **OPTIONS)
        push(first, optimizer, 1.0)
        second = [nn.Parameter(p.detach().clone()) for p in first]
        resumed = kind(second, **OPTIONS)
        resumed.load_state_dict(optimizer.state_dict())
        push(second, resumed, -0.9)  # cancels the largest value of the block
        push(second, resumed, 1e-3)
        results.append(second)
        if isinstance(resumed, FlatBnbAdamW):
            (block,) = resumed.blocks
            scale = block.part("absmax1", 0)[-1]
            assert float(scale) < 0.02  # padding of code 0 would have kept it near 0.8
    assert same_bits(*results)
