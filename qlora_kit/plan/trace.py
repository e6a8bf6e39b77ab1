"""A record of what a step allocates, op by op, on the meta device.

Nothing is computed, so a step of a 70B model is traced in a second, on any machine. Tensors
live as long as the real step's would: it is the same code, and Python frees what it no longer
needs at the same places. Sizes are rounded as torch's allocator on a GPU counts them.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.plan.costs import cost_of, launch_seconds, tensors_of
from qlora_kit.plan.gpus import Gpu

BACKWARD = "backward"
"""Name of the phase in which autograd adds gradients up."""

_SOON = 4
"""Changes after which a tensor that was added to would be gone, were it added to in place."""

_INTO_OUT = (torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
"""Products that write where they are told to. There is nothing to run, and torch would take each
apart in Python to see that: a third of a millisecond, thousands of times in a long row's step."""

_MIB = 1 << 20
_STEP, _SMALL, _SEGMENT, _LARGE = 512, _MIB, 2 * _MIB, 10 * _MIB


def counted_bytes(size: int) -> int:
    """What `torch.cuda.memory_allocated` counts for one tensor.

    The allocator gives multiples of 512 bytes. It takes memory from the driver in pieces of
    2 MiB, and a rest below 1 MiB behind a large tensor is not split off: it counts.

    Args:
        size: bytes of the tensor.

    Returns:
        Bytes counted.

    Example:
        >>> counted_bytes(1), counted_bytes(20 * 2**20 - 5) == 20 * 2**20
        (512, True)
    """
    rounded = -(-size // _STEP) * _STEP
    if rounded < _LARGE:
        return rounded
    segment = -(-rounded // _SEGMENT) * _SEGMENT
    return segment if segment - rounded < _SMALL else rounded


@dataclass(slots=True)
class Block:
    """One allocation."""

    size: int
    """Bytes, as counted."""
    phase: str
    """Of the step, when it was made."""
    decoded: bool = False
    """Whether it holds a decoded weight."""
    born: int = 0
    """Number of the event that made it."""
    died: int | None = None
    """Number of the event that freed it; None if it outlived the trace."""


class Trace(TorchDispatchMode):
    """Records allocations and costs while it is active.

    Attributes:
        phase: name given to what is allocated now.
        blocks: every allocation, in order.
        seconds: on the GPU, by kind of op.
        launching: seconds that the host needs to launch them.

    Example:
        >>> import torch
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> with Trace(find_gpu("h100")) as trace:
        ...     x = torch.empty(1 << 20, device="meta")
        ...     y = (x + 1) * 2
        >>> trace.peak_bytes() >> 20
        12
    """

    def __init__(self, gpu: Gpu, owned: Iterable[Tensor] = ()) -> None:
        """Start empty.

        Args:
            gpu: the step would run on.
            owned: tensors that are there already and are counted elsewhere.
        """
        super().__init__()
        self.gpu = gpu
        self.phase = ""
        self.blocks: list[Block] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.launching = 0.0
        self._owned = [tensor.untyped_storage() for tensor in owned]
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._owned}
        self._live: dict[int, Block] = {}
        self._changes: list[int] = []
        self._sums: dict[int, Block] = {}
        self._spikes: list[tuple[int, int, str]] = []

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name a phase.

        Args:
            phase: its name.

        Yields:
            Nothing.
        """
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under a trace: torch need not keep its compiler off, op by op."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and take note of it."""
        if func in _INTO_OUT and kwargs["out"].is_meta:
            result = kwargs["out"]
        else:
            result = func(*args, **(kwargs or {}))
        cost = cost_of(func, (args, kwargs), result, self.gpu)
        for tensor in tensors_of(result):
            self._see(tensor)
        if cost.kind != "nothing":
            self.launching += launch_seconds(func, cost, self.gpu)
            self.seconds[cost.kind] += cost.seconds
        if cost.workspace:
            self._spikes.append((len(self._changes), counted_bytes(cost.workspace), self.phase))
        if func is torch.ops.aten.add.Tensor and self.phase == BACKWARD:
            self._note_sum(args[0], result)
        if cost.kind == "decode":
            block = self.block_of(args[-1] if result is None else result)
            if block is not None:
                block.decoded = True
        return result

    def _see(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        block = Block(counted_bytes(storage.nbytes()), self.phase, born=len(self._changes))
        self.blocks.append(block)
        self._changes.append(block.size)
        self._live[key] = block
        self._known[key] = weakref.ref(storage, partial(self._freed, key))

    def _note_sum(self, old: Any, new: Tensor) -> None:
        """Autograd adds gradients in place where it can, but never under a dispatch mode."""
        before = self.block_of(old) if isinstance(old, Tensor) else None
        after = self.block_of(new)
        if before is not None and after is not None and before.size == after.size:
            self._sums[id(before)] = after

    def _freed(self, key: int, _reference: Any) -> None:
        block = self._live.pop(key)
        del self._known[key]
        total = self._sums.pop(id(block), None)
        if total is not None and len(self._changes) - total.born <= _SOON:
            self._changes[total.born] = 0  # the sum took the place of what was added to
            total.born = block.died = len(self._changes)
            self._changes.append(0)
            return
        block.died = len(self._changes)
        self._changes.append(-block.size)

    def block_of(self, tensor: Tensor) -> Block | None:
        """The allocation a tensor lives in, if it was made under this trace.

        Args:
            tensor: any.

        Returns:
            The block, or None.
        """
        return self._live.get(tensor.untyped_storage()._cdata)

    def peak_bytes(self) -> int:
        """The most bytes that were alive at once, workspaces included."""
        return self.peak()[0]

    def peak(self) -> tuple[int, list[Block], int]:
        """The moment of the peak.

        Returns:
            bytes: alive, workspace included.
            blocks: those alive.
            workspace: bytes of a kernel's own, of `bytes`.
        """
        spikes: dict[int, int] = {}
        for at, size, _phase in self._spikes:
            spikes[at] = max(size, spikes.get(at, 0))
        best = (0, 0, 0)
        alive = 0
        for at, change in enumerate([*self._changes, 0]):
            # a workspace is alive beside what was there when its kernel began, results included
            spike = spikes.get(at, 0)
            best = max(best, (alive + spike, at, spike))
            alive += change
        best = max(best, (alive, len(self._changes), 0))
        total, at, spike = best
        blocks = [b for b in self.blocks if b.born < at and (b.died is None or b.died >= at)]
        return total, blocks, spike
