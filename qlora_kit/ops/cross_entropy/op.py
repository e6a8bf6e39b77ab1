"""`cross_entropy`: losses of rows of logits and, in place, the gradient of their sum.

    z = scale · raw, or c · tanh(scale · raw / c)        raw: what the head's product wrote
    loss = −(1 − s) · log p[target] − s · mean(log p)     p = softmax(z), s the label smoothing
    gradient = factor · (p − (1 − s) · [target] − s / V) · dz/draw

A head's logits are its largest tensor, so the gradient takes their place: they are read
(once, where a row fits on the processor) and written once. Arithmetic is float32, rounded
once at the end. Rows whose target is ignored give a loss and a gradient of zero: nothing
has to be removed, and shapes stay what they are.

Not differentiable by itself: the loss head calls it.
"""

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.cross_entropy import cuda, reference
from qlora_kit.ops.layout import arithmetic_dtype, check_rows, check_unrecorded

OP = "cross_entropy"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each row.

    Args:
        logits: (M, V) bfloat16, float16 or float32 (float64 in plain torch), as the head's
            product wrote them, any distance between rows. Not modified.
        targets: (M,) int64, classes. One that is neither a class nor `ignore_index` gives NaN
            on a GPU, and an error in plain torch.
        scale: factor on the logits, above zero.
        softcap: c in c·tanh(z/c), after the scale; above zero, or None.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        ignore_index: target of rows that do not count; None when all of them count.
        losses: (M,) contiguous float32 (float64 for float64), written; a new tensor if None.

    Returns:
        `losses`: each row's, zero where ignored.

    Raises:
        UserError: autograd records, and the logits require a gradient.
        ShapeError: shapes, dtypes, devices, strides or numbers do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), ignore_index=-100)
        tensor([1.3863, 0.0000])
    """
    losses = _prepare(logits, targets, scale, softcap, label_smoothing, losses, None)
    torch.ops.qlora_kit.cross_entropy.default(
        logits, targets, scale, softcap, label_smoothing, ignore_index, losses
    )
    return losses


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    factor: Tensor | None = None,
    losses: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each row; its gradient takes the place of the logits.

    Args:
        logits: (M, V), as in `cross_entropy`. Modified: the gradient of the sum of the losses
            in the head's product, times `factor`; zero in rows that are ignored.
        targets: (M,) int64.
        scale: factor on the logits, above zero.
        softcap: c in c·tanh(z/c), after the scale; above zero, or None.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        ignore_index: target of rows that do not count; None when all of them count.
        factor: () float32 (float64 for float64) on the gradient, read on the device; None
            for one.
        losses: as in `cross_entropy`.

    Returns:
        `losses`: each row's, zero where ignored; `factor` is not in them.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices, strides or numbers do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> logits = torch.zeros(1, 4)
        >>> losses = cross_entropy_(logits, torch.tensor([1]))
        >>> logits
        tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]])
    """
    losses = _prepare(logits, targets, scale, softcap, label_smoothing, losses, factor)
    torch.ops.qlora_kit.cross_entropy_.default(
        logits, targets, scale, softcap, label_smoothing, ignore_index, factor, losses
    )
    return losses


def _prepare(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    losses: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    """Refuse what does not fit; where the losses go."""
    check_unrecorded(OP, logits, losses, factor)
    check_rows(OP, "logits", logits, (2,))
    rows, wide, device = logits.shape[0], arithmetic_dtype(logits), logits.device
    if losses is None:
        losses = logits.new_empty(rows, dtype=wide)
    wanted: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("targets", targets, (rows,), torch.int64),
        ("losses", losses, (rows,), wide),
    ]
    if factor is not None:
        wanted.append(("factor", factor, (), wide))
    for name, tensor, shape, dtype in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise ShapeError(
                f"{OP} needs {name} of shape {shape} in {dtype} on {device}, got "
                f"{tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}."
            )
        if not tensor.is_contiguous():
            raise ShapeError(f"{OP} needs {name} contiguous. Call .contiguous() first.")
    if not (scale > 0 and (softcap is None or softcap > 0) and 0 <= label_smoothing < 1):
        raise ShapeError(
            f"{OP} needs a scale and a soft cap above zero and label smoothing in [0, 1), got "
            f"{scale}, {softcap} and {label_smoothing}."
        )
    return losses


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_OPTIONS = "Tensor targets, float scale, float? softcap, float label_smoothing, int? ignore_index"
_LIBRARY.define(f"cross_entropy(Tensor logits, {_OPTIONS}, Tensor(a!) losses) -> ()")
_LIBRARY.define(
    f"cross_entropy_(Tensor(a!) logits, {_OPTIONS}, Tensor? factor, Tensor(b!) losses) -> ()"
)


def _losses(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    ignore_index: int | None,
    losses: Tensor,
) -> None:
    options = (scale, softcap, label_smoothing, ignore_index)
    resolve(OP, logits).run(logits, targets, *options, losses, False, None)


def _losses_and_gradient(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    ignore_index: int | None,
    factor: Tensor | None,
    losses: Tensor,
) -> None:
    options = (scale, softcap, label_smoothing, ignore_index)
    resolve(OP, logits).run(logits, targets, *options, losses, True, factor)


# By hand, as docs/decisions/0005 says. Nothing is returned, so a fake has nothing to make.
_LIBRARY.impl("cross_entropy", _losses, "CompositeExplicitAutograd")
_LIBRARY.impl("cross_entropy_", _losses_and_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::cross_entropy")
def _(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    ignore_index: int | None,
    losses: Tensor,
) -> None:
    return None


@torch.library.register_fake("qlora_kit::cross_entropy_")
def _(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    ignore_index: int | None,
    factor: Tensor | None,
    losses: Tensor,
) -> None:
    return None
