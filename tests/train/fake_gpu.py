"""A GPU's queue and a host that runs ahead of it, as two numbers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_kit.train import marks

QUEUEING_S = 1e-3
"""What queueing a step costs the host."""


class FakeGpu:
    """Work lasts on the GPU; the host only queues it. `host_s` and `free_s` are clocks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.host_s = self.free_s = 100.0
        patch.setattr(marks, "time", SimpleNamespace(perf_counter=lambda: self.host_s))
        patch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(self))
        patch.setattr(torch.cuda, "current_stream", lambda _: None)

    def queue(self, seconds: float) -> None:
        """Give the GPU work."""
        self.host_s += QUEUEING_S
        self.free_s = max(self.free_s, self.host_s) + seconds

    def wait(self) -> None:
        """Until all of it is done."""
        self.host_s = max(self.host_s, self.free_s)


class FakeEvent:
    """As `torch.cuda.Event`."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at_s = gpu, 0.0

    def record(self, stream: Any = None) -> None:
        self.at_s = max(self.gpu.free_s, self.gpu.host_s)

    def synchronize(self) -> None:
        self.gpu.host_s = max(self.gpu.host_s, self.at_s)

    def query(self) -> bool:
        return self.gpu.host_s >= self.at_s

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.query()
        assert end.query(), "the GPU has not come to the end: CUDA refuses"
        return (end.at_s - self.at_s) * 1e3
