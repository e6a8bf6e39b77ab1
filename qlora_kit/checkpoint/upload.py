"""From a mapped file to a GPU, as fast as memory can be copied.

A GPU reads host memory at full speed only where it is pinned, and pages of a mapped
file are not: the driver copies them piece by piece on one thread. So tensors go
through a few pinned buffers that live as long as the load. All of torch's threads
fill one buffer, taking the page faults, while the GPU empties the others. A tensor's
copy and the kernels that use it are queued on one stream, so nobody waits for
anybody, except for a buffer to be empty again.

Host memory: the buffers (64 MiB), whatever the size of the tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SLOT_BYTES = 16 << 20
"""Of one buffer: large enough that starting a copy costs nothing (0.3 ms of PCIe 5)."""
SLOTS = 4
"""One is filled while the others are emptied."""


@dataclass(slots=True)
class _Slot:
    """A buffer, and the copy that reads it."""

    buffer: Tensor
    busy: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the buffer may be written."""
        if self.busy is not None:
            self.busy.synchronize()


class Uploader:
    """Copies tensors from host memory to one device; not for several threads at once.

    Example:
        >>> Uploader(torch.device("cpu")).upload(torch.arange(3))
        tensor([0, 1, 2])
    """

    def __init__(
        self, device: torch.device, *, slot_bytes: int = SLOT_BYTES, slots: int = SLOTS
    ) -> None:
        """Prepare; the buffers are made at the first upload.

        Args:
            device: where tensors go.
            slot_bytes: of one buffer.
            slots: how many buffers.
        """
        self.device = device
        self._slot_bytes = slot_bytes
        self._count = slots
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
        for start in range(0, source.numel(), self._slot_bytes):
            slot = self._empty_slot()
            piece = source[start : start + self._slot_bytes]
            buffer = slot.buffer[: piece.numel()]
            self._fill(buffer, piece)
            target[start : start + piece.numel()].copy_(buffer, non_blocking=True)
            self._mark(slot)
        return made

    def _empty_slot(self) -> _Slot:
        """The next buffer, once its last copy is done."""
        if not self._slots:
            whole = torch.empty(
                self._count * self._slot_bytes,
                dtype=torch.uint8,
                device="cpu",
                pin_memory=self.device.type == "cuda",
            )
            self._slots = [_Slot(part) for part in whole.split(self._slot_bytes)]
        slot = self._slots[self._next]
        self._next = (self._next + 1) % self._count
        slot.wait()
        return slot

    def _fill(self, buffer: Tensor, piece: Tensor) -> None:
        """Read a piece of the file: the page faults and the copy, on all threads."""
        buffer.copy_(piece)

    def _mark(self, slot: _Slot) -> None:
        """Remember which copy reads a buffer."""
        if self.device.type == "cuda":  # needs a GPU
            slot.busy = slot.busy or torch.cuda.Event()
            slot.busy.record(torch.cuda.current_stream(self.device))
