"""What layers keep for the backward pass, waiting in pinned host memory.

Each layer's tensors leave on a side stream while the next layer computes, and come back while
the layer after it is differentiated, so that copies hide behind arithmetic: on 8,192 tokens a
layer of an 8B model computes for about 5 ms forward and 15 ms in a backward pass that recomputes,
and its input, 64 MiB, should take 1.3 ms each way at the 54 GB/s that the record of
`benchmarks/load` has for pinned memory. Copies grow with the tokens, attention with their
square: on 300,000 an input, 2.3 GiB, takes 45 ms each way and the layer's attention seconds. So
large inputs wait for each other. Inputs of batches in tiles come twice, so that they need not lie
on the GPU between their two uses. They, and whatever takes `LATE_BYTES`, have left before the next
layer's attention begins, and come back only after that of the layer behind: so they lie on the GPU
for a shorter time, and less of their copies hides.

Host memory is taken in blocks (`core/pinned.py`) and divided into pages, which are kept for the
next step: pinning is slow. A layer's tensors lie one behind the other in pages from anywhere, so
batches of other lengths use the same ones, and no more than one page per layer is filled in part.
All copies share one stream, so a page that is handed out again is written only after its last
copy has left. A tensor on its way out stays referenced until the computing stream has waited for
the copy: so memory is given back in the order of that stream, and no more of it is in use than
with a host that never runs ahead.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.core.pinned import pinned_block

SMALLEST_BYTES = 2 << 20
"""Tensors below this stay where they are: they are many and weigh nothing."""

PAGE_BYTES = 32 << 20
"""What is handed out at a time."""

BLOCK_BYTES = 256 << 20
"""What is pinned at a time."""

LARGE_BYTES = 512 << 20
"""A layer's tensors are large from here on: one layer's may be on their way out, else two."""

LATE_BYTES = 2 << 30
"""Of a layer of a batch in tiles: from here on memory counts, below it what waits for copies. On
32,768 tokens of an 8B model under `offload_attention`, 1.16 GiB a layer, a step that waited took
4.94 s, one that does not 3.89 in 1.1 GiB more; the planner, where nothing waits, says 3.82 (an
H100, records of `benchmarks/train`)."""

_ALIGNMENT_BYTES = 512


@dataclass(slots=True)
class _Away:
    """One tensor on the host."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """Its first byte in the layer's pages."""
    nbytes: int
    """Those between its rows included."""
    back: Tensor | None = None
    """On the device again, once asked for."""


@dataclass(slots=True)
class Ticket:
    """What one layer's backward pass will ask for."""

    index: int
    """Of the layer."""
    items: list[Tensor | _Away | None]
    pages: list[Tensor]
    """Where the tensors on the host are."""
    free: list[Tensor]
    """Where their pages go when nobody needs them any more."""
    before: "Ticket | None"
    """That of the layer before, in the same forward pass."""
    twice: bool = False
    """Whether it can be taken once more after the next time."""
    late: bool = False
    """Whether its tensors come late: large ones, and inputs alone, whose copies are short."""
    arrived: Any = None
    """The event when all of it is back; None until its return was started."""

    def give_back(self) -> None:
        """Let others have the pages."""
        self.free += self.pages
        self.pages = []

    def __del__(self) -> None:
        """A pass whose backward never came."""
        self.give_back()


