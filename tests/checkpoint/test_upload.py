"""Copies through a ring of buffers: every byte arrives, and no buffer is written while it is read.

The CPU stands in for a GPU here, with buffers of a few bytes; tests/load/test_gpu.py has the GPU.
"""

import mmap

import pytest
import torch

from qlora_kit.checkpoint.upload import Uploader, _Slot

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.int64]


def random(shape, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same(came, wanted):
    """Equal in shape, dtype and bytes (a random pattern may be a NaN)."""
    assert came.shape == wanted.shape
    assert came.dtype == wanted.dtype
    flat = (t.contiguous().view(-1).view(torch.uint8) for t in (came, wanted))
    return torch.equal(*flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 7), (64, 3), (2, 3, 11)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_byte_arrives(dtype, shape, threads):
    """Tensors of no, one and many buffers, the last one partly full."""
    uploader = Uploader(CPU, slot_bytes=64, threads=threads)
    for seed in range(3):  # the ring goes on where it was
        wanted = random(shape, dtype, seed)
        came = uploader.upload(wanted)
        assert same(came, wanted)
        assert came.is_contiguous()
    if wanted.numel():
        assert came.data_ptr() != wanted.data_ptr()
        assert not same(came, random(shape, dtype, 99)) or wanted.numel() < 8  # `same` can fail


def test_a_transposed_tensor_arrives_contiguous():
    wanted = random((8, 24), torch.bfloat16).T
    came = Uploader(CPU, slot_bytes=64).upload(wanted)
    assert came.is_contiguous()
    assert same(came, wanted)


def test_a_view_of_a_file_at_an_odd_address(tmp_path):
    """Headers have any length, so tensors in a mapped file start anywhere."""
    data = random((1000,))
    (tmp_path / "file").write_bytes(b"x" * 13 + bytes(data.tolist()))
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    view = torch.frombuffer(mapped, dtype=torch.uint8)[13:]
    assert same(Uploader(CPU, slot_bytes=64).upload(view), data)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_buffer_is_filled_only_after_its_copy_was_waited_for(threads, waits, monkeypatch):
    """Between the copy that reads a buffer and the next filling there is a wait for that copy."""
    events = []

    class Event:
        def __init__(self, slot):
            self.slot = slot

        def synchronize(self):
            events.append(("wait", self.slot))

    class Noted(Uploader):
        def _fill(self, buffer, part):
            events.append(("fill", buffer.data_ptr()))
            super()._fill(buffer, part)

        def _send(self, slot, target):
            super()._send(slot, target)
            events.append(("send", slot.buffer.data_ptr()))
            slot.busy = Event(slot.buffer.data_ptr())

    if not waits:
        monkeypatch.setattr(_Slot, "wait", lambda slot: None)
    wanted = random((64 * 23 + 5,))
    assert same(Noted(CPU, slot_bytes=64, threads=threads).upload(wanted), wanted)
    slots = {at for _, at in events}
    assert len(slots) == 2 * threads
    for slot in slots:
        order = [what for what, at in events if at == slot]
        rounds = ["fill", "send", "wait"] if waits else ["fill", "send"]
        assert order == (rounds * len(order))[: len(order)]
        assert len(order) > len(rounds)


def test_every_thread_gets_a_part_of_a_tensor_worth_dividing():
    parts = []

    class Noted(Uploader):
        def _fill(self, buffer, part):
            parts.append(part.numel())
            super()._fill(buffer, part)

    uploader = Noted(CPU, slot_bytes=800, threads=4)
    for whole, wanted in (
        (99, [99]),  # an eighth of a buffer: the caller's thread does it
        (250, [50, 100, 100]),
        (1000, [250] * 4),
        (8100, [100] + [800] * 10),
    ):
        parts.clear()
        uploader.upload(random((whole,)))
        assert sorted(parts) == wanted


def test_an_error_in_a_thread_is_an_error_of_the_upload():
    class Broken(Uploader):
        def _fill(self, buffer, part):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Broken(CPU, slot_bytes=64).upload(random((1000,)))


def test_memory_is_the_ring_whatever_the_tensor():
    uploader = Uploader(CPU, slot_bytes=64, threads=1)
    assert not uploader._slots  # none before it is needed
    uploader.upload(random((64 * 50,)))
    first = [slot.buffer.data_ptr() for slot in uploader._slots]
    uploader.upload(random((64 * 50,)))
    assert [slot.buffer.data_ptr() for slot in uploader._slots] == first
    assert sum(slot.buffer.nbytes for slot in uploader._slots) == 128
    uploader.close()
    assert not uploader._slots
