"""The caller's device stays current, whatever device the tensors are on.

The CUDA runtime is played by `Thread`: torch's guards and cuda-core's `set_current` change the same
context, as `torch.cuda.current_device()` showed on two GPUs.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from qlora_kit.ops import launch

pytest.importorskip("cuda.core")

FRESH = None
"""A thread that has not used a GPU has no context; torch calls its device 0."""


class Thread:
    """What is current in one thread."""

    def __init__(self, context):
        self.context = context
        self.switches = 0

    def current_device(self):
        return self.context or 0

    def set(self, index):
        self.context = index
        self.switches += 1

    @contextmanager
    def guard(self, device):
        """`torch.cuda.device`: nothing where the device is current, context or not."""
        index = device if isinstance(device, int) else device.index
        before = self.current_device()
        if before != index:
            self.set(index)
        try:
            yield
        finally:
            if self.current_device() != before:
                self.set(before)


def play(monkeypatch, context):
    """A thread in the place of torch's and cuda-core's, and where each thing was done."""
    thread, seen = Thread(context), []

    def note(*_, **__):
        seen.append(thread.context)
        return thread.context

    view = SimpleNamespace(as_tensor_map=note)
    views = SimpleNamespace(from_cuda_array_interface=lambda *_, **__: view)
    monkeypatch.setattr(torch.cuda, "device", thread.guard)
    monkeypatch.setattr(torch.cuda, "current_device", thread.current_device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    device = lambda index: SimpleNamespace(set_current=lambda: thread.set(index))  # noqa: E731
    monkeypatch.setattr("cuda.core.Device", device)
    monkeypatch.setattr("cuda.core.utils.StridedMemoryView", views)
    monkeypatch.setattr(launch, "_THREAD", SimpleNamespace())
    monkeypatch.setattr(launch, "_stream", lambda device, handle: (device, handle))
    monkeypatch.setattr(launch, "_config", lambda *_: None)
    monkeypatch.setattr(launch, "_launcher", lambda: note)
    return thread, seen


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("current", [FRESH, 0, 1])
def test_a_tensor_map_is_made_on_its_device_and_leaves_the_callers(monkeypatch, current, device):
    thread, seen = play(monkeypatch, current)
    launch._tensor_map.__wrapped__(device, 4096, 64, 64, "<u2", (8, 64), 128)
    assert seen == [device]  # a context, and the right one
    assert thread.current_device() == (current or 0)


@pytest.mark.parametrize("current", [FRESH, 0, 1])
def test_either_half_alone_is_wrong(monkeypatch, current):
    """What the test above must tell apart: a context set for good, and a guard without one."""
    thread, _ = play(monkeypatch, current)
    from cuda.core import Device  # the one just put in its place

    other = 1 - (current or 0)
    Device(other).set_current()
    assert thread.current_device() == other
    thread, _ = play(monkeypatch, FRESH)
    with torch.cuda.device(0):
        assert thread.context is FRESH


@pytest.mark.parametrize("device", [None, 0, 1])
@pytest.mark.parametrize("current", [FRESH, 0, 1])
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "first use"])
def test_a_launch_is_on_the_tensors_device(monkeypatch, current, device, loaded):
    """A context for a thread without one, loading at first use, and then no switch too many."""
    thread, seen = play(monkeypatch, current)
    code = SimpleNamespace(get_kernel=lambda name: name)
    monkeypatch.setattr(launch, "compile_source", lambda *_: (code, ""))
    monkeypatch.setattr(launch, "architecture_of", lambda device: "sm_90a")
    kernels = launch.Kernels("some.cu")
    if loaded:
        kernels._loaded.update({(index, "some"): "some" for index in (0, 1)})
    place = torch.device("cuda") if device is None else torch.device("cuda", device)
    here = thread.current_device()
    where = here if device is None else device
    for _ in range(2):
        before = thread.switches
        kernels.launch("some", 1, 32, (), device=place)
        assert thread.context == here
    assert seen == [where, where]
    assert thread.switches - before == (0 if where == here else 2)
