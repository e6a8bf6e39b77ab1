"""Moments in a device's work, and the time between them.

The host queues work and runs ahead: when a GPU did something cannot be read off the host's
clock. A mark lies in the GPU's queue, behind what was queued before it. Setting one never
waits; asking for the time between two waits until the GPU has come to the later one. On a CPU,
where work is done when the call returns, a mark is the host's clock.
"""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment in a device's work."""

    host_s: float
    """When it was set, by `time.perf_counter`."""
    event: torch.cuda.Event | None = None
    """In the GPU's queue; None on a CPU."""

    def since(self, earlier: "Mark") -> float:
        """Time the device took from another mark to this one.

        Args:
            earlier: of the same device.

        Returns:
            Seconds, idle ones included.

        Example:
            >>> Mark(3.5).since(Mark(1.0))
            2.5
        """
        if self.event is None or earlier.event is None:
            return self.host_s - earlier.host_s
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3

    @property
    def is_passed(self) -> bool:
        """Whether the device has come this far; asking does not wait."""
        return self.event is None or self.event.query()


def mark(device: torch.device | str) -> Mark:
    """Mark the end of all work that a device was given so far, without waiting for it.

    Args:
        device: CPU or GPU; of a GPU, its current stream.

    Returns:
        The mark.

    Example:
        >>> mark("cpu").is_passed
        True
    """
    device = torch.device(device)
    event = None
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(device))
    return Mark(time.perf_counter(), event)