class HostStore:
    """Keeps tensors of a model's layers; see the module's text.

    Attributes:
        host_bytes: of pinned memory taken so far.
        moved_bytes: that went to the host and back.

    Example:
        >>> store = HostStore()
        >>> ticket = store.put(0, [torch.ones(2, 3), None])
        >>> store.take(ticket)[0].shape
        torch.Size([2, 3])
    """

    def __init__(self) -> None:
        """Start empty."""
        self.host_bytes = self.moved_bytes = 0
        self._stream: torch.cuda.Stream | None = None
        self._free: list[Tensor] = []
        self._last: Ticket | None = None
        self._leaving: deque[tuple[Any, list[Tensor]]] = deque()

    def put(self, index: int, tensors: Sequence[Tensor | None], *, twice: bool = False) -> Ticket:
        """Send a layer's tensors away.

        Args:
            index: the layer's number; layers come in order.
            tensors: large ones dense, but for room between the rows of a matrix; None passes.
                On a CPU they stay.
            twice: let them be taken twice, as tensors of their own each time; where the first
                of them stays, it is once.

        Returns:
            What `take` wants.
        """
        before = self._last if self._last is not None and self._last.index == index - 1 else None
        items: list[Tensor | _Away | None] = list(tensors)
        going: list[tuple[_Away, Tensor]] = []
        size = 0
        for place, tensor in enumerate(tensors):
            if tensor is None or not self._takes(tensor) or tensor.nbytes < SMALLEST_BYTES:
                continue
            flat = _dense(tensor)
            away = _Away(tensor.shape, tensor.stride(), tensor.dtype, size, flat.nbytes)
            going.append((away, flat))
            items[place] = away
            size += -(-flat.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        pages = [self._page() for _ in range(-(-size // PAGE_BYTES))]
        if going:
            self.moved_bytes += sum(away.nbytes for away, _ in going)
            left = self._copy([pair for item in going for pair in _pairs(*item, pages)], out=True)
            self._leaving.append((left, [flat for _, flat in going]))
            self._wait_for_leaving(1 if size >= LARGE_BYTES else 2)
        twice = twice and bool(items) and isinstance(items[0], _Away)
        late = twice or size >= LATE_BYTES
        self._last = Ticket(index, items, pages, self._free, before, twice, late)
        return self._last

    def take(self, ticket: Ticket, *, ahead: bool = True) -> list[Tensor | None]:
        """Bring a layer's tensors back.

        Args:
            ticket: from `put`; used up, unless it is for twice and this is the first time.
            ahead: start on those of the layer before, as `prefetch` does.

        Returns:
            The tensors, as they were put.
        """
        self.settle()
        self._start(ticket)
        found = [item.back if isinstance(item, _Away) else item for item in ticket.items]
        if ticket.arrived is not None:
            self._wait(ticket.arrived)
        if ticket.twice:
            ticket.twice, ticket.arrived = False, None
            for item in ticket.items:
                if isinstance(item, _Away):
                    item.back = None
        else:
            ticket.items.clear()
        if ahead:
            self.prefetch(ticket)
        return found

    def settle(self) -> None:
        """Wait, on the computing stream, for what leaves, and let go of it."""
        self._wait_for_leaving(0)

    def settle_large(self) -> None:
        """Wait so where the layer before has put so much that it comes late."""
        if self._last is not None and self._last.late:
            self.settle()

    def begin(self, ticket: Ticket) -> None:
        """Start to bring back what `take` is about to be asked for.

        Args:
            ticket: from `put`.
        """
        self._start(ticket)

    def prefetch(self, ticket: Ticket) -> None:
        """Start to bring back what the layer before has put.

        Args:
            ticket: of the layer behind.
        """
        if ticket.before is not None:
            self._start(ticket.before)
            ticket.before = None

    def _start(self, ticket: Ticket) -> None:
        """Begin the copies back, unless they have begun."""
        away = [item for item in ticket.items if isinstance(item, _Away)]
        if not away or ticket.arrived is not None:
            return
        going = []
        for item in away:
            flat = self._memory(item)
            item.back = flat.as_strided(item.shape, item.stride)
            going.append((item, flat))
        self.moved_bytes += sum(item.nbytes for item in away)
        pairs = [pair for item in going for pair in _pairs(*item, ticket.pages)]
        ticket.arrived = self._copy(pairs, out=False)
        if not ticket.twice:
            ticket.give_back()

    def _page(self) -> Tensor:
        if not self._free:
            self.host_bytes += BLOCK_BYTES
            self._free += self._block()
        return self._free.pop()

    def _wait_for_leaving(self, most: int) -> None:
        """Let the computing stream wait until no more than so many layers are on their way."""
        while len(self._leaving) > most:
            left, _tensors = self._leaving.popleft()
            self._wait(left)

    def _takes(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where there is something to be sent away from."""
        return tensor.is_cuda

    def _block(self) -> Sequence[Tensor]:  # needs a GPU
        """More pages."""
        return pinned_block(BLOCK_BYTES).split(PAGE_BYTES)

    def _memory(self, item: _Away) -> Tensor:  # needs a GPU
        device = torch.device("cuda", torch.cuda.current_device())
        return torch.empty(item.nbytes // item.dtype.itemsize, dtype=item.dtype, device=device)

    def _wait(self, event: Any) -> None:  # needs a GPU
        torch.cuda.current_stream().wait_event(event)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], *, out: bool) -> Any:  # needs a GPU
        """Copy pieces between host and device on the side stream; the event when it is done."""
        main = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream(main.device)
        self._stream.wait_stream(main)  # written, or in use, until now
        with torch.cuda.stream(self._stream):
            for host, device in pairs:
                if out:
                    host.copy_(device, non_blocking=True)
                else:
                    device.copy_(host, non_blocking=True)
            return self._stream.record_event()


class OutlinedStore(HostStore):
    """A store for the meta device: copies nothing, and keeps tensors alive as long as they were.

    Example:
        >>> store = OutlinedStore()
        >>> ticket = store.put(0, [torch.empty(1024, 1024, device="meta")])
        >>> store.host_bytes == BLOCK_BYTES, store.take(ticket)[0].shape
        (True, torch.Size([1024, 1024]))
    """

    def _takes(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def _block(self) -> Sequence[Tensor]:
        return [torch.empty(0, dtype=torch.uint8)] * (BLOCK_BYTES // PAGE_BYTES)

    def _memory(self, item: _Away) -> Tensor:
        return torch.empty(item.nbytes // item.dtype.itemsize, dtype=item.dtype, device="meta")

    def _wait(self, event: Any) -> None:
        """No stream, nothing to wait for."""

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], *, out: bool) -> Any:
        return "done"


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


def _dense(tensor: Tensor) -> Tensor:
    """All memory of a tensor, (n,), that between the rows of a matrix included."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    rows, columns = tensor.shape
    assert tensor.stride(1) == 1
    assert tensor.stride(0) > columns
    return tensor.as_strided((rows * tensor.stride(0),), (1,))


def _pairs(away: _Away, flat: Tensor, pages: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of a tensor's bytes, each with its place in the pages."""
    if flat.is_meta:
        return
    data, done = flat.view(torch.uint8), 0
    while done < away.nbytes:
        page, offset = divmod(away.begin + done, PAGE_BYTES)
        size = min(PAGE_BYTES - offset, away.nbytes - done)
        yield pages[page][offset : offset + size], data[done : done + size]
        done += size
