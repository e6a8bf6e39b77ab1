"""From a mapped file to a GPU, as fast as memory can be copied.

A GPU reads host memory at full speed only where it is pinned, and pages of a mapped
file are not: the driver copies them piece by piece on one thread. So tensors go
through a ring of pinned buffers that lives as long as the load. A few threads fill
buffers, taking the page faults, while the GPU empties others. Copies are queued in
order on the current stream, as are the kernels that use them, so nobody waits for the
GPU, except for a buffer to be empty again.

The threads are ours, each with a piece of its own, because torch's share one copy and
meet at its end: where other processes want the cores too, that is several times slower.

Host memory: the buffers (128 MiB on 8 cores or more), whatever the size of the tensors.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora_kit.core.cores import usable_cores

SLOT_BYTES = 8 << 20
"""Of one buffer: large enough that handing it over costs little (0.15 ms of PCIe 5)."""
MOST_THREADS = 8
"""Together they read faster than PCIe 5 takes it away."""


@dataclass(slots=True)
class _Slot:
    """A buffer, and the copy that reads it."""

    buffer: Tensor
    busy: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the buffer may be written."""
        if self.busy is not None:
            self.busy.synchronize()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor on its way."""

    filled: Future[None]
    slot: _Slot
    target: Tensor


class Uploader:
    """Copies tensors from host memory to one device; not for several threads at once.

    Example:
        >>> Uploader(torch.device("cpu")).upload(torch.arange(3))
        tensor([0, 1, 2])
    """

    def __init__(
        self, device: torch.device, *, slot_bytes: int = SLOT_BYTES, threads: int | None = None
    ) -> None:
        """Prepare; threads and buffers, two for each, are made when they are needed.

        Args:
            device: where tensors go.
            slot_bytes: of one buffer.
            threads: that fill buffers; None for as many as there are cores, but 8 at most.
        """
        self.device = device
        self._slot_bytes = slot_bytes
        self._threads = threads or min(MOST_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(self._threads, "qlora-kit-upload")
        self._slots: list[_Slot] = []
        self._next = 0

    def upload(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device.

        Args:
            tensor: on the CPU, of any shape and dtype. It may be dropped at once.

        Returns:
            A contiguous tensor of the same shape and dtype on the device. On a GPU the
            copy is queued on the current stream, and the host does not wait for it.
        """
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source = tensor.detach().contiguous().view(-1).view(torch.uint8)
        target = made.view(-1).view(torch.uint8)
        if not source.numel():
            return made
        step = self._piece_bytes(source.numel())
        if source.numel() <= step:  # not worth a thread's waking up
            slot = self._empty_slot()
            self._fill(slot.buffer, source)
            self._send(slot, target)
            return made
        waiting: deque[_Piece] = deque()
        for part, goal in zip(source.split(step), target.split(step), strict=True):
            if len(waiting) == self._threads:
                self._hand_over(waiting.popleft())
            slot = self._empty_slot()
            filled = self._pool.submit(self._fill, slot.buffer, part)
            waiting.append(_Piece(filled, slot, goal))
        while waiting:
            self._hand_over(waiting.popleft())
        return made

    def close(self) -> None:
        """Give threads and buffers back."""
        self._pool.shutdown()
        self._slots = []

    def _piece_bytes(self, whole: int) -> int:
        """How much of a tensor goes into one buffer: every thread gets a part, but no crumbs."""
        share = -(-whole // self._threads)
        return min(self._slot_bytes, max(share, self._slot_bytes // 8))

    def _empty_slot(self) -> _Slot:
        """The next buffer of the ring, once its last copy is done."""
        if not self._slots:
            whole = torch.empty(
                2 * self._threads * self._slot_bytes,
                dtype=torch.uint8,
                device="cpu",
                pin_memory=self.device.type == "cuda",
            )
            self._slots = [_Slot(part) for part in whole.split(self._slot_bytes)]
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.wait()
        return slot

    def _fill(self, buffer: Tensor, part: Tensor) -> None:
        """Read a part of the file: page faults and copy, on the thread that calls."""
        np.copyto(buffer[: part.numel()].numpy(), part.numpy())

    def _hand_over(self, piece: _Piece) -> None:
        """Wait for a thread, then give its buffer to the device."""
        piece.filled.result()
        self._send(piece.slot, piece.target)

    def _send(self, slot: _Slot, target: Tensor) -> None:
        """Queue a copy to the device, and remember which buffer it reads."""
        target.copy_(slot.buffer[: target.numel()], non_blocking=True)
        if self.device.type == "cuda":  # needs a GPU
            slot.busy = slot.busy or torch.cuda.Event()
            slot.busy.record(torch.cuda.current_stream(self.device))
