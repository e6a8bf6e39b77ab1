"""Storage moves, parameters stay: values, gradients, saving, and everything that interferes."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import AdapterError
from qlora_kit.optim.flat import ALIGNMENT, FlatParameters, why_not_flat
from tests import tiny_models
from tests.optim.tensors import give_gradients, parameters, same_bits, values, zero_grad


def test_parameters_become_views_of_one_buffer() -> None:
    """The same objects, the same values, aligned, zero between them."""
    params = parameters()
    before, ids = values(params), [id(p) for p in params]
    flat = FlatParameters(params)
    assert [id(p) for p in flat.parameters] == ids
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    step = ALIGNMENT * flat.data.element_size()
    start = flat.data.data_ptr()
    assert all((p.data_ptr() - start) % step == 0 for p in params)
    assert len({p.untyped_storage().data_ptr() for p in params}) == 1
    assert flat.data.double().sum() == pytest.approx(sum(float(p.double().sum()) for p in before))
    flat.data[flat.offsets[1]] = 17.0
    assert params[1].detach().flatten()[0] == 17.0


def model_of(params: list[nn.Parameter], x: Tensor) -> Tensor:
    """A loss with a different gradient for each parameter and each x."""
    return sum(((p * (i + 1) + x).sin() * x).sum() for i, p in enumerate(params))


def test_gradients_equal_those_of_separate_tensors() -> None:
    """Three updates of three accumulated batches; `.grad` is None in between, as Trainer has it."""
    flat_params, plain = parameters(), parameters()
    flat = FlatParameters(flat_params)
    for update in range(3):
        for batch in range(3):
            x = torch.tensor(0.3 * update + batch)
            model_of(flat_params, x).backward()
            model_of(plain, x).backward()
        gathered = flat.gather()
        assert flat.gather() is gathered  # a second call changes nothing
        for p, q in zip(flat_params, plain, strict=True):
            assert torch.equal(p.grad, q.grad)
            assert p.grad.untyped_storage().data_ptr() == gathered.untyped_storage().data_ptr()
        model_of(flat_params, x).backward()  # adds to the views, in place
        model_of(plain, x).backward()
        assert flat.gather() is gathered
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(flat_params, plain, strict=True))
        zero_grad(flat_params + plain)
        flat.release_grad()
    model_of(plain, torch.tensor(0.1)).backward()
    model_of(flat_params, torch.tensor(0.2)).backward()
    assert not torch.equal(plain[0].grad, flat_params[0].grad)  # the comparison can fail


def test_missing_gradients_are_zero_and_named() -> None:
    """None stays None; its place in the buffer is zero even where old values were."""
    params = parameters()
    flat = FlatParameters(params, keep_grad=True)
    give_gradients(params, 0)
    flat.gather()
    assert flat.missing == ()
    zero_grad(params)
    give_gradients(params, 1, skip=(0, 4))
    gathered = flat.gather()
    assert flat.missing == (0, 4)
    assert params[0].grad is None
    expected = sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None)
    assert float(gathered.double().square().sum()) == pytest.approx(expected, rel=1e-12)
    zero_grad(params)
    assert flat.gather() is None


def test_gradient_buffer_goes_with_the_gradients() -> None:
    """Memory of gradients exists from the backward to `zero_grad`; with keep_grad it stays."""
    params = parameters()
    flat = FlatParameters(params)
    give_gradients(params, 0)
    buffer = weakref.ref(flat.gather())
    flat.release_grad()
    gc.collect()
    assert params[0].grad is not None  # still readable after the update
    zero_grad(params)
    gc.collect()
    assert buffer() is None
    kept = FlatParameters(parameters(seed=1), keep_grad=True)
    addresses = set()
    for step in range(3):
        give_gradients(list(kept.parameters), step)
        addresses.add(kept.gather().data_ptr())
        zero_grad(list(kept.parameters))
        kept.release_grad()
    assert len(addresses) == 1


def test_open_grad_collects_what_backward_adds() -> None:
    """Zeroed views in `.grad` before the backward: the same gradients, no copy afterwards."""
    params, plain = parameters(), parameters()
    flat = FlatParameters(params)
    opened = flat.open_grad()
    for batch in (0.1, 0.7):
        model_of(params, torch.tensor(batch)).backward()
        model_of(plain, torch.tensor(batch)).backward()
    assert flat.gather() is opened
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
    zero_grad(params)
    again = flat.open_grad(zero=False)  # what a replayed graph has written
    assert again is opened
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, plain, strict=True))


def test_replaced_storage_is_taken_back() -> None:
    """`p.data = ...`, a round trip through another dtype, another flat buffer: values count."""
    params = parameters()
    flat = FlatParameters(params)
    params[2].data = torch.full_like(params[2], 5.0)
    params[3].data = params[3].data.double().float()
    wanted = values(params)
    flat.reclaim()
    assert all(torch.equal(p, w) for p, w in zip(params, wanted, strict=True))
    assert params[2].untyped_storage().data_ptr() == flat.data.untyped_storage().data_ptr()
    second = FlatParameters(params)
    params[0].data.mul_(2)
    flat.reclaim()
    assert torch.equal(params[0], wanted[0] * 2)
    assert second.data.data_ptr() != params[0].data_ptr()
    params[1].data = params[1].data.double()
    with pytest.raises(AdapterError, match="Move the model first"):
        flat.reclaim()


def test_what_cannot_be_flat_is_said() -> None:
    """Ties, subclasses, meta tensors, several dtypes; neighbours in one storage are fine."""
    params = parameters()
    assert why_not_flat(params) is None
    FlatParameters(params)
    assert why_not_flat(params, params) is None  # disjoint views of one buffer
    frozen = torch.zeros(10)
    tied = nn.Parameter(frozen[4:])
    assert "shares its memory" in why_not_flat([tied], [frozen])
    assert why_not_flat([tied], [frozen[:4]]) is None
    assert "shares its memory" in why_not_flat([params[0], params[0]])
    rows = torch.zeros(4, 4)
    crossed = nn.Parameter(rows[:, :2])
    assert "shares its memory" in why_not_flat([crossed], [rows[1:2, 2:]])  # interleaved: refused

    class Sharded(nn.Parameter):
        pass

    assert "Sharded" in why_not_flat([Sharded(torch.zeros(2))])
    assert "no memory" in why_not_flat([nn.Parameter(torch.empty(2, device="meta"))])
    mixed = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    with pytest.raises(AdapterError, match="2 dtypes"):
        FlatParameters(mixed)
    with pytest.raises(AdapterError, match="Sharded"):
        FlatParameters([Sharded(torch.zeros(2))])


def test_an_adapter_saves_and_detaches_as_before(tmp_path: Path) -> None:
    """Files hold each tensor once, in full; copies of the model are its own."""
    model = tiny_models.build("llama")
    adapter = attach(model, LoRA(rank=4), seed=3)
    adapter.save(tmp_path / "before")
    flat = FlatParameters(list(adapter.parameters()))
    adapter.save(tmp_path / "after")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    twin = copy.deepcopy(model)
    flat.data.add_(1.0)
    a = next(p for n, p in twin.named_parameters() if "lora_A" in n)
    b = next(p for n, p in model.named_parameters() if "lora_A" in n)
    assert torch.equal(a + 1.0, b)
    adapter.load_state_dict({n: t.clone() for n, t in load_into_fresh(tmp_path / "after").items()})
    assert same_bits([a], [b])
    adapter.detach_from_model()
    assert not any("lora" in n for n, _ in model.named_parameters())


def load_into_fresh(folder: Path) -> dict[str, Tensor]:
    """The state of an adapter loaded onto a fresh model."""
    return load_adapter(tiny_models.build("llama"), folder).state_dict()
