"""What layers keep for the backward pass, waiting in pinned host memory.

Each layer's tensors leave on a side stream while the next layer computes, and come back while
the layer after it is differentiated, so that copies hide behind arithmetic: on 8,192 tokens a
layer of an 8B model computes for about 5 ms forward and 15 ms in a backward pass that recomputes,
and its input, 64 MiB, should take 1.3 ms each way at the 54 GB/s that the record of
`benchmarks/load` has for pinned memory.

Host buffers are kept for the next step: pinning memory is slow. All copies share one stream,
so a buffer that is handed out again is written only after its last copy has left. A tensor on
its way out stays referenced until the computing stream has waited for the copy, two layers
later: so memory is given back in the order of that stream, and no more of it is in use than
with a host that never runs ahead.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_BYTES = 2 << 20
"""Tensors below this stay where they are: they are many and weigh nothing."""

_LAYERS_LEAVING = 2
"""How many layers' tensors may be on their way out at a time."""


@dataclass(slots=True)
class _Away:
    """One tensor on the host."""

    host: Tensor
    """Pinned, flat."""
    shape: torch.Size
    back: Tensor | None = None
    """On the device again, once asked for."""


@dataclass(slots=True)
class Ticket:
    """What one layer's backward pass will ask for."""

    index: int
    """Of the layer."""
    items: list[Tensor | _Away | None]
    before: "Ticket | None"
    """That of the layer before, in the same forward pass."""
    arrived: Any = None
    """The event when all of it is back; None until its return was started."""


class HostStore:
    """Keeps tensors of a model's layers; see the module's text.

    Example:
        >>> store = HostStore()
        >>> ticket = store.put(0, [torch.ones(2, 3), None])
        >>> store.take(ticket)[0].shape
        torch.Size([2, 3])
    """

    def __init__(self) -> None:
        """Start empty."""
        self._stream: torch.cuda.Stream | None = None
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._last: Ticket | None = None
        self._leaving: deque[tuple[Any, list[Tensor]]] = deque()

    def put(self, index: int, tensors: Sequence[Tensor | None]) -> Ticket:
        """Send a layer's tensors away.

        Args:
            index: the layer's number; layers come in order.
            tensors: contiguous where they are large; None passes. On a CPU they stay.

        Returns:
            What `take` wants.
        """
        before = self._last if self._last is not None and self._last.index == index - 1 else None
        items: list[Tensor | _Away | None] = list(tensors)
        large = {
            place: tensor
            for place, tensor in enumerate(tensors)
            if tensor is not None and self._takes(tensor) and tensor.nbytes >= SMALLEST_BYTES
        }
        if large:
            for place, away in zip(large, self._send(list(large.values())), strict=True):
                items[place] = away
        self._last = Ticket(index, items, before)
        return self._last

    def take(self, ticket: Ticket) -> list[Tensor | None]:
        """Bring a layer's tensors back, and start on those of the layer before.

        Args:
            ticket: from `put`; used up.

        Returns:
            The tensors, as they were put.
        """
        self._wait_for_leaving(0)
        self._start(ticket)
        found = [item.back if isinstance(item, _Away) else item for item in ticket.items]
        if ticket.arrived is not None:
            self._wait(ticket.arrived)
        if ticket.before is not None:
            self._start(ticket.before)
        ticket.items.clear()
        return found

    def _takes(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where there is something to be sent away from."""
        return tensor.is_cuda

    def _wait(self, event: Any) -> None:  # needs a GPU
        torch.cuda.current_stream().wait_event(event)

    def _send(self, tensors: list[Tensor]) -> list[_Away]:  # needs a GPU
        main = torch.cuda.current_stream(tensors[0].device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensors[0].device)
        side = self._stream
        side.wait_stream(main)
        sent = []
        with torch.cuda.stream(side):
            for tensor in tensors:
                assert tensor.is_contiguous()
                host = self._host(tensor.numel(), tensor.dtype)
                host.copy_(tensor.view(-1), non_blocking=True)
                sent.append(_Away(host, tensor.shape))
            left = side.record_event()
        self._leaving.append((left, tensors))
        self._wait_for_leaving(_LAYERS_LEAVING)
        return sent

    def _host(self, count: int, dtype: torch.dtype) -> Tensor:  # needs a GPU
        free = self._free.setdefault((count, dtype), [])
        return free.pop() if free else torch.empty(count, dtype=dtype, pin_memory=True)

    def _wait_for_leaving(self, most: int) -> None:
        """Let the computing stream wait until no more than so many layers are on their way."""
        while len(self._leaving) > most:
            left, _tensors = self._leaving.popleft()
            self._wait(left)

    def _start(self, ticket: Ticket) -> None:
        """Begin the copies back, unless they have begun."""
        away = [item for item in ticket.items if isinstance(item, _Away)]
        if away and ticket.arrived is None:
            ticket.arrived = self._bring(away)

    def _bring(self, away: list[_Away]) -> Any:  # needs a GPU
        device = torch.device("cuda", torch.cuda.current_device())
        for item in away:
            item.back = torch.empty(item.shape, dtype=item.host.dtype, device=device)
        assert self._stream is not None
        side = self._stream
        side.wait_stream(torch.cuda.current_stream(device))  # the memory may be in use until now
        with torch.cuda.stream(side):
            for item in away:
                assert item.back is not None
                item.back.view(-1).copy_(item.host, non_blocking=True)
                self._free[item.host.numel(), item.host.dtype].append(item.host)
            return side.record_event()


class OutlinedStore(HostStore):
    """A store for the meta device: copies nothing, and keeps tensors alive as long as they were.

    Attributes:
        host_bytes: pinned memory that the buffers would take.
        moved_bytes: what would have gone to the host and back.

    Example:
        >>> store = OutlinedStore()
        >>> ticket = store.put(0, [torch.empty(1024, 1024, device="meta")])
        >>> store.host_bytes == 4 << 20, store.take(ticket)[0].shape
        (True, torch.Size([1024, 1024]))
    """

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.host_bytes = self.moved_bytes = 0

    def _takes(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def _wait(self, event: Any) -> None:
        """No stream, nothing to wait for."""

    def _send(self, tensors: list[Tensor]) -> list[_Away]:
        sent = []
        for tensor in tensors:
            free = self._free.setdefault((tensor.numel(), tensor.dtype), [])
            if free:
                free.pop()
            else:
                self.host_bytes += tensor.nbytes
            self.moved_bytes += tensor.nbytes
            sent.append(_Away(torch.empty(0, dtype=tensor.dtype), tensor.shape))
        self._leaving.append((None, tensors))
        self._wait_for_leaving(_LAYERS_LEAVING)
        return sent

    def _bring(self, away: list[_Away]) -> Any:
        for item in away:
            item.back = torch.empty(item.shape, dtype=item.host.dtype, device="meta")
            self._free[item.shape.numel(), item.host.dtype].append(item.host)
            self.moved_bytes += item.back.nbytes
        return "arrived"


def host_store(device: torch.device) -> HostStore:
    """The store for layers on a device.

    Args:
        device: where the layers are.

    Returns:
        An empty store.

    Example:
        >>> type(host_store(torch.device("meta"))).__name__
        'OutlinedStore'
    """
    return OutlinedStore() if device.type == "meta" else HostStore()
