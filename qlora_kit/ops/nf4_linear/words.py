"""Words of a GPU's memory that the blocks of a launch count in, zero between launches.

Blocks that wait for one another need a counter that is zero when a launch begins. A
kernel that sets it back to zero itself needs no other launch for that, but no two
launches that run at once may share one.
"""

import threading

import torch
from torch import Tensor


class Words:
    """Words of a GPU's memory that a launch counts in: zero before it and after it.

    Launches of a stream follow one another and share a few: a kernel that may begin before the one
    ahead of it has ended touches them only once it has. A captured one may run beside
    anything later, so that it gets its own, for good.
    """

    _EACH = 8
    """Words given out together: no two launches write the same 32 bytes."""
    _POOL = 1 << 17
    """Eights of a pool: 4 MiB."""
    _SPARE = 1 << 15
    """Eights left for launches captured next, or another pool is made."""
    _EACH_STREAM = 64
    """Eights that a stream gets at first, so that few launches find them too few."""

    def __init__(self) -> None:
        """None yet."""
        self._lock = threading.Lock()
        self._pools: dict[torch.device, list[Tensor]] = {}
        self._used: dict[torch.device, int] = {}
        self._of_stream: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, device: torch.device, count: int = _EACH) -> Tensor | None:
        """Words for a launch on the current stream of a device.

        Args:
            device: a CUDA device.
            count: of words.

        Returns:
            (count,) int32, or None while capturing when too few are left: no memory can be
            made and set to zero then. None, too, for more words than a pool has to spare.
        """
        eights = -(-count // self._EACH)
        if eights > self._SPARE:
            return None
        stream, capturing = self._stream(device)
        with self._lock:
            if capturing:
                return self._next(device, eights)[:count] if self._left(device) >= eights else None
            if self._left(device) < self._SPARE:
                self._make_pool(device)
            key = device, stream
            if key not in self._of_stream or self._of_stream[key].numel() < count:
                self._of_stream[key] = self._next(device, max(eights, self._EACH_STREAM))
            return self._of_stream[key][:count]

    def _left(self, device: torch.device) -> int:
        return self._POOL - self._used[device] if device in self._used else 0

    def _next(self, device: torch.device, eights: int) -> Tensor:
        first = self._used[device]
        self._used[device] += eights
        return self._pools[device][-1][first * self._EACH : self._used[device] * self._EACH]

    def _make_pool(self, device: torch.device) -> None:
        pool = torch.zeros(self._POOL * self._EACH, dtype=torch.int32, device=device)
        self._finish(device)  # other streams take from it as well
        self._pools.setdefault(device, []).append(pool)
        self._used[device] = 0

    def _stream(self, device: torch.device) -> tuple[int, bool]:  # needs a GPU
        """The current stream's handle, and whether it is being captured."""
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        return torch._C._cuda_getCurrentRawStream(device.index), capturing

    def _finish(self, device: torch.device) -> None:  # needs a GPU
        """Wait for what the current stream has been given."""
        torch.cuda.current_stream(device).synchronize()


WORDS = Words()
"""Of all devices."""
