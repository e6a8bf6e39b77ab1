"""The norm of all gradients, and scaling them down to it, without waiting for the GPU.

One reduction and one multiplication per buffer, instead of one norm per tensor. The sum
of squares is kept in float32 whatever the gradients' dtype, the factor stays on the
device, and multiplying by a factor of one is cheaper than asking whether to.

Truth: `torch.nn.utils.clip_grad_norm_`, whose formula this is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_kit.optim.flat import FlatParameters

_TINY = 1e-6
"""Added to the norm, as torch does: a norm of zero scales by nothing."""


def gradient_norm(flats: Sequence[FlatParameters]) -> Tensor:
    """Euclidean norm of the gradients of several buffers together.

    Args:
        flats: on one device; their gradients are gathered.

    Returns:
        () float32, 0 without any gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> (weight * weight / 2).sum().backward()
        >>> gradient_norm([FlatParameters([weight])])
        tensor(5.)
    """
    return _norm(_gathered(flats), flats)


def clip_gradients(flats: Sequence[FlatParameters], max_norm: float) -> Tensor:
    """Scale gradients in place so that their common norm is at most `max_norm`.

    Args:
        flats: on one device; their gradients are gathered.
        max_norm: above 0.

    Returns:
        () float32, the norm before.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> (weight * weight / 2).sum().backward()
        >>> clip_gradients([FlatParameters([weight])], 0.5)
        tensor(5.)
        >>> weight.grad
        tensor([0.3000, 0.4000])
    """
    gradients = _gathered(flats)
    norm = _norm(gradients, flats)
    factor = (max_norm / (norm + _TINY)).clamp_(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


def _gathered(flats: Sequence[FlatParameters]) -> list[Tensor]:
    return [gradient for flat in flats if (gradient := flat.gather()) is not None]


def _norm(gradients: Sequence[Tensor], flats: Sequence[FlatParameters]) -> Tensor:
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    if len(norms) == 1:
        return norms[0]
    if not norms:
        return torch.zeros((), device=flats[0].data.device if flats else None)
    return torch.linalg.vector_norm(torch.stack(norms))
