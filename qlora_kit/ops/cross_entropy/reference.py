"""`cross_entropy` in plain torch."""

import torch
from torch import Tensor

from qlora_kit.ops.layout import arithmetic_dtype


def logits_of(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Turn a head's output into logits.

    Args:
        raw: (..., V) floating point. Not modified.
        scale: factor.
        softcap: c in c·tanh(z/c), after the scale; or None.

    Returns:
        (..., V), at least float32, in memory of its own.

    Example:
        >>> logits_of(torch.tensor([0.0, 1e4]), 1.0, 30.0).tolist()
        [0.0, 30.0]
    """
    z = raw.to(arithmetic_dtype(raw), copy=True).mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def run(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    ignore_index: int | None,
    losses: Tensor,
    gradient: bool,
    factor: Tensor | None,
) -> None:
    """Losses of rows, and their gradient over the logits; see `op.cross_entropy_`.

    Args:
        logits: (M, V), overwritten if `gradient`.
        targets: (M,) int64.
        scale: factor on the logits.
        softcap: of the logits, or None.
        label_smoothing: share of the target spread over all classes.
        ignore_index: target of rows that do not count, or None.
        losses: (M,), written.
        gradient: replace the logits by it.
        factor: () float32 on the gradient, or None.

    Example:
        >>> logits, losses = torch.zeros(1, 2), torch.empty(1)
        >>> run(logits, torch.tensor([1]), 1.0, None, 0.0, None, losses, True, None)
        >>> logits.tolist()
        [[0.5, -0.5]]
    """
    v = logits.shape[1]
    z = logits_of(logits, scale, softcap)
    slope: Tensor | float = scale
    if softcap is not None and gradient:
        slope = (z / softcap).square_().neg_().add_(1).mul_(scale)
    log_p = torch.log_softmax(z, dim=-1)
    del z
    ignored = None if ignore_index is None else targets == ignore_index
    wanted = (targets if ignored is None else targets.masked_fill(ignored, 0)).unsqueeze(1)
    chosen = log_p.gather(1, wanted)
    found = chosen.squeeze(1) * (label_smoothing - 1.0)
    if label_smoothing:
        found = found - label_smoothing * log_p.mean(dim=1)
    losses.copy_(found if ignored is None else found.masked_fill(ignored, 0.0))
    if not gradient:
        return
    # p minus the target distribution; at the target, p - 1 is expm1(log p): exact near p = 1.
    p = log_p.exp_()
    if label_smoothing:
        p.sub_(label_smoothing / v)
    at_target = torch.expm1(chosen).add_(label_smoothing - label_smoothing / v)
    p.scatter_(1, wanted, at_target).mul_(slope)
    if factor is not None:
        p.mul_(factor)
    logits.copy_(p if ignored is None else p.masked_fill_(ignored.unsqueeze(1), 0.0))
