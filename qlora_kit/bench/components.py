"""What holds the memory of a training step, by component, measured.

What stays from step to step is known exactly: the bytes of the tensors, each counted once.
What comes and goes within a step (saved activations, what is computed again, workspaces, a
chunk of logits) is the rest of the peak. Gradients count in full: the peak may come before
they are complete, but they and everything that stays exist together at every update, so the
rest is never negative from the second update on.

    trained    weights that are trained: adapters, or everything
    weights    frozen linears and norms
    scales     of quantized weights
    embeddings input embeddings and output head, frozen
    gradients, optimizer
    step       the rest of the peak
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.bench.subject import Subject
from qlora_kit.optim.create import flat_optimizer

RESIDENT = ("weights", "scales", "embeddings", "trained", "gradients", "optimizer")
"""Components that stay from step to step, in the order in which they are shown."""

REST = "step"
"""What comes and goes."""

_SCALES = ("absmax", "offset", "quant_map", "code")


def _bytes(tensors: Iterable[Tensor], device: str, seen: set[int]) -> int:
    """Bytes of the tensors on a device that were not seen before."""
    total = 0
    for tensor in tensors:
        if tensor.device.type != device or tensor.numel() == 0 or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        total += tensor.nbytes
    return total


def _quant_state(weight: Tensor) -> Iterator[Tensor]:
    """Scales that bitsandbytes hangs on a weight instead of registering them."""
    state: Any = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (v for v in (state.absmax, state.code, state.offset) if isinstance(v, Tensor))
        state = getattr(state, "state2", None)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """An optimizer's state; paged state is managed memory, which is the host's."""
    flat = flat_optimizer(optimizer)
    states = [s.values() for s in optimizer.state.values()]
    if flat is not None:
        states += [block.state.values() for block in flat.blocks]
    for values in states:
        for value in values:
            if isinstance(value, Tensor) and not getattr(value, "is_paged", False):
                yield value


def _embeddings(model: nn.Module) -> Iterator[Tensor]:
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if isinstance(module, nn.Module):
            yield from module.parameters()


def resident_bytes(subject: Subject, device: str) -> dict[str, int]:
    """Bytes that stay from step to step, by component.

    Args:
        subject: after at least one update, so that there is an optimizer's state.
        device: `cuda` or `cpu`; tensors elsewhere do not count.

    Returns:
        One entry per name in `RESIDENT`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False))
        >>> _ = model[0].requires_grad_(False)
        >>> trained = list(model[1].parameters())
        >>> found = resident_bytes(
        ...     Subject(model=model, loss=lambda batch: model(batch).sum(), parameters=trained,
        ...         optimizer=torch.optim.SGD(trained, lr=0.1)), "cpu")
        >>> found["weights"], found["trained"], found["gradients"], found["optimizer"]
        (128, 128, 128, 0)
    """
    seen: set[int] = set()
    named = [*subject.model.named_parameters(), *subject.model.named_buffers()]
    scales = [t for name, t in named if any(part in name.split(".")[-1] for part in _SCALES)]
    found = {
        "trained": _bytes(subject.parameters, device, seen),
        "embeddings": _bytes(_embeddings(subject.model), device, seen),
        "scales": _bytes(scales, device, seen),
    }
    hung = [state for _, t in named for state in _quant_state(t)]
    found["scales"] += _bytes(hung, device, seen)
    found["weights"] = _bytes((t for _, t in named), device, seen)
    found["optimizer"] = _bytes(_optimizer_tensors(subject.optimizer), device, seen)
    found["gradients"] = sum(p.nbytes for p in subject.parameters if p.device.type == device)
    return {name: found[name] for name in RESIDENT}


def components(resident: dict[str, int], peak_bytes: int | None) -> dict[str, int]:
    """Add what comes and goes.

    Args:
        resident: of `resident_bytes`.
        peak_bytes: most that was allocated; None where that is not known (a CPU).

    Returns:
        `resident`, and `step` where the peak is known.

    Example:
        >>> components({"weights": 10}, 25)
        {'weights': 10, 'step': 15}
    """
    if peak_bytes is None:
        return dict(resident)
    return {**resident, REST: max(0, peak_bytes - sum(resident.values()))}
