"""Twins of parameters and gradients for the tests of flat optimizers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = ((4, 64), (64, 4), (3, 5), (7,), (33, 9), (1,), (16, 320), (300,))
"""Odd sizes, one above the 4,096 elements from which bitsandbytes keeps state in 8 bits."""

_NO_KERNEL = ("view", "as_strided", "slice", "detach", "alias", "select", "unbind", "expand", "t")


def parameters(
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[nn.Parameter]:
    """Random parameters; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(tensor.to(device, dtype)) for tensor in made]


def give_gradients(params: list[nn.Parameter], step: int, skip: tuple[int, ...] = ()) -> None:
    """Set fresh `.grad`s as autograd leaves them, None for the positions in `skip`."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad = None if i in skip else gradient


def zero_grad(params: list[nn.Parameter]) -> None:
    """As `nn.Module.zero_grad`."""
    for p in params:
        p.grad = None


def train(
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: range = range(5),
    skip: Callable[[int], tuple[int, ...]] = lambda _: (),
) -> None:
    """Update with gradients that depend on the number of the step alone."""
    for step in steps:
        give_gradients(params, step, skip(step))
        optimizer.step()
        zero_grad(params)


def same_bits(left: list[nn.Parameter], right: list[nn.Parameter]) -> bool:
    """Whether all values agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def values(params: list[nn.Parameter]) -> list[Tensor]:
    """Copies."""
    return [p.detach().clone() for p in params]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func._schema.name.split("::")[1]
        if name not in _NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the ops that launch something, views left out."""
    counter = _Counter()
    with counter:
        yield counter.names
