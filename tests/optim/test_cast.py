"""The low-precision copy holds what the masters hold now, however it got there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_kit.adapters.config import LoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.cast import CastCopy
from qlora_kit.optim.flat import FlatParameters
from qlora_kit.train.checkpoints import restore_adapter
from tests import tiny_models
from tests.optim.tensors import counted, parameters, train

LOW = torch.bfloat16


def fresh(copy: CastCopy, params: list[nn.Parameter]) -> bool:
    return all(torch.equal(copy[p], p.detach().to(LOW)) for p in params)


def by_data(params: list[nn.Parameter]) -> None:
    params[1].data.add_(1.0)


def by_copy(params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        params[2].copy_(torch.ones_like(params[2]))


def by_detached(params: list[nn.Parameter]) -> None:
    params[0].detach().mul_(3.0)


def by_replacing(params: list[nn.Parameter]) -> None:
    params[4].data = torch.ones_like(params[4])


def by_numpy(params: list[nn.Parameter]) -> None:
    params[3].detach().numpy()[...] = 2.0  # not even torch's own code


def by_optimizer(params: list[nn.Parameter]) -> None:
    train(params, FlatAdamW(params, lr=0.1), range(1))  # moves them to a buffer of its own


EDITS = (by_data, by_copy, by_detached, by_replacing, by_numpy, by_optimizer)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_every_change_is_in_the_next_copy(
    edit: Callable[[list[nn.Parameter]], None], flat: bool
) -> None:
    """Flat or not, whoever wrote: one refresh, and addresses stay."""
    params = parameters()
    if flat:
        FlatParameters(params)
    copy = CastCopy(params, LOW)
    addresses = [copy[p].data_ptr() for p in params]
    assert fresh(copy, params)
    edit(params)
    assert not fresh(copy, params)  # the edit shows
    copy.refresh()
    assert fresh(copy, params)
    by_data(params)
    copy.refresh()
    assert fresh(copy, params)
    assert [copy[p].data_ptr() for p in params] == addresses


def test_no_counter_sees_an_edit_through_data() -> None:
    """Why `refresh` does not ask: none of torch's version counters moves."""
    params = parameters()
    flat = FlatParameters(params)
    before = (flat.data._version, [p._version for p in params])
    by_data(params)
    assert (flat.data._version, [p._version for p in params]) == before


def test_before_every_forward_pass_of_a_model(tmp_path: Path) -> None:
    """A hook on the model: an update, a restored checkpoint and an edit are all seen."""
    model = tiny_models.build("llama")
    adapter = attach(model, LoRA(rank=4), seed=3)
    adapter.save(tmp_path / "checkpoint")
    params = list(adapter.parameters())
    optimizer = FlatAdamW(params, lr=0.1)
    copy = CastCopy(params, LOW)
    handle = copy.refresh_before(model)
    ids = tiny_models.tokens()
    for change in (
        lambda: train(params, optimizer, range(1)),
        lambda: restore_adapter(adapter, tmp_path / "checkpoint"),
        lambda: by_data(params),
    ):
        change()
        assert not fresh(copy, params)
        model(ids)
        assert fresh(copy, params)
    handle.remove()
    by_data(params)
    model(ids)
    assert not fresh(copy, params)


def test_one_kernel_when_flat_and_one_call_when_not() -> None:
    """The number of ops does not depend on the number of parameters."""
    many = parameters(((16, 48),) * 200)
    scattered = CastCopy(many, LOW)
    with counted() as names:
        scattered.refresh()
    assert names == ["_foreach_copy_"]
    FlatParameters(many)
    copy = CastCopy(reversed(many), LOW)  # laid out as they lie, whatever the order given
    with counted() as names:
        copy.refresh()
    assert names == ["copy_"]
    assert fresh(copy, many)
