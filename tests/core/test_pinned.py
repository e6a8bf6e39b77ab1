"""Host memory in blocks: touched by several threads, alive as long as a view of it."""

import gc
import weakref

import pytest
import torch

from qlora_kit.block.offload import BLOCK_BYTES, PAGE_BYTES
from qlora_kit.core import pinned
from qlora_kit.core.pinned import pinned_block, pinned_copy, registered_peak_bytes, touched

MIB = 1 << 20


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("size", [4096, MIB, 3 * MIB + 4096])
def test_every_byte_is_touched(monkeypatch, threads, size):
    """Threads cover the block and nothing behind it; a byte left out would be seen."""
    monkeypatch.setattr(pinned.os, "cpu_count", lambda: 8)
    real, covered = pinned.ctypes.memset, torch.zeros(size + 1, dtype=torch.int32)
    begin: list[int] = []

    def memset(address: int, value: int, count: int) -> None:
        begin.append(address)
        parts.append((address, count))
        real(address, value, count)

    parts: list[tuple[int, int]] = []
    monkeypatch.setattr(pinned.ctypes, "memset", memset)
    _, data = touched(size, threads=threads)
    for address, count in parts:
        at = address - data.data_ptr()
        assert 0 <= at < at + count <= size
        covered[at : at + count] += 1
    assert bool((covered[:size] == 1).all())
    assert int(covered[size]) == 0
    assert data.dtype == torch.uint8
    assert not data.any()


def test_a_view_keeps_it_alive():
    mapping, data = touched(MIB)
    seen = weakref.ref(mapping)
    page = data.split(MIB // 4)[2]
    del mapping, data
    gc.collect()
    page.fill_(7)
    assert seen() is not None
    assert int(page.sum()) == 7 * MIB // 4
    del page
    gc.collect()
    assert seen() is None


def test_what_is_registered_is_counted_and_let_go(monkeypatch):
    """With a CUDA that only remembers: unregistered once, before the memory goes."""
    known: dict[int, int] = {}
    order: list[str] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            known[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            order.append("unregistered")
            known.pop(address)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("waited"))
    registered_peak_bytes(reset=True)
    before = registered_peak_bytes()
    block = pinned_block(MIB)
    assert known == {block.data_ptr(): MIB}
    pages = block.split(MIB // 2)
    del block
    gc.collect()
    assert len(known) == 1
    assert registered_peak_bytes() == before + MIB
    del pages
    gc.collect()
    assert order == ["waited", "unregistered"]
    assert known == {}
    assert registered_peak_bytes(reset=True) == before + MIB
    assert registered_peak_bytes() == before


@pytest.mark.parametrize("shape", [(7,), (0, 4), (3, 5), (1025, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_a_copy_has_whole_pages_of_its_own(monkeypatch, shape, dtype):
    """Of a tensor in any layout; as many pages as its values take."""
    sizes = []

    def block(size: int) -> torch.Tensor:
        sizes.append(size)
        return touched(size)[1]

    monkeypatch.setattr(pinned, "pinned_block", block)
    source = torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    found = pinned_copy(source)
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(found, source)
    assert found.data_ptr() != source.data_ptr() or not source.numel()
    page = pinned.mmap.PAGESIZE
    assert sizes == [max(1, -(-source.nbytes // page)) * page]


@pytest.mark.gpu
def test_copies_are_asynchronous_and_right():
    block = pinned_block(BLOCK_BYTES)
    assert block.is_pinned()
    page = block.split(PAGE_BYTES)[3]
    data = torch.randint(0, 256, (PAGE_BYTES,), dtype=torch.uint8, device="cuda")
    page.copy_(data, non_blocking=True)
    back = torch.empty_like(data)
    back.copy_(page, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(back, data)
    assert registered_peak_bytes() >= BLOCK_BYTES
