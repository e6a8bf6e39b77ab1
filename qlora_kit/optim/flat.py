"""Trained tensors of one dtype and device as views of one buffer, their gradients too.

An adapter is hundreds of small tensors (448 in an 8B model with LoRA on every linear).
One kernel per tensor costs milliseconds per update, and memory that is paged by the
tensor pages badly or, for small tensors, not at all. Laid end to end they are one
tensor, and everything an update does (norm, scaling, AdamW) is one kernel.

Parameters stay the objects they were: only their storage moves. Each starts at a
multiple of 256 elements, so that no block of an 8-bit optimizer spans two parameters
and every access is aligned; what lies between them is zero and stays zero.

*Gradients.* `zero_grad` sets `.grad` to None, as torch and Transformers do, and autograd
then hands over each new gradient without touching it. `gather` copies them into one
buffer with one `_foreach_copy_` and makes every `.grad` a view of it. The alternative,
zeroed views that stay in `.grad`, costs an addition per tensor in *every* backward pass
instead of one copy per update, and its buffer lies in memory while activations peak.
Ours exists from the end of the backward to `zero_grad`, unless `keep_grad` asks for an
address that stays. With accumulation the first backward pass of an update hands over,
the others add in place, and the copy is made once, at the end.

A parameter whose storage is replaced (`p.data = ...`, `model.to(...)`, another flat
buffer) is taken back at the next update, with the values it then has.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qlora_kit.core.errors import AdapterError

ALIGNMENT = 256
"""Elements: the block of bitsandbytes' 8-bit optimizers, and a multiple of 16 bytes."""


