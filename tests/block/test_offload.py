"""Tensors come back from host memory as they were; pages serve batches of any length.

A store whose host and device are both the CPU stands for one with a GPU: it divides, copies and
hands out memory as that does. Streams are for tests/block/test_gpu.py.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kit.block import offload, tiles
from qlora_kit.block.install import fuse_blocks
from qlora_kit.block.offload import HostStore, OutlinedStore
from tests.block.helpers import FAMILIES, loss_and_gradients, make, maskless

PAGE, BLOCK = 4096, 8 * 4096


class CpuStore(HostStore):
    """Copies at once, from the CPU to the CPU."""

    def _takes(self, tensor: Tensor) -> bool:
        return True

    def _block(self) -> Sequence[Tensor]:
        return torch.zeros(BLOCK, dtype=torch.uint8).split(PAGE)

    def _memory(self, item: Any) -> Tensor:
        return torch.empty(item.nbytes // item.dtype.itemsize, dtype=item.dtype)

    def _wait(self, event: Any) -> None:
        """Nothing is under way."""

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], *, out: bool) -> Any:
        for host, device in pairs:
            host.copy_(device) if out else device.copy_(host)
        return "done"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, blocks and tensors."""
    monkeypatch.setattr(offload, "PAGE_BYTES", PAGE)
    monkeypatch.setattr(offload, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 100)


def tensors(rows: int) -> list[Tensor | None]:
    """What a layer might keep: odd sizes, several dtypes, room beside rows, one too small."""
    wide = torch.randn(rows, 40)
    return [
        torch.randn(rows, 33).to(torch.bfloat16),
        None,
        wide[:, :32],
        torch.randn(rows, dtype=torch.float64),
        torch.randn(3),
    ]


def twin(tensor: Tensor) -> Tensor:
    """A copy of the same layout."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> bool:
    """Whether values, dtypes and strides are."""
    return all(
        (a is None and b is None)
        or (
            a is not None
            and b is not None
            and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            and torch.equal(a, b)
        )
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("ahead", [True, False])
def test_what_was_put_comes_back(ahead: bool) -> None:
    """In reverse order, after the originals were written over; several steps, odd lengths."""
    store = CpuStore()
    for rows in (100, 37, 211, 100):
        kept = [tensors(rows + layer) for layer in range(4)]
        copies = [[None if t is None else twin(t) for t in layer] for layer in kept]
        tickets = [store.put(layer, kept[layer]) for layer in range(4)]
        for layer in kept:
            for tensor in layer:
                if tensor is not None and tensor.nbytes >= 100:
                    tensor.zero_()
        for layer in reversed(range(4)):
            found = store.take(tickets[layer], ahead=ahead)
            assert same(found, copies[layer]), layer
            if not ahead:
                store.prefetch(tickets[layer])
    assert store.host_bytes % BLOCK == 0


@pytest.mark.parametrize("ahead", [True, False])
def test_the_layer_before_is_asked_for_ahead(ahead: bool) -> None:
    """Its copies are on their way when the layer behind is computed again, if that is wanted."""
    store = CpuStore()
    tickets = [store.put(layer, tensors(100 + layer)) for layer in range(3)]
    store.take(tickets[2], ahead=ahead)
    assert (tickets[1].arrived is not None) == ahead
    assert tickets[0].arrived is None  # one layer at a time
    moved = store.moved_bytes
    store.take(tickets[1], ahead=False)
    assert (store.moved_bytes == moved) == ahead


def test_large_ones_and_inputs_alone_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The computing stream waits for those before the next layer gets wide, and for no others."""
    waits: list[Any] = []
    monkeypatch.setattr(CpuStore, "_wait", lambda self, event: waits.append(event))
    store = CpuStore()
    first = store.put(0, tensors(100))
    store.settle_large()
    assert not first.late
    assert waits == []
    inputs = store.put(1, [torch.randn(100, 33)], twice=True)
    store.settle_large()
    assert inputs.late
    assert len(waits) == 2
    monkeypatch.setattr(offload, "LATE_BYTES", 20_000)
    assert not store.put(2, tensors(10)).late
    assert store.put(3, tensors(1000)).late


def test_pages_serve_other_lengths() -> None:
    """The memory of the longest batch is enough for all that come after."""
    store = CpuStore()

    def step(rows: int) -> None:
        tickets = [store.put(layer, tensors(rows)) for layer in range(3)]
        for ticket in reversed(tickets):
            store.take(ticket)

    step(300)
    most = store.host_bytes
    for rows in (299, 150, 7, 301 - 2, 300):
        step(rows)
    assert store.host_bytes == most


