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
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_byte_arrives(dtype, shape, slots):
    """Tensors of no, one and many buffers, the last one partly full."""
    uploader = Uploader(CPU, slot_bytes=64, slots=slots)
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
def test_a_buffer_is_filled_only_after_it_was_waited_for(waits, monkeypatch):
    """Order of events: wait, fill, mark; a ring that did not wait would send wrong bytes."""
    events = []

    class Event:
        def __init__(self, slot):
            self.slot = slot

        def synchronize(self):
            events.append(("wait", self.slot))

    class Noted(Uploader):
        def _fill(self, buffer, piece):
            events.append(("fill", buffer.data_ptr()))
            super()._fill(buffer, piece)

        def _mark(self, slot):
            events.append(("mark", slot.buffer.data_ptr()))
            slot.busy = Event(slot.buffer.data_ptr())

    if not waits:
        monkeypatch.setattr(_Slot, "wait", lambda slot: None)
    Noted(CPU, slot_bytes=64, slots=3).upload(random((64 * 7,)))
    filled = [at for what, at in events if what == "fill"]
    assert len(set(filled)) == 3
    assert filled[:3] == filled[3:6]
    good = True
    for index, (what, at) in enumerate(events):
        if what == "fill" and ("mark", at) in events[:index]:
            good &= events[index - 1] == ("wait", at)
    assert good == waits


def test_memory_is_the_ring_whatever_the_tensor():
    uploader = Uploader(CPU, slot_bytes=64, slots=2)
    assert not uploader._slots  # none before it is needed
    uploader.upload(random((64 * 50,)))
    first = [slot.buffer.data_ptr() for slot in uploader._slots]
    uploader.upload(random((64 * 50,)))
    assert [slot.buffer.data_ptr() for slot in uploader._slots] == first
    assert sum(slot.buffer.nbytes for slot in uploader._slots) == 128