def offsets_of(sizes: Iterable[int]) -> list[int]:
    """Where tensors begin when each starts at a multiple of `ALIGNMENT`.

    Args:
        sizes: elements of each.

    Returns:
        One offset per size, and the total at the end.

    Example:
        >>> offsets_of([256, 10, 300])
        [0, 256, 512, 1024]
    """
    found = [0]
    for size in sizes:
        found.append(found[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return found


def views_of(flat: Tensor, shapes: Sequence[torch.Size], offsets: Sequence[int]) -> list[Tensor]:
    """Give contiguous parts of a buffer the shapes of the tensors in it.

    Args:
        flat: (n,).
        shapes: of the tensors.
        offsets: where each begins; more than `shapes` is fine.

    Returns:
        One view per shape.

    Example:
        >>> [v.shape for v in views_of(torch.zeros(512), [torch.Size([2, 3])], [256])]
        [torch.Size([2, 3])]
    """
    strides = [_contiguous_stride(shape) for shape in shapes]
    return list(map(flat.as_strided, shapes, strides, offsets))


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(1, size)
    return tuple(reversed(stride))


def why_not_flat(parameters: Sequence[nn.Parameter], others: Iterable[Tensor] = ()) -> str | None:
    """Say why parameters cannot share one buffer, or several on one device.

    Args:
        parameters: what is trained.
        others: more tensors of the model, such as frozen parameters, that must not lose
            memory they share with a trained one. May include `parameters`.

    Returns:
        A clause for a message; None if they can.

    Example:
        >>> why_not_flat([nn.Parameter(torch.zeros(2))])
        >>> tied = torch.zeros(4)
        >>> why_not_flat([nn.Parameter(tied[:3])], [tied])
        'a trained parameter shares its memory with another tensor of the model'
    """
    kinds = {type(p) for p in parameters} - {nn.Parameter}
    if kinds:
        return f"a trained parameter is a {kinds.pop().__name__}, not a plain tensor"
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        return f"the trained parameters are on {len(devices)} devices"
    if any(p.device.type == "meta" or p.layout != torch.strided for p in parameters):
        return "a trained parameter is sparse or has no memory yet"
    if not all(p.is_floating_point() for p in parameters):
        return "a trained parameter is not real floating point"
    if _memory_is_shared(parameters, others):
        return "a trained parameter shares its memory with another tensor of the model"
    return None


def _memory_is_shared(parameters: Sequence[nn.Parameter], others: Iterable[Tensor]) -> bool:
    trained = {id(p) for p in parameters}
    spans = [(*_span(p), True) for p in {id(p): p for p in parameters}.values()]
    if len(spans) < len(parameters):
        return True  # one parameter twice
    device = parameters[0].device
    spans += [(*_span(t), False) for t in others if id(t) not in trained and t.device == device]
    reach, reach_trained = -1, -1  # furthest byte so far: of any tensor, of a trained one
    for start, end, is_trained in sorted(s for s in spans if s[0] < s[1]):
        if start < (reach if is_trained else reach_trained):
            return True
        reach = max(reach, end)
        reach_trained = max(reach_trained, end) if is_trained else reach_trained
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one after the last."""
    if tensor.layout != torch.strided or not tensor.numel():
        return 0, 0
    furthest = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (furthest + 1) * tensor.element_size()


class FlatParameters:
    """Parameters of one dtype and device whose storage is one buffer.

    Attributes:
        parameters: in the order in which they lie.
        offsets: where each begins, in elements, and the total at the end.
        data: (n,) all values; every parameter is a view of it.
        keep_grad: whether the buffer of gradients stays from one update to the next.

    Example:
        >>> weight, bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(3))
        >>> flat = FlatParameters([weight, bias])
        >>> flat.data.shape, float(flat.data.sum())
        (torch.Size([512]), 6.0)
        >>> (weight.sum() + bias.sum()).backward()
        >>> float(flat.gather().sum()), weight.grad.shape
        (9.0, torch.Size([2, 3]))
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, keep_grad: bool = False) -> None:
        """Move the parameters' storage, in place; the parameters remain the same objects.

        Args:
            parameters: at least one; plain, dense, of one dtype and device.
            keep_grad: keep the buffer of gradients at its address, for CUDA graphs.

        Raises:
            AdapterError: they differ in dtype or device, share memory, or are no plain tensors.
        """
        self.parameters = tuple(parameters)
        self.keep_grad = keep_grad
        reason = why_not_flat(self.parameters)
        dtypes = {p.dtype for p in self.parameters}
        if reason is None and len(dtypes) != 1:
            reason = f"they have {len(dtypes)} dtypes"
        if reason is not None:
            raise AdapterError(
                f"these {len(self.parameters)} parameters cannot lie in one buffer: {reason}. Use "
                "one FlatParameters per dtype and device, or an optimizer that steps per tensor."
            )
        first = self.parameters[0]
        self.offsets = offsets_of(p.numel() for p in self.parameters)
        self._shapes = [p.shape for p in self.parameters]
        self._padded = self.offsets[-1] > sum(p.numel() for p in self.parameters)
        self.data = torch.zeros(self.offsets[-1], dtype=first.dtype, device=first.device)
        self._views = views_of(self.data, self._shapes, self.offsets)
        self._addresses = [view.data_ptr() for view in self._views]
        self._grad: Tensor | None = None
        self._grad_views: list[Tensor] = []
        self.missing: tuple[int, ...] = ()
        """Positions of the parameters that had no gradient when `gather` last ran."""
        self.reclaim()

    @torch.no_grad()
    def reclaim(self) -> None:
        """Take parameters back whose storage was replaced, with the values they have now.

        Raises:
            AdapterError: one was moved to another device, dtype or shape.
        """
        addresses = [p.data_ptr() for p in self.parameters]
        if addresses == self._addresses:
            return
        moved = [i for i, a in enumerate(addresses) if a != self._addresses[i]]
        for i in moved:
            new, old = self.parameters[i], self._views[i]
            if (new.dtype, new.device, new.shape) != (old.dtype, old.device, old.shape):
                raise AdapterError(
                    f"a trained parameter was {tuple(old.shape)} {old.dtype} on {old.device} when "
                    f"its optimizer was made and is {tuple(new.shape)} {new.dtype} on {new.device} "
                    "now. Move the model first, then make the optimizer."
                )
        sources = [self.parameters[i].detach() for i in moved]
        torch._foreach_copy_([self._views[i] for i in moved], sources)
        for i in moved:
            self.parameters[i].data = self._views[i]

    @torch.no_grad()
    def gather(self) -> Tensor | None:
        """Bring the gradients into one buffer; every `.grad` becomes a view of it.

        Calling it again costs nothing and loses nothing.

        Returns:
            (n,) in the parameters' dtype, zero where a parameter has no gradient and between
            them; None if none has one. `missing` tells which have none.
        """
        grads = [p.grad for p in self.parameters]
        self.missing = tuple(i for i, grad in enumerate(grads) if grad is None)
        if len(self.missing) == len(grads):
            return None
        reused = self._grad is not None
        flat, views = self._grad_buffer()
        new = [i for i, g in enumerate(grads) if g is not None and g is not views[i]]
        if reused and self._padded and len(new) + len(self.missing) == len(grads):
            flat.zero_()  # a norm that is not finite has left its mark between the parameters
        elif self.missing:
            torch._foreach_zero_([views[i] for i in self.missing])
        if new:
            arrived = [g for g, v in zip(grads, views, strict=True) if g is not None and g is not v]
            torch._foreach_copy_([views[i] for i in new], arrived)
            for i in new:
                self.parameters[i].grad = views[i]
        return flat

    @torch.no_grad()
    def open_grad(self, *, zero: bool = True) -> Tensor:
        """Make every `.grad` a view of one buffer before there are gradients.

        For steps that write gradients themselves: backward passes add to the views, and a
        captured CUDA graph finds the addresses it was captured with (`keep_grad`).

        Args:
            zero: fill it with zeros; False: what is in it are this update's gradients.

        Returns:
            (n,) the buffer.
        """
        flat, views = self._grad_buffer()
        if zero:
            flat.zero_()
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.grad = view
        return flat

    def release_grad(self) -> None:
        """Let go of the gradients' buffer: it is freed when the `.grad` views are."""
        if not self.keep_grad:
            self._grad, self._grad_views = None, []

    def _grad_buffer(self) -> tuple[Tensor, list[Tensor]]:
        if self._grad is None:
            make = torch.zeros_like if self._padded else torch.empty_like
            self._grad = make(self.data)
            self._grad_views = views_of(self._grad, self._shapes, self.offsets)
        return self._grad, self._grad_views