def test_a_pass_without_a_backward_gives_its_pages_back() -> None:
    """When nobody can ask for them any more: the next pass has begun."""
    store = CpuStore()
    for _ in range(20):
        for layer in range(3):
            store.put(layer, tensors(100))
    assert store.host_bytes < 4 * 3 * 100 * 40 * 8


def test_no_more_is_pinned_than_a_page_per_layer_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """300,000 tokens of an 8B model: 73.2 GiB, and not 128 as powers of two."""
    for name, size in {"PAGE_BYTES": 32 << 20, "BLOCK_BYTES": 256 << 20}.items():
        monkeypatch.setattr(offload, name, size)
    store = OutlinedStore()
    for layer in range(32):
        store.put(layer, [torch.empty(300_000, 4096, dtype=torch.bfloat16, device="meta")])
    exact = 32 * 300_000 * 4096 * 2
    assert exact < store.host_bytes < exact + 32 * (32 << 20) + (256 << 20)


def test_how_many_layers_leave_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the usual size, one of the large."""
    store = CpuStore()
    for layer in range(5):
        store.put(layer, [torch.randn(100, 10)])
    assert len(store._leaving) == 2
    monkeypatch.setattr(offload, "LARGE_BYTES", 1000)
    store = CpuStore()
    for layer in range(5):
        store.put(layer, [torch.randn(100, 10)])
    assert len(store._leaving) == 1


@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_for_twice_comes_back_twice(ahead: bool) -> None:
    """As tensors of its own each time: the first may be written over. Then its pages are free."""
    store = CpuStore()
    kept = [tensors(100 + layer) for layer in range(3)]
    copies = [[None if t is None else twin(t) for t in layer] for layer in kept]
    tickets = [store.put(layer, kept[layer], twice=True) for layer in range(3)]
    for layer in reversed(range(3)):
        first = store.take(tickets[layer], ahead=ahead)
        assert same(first, copies[layer])
        for tensor in first[:-1]:  # the last is too small to have left
            if tensor is not None:
                tensor.zero_()
        assert not tickets[layer].twice
        assert same(store.take(tickets[layer], ahead=False), copies[layer])
        assert tickets[layer].pages == []
    most = store.host_bytes
    for layer in range(3):
        store.put(layer, tensors(100))
    assert store.host_bytes == most


def test_what_stays_is_not_for_twice() -> None:
    """A first tensor that is too small to leave would be written over where it lies."""
    assert not CpuStore().put(0, [torch.randn(3), torch.randn(100)], twice=True).twice
    assert not HostStore().put(0, [torch.randn(100)], twice=True).twice
    assert not CpuStore().put(0, [torch.randn(100)]).twice


class Forgetful(CpuStore):
    """Gives the same memory the second time, whatever became of it."""

    def _memory(self, item: Any) -> Tensor:
        return torch.zeros(item.nbytes // item.dtype.itemsize, dtype=item.dtype)

    def take(self, ticket: Any, *, ahead: bool = True) -> list[Tensor | None]:
        twice = ticket.twice
        found = super().take(ticket, ahead=ahead)
        if not twice:
            found = [None if t is None else torch.zeros_like(t) for t in found]
        return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs dropped, written over by what comes behind attention, and brought back."""
    monkeypatch.setattr(tiles, "ATTENTION_ROWS", 1)
    model, _ = make(family)
    fused = fuse_blocks(model, "recompute_all", tile=32)
    loss, wanted = loss_and_gradients(model, **maskless())
    fused.set_policy("offload")
    taken = []
    for store in (CpuStore(), Forgetful()):
        fused.host = store
        moved = store.take

        def counting(ticket: Any, *, ahead: bool = True, moved: Any = moved) -> Any:
            taken.append((ticket.index, ticket.twice))
            return moved(ticket, ahead=ahead)

        monkeypatch.setattr(store, "take", counting)
        found_loss, found = loss_and_gradients(model, **maskless())
        assert found_loss == loss
        right = all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert right == (type(store) is CpuStore)  # a wrong input would be seen
    last = len(fused.layers) - 1
    assert taken[:2] == [(last, True), (last, False)]
    assert len(taken) == 2 * 2 * len(fused.layers)


def test_without_tiles_inputs_come_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make()
    fused = fuse_blocks(model, "offload", tile=None)
    fused.host = CpuStore()
    loss_and_gradients(model, **maskless())
    once = fused.host.moved_bytes
    fused.tile, fused.host = 32, CpuStore()
    loss_and_gradients(model, **maskless())
    assert fused.host.moved_bytes == 1.5 * once
